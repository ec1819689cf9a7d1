// Grouped-query attention over a cache of keys and values: compiled with HEAD_DIM and KV_DTYPE (as in common.cuh). The order of sums is
// that of Engine::attention and attend_segment in native: segments of 1,024 positions, blocks of 64 keys inside them.
#include "common.cuh"

constexpr int kDim = HEAD_DIM;
constexpr int kSegment = 1024, kKeys = 64;
constexpr int kRowBytes = KV_DTYPE == kF32 ? 4 * kDim : KV_DTYPE == kBF16 ? 2 * kDim : kDim + 4;

// One sequence of a batch: rows [begin, begin + count) are its tokens from `position` on. Row 0 of keys and values is position `first`.
struct Sequence {
  u8* keys;
  u8* values;
  i64 capacity, first, position;
  i64 begin, count;
};

__device__ __forceinline__ void store_row(u8* to, const float* x, int lane) {  // a warp a row
  if (KV_DTYPE == kBF16) {
    for (int c = lane; c < kDim; c += 32) reinterpret_cast<u16*>(to)[c] = to_bf16(x[c]);
  } else if (KV_DTYPE == kF32) {
    for (int c = lane; c < kDim; c += 32) reinterpret_cast<float*>(to)[c] = x[c];
  } else {
    float most = 0.0f;
    for (int c = lane; c < kDim; c += 32) most = larger(fabsf(x[c]), most);
    most = warp_max(most);
    const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
    for (int c = lane; c < kDim; c += 32) to[c] = static_cast<u8>(static_cast<signed char>(rintf(x[c] * inverse)));
    if (lane == 0) {
      const u32 step = __float_as_uint(most / 127.0f);
      for (int i = 0; i < 4; ++i) to[kDim + i] = static_cast<u8>(step >> (8 * i));
    }
  }
}

__device__ __forceinline__ float row_scale(const u8* row) {
  const u8* p = row + kDim;
  return __uint_as_float(p[0] | static_cast<u32>(p[1]) << 8 | static_cast<u32>(p[2]) << 16 | static_cast<u32>(p[3]) << 24);
}

// Norms and rotates queries and keys, scales queries, and stores keys and values in the cache; grid (rows, heads + kv_heads), a warp each.
extern "C" __global__ void prepare_heads(const float* q_in, const float* k_in, const float* v_in, const float* cos, const float* sin,
                                         int half, const float* q_norm, const float* k_norm, float eps, float scale, int heads, int kv_heads,
                                         int gated, const Sequence* sequences, int count, i64 first_row, float* q) {
  after_previous();
  __shared__ float x[kDim];
  const i64 row = first_row + blockIdx.x;
  const int lane = threadIdx.x, head = blockIdx.y;
  const bool is_query = head < heads;
  const int kv_head = head - heads;
  const float* from = is_query ? q_in + (row * heads + head) * (gated ? 2 * kDim : kDim) : k_in + (row * kv_heads + kv_head) * kDim;
  const float* norm = is_query ? q_norm : k_norm;
  float factor = 1.0f;
  if (norm) factor = 1.0f / sqrtf(sum_of_squares(from, kDim, lane & 15) / static_cast<float>(kDim) + eps);
  for (int c = lane; c < kDim; c += 32) x[c] = norm ? from[c] * factor * norm[c] : from[c];
  __syncthreads();
  for (int c = lane; c < half; c += 32) {
    const float x1 = x[c], x2 = x[half + c], co = cos[row * half + c], si = sin[row * half + c];
    x[c] = fmaf(x1, co, 0.0f - x2 * si);
    x[half + c] = fmaf(x2, co, x1 * si);
  }
  __syncthreads();
  if (is_query) {
    for (int c = lane; c < kDim; c += 32) q[(row * heads + head) * kDim + c] = scale * x[c];
    return;
  }
  int s = 0;
  while (s + 1 < count && row >= sequences[s + 1].begin) ++s;
  const Sequence own = sequences[s];
  const i64 at = (kv_head * own.capacity + own.position - own.first + (row - own.begin)) * kRowBytes;
  store_row(own.keys + at, x, lane);
  store_row(own.values + at, v_in + (row * kv_heads + kv_head) * kDim, lane);
}

