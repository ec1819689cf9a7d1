// Norms, routing, embedding, dense products: everything between the products with quantized weights. As native/kernels/rows.h.
#include "common.cuh"

extern "C" __global__ void add(float* y, const float* x, i64 n) {
  after_previous_beside_next();
  const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) y[i] = y[i] + x[i];
}

extern "C" __global__ void copy_words(int* to, const int* from, i64 words) {
  after_previous();
  const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < words) to[i] = from[i];
}

// The same for a block of words that begins with their number, as i64.
extern "C" __global__ void copy_inputs(int* to, const int* from) {
  wait_for_previous();  // the next kernel starts when this one is done: what it copies can be read at any time
  const i64 words = *reinterpret_cast<const i64*>(from);
#pragma unroll 1
  for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < words; i += static_cast<i64>(gridDim.x) * blockDim.x)
    to[i] = from[i];
}

// y (rows, n) ← rms_norm of each row of x, to which a sum is added first; a block a row. Shared: 2·n floats.
extern "C" __global__ void rms_norm(float* x, const Sum sum, const float* weight, int n, float eps, float* y) {
  after_previous_beside_next();
  DYNAMIC_SHARED(memory);
  __shared__ float factor;
  float* row = reinterpret_cast<float*>(memory);
  float* weights = row + n;
#pragma unroll 1
  for (int c = threadIdx.x; c < n; c += blockDim.x) {
    row[c] = sum.add_to(x, blockIdx.x, n, c);
    weights[c] = weight[c];
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const float squares = sum_of_squares(row, n, threadIdx.x & 15);
    if (threadIdx.x == 0) factor = 1.0f / sqrtf(squares / static_cast<float>(n) + eps);
  }
  __syncthreads();
  for (int c = threadIdx.x; c < n; c += blockDim.x) y[static_cast<i64>(blockIdx.x) * n + c] = row[c] * factor * weights[c];
}

// y (count, n) ← rows `which` of x.
extern "C" __global__ void gather_rows(const float* x, const i64* which, int n, float* y) {
  after_previous_beside_next();
  for (int c = threadIdx.x; c < n; c += blockDim.x) y[static_cast<i64>(blockIdx.x) * n + c] = x[which[blockIdx.x] * n + c];
}

// Rows `which` of y ← x (count, n).
extern "C" __global__ void scatter_rows(const float* x, const i64* which, int n, float* y) {
  after_previous();
  for (int c = threadIdx.x; c < n; c += blockDim.x) y[which[blockIdx.x] * n + c] = x[static_cast<i64>(blockIdx.x) * n + c];
}

// y (tokens, cols) ← rows of a matrix as float32; a block a token. Quantized: fma(q, scale, bias).
extern "C" __global__ void embed(const u8* data, const u8* scales, const u8* biases, int cols, int bits, int group, int dtype, int codes,
                                 const i64* tokens, float* y) {
  after_previous_beside_next();
  const i64 row = tokens[blockIdx.x];
  float* to = y + static_cast<i64>(blockIdx.x) * cols;
  if (bits >= 16) {
    for (int c = threadIdx.x; c < cols; c += blockDim.x) to[c] = load_value(data, row * cols + c, dtype);
    return;
  }
  const int groups = cols / group, per_vector = 32 / bits;
  const i64 tile = row / 16, lane = row % 16;
  const u8* own = data + tile * (cols / per_vector) * 64 + lane * 4;
  const int zero = codes == kSymmetric ? 1 << (bits - 1) : codes == kE2M1 ? 12 : 0;
  for (int c = threadIdx.x; c < cols; c += blockDim.x) {
    const i64 at = (tile * groups + c / group) * 16 + lane;
    const int within = c % per_vector;
    const int code = (own[static_cast<i64>(c / per_vector) * 64 + within % 4] >> (within / 4 * bits)) & ((1 << bits) - 1);
    const int magnitude = code & 7, doubled = magnitude < 5 ? magnitude : magnitude == 5 ? 6 : magnitude == 6 ? 8 : 12;
    const float scale = codes == kE2M1 ? 0.5f * load_value(scales, at, kE8M0) : load_value(scales, at, dtype);
    const float bias = codes == kAffine ? load_value(biases, at, dtype) : -static_cast<float>(zero) * scale;
    const int q = codes != kE2M1 ? code : code & 8 ? 12 - doubled : 12 + doubled;
    to[c] = fmaf(static_cast<float>(q), scale, bias);
  }
}

