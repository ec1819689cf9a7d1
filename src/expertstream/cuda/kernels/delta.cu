// The gated delta rule: compiled with KEY_DIM and VALUE_DIM. As Engine::delta_net and native/kernels/mixers.h; delta_step token by token,
// delta_pairs and delta_chunks for prompts, in chunks of 64 tokens.
#include "common.cuh"

constexpr int kKey = KEY_DIM, kValue = VALUE_DIM;
constexpr int kChunk = 64;

// One sequence of a batch: rows [begin, begin + count) are its tokens.
struct Sequence {
  float* conv_state;  // (kernel − 1, channels)
  float* state;       // (value_heads, kKey, kValue)
  i64 begin, count;
};

__device__ __forceinline__ float conv_input(const float* x, const Sequence& own, i64 t, int back, int channels, int c, int kernel) {
  const i64 at = t - back;  // of this sequence's tokens; before them lies its state
  return at >= 0 ? x[(own.begin + at) * channels + c] : own.conv_state[(kernel - 1 + at) * channels + c];
}

// y ← silu(causal depthwise convolution of x); grid (channels / blockDim.x, blocks of 32 tokens, sequences).
extern "C" __global__ void convolve(const float* x, const float* weight, const Sequence* sequences, int channels, int kernel, float* y) {
  after_previous();
  const Sequence own = sequences[blockIdx.z];
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  const i64 first = static_cast<i64>(blockIdx.y) * 32;
  for (i64 t = first; t < first + 32 && t < own.count; ++t) {
    float sum = 0.0f;
    for (int i = 0; i < kernel; ++i) sum = fmaf(weight[i * channels + c], conv_input(x, own, t, kernel - 1 - i, channels, c, kernel), sum);
    y[(own.begin + t) * channels + c] = silu(sum);
  }
}

// Keeps each sequence's last inputs; grid (channels / blockDim.x, sequences).
extern "C" __global__ void keep_inputs(const float* x, const Sequence* sequences, int channels, int kernel) {
  after_previous();
  const Sequence own = sequences[blockIdx.y];
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  float last[8];
  for (int i = 0; i + 1 < kernel; ++i) last[i] = conv_input(x, own, own.count, kernel - 1 - i, channels, c, kernel);
  for (int i = 0; i + 1 < kernel; ++i) own.conv_state[static_cast<i64>(i) * channels + c] = last[i];
}

// Both for one token of each sequence; grid (channels / blockDim.x, sequences).
extern "C" __global__ void convolve_step(const float* x, const float* weight, const Sequence* sequences, int channels, int kernel, float* y) {
  after_previous_beside_next();
  const Sequence own = sequences[blockIdx.y];
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  float window[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < kernel) window[i] = conv_input(x, own, 0, kernel - 1 - i, channels, c, kernel);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < kernel) sum = fmaf(weight[i * channels + c], window[i], sum);
  y[own.begin * channels + c] = silu(sum);
#pragma unroll
  for (int i = 0; i < 7; ++i)
    if (i + 1 < kernel) own.conv_state[static_cast<i64>(i) * channels + c] = window[i + 1];
}

// Scales queries and keys to unit length, queries also by `scale`, in place; a warp a head, grid (rows, 2·key_heads + 1). The last block of
// a row computes its heads' log decays and betas.
extern "C" __global__ void prepare_delta(float* mixed, int channels, int key_heads, float scale, const float* a, const float* b,
                                         const float* a_log, const float* dt_bias, int value_heads, i64 first_row, float* g, float* beta) {
  after_previous();
  const i64 row = first_row + blockIdx.x;
  const int head = blockIdx.y;
  if (head < 2 * key_heads) {
    float* x = mixed + row * channels + static_cast<i64>(head) * kKey;
    const float squares = sum_of_squares(x, kKey, threadIdx.x & 15);
    const float factor = (head < key_heads ? scale : 1.0f) / sqrtf(squares + 1e-6f);
    for (int c = threadIdx.x; c < kKey; c += 32) x[c] = x[c] * factor;
    return;
  }
  for (int h = threadIdx.x; h < value_heads; h += 32) {
    const i64 at = row * value_heads + h;
    g[at] = expertstream::log_decay(a[at], a_log[h], dt_bias[h]);
    beta[at] = sigmoid(b[at]);
  }
}

// rms_norm(x)·silu(z) of kValue values in shared memory, by a block.
__device__ __forceinline__ void finish_row(const float* x, const float* z, const float* norm, float eps, float* factor, float* to) {
  if (threadIdx.x < 32) {
    const float squares = sum_of_squares(x, kValue, threadIdx.x & 15);
    if (threadIdx.x == 0) *factor = 1.0f / sqrtf(squares / static_cast<float>(kValue) + eps);
  }
  __syncthreads();
  for (int c = threadIdx.x; c < kValue; c += blockDim.x) to[c] = x[c] * *factor * norm[c] * silu(z[c]);
}