// Rows are query heads of one KV head, of one or several tokens of a sequence: a block has kRows of them. `blocks` gives (sequence, first
// token) of each block of rows; `slab` is its row in the scratch memory. Positions count from the segment that a sequence's first token sees.
constexpr int kPart = 32;  // of the inner dimension, in shared memory at a time

template <int kRows>
struct RowBlock {
  Sequence own;
  i64 first_token, base, end;  // positions [base, end) are seen by some row
  int tokens, heads, per_kv, kv_head, head0, here, rows;

  // blockIdx.x: the block of rows; blockIdx.y: the KV head, and which of its heads if they are more than kRows.
  __device__ __forceinline__ RowBlock(const Sequence* sequences, const int* blocks, int heads_, int kv_heads, int window) {
    heads = heads_;
    per_kv = heads / kv_heads;
    kv_head = blockIdx.y % kv_heads;
    head0 = blockIdx.y / kv_heads * kRows;
    own = sequences[blocks[2 * blockIdx.x]];
    first_token = blocks[2 * blockIdx.x + 1];
    const i64 together = kRows / per_kv > 1 ? kRows / per_kv : 1, left = own.count - first_token;
    tokens = static_cast<int>(left < together ? left : together);
    here = per_kv - head0 < kRows ? per_kv - head0 : kRows;
    rows = tokens * here;
    const i64 oldest = window && own.position + 1 > window ? own.position + 1 - window : 0;
    base = oldest / kSegment * kSegment;
    end = own.position + first_token + tokens;
  }
  __device__ __forceinline__ i64 token(int r) const { return first_token + r / here; }
  __device__ __forceinline__ i64 row(int r) const { return (own.begin + token(r)) * heads + kv_head * per_kv + head0 + r % here; }
  // The first position that the block's first token sees, in whole blocks of keys.
  __device__ __forceinline__ i64 first(int window) const {
    const i64 from = own.position + first_token + 1 - window;
    return window && from > 0 ? from / kKeys * kKeys : 0;
  }
};