// A row of a dense matrix by kTokens tokens: 16 lanes, as f_sum adds them; called by half-warps. token(t, c): value c of a token.
template <int kTokens, int kDtype, class Token>
__device__ __forceinline__ void multiply_row(const u8* row, int cols, Token token, float* sums) {
  constexpr int kSteps = 16;  // of 16 columns, on their way at once
#pragma unroll
  for (int t = 0; t < kTokens; ++t) sums[t] = 0.0f;
  for (int c0 = threadIdx.x & 15; c0 < cols; c0 += 16 * kSteps) {
    float w[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) w[i] = c0 + 16 * i < cols ? load_value(row, c0 + 16 * i, kDtype) : 0.0f;
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      if (c0 + 16 * i < cols)
#pragma unroll
        for (int t = 0; t < kTokens; ++t) sums[t] = fmaf(w[i], token(t, c0 + 16 * i), sums[t]);
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) sums[t] = lane_sum(sums[t]);
}
template <int kTokens, class Token>
__device__ __forceinline__ void multiply_row_of(int dtype, const u8* row, int cols, Token token, float* sums) {
  if (dtype == kBF16)
    multiply_row<kTokens, kBF16>(row, cols, token, sums);
  else if (dtype == kF16)
    multiply_row<kTokens, kF16>(row, cols, token, sums);
  else
    multiply_row<kTokens, kF32>(row, cols, token, sums);
}

// Some dense matrices by few tokens, four rows a block of 128 threads; grid (4·tiles, tokens). Rows pass through shared memory, so that all threads
// read them and few lines of code add them up. y: the results one after another, each (tokens, rows).
extern "C" __global__ void __launch_bounds__(128) dense_few(const Places matrices, int count, int dtype, int cols, const float* x, i64 tokens,
                                                            float* y) {
  constexpr int kColumns = 2048, kRowBytes = 4 * kColumns + 32;
  __shared__ __align__(16) u8 ws[4][kRowBytes];
  __shared__ float xs[kColumns];
  const Place w = matrices.of_tile(blockIdx.x / 4, count);
  const int size = value_bytes(dtype), lane = threadIdx.x & 15, own = threadIdx.x / 16 & 3;
  const i64 row0 = (static_cast<i64>(blockIdx.x / 4) - w.first_tile) * 16 + blockIdx.x % 4 * 4;
  if (row0 >= w.rows) return;
  const bool aligned = cols * size % 16 == 0;
  auto fetch = [&](int c0, int n) {
#pragma unroll 1
    for (int r = 0; r < 4 && row0 + r < w.rows; ++r) {
      const u8* from = w.data + ((row0 + r) * cols + c0) * size;
      if (aligned) {
#pragma unroll 4
        for (int i = threadIdx.x * 16; i < n * size; i += 128 * 16) *reinterpret_cast<uint4*>(ws[r] + i) = load_once(from + i);
      } else {
#pragma unroll 1
        for (int i = threadIdx.x * size; i < n * size; i += 128 * size)
#pragma unroll 1
          for (int j = 0; j < size; ++j) ws[r][i + j] = from[i + j];
      }
    }
  };
  float sum = 0.0f;
  for (int c0 = 0; c0 < cols; c0 += kColumns) {
    const int n = cols - c0 < kColumns ? cols - c0 : kColumns;
    fetch(c0, n);
    if (c0 == 0) after_previous_beside_next();
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += 128) xs[i] = x[static_cast<i64>(blockIdx.y) * cols + c0 + i];
    __syncthreads();
    if (threadIdx.x < 64) {
      const u8* row = ws[own];
      if (dtype == kF32) {
#pragma unroll 8
        for (int c = lane; c < n; c += 16) sum = fmaf(load_value(row, c, kF32), xs[c], sum);
      } else if (dtype == kBF16) {
#pragma unroll 8
        for (int c = lane; c < n; c += 16) sum = fmaf(load_value(row, c, kBF16), xs[c], sum);
      } else {
#pragma unroll 1
        for (int c = lane; c < n; c += 16) sum = fmaf(load_value(row, c, kF16), xs[c], sum);
      }
    }
    __syncthreads();
  }
  sum = lane_sum(sum);
  const i64 row = row0 + own;
  if (threadIdx.x >= 64 || lane != 0 || row >= w.rows) return;
  y[w.first_row * tokens + blockIdx.y * w.rows + row] = w.row_bias ? fmaf(1.0f, w.row_bias[row], sum) : sum;
}