// Token by token; a thread a column of the state, grid (value_heads, sequences). Includes prepare_delta, for one head.
extern "C" __global__ void delta_step(const float* mixed, const float* z, const float* a, const float* b, const float* a_log,
                                      const float* dt_bias, const Sequence* sequences, int channels, int key_heads, int value_heads,
                                      float query_scale, const float* norm, float eps, float* out) {
  __shared__ float q[kKey], k[kKey], row[kValue];
  __shared__ float factor, decay, rate;
  const Sequence own = sequences[blockIdx.y];
  const int head = blockIdx.x, key_head = head / (value_heads / key_heads), c = threadIdx.x;
  const bool works = c < kValue;
  float* state = own.state + static_cast<i64>(head) * kKey * kValue + (works ? c : 0);
  float s[kKey];
#pragma unroll
  for (int i = 0; i < kKey; ++i) s[i] = state[i * kValue];
  after_previous();  // the kernel before does not write states
#pragma unroll 1
  for (i64 t = own.begin; t < own.begin + own.count; ++t) {
    const float* from = mixed + t * channels + key_head * kKey;
    const i64 at = t * value_heads + head;
    const int warp = c >> 5, warps = blockDim.x >> 5, lane = c & 31;
    if (warp == 0) {
      const float by = query_scale / sqrtf(sum_of_squares(from, kKey, lane & 15) + 1e-6f);
      for (int i = lane; i < kKey; i += 32) q[i] = from[i] * by;
    }
    if (warp == 1 % warps) {
      const float* key = from + key_heads * kKey;
      const float by = 1.0f / sqrtf(sum_of_squares(key, kKey, lane & 15) + 1e-6f);
      for (int i = lane; i < kKey; i += 32) k[i] = key[i] * by;
    }
    if (warp == 2 % warps && lane == 0) {
      decay = expertstream::log_decay(a[at], a_log[head], dt_bias[head]);
      rate = sigmoid(b[at]);
    }
    __syncthreads();
    const float keep = exp_f32(decay);
    float seen = 0.0f;
#pragma unroll
    for (int i = 0; i < kKey; ++i) {
      s[i] = s[i] * keep;
      seen = fmaf(k[i], s[i], seen);
    }
    const float v = works ? mixed[t * channels + 2 * key_heads * kKey + head * kValue + c] : 0.0f;
    const float delta = (v - seen) * rate;
    float sum = 0.0f;
    __syncthreads();  // so that k is read again: there are no registers to keep it in
#pragma unroll
    for (int i = 0; i < kKey; ++i) {
      s[i] = fmaf(k[i], delta, s[i]);
      sum = fmaf(q[i], s[i], sum);
    }
    if (works) row[c] = sum;
    __syncthreads();
    finish_row(row, z + at * kValue, norm, eps, &factor, out + at * kValue);
    __syncthreads();
  }
  if (!works) return;
#pragma unroll
  for (int i = 0; i < kKey; ++i) state[i * kValue] = s[i];
}

constexpr int kPart = 32;  // of the key's dimensions, in shared memory at a time
constexpr int kStride = kPart + 4;