// scores[row − first_row·heads][position − base] ← q·k, summed over the dimensions in ascending order; grid (blocks, kv heads, key blocks).
template <int kRows>
__device__ __forceinline__ void score_keys(const float* q, const Sequence* sequences, const int* blocks, int heads, int kv_heads, int window,
                                           i64 first_row, i64 width, float* scores) {
  constexpr int kOwn = kRows / 16, kStride = kPart + 4;
  __shared__ __align__(16) float qs[kRows][kStride];
  __shared__ __align__(16) float ks[kKeys][kStride];
  const RowBlock<kRows> b(sequences, blocks, heads, kv_heads, window);
  const i64 p0 = b.base + static_cast<i64>(blockIdx.z) * kKeys;
  if (p0 >= b.end || p0 + kKeys <= b.first(window)) return;
  const int n = static_cast<int>(b.end - p0 < kKeys ? b.end - p0 : kKeys), thread = threadIdx.x;
  const u8* keys = b.own.keys + (b.kv_head * b.own.capacity - b.own.first + p0) * kRowBytes;
  const int r0 = thread / 16 * kOwn, k0 = thread % 16;  // rows r0 …, keys k0, k0 + 16, …
  float sum[kOwn][4];
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[i][j] = 0.0f;
  for (int c0 = 0; c0 < kDim; c0 += kPart) {
    __syncthreads();
    for (int i = thread; i < kRows * kPart; i += 256) {
      const int r = i / kPart, c = i % kPart;
      qs[r][c] = r < b.rows && c0 + c < kDim ? q[b.row(r) * kDim + c0 + c] : 0.0f;
    }
#pragma unroll
    for (int i = thread; i < kKeys * kPart; i += 256) {
      const int p = i / kPart, c = i % kPart;
      ks[p][c] = p < n && c0 + c < kDim ? load_value(keys + static_cast<i64>(p) * kRowBytes, c0 + c, KV_DTYPE) : 0.0f;
    }
    __syncthreads();
    if (kDim - c0 >= kPart) {
#pragma unroll
      for (int c = 0; c < kPart; c += 4) {
        float4 k[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) k[j] = *reinterpret_cast<const float4*>(&ks[k0 + 16 * j][c]);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const float4 x = *reinterpret_cast<const float4*>(&qs[r0 + i][c]);
#pragma unroll
          for (int j = 0; j < 4; ++j)
            sum[i][j] = fmaf(x.w, k[j].w, fmaf(x.z, k[j].z, fmaf(x.y, k[j].y, fmaf(x.x, k[j].x, sum[i][j]))));
        }
      }
    } else {
      for (int c = 0; c < kDim - c0; ++c)
#pragma unroll
        for (int i = 0; i < kOwn; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(qs[r0 + i][c], ks[k0 + 16 * j][c], sum[i][j]);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int p = k0 + 16 * j;
    if (p >= n) continue;
    const float by = KV_DTYPE == kI8 ? row_scale(keys + static_cast<i64>(p) * kRowBytes) : 1.0f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (r0 + i < b.rows) {
        const float s = KV_DTYPE == kI8 ? sum[i][j] * by : sum[i][j];
        scores[(b.row(r0 + i) - first_row * heads) * width + (p0 - b.base) + p] = s;
      }
  }
}
// The same for few rows: a block has 16 rows and 16 keys, a thread one of each; grid (blocks, kv heads, sixteens of keys).
extern "C" __global__ void __launch_bounds__(256) scores_few(const float* q, const Sequence* sequences, const int* blocks, int heads,
                                                             int kv_heads, int window, i64 first_row, i64 width, float* scores) {
  after_previous();
  constexpr int kWide = kDim < 256 ? (kDim + 3) / 4 * 4 : 256, kStride = kWide + 4;  // of the dimensions, in shared memory at a time
  __shared__ __align__(16) float qs[16][kStride];
  __shared__ __align__(16) float ks[16][kStride];
  const RowBlock<16> b(sequences, blocks, heads, kv_heads, window);
  const i64 p0 = b.base + static_cast<i64>(blockIdx.z) * 16;
  if (p0 >= b.end || p0 + 16 <= b.first(window)) return;
  const int n = static_cast<int>(b.end - p0 < 16 ? b.end - p0 : 16), thread = threadIdx.x, r = thread / 16, p = thread % 16;
  const u8* keys = b.own.keys + (b.kv_head * b.own.capacity - b.own.first + p0) * kRowBytes;
  float sum = 0.0f;
  for (int c0 = 0; c0 < kDim; c0 += kWide) {
    const int wide = kDim - c0 < kWide ? kDim - c0 : kWide;
    __syncthreads();
    for (int c = thread; c < wide; c += 256)
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        qs[i][c] = i < b.rows ? q[b.row(i) * kDim + c0 + c] : 0.0f;
        ks[i][c] = i < n ? load_value(keys + static_cast<i64>(i) * kRowBytes, c0 + c, KV_DTYPE) : 0.0f;
      }
    __syncthreads();
    int c = 0;
#pragma unroll 8
    for (; c + 4 <= wide; c += 4) {
      const float4 x = *reinterpret_cast<const float4*>(&qs[r][c]), k = *reinterpret_cast<const float4*>(&ks[p][c]);
      sum = fmaf(x.w, k.w, fmaf(x.z, k.z, fmaf(x.y, k.y, fmaf(x.x, k.x, sum))));
    }
    for (; c < wide; ++c) sum = fmaf(qs[r][c], ks[p][c], sum);
  }
  if (p >= n || r >= b.rows) return;
  if (KV_DTYPE == kI8) sum = sum * row_scale(keys + static_cast<i64>(p) * kRowBytes);
  scores[(b.row(r) - first_row * heads) * width + (p0 - b.base) + p] = sum;
}
extern "C" __global__ void __launch_bounds__(256) scores_many(const float* q, const Sequence* sequences, const int* blocks, int heads,
                                                              int kv_heads, int window, i64 first_row, i64 width, float* scores) {
  after_previous();
  score_keys<64>(q, sequences, blocks, heads, kv_heads, window, first_row, width, scores);
}