// The same for many, 16 rows and four tokens a block of 256 threads; grid (tiles, blocks of tokens). Shared: the tokens.
extern "C" __global__ void __launch_bounds__(256) dense_many(const Places matrices, int count, int dtype, int cols, const float* x, i64 tokens,
                                                             float* y) {
  DYNAMIC_SHARED(memory);
  constexpr int kTokens = 4;
  const Place w = matrices.of_tile(blockIdx.x, count);
  const i64 row = (static_cast<i64>(blockIdx.x) - w.first_tile) * 16 + threadIdx.x / 16, first = static_cast<i64>(blockIdx.y) * kTokens;
  const int here = static_cast<int>(tokens - first < kTokens ? tokens - first : kTokens);
  float* xs = reinterpret_cast<float*>(memory);
  after_previous();
  for (int i = threadIdx.x; i < here * cols; i += 256) xs[i] = x[first * cols + i];
  for (int i = here * cols + threadIdx.x; i < kTokens * cols; i += 256) xs[i] = 0.0f;
  __syncthreads();
  float sums[kTokens];
  multiply_row_of<kTokens>(dtype, w.data + (row < w.rows ? row : 0) * cols * value_bytes(dtype), cols,
                           [xs, cols](int t, int c) { return xs[t * cols + c]; }, sums);
  if ((threadIdx.x & 15) != 0 || row >= w.rows) return;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (t >= here) break;
    y[w.first_row * tokens + (first + t) * w.rows + row] = w.row_bias ? fmaf(1.0f, w.row_bias[row], sums[t]) : sums[t];
  }
}

// y (pairs, rows) ← the dense matrix of pair_expert[p] by its pair_token's x, or by row p; as multiply_pairs in products.cu. Grid (rows / 16,
// pairs).
extern "C" __global__ void dense_pairs(const u64* parts, int stride, int first, int biased, const i64* pair_expert, const int* pair_token,
                                       int dtype, int rows, int cols, const float* x, float* y) {
  after_previous();
  const int pair = blockIdx.y, row = blockIdx.x * 16 + threadIdx.x / 16;
  if (pair_expert[pair] < 0) return;  // the host's
  const u64* at = parts + pair_expert[pair] * stride + first;
  const u8* data = reinterpret_cast<const u8*>(at[0]);
  if (!data) return;  // not here yet
  const float* row_bias = biased ? reinterpret_cast<const float*>(at[1]) : nullptr;
  const float* xs = x + (pair_token ? pair_token[pair] : static_cast<i64>(pair)) * cols;
  float sum[1];
  multiply_row_of<1>(dtype, data + static_cast<i64>(row < rows ? row : 0) * cols * value_bytes(dtype), cols,
                     [xs](int, int c) { return xs[c]; }, sum);
  if ((threadIdx.x & 15) != 0 || row >= rows) return;
  y[static_cast<i64>(pair) * rows + row] = row_bias ? fmaf(1.0f, row_bias[row], sum[0]) : sum[0];
}