// Products among a chunk's tokens, which do not depend on the state; grid (chunks, value_heads). pairs: (chunks, value_heads, 2, 64, 64):
// −β_i e^{γ_i−γ_j}(k_i·k_j), and e^{γ_i−γ_j}(q_i·k_j) for j ≤ i, else 0. ends: (chunks, value_heads, 2, 64): e^{γ_i}, e^{γ_last−γ_i}.
extern "C" __global__ void __launch_bounds__(256) delta_pairs(const float* mixed, const float* g, const float* beta, i64 begin, i64 count,
                                                              int channels, int key_heads, int value_heads, float* pairs, float* ends) {
  after_previous();
  __shared__ __align__(16) float ks[kChunk][kStride];
  __shared__ __align__(16) float qs[kChunk][kStride];
  __shared__ float gamma[kChunk], rate[kChunk];
  const int head = blockIdx.y, key_head = head / (value_heads / key_heads), thread = threadIdx.x;
  const i64 t0 = begin + static_cast<i64>(blockIdx.x) * kChunk, left = begin + count - t0;
  const int n = static_cast<int>(left < kChunk ? left : kChunk);
  const i64 own = static_cast<i64>(blockIdx.x) * value_heads + head;
  if (thread == 0) {
    float total = 0.0f;
    for (int i = 0; i < n; ++i) gamma[i] = total = total + g[(t0 + i) * value_heads + head];
  }
  if (thread < n) rate[thread] = -beta[(t0 + thread) * value_heads + head];
  const int i0 = (thread >> 4) * 4, j0 = (thread & 15) * 4;
  float key[4][4], query[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) key[i][j] = query[i][j] = 0.0f;
  for (int c0 = 0; c0 < kKey; c0 += kPart) {
    __syncthreads();
    for (int at = thread; at < kChunk * kPart; at += blockDim.x) {
      const int i = at / kPart, c = at % kPart;
      const bool inside = i < n && c0 + c < kKey;
      const float* from = mixed + (t0 + (inside ? i : 0)) * channels + key_head * kKey + (inside ? c0 + c : 0);
      qs[i][c] = inside ? from[0] : 0.0f;
      ks[i][c] = inside ? from[key_heads * kKey] : 0.0f;
    }
    __syncthreads();
    const int width = kKey - c0 < kPart ? kKey - c0 : kPart;
    for (int c = 0; c < width; ++c) {
      float b[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) b[j] = ks[j0 + j][c];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = ks[i0 + i][c], y = qs[i0 + i][c];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          key[i][j] = fmaf(x, b[j], key[i][j]);
          query[i][j] = fmaf(y, b[j], query[i][j]);
        }
      }
    }
  }
  float* among = pairs + own * 2 * kChunk * kChunk;
  float* scores = among + kChunk * kChunk;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = i0 + i, col = j0 + j;
      if (row >= n || col >= n) continue;
      const float ratio = exp_f32(gamma[row] - gamma[col]);
      among[row * kChunk + col] = rate[row] * (ratio * key[i][j]);
      scores[row * kChunk + col] = col <= row ? ratio * query[i][j] : 0.0f;
    }
  if (thread < n) {
    ends[own * 2 * kChunk + thread] = exp_f32(gamma[thread]);
    ends[own * 2 * kChunk + kChunk + thread] = exp_f32(gamma[n - 1] - gamma[thread]);
  }
}