// The softmax of one segment of a row: 64 keys after 64 keys, each time rescaled to the new largest score, which `keep` (rows, key blocks)
// tells. ends (rows, segments, 2): the largest score and the sum. Scores become weights, 0 for what is not seen. Half a warp a row, grid
// (rows, segments, …): eight warps have 16 rows of heads. together: tokens of a block of rows in `weigh`, whose last key blocks are needed.
extern "C" __global__ void soften(const Sequence* sequences, int count, int heads, int kv_heads, int window, i64 first_row, i64 rows,
                                  int together, i64 width, int segments, float* scores, float* keep, float* ends) {
  after_previous();
  const i64 at = static_cast<i64>(blockIdx.x) * (blockDim.x / 16) + threadIdx.x / 16;  // row·heads + head, in the slab
  const int lane = threadIdx.x & 15, segment = blockIdx.y;
  const bool works = at < rows * heads;
  const i64 row = first_row + (works ? at : 0) / heads;
  const int kv_head = static_cast<int>((works ? at : 0) % heads) / (heads / kv_heads);
  int s = 0;
  while (s + 1 < count && row >= sequences[s + 1].begin) ++s;
  const Sequence own = sequences[s];
  const i64 token = row - own.begin, visible = own.position + token + 1;
  const i64 oldest = window && own.position + 1 > window ? own.position + 1 - window : 0, base = oldest / kSegment * kSegment;
  const i64 last = token / together * together + together, end = own.position + (last < own.count ? last : own.count);
  const i64 start = base + static_cast<i64>(segment) * kSegment;
  float largest = -1e30f, sum = 0.0f, ahead[4];
  auto load_ahead = [&](i64 p0) {  // the next scores, on their way while the present ones are processed
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const i64 p = p0 + lane + 16 * j;
      ahead[j] = works && p < visible && p < end ? scores[at * width + (p - base)] : -1e30f;
    }
  };
  load_ahead(start);
  for (int b = 0; b < kSegment / kKeys; ++b) {
    const i64 p0 = start + b * kKeys;
    if (__all_sync(kWarp, p0 >= end)) break;  // both halves of a warp go on together
    const bool inside = works && p0 < end;
    const int n = static_cast<int>(end - p0 < kKeys ? end - p0 : kKeys);
    const int seen = static_cast<int>(visible - p0 < 0 ? 0 : visible - p0 < n ? visible - p0 : n);
    const i64 from = visible - window - p0;
    const int unseen = window == 0 || from < 0 ? 0 : from < seen ? static_cast<int>(from) : seen;
    float* own_scores = scores + (works ? at : 0) * width + (p0 - base);
    float v[4];
    float most = largest;
    if (unseen == 0) {
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = ahead[j];
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = inside && unseen + lane + 16 * j < seen ? own_scores[unseen + lane + 16 * j] : -1e30f;
    }
    if (b + 1 < kSegment / kKeys) load_ahead(p0 + kKeys);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (inside && unseen + lane + 16 * j < seen) most = larger(v[j], most);
#pragma unroll
    for (int step = 8; step; step /= 2) most = larger(most, __shfl_xor_sync(kWarp, most, step));
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int p = unseen + lane + 16 * j;
      if (!inside || p >= seen) continue;
      v[j] = exp_f32(v[j] - most);
      total = total + v[j];
    }
    total = lane_sum(total);
    if (!inside) continue;
    float kept = 1.0f;
    if (most > largest) {
      kept = exp_f32(largest - most);
      sum = sum * kept;
      largest = most;
    }
    sum = sum + total;
    if (lane == 0) keep[at * (width / kKeys) + (p0 - base) / kKeys] = kept;
    const u8* value_row = own.values + (kv_head * own.capacity - own.first + p0) * kRowBytes;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int p = unseen + lane + 16 * j;
      if (p < seen) own_scores[p] = KV_DTYPE == kI8 ? v[j] * row_scale(value_row + static_cast<i64>(p) * kRowBytes) : v[j];
      const int q = lane + 16 * j;
      if (q < n && (q < unseen || q >= seen)) own_scores[q] = 0.0f;
    }
  }
  if (works && lane == 0) {
    ends[(at * segments + segment) * 2] = largest;
    ends[(at * segments + segment) * 2 + 1] = sum;
  }
}