// gate ← act(gate, up), n values.
extern "C" __global__ void activate_dense(float* gate, const float* up, i64 n, float alpha, float limit) {
  after_previous();
  const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) gate[i] = activate(gate[i], up[i], alpha, limit);
}

// y (tokens, n) ← sigmoid(factor of the token)·x; grid (n / blockDim.x, tokens).
extern "C" __global__ void scale_by_sigmoid(float* y, const float* x, const float* factor, int n) {
  after_previous_beside_next();
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= n) return;
  const i64 at = static_cast<i64>(blockIdx.y) * n + c;
  y[at] = sigmoid(factor[blockIdx.y]) * x[at];
}

// acc (tokens, n) += Σ weights[p]·y[p] over each token's pairs, ascending: pairs of token t are `pairs`[start[t]] to `pairs`[start[t + 1] − 1].
// by_place: weights are in the order of `pairs` instead.
extern "C" __global__ void accumulate(float* acc, const float* y, const int* start, const int* pairs, const float* weights, int by_place,
                                      int n) {
  after_previous_beside_next();
  const int token = blockIdx.y, c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= n) return;
  float total = acc[static_cast<i64>(token) * n + c];
  for (int i = start[token]; i < start[token + 1]; ++i) {
    const int p = pairs[i];
    total = fmaf(weights[by_place ? i : p], y[static_cast<i64>(p) * n + c], total);
  }
  acc[static_cast<i64>(token) * n + c] = total;
}

// acc (tokens, n) ← a sum.
extern "C" __global__ void combine(float* acc, const Sum sum, int n) {
  after_previous_beside_next();
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c < n) acc[static_cast<i64>(blockIdx.y) * n + c] = sum.of(blockIdx.y, n, c);
}

// Groups pairs by expert, each expert's in order, in three steps. selected (pairs): experts. A block an expert, 256 threads, each with a run
// of pairs.
__device__ __forceinline__ i64 run_of(i64 pairs, int thread) { return pairs * thread / 256; }

// counts[e] ← pairs of expert e.
extern "C" __global__ void count_pairs(const i64* selected, i64 pairs, int* counts) {
  after_previous();
  __shared__ int of_warp[8];
  int own = 0;
  for (i64 p = run_of(pairs, threadIdx.x); p < run_of(pairs, threadIdx.x + 1); ++p) own += selected[p] == blockIdx.x ? 1 : 0;
  own = warp_sum(own);
  if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x >> 5] = own;
  __syncthreads();
  if (threadIdx.x != 0) return;
  int sum = 0;
  for (int w = 0; w < 8; ++w) sum += of_warp[w];
  counts[blockIdx.x] = sum;
}

// starts (experts + 1): each expert's first pair. tasks (capacity, 3): (expert, first pair, pairs) of blocks of at most `block` pairs; those
// that are not needed have no pairs. One block, one thread an expert or more.
extern "C" __global__ void plan_pairs(const int* counts, int experts, int block, int capacity, int* starts, int* tasks) {
  after_previous();
  DYNAMIC_SHARED(memory);
  int* first = reinterpret_cast<int*>(memory);  // (experts + 1): pairs
  int* task = first + experts + 1;              // (experts + 1): tasks
  for (int e = threadIdx.x; e < experts; e += blockDim.x) first[e + 1] = counts[e];
  __syncthreads();
  if (threadIdx.x == 0) {
    int pairs = 0, blocks = 0;
    for (int e = 0; e < experts; ++e) {
      const int own = first[e + 1];
      first[e] = pairs;
      task[e] = blocks;
      pairs += own;
      blocks += (own + block - 1) / block;
    }
    first[experts] = pairs;
    task[experts] = blocks;
  }
  __syncthreads();
  for (int e = threadIdx.x; e <= experts; e += blockDim.x) starts[e] = first[e];
  for (int e = threadIdx.x; e < experts; e += blockDim.x)
    for (int t = task[e]; t < task[e + 1]; ++t) {
      const int begin = first[e] + (t - task[e]) * block, left = first[e + 1] - begin;
      tasks[3 * t] = e;
      tasks[3 * t + 1] = begin;
      tasks[3 * t + 2] = left < block ? left : block;
    }
  for (int t = task[experts] + threadIdx.x; t < capacity; t += blockDim.x) tasks[3 * t] = tasks[3 * t + 1] = tasks[3 * t + 2] = 0;
}