// The chunks of one sequence, one after another, for 32 columns of the state of one head; grid (value_heads, columns / 32), 256 threads.
// out (rows, value_heads, kValue) is not normed yet. Shared: delta_shared() floats.
extern "C" __global__ void __launch_bounds__(256) delta_chunks(const float* mixed, const float* beta, float* states, i64 begin, i64 count,
                                                               int channels, int key_heads, int value_heads, const float* pairs,
                                                               const float* ends, float* out) {
  after_previous();
  DYNAMIC_SHARED(memory);
  float* s = reinterpret_cast<float*>(memory);           // (kKey, 32): the state
  float* among = s + kKey * 32;                          // (64, 64), then the scores
  float* d = among + kChunk * kChunk;                    // (64, 32)
  float* ks = d + kChunk * 32;                           // (64, kStride)
  float* qs = ks + kChunk * kStride;                     // (64, kStride)
  float* from_start = qs + kChunk * kStride;             // (64)
  float* to_end = from_start + kChunk;                   // (64)
  const int head = blockIdx.x, key_head = head / (value_heads / key_heads), thread = threadIdx.x;
  const int lane = thread & 31, warp = thread >> 5, column = blockIdx.y * 32 + lane;
  const bool works = column < kValue;
  float* state = states + static_cast<i64>(head) * kKey * kValue + (works ? column : 0);
  for (int r = warp; r < kKey; r += 8) s[r * 32 + lane] = works ? state[static_cast<i64>(r) * kValue] : 0.0f;
  const i64 chunks = (count + kChunk - 1) / kChunk;
  for (i64 chunk = 0; chunk < chunks; ++chunk) {
    const i64 t0 = begin + chunk * kChunk, left = begin + count - t0, own = chunk * value_heads + head;
    const int n = static_cast<int>(left < kChunk ? left : kChunk);
    const float* given = pairs + own * 2 * kChunk * kChunk;
    __syncthreads();
    for (int i = thread; i < kChunk * kChunk; i += 256) among[i] = i / kChunk < n && i % kChunk < n ? given[i] : 0.0f;
    if (thread < n) {
      from_start[thread] = ends[own * 2 * kChunk + thread];
      to_end[thread] = ends[own * 2 * kChunk + kChunk + thread];
    }
    auto load_part = [&](int c0) {
      for (int at = thread; at < kChunk * kPart; at += 256) {
        const int i = at / kPart, c = at % kPart;
        const bool inside = i < n && c0 + c < kKey;
        const float* from = mixed + (t0 + (inside ? i : 0)) * channels + key_head * kKey + (inside ? c0 + c : 0);
        qs[i * kStride + c] = inside ? from[0] : 0.0f;
        ks[i * kStride + c] = inside ? from[key_heads * kKey] : 0.0f;
      }
    };
    // 1. What the state says of each token's key and query: rows warp + 8m.
    float by_key[8], by_query[8];
#pragma unroll
    for (int m = 0; m < 8; ++m) by_key[m] = by_query[m] = 0.0f;
    for (int c0 = 0; c0 < kKey; c0 += kPart) {
      __syncthreads();
      load_part(c0);
      __syncthreads();
      const int width = kKey - c0 < kPart ? kKey - c0 : kPart;
#pragma unroll 4
      for (int c = 0; c < width; ++c) {
        const float x = s[(c0 + c) * 32 + lane];
#pragma unroll
        for (int m = 0; m < 8; ++m) {
          by_key[m] = fmaf(ks[(warp + 8 * m) * kStride + c], x, by_key[m]);
          by_query[m] = fmaf(qs[(warp + 8 * m) * kStride + c], x, by_query[m]);
        }
      }
    }
    // 2. The triangular system: once d_j is known, every later row subtracts its part of it.
    float delta[8];
#pragma unroll
    for (int m = 0; m < 8; ++m) {
      const int i = warp + 8 * m;
      delta[m] = 0.0f;
      if (i >= n || !works) continue;
      const i64 t = t0 + i;
      const float v = mixed[t * channels + 2 * key_heads * kKey + head * kValue + column];
      delta[m] = beta[t * value_heads + head] * (v - from_start[i] * by_key[m]);
    }
#pragma unroll
    for (int m = 0; m < 8; ++m)
      for (int w = 0; w < 8; ++w) {
        const int j = 8 * m + w;
        if (j >= n) break;
        if (warp == w) d[j * 32 + lane] = delta[m];
        __syncthreads();
        const float dj = d[j * 32 + lane];
#pragma unroll
        for (int o = m; o < 8; ++o) {
          const int i = warp + 8 * o;
          if (i > j) delta[o] = fmaf(among[i * kChunk + j], dj, delta[o]);
        }
      }
    __syncthreads();
    // 3. The outputs, up to the end of each block of 16 rows, as the CPU's.
    for (int i = thread; i < kChunk * kChunk; i += 256)
      among[i] = i / kChunk < n && i % kChunk < n ? given[kChunk * kChunk + i] : 0.0f;
    __syncthreads();
#pragma unroll
    for (int m = 0; m < 8; ++m) {
      const int i = warp + 8 * m, last = (i / 16 + 1) * 16 < n ? (i / 16 + 1) * 16 : n;
      if (i >= n) continue;
      float o = from_start[i] * by_query[m];
#pragma unroll 8
      for (int j = 0; j < last; ++j) o = fmaf(among[i * kChunk + j], d[j * 32 + lane], o);
      if (works) out[((t0 + i) * value_heads + head) * kValue + column] = o;
    }
    // 4. The new state: rows c0 + 4·warp to c0 + 4·warp + 3.
    const float decay = from_start[n - 1];
    for (int c0 = 0; c0 < kKey; c0 += kPart) {
      __syncthreads();
      load_part(c0);
      __syncthreads();
      float next[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) next[r] = c0 + 4 * warp + r < kKey ? decay * s[(c0 + 4 * warp + r) * 32 + lane] : 0.0f;
      for (int i = 0; i < n; ++i) {
        const float di = d[i * 32 + lane], by = to_end[i];
#pragma unroll
        for (int r = 0; r < 4; ++r) next[r] = fmaf(ks[i * kStride + 4 * warp + r] * by, di, next[r]);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r)
        if (c0 + 4 * warp + r < kKey) s[(c0 + 4 * warp + r) * 32 + lane] = next[r];
    }
  }
  __syncthreads();
  if (!works) return;
  for (int r = warp; r < kKey; r += 8) state[static_cast<i64>(r) * kValue] = s[r * 32 + lane];
}

// out ← rms_norm(out)·silu(z) of each row and head; grid (rows·value_heads).
extern "C" __global__ void finish_delta(float* out, const float* z, const float* norm, float eps) {
  after_previous();
  __shared__ float row[kValue];
  __shared__ float factor;
  const i64 at = static_cast<i64>(blockIdx.x) * kValue;
  for (int c = threadIdx.x; c < kValue; c += blockDim.x) row[c] = out[at + c];
  __syncthreads();
  finish_row(row, z + at, norm, eps, &factor, out + at);
}