// sums[row][segment] (kDim) ← the weighted values of one segment, keys in ascending order; grid (blocks, kv heads,
// segments · columns).
template <int kRows, int kColumns>
__device__ __forceinline__ void weigh(const Sequence* sequences, const int* blocks, int heads, int kv_heads, int window, i64 first_row,
                                      i64 width, int segments, const float* scores, const float* keep, float* sums) {
  constexpr int kOwn = kRows / 16, kThreads = 4 * kColumns;  // a thread has kOwn rows and 4 columns
  constexpr int kValues = kKeys * kColumns / kThreads, kWeights = kRows * kKeys / kThreads;
  __shared__ __align__(16) float vs[kKeys][kColumns];
  __shared__ __align__(16) float ws[kRows][kKeys + 4];
  __shared__ float kept[kRows];
  __shared__ i64 score_row[kRows];
  const int column0 = blockIdx.z / segments * kColumns, segment = blockIdx.z % segments;
  const RowBlock<kRows> b(sequences, blocks, heads, kv_heads, window);
  const i64 start = b.base + static_cast<i64>(segment) * kSegment, first = b.first(window);
  const i64 end = start + kSegment < b.end ? start + kSegment : b.end;
  const int thread = threadIdx.x, r0 = thread / (kColumns / 4) * kOwn, c0 = thread % (kColumns / 4) * 4;
  const u8* values = b.own.values + (b.kv_head * b.own.capacity - b.own.first) * kRowBytes;
  if (thread < kRows) score_row[thread] = thread < b.rows ? b.row(thread) - first_row * heads : -1;
  __syncthreads();
  float v[kValues], w[kWeights], k = 1.0f;  // of the next 64 keys, on their way while the present ones are weighed
  auto fetch = [&](i64 p0) {
    const int n = static_cast<int>(end - p0 < kKeys ? end - p0 : kKeys);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int at = i * kThreads + thread, p = at / kColumns, c = column0 + at % kColumns;
      v[i] = p < n && c < kDim ? load_value(values + (p0 + p) * kRowBytes, c, KV_DTYPE) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kWeights; ++i) {
      const int at = i * kThreads + thread, p = at % kKeys;
      const i64 row = score_row[at / kKeys];
      w[i] = row >= 0 && p < n ? scores[row * width + (p0 - b.base) + p] : 0.0f;
    }
    if (thread < kRows && score_row[thread] >= 0) k = keep[score_row[thread] * (width / kKeys) + (p0 - b.base) / kKeys];
  };
  float out[kOwn][4];
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) out[i][j] = 0.0f;
  i64 p0 = start > first ? start : first;
  if (p0 < end) fetch(p0);
  for (; p0 < end; p0 += kKeys) {
    const int n = static_cast<int>(end - p0 < kKeys ? end - p0 : kKeys);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int at = i * kThreads + thread;
      vs[at / kColumns][at % kColumns] = v[i];
    }