// place[p] ← where pair p stands among the grouped ones; token and expert of that place.
extern "C" __global__ void place_pairs(const i64* selected, i64 pairs, int top_k, const int* starts, int* place, int* token, i64* expert) {
  after_previous();
  __shared__ int before[256];
  int own = 0;
  for (i64 p = run_of(pairs, threadIdx.x); p < run_of(pairs, threadIdx.x + 1); ++p) own += selected[p] == blockIdx.x ? 1 : 0;
  before[threadIdx.x] = own;
  __syncthreads();
  if (threadIdx.x == 0) {
    int sum = starts[blockIdx.x];
    for (int t = 0; t < 256; ++t) {
      const int here = before[t];
      before[t] = sum;
      sum += here;
    }
  }
  __syncthreads();
  int at = before[threadIdx.x];
  for (i64 p = run_of(pairs, threadIdx.x); p < run_of(pairs, threadIdx.x + 1); ++p)
    if (selected[p] == blockIdx.x) {
      place[p] = at;
      expert[at] = blockIdx.x;
      token[at++] = static_cast<int>(p / top_k);
    }
}

// The softmax of each token's logits (experts), the top_k largest, experts ascending, the lower one of equals first; a warp a token. Shared:
// `experts` words, and 2·top_k words.
extern "C" __global__ void __launch_bounds__(32) route(const float* logits, int experts, int top_k, int renormalize, float* weights,
                                                       i64* selected) {
  after_previous_beside_next();
  DYNAMIC_SHARED(memory);
  float* probs = reinterpret_cast<float*>(memory);
  u32* keys = reinterpret_cast<u32*>(memory);  // the same: a probability's bits plus one, 0 once it was selected
  float* ranked = probs + experts;
  int* found = reinterpret_cast<int*>(ranked + top_k);
  const float* own = logits + static_cast<i64>(blockIdx.x) * experts;
  const int lane = threadIdx.x;
  float largest = own[0];
#pragma unroll 8
  for (int e = lane; e < experts; e += 32) {
    probs[e] = own[e];
    largest = larger(own[e], largest);
  }
  largest = warp_max(largest);
#pragma unroll 4
  for (int e = lane; e < experts; e += 32) probs[e] = exp_f32(probs[e] - largest);
  __syncwarp();
  float whole = 0.0f;
#pragma unroll 16
  for (int e = lane & 15; e < experts; e += 16) whole = whole + probs[e];
  whole = lane_sum(whole);
  __syncwarp();
#pragma unroll 4
  for (int e = lane; e < experts; e += 32) keys[e] = __float_as_uint(probs[e] / whole) + 1u;
  float sum = 0.0f;
#pragma unroll 1
  for (int i = 0; i < top_k; ++i) {
    u32 most = 0u;
    int first = experts;
#pragma unroll 8
    for (int e = lane; e < experts; e += 32)
      if (keys[e] > most) {
        most = keys[e];
        first = e;
      }
    const u32 of_all = warp_max_word(most);
    const int chosen = static_cast<int>(~warp_max_word(most == of_all ? ~static_cast<u32>(first) : 0u));
    const float p = __uint_as_float(of_all - 1u);
    sum = sum + p;
    if (lane == chosen % 32) {
      keys[chosen] = 0u;
      ranked[i] = p;
      found[i] = chosen;
    }
  }
  if (!renormalize) sum = 1.0f;
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i < top_k; i += 32) {
    int place = 0;
#pragma unroll 1
    for (int other = 0; other < top_k; ++other) place += found[other] < found[i] ? 1 : 0;
    const i64 at = static_cast<i64>(blockIdx.x) * top_k + place;
    weights[at] = ranked[i] / sum;
    selected[at] = found[i];
  }
}