#pragma unroll
    for (int i = 0; i < kWeights; ++i) {
      const int at = i * kThreads + thread;
      ws[at / kKeys][at % kKeys] = w[i];
    }
    if (thread < kRows) kept[thread] = k;
    __syncthreads();
    if (p0 + kKeys < end) fetch(p0 + kKeys);
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i][j] = kept[r0 + i] * out[i][j];
    int p = 0;
    for (; p + 4 <= n; p += 4) {
      float4 weight[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) weight[i] = *reinterpret_cast<const float4*>(&ws[r0 + i][p]);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const float4 x = *reinterpret_cast<const float4*>(&vs[p + s][c0]);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          const float by = s == 0 ? weight[i].x : s == 1 ? weight[i].y : s == 2 ? weight[i].z : weight[i].w;
          out[i][0] = fmaf(by, x.x, out[i][0]);
          out[i][1] = fmaf(by, x.y, out[i][1]);
          out[i][2] = fmaf(by, x.z, out[i][2]);
          out[i][3] = fmaf(by, x.w, out[i][3]);
        }
      }
    }
    for (; p < n; ++p)
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) out[i][j] = fmaf(ws[r0 + i][p], vs[p][c0 + j], out[i][j]);
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int c = column0 + c0 + j;
      if (r0 + i < b.rows && c < kDim) sums[(score_row[r0 + i] * segments + segment) * kDim + c] = out[i][j];
    }
}
extern "C" __global__ void __launch_bounds__(64) weigh_few(const Sequence* sequences, const int* blocks, int heads, int kv_heads, int window,
                                                            i64 first_row, i64 width, int segments, const float* scores,
                                                            const float* keep, float* sums) {
  after_previous();
  weigh<16, 16>(sequences, blocks, heads, kv_heads, window, first_row, width, segments, scores, keep, sums);
}
extern "C" __global__ void __launch_bounds__(256) weigh_many(const Sequence* sequences, const int* blocks, int heads, int kv_heads, int window,
                                                             i64 first_row, i64 width, int segments, const float* scores,
                                                             const float* keep, float* sums) {
  after_previous();
  weigh<64, 64>(sequences, blocks, heads, kv_heads, window, first_row, width, segments, scores, keep, sums);
}

// Merges the segments of each row, in order, then the sink; divides by the sum and applies the gate. Grid (rows, heads).
extern "C" __global__ void merge_heads(const float* ends, const float* sums, int segments, const float* sinks, const float* q_in, int gated,
                                       int heads, i64 first_row, float* out) {
  after_previous();
  const i64 row = first_row + blockIdx.x;
  const int head = blockIdx.y;
  const i64 own = (static_cast<i64>(blockIdx.x) * heads + head) * segments;
  for (int c = threadIdx.x; c < kDim; c += blockDim.x) {
    float largest = ends[own * 2], sum = ends[own * 2 + 1], value = sums[own * kDim + c];
    for (int s = 1; s <= segments; ++s) {
      float next_largest, next_sum, next_value;
      if (s < segments) {
        next_largest = ends[(own + s) * 2];
        next_sum = ends[(own + s) * 2 + 1];
        next_value = sums[(own + s) * kDim + c];
      } else {
        if (!sinks) break;
        next_largest = sinks[head];
        next_sum = 1.0f;
        next_value = 0.0f;
      }
      if (next_sum == 0.0f) continue;
      float keep = 1.0f, take = 1.0f;
      if (next_largest > largest) {
        keep = exp_f32(largest - next_largest);
        largest = next_largest;
      } else {
        take = exp_f32(next_largest - largest);
      }
      sum = fmaf(take, next_sum, keep * sum);
      value = fmaf(take, next_value, keep * value);
    }
    value = (1.0f / sum) * value;
    if (gated) value = value * sigmoid(q_in[((row * heads + head) * 2 + 1) * kDim + c]);
    out[(row * heads + head) * kDim + c] = value;
  }
}
