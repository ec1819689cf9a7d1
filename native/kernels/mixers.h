// Attention over a KV cache and the gated-delta rule for one instruction set; included after gemm.h.
#pragma once

#include "gemm.h"

namespace {

// Multiplies each column of scores (rows, kKeys) by the scale at the end of its row of keys or values.
inline void scale_columns(float* scores, int64_t rows, int64_t n, const uint8_t* first, int64_t row) {
  for (int64_t p = 0; p < n; ++p) {
    float by;
    std::memcpy(&by, first + p * row, 4);
    for (int64_t r = 0; r < rows; ++r) scores[r * kKeys + p] *= by;
  }
}

void attend_segment(const float* q, int64_t rows, const int64_t* visible, int64_t window, const KVLayer& kv,
                    int64_t kv_head, int64_t begin, int64_t end, float* largest, float* sum, float* out,
                    float* scratch) {
  const int64_t d = kv.head_dim, size = value_bytes(kv.dtype), row = kv.row_bytes();
  const uint8_t* keys = static_cast<const uint8_t*>(kv.k) + (kv_head * kv.capacity - kv.first) * row;
  const uint8_t* values = static_cast<const uint8_t*>(kv.v) + (kv_head * kv.capacity - kv.first) * row;
  float *turned = scratch, *wide = turned + kKeys * d,
        *scores = wide + kKeys * d;  // (d, kKeys), (kKeys, d), (rows, kKeys)
  for (int64_t r = 0; r < rows; ++r) {
    largest[r] = -1e30f;
    sum[r] = 0.0f;
  }
  set_zero(out, rows, d, d);
  for (int64_t p0 = begin; p0 < end; p0 += kKeys) {
    const int64_t n = end - p0 < kKeys ? end - p0 : kKeys;
    const uint8_t *values_now = values + p0 * row, *keys_next = keys + (p0 + n) * row;
    const int64_t bytes = n * row;  // of either; each is fetched while the other is processed
    // 1. Transpose keys, so that a query's value is multiplied by 16 keys at once.
    int64_t p = 0;
    for (; p + 16 <= n && d % 16 == 0; p += 16)
      for (int64_t c = 0; c < d; c += 16) {
        for (int64_t at = 0; at < 16 * 16 * size; at += 64)
          __builtin_prefetch(values_now + p * row + c * 16 * size + at);
        F square[16];
        for (int64_t i = 0; i < 16; ++i) square[i] = load_values(keys + (p0 + p + i) * row + c * size, kv.dtype, 16);
        f_transpose(square, turned + c * kKeys + p, kKeys);
      }
    for (; p < n; ++p)
      for_lanes(d, [&](int64_t c, int64_t m) {
        float t[16];
        f_store(t, load_values(keys + (p0 + p) * row + c * size, kv.dtype, m));
        for (int64_t i = 0; i < m; ++i) turned[(c + i) * kKeys + p] = t[i];
      });
    set_zero(scores, rows, n, kKeys);
    gemm(rows, n, d, q, d, turned, kKeys, scores, kKeys);
    if (kv.dtype == DType::i8) scale_columns(scores, rows, n, keys + p0 * row + d, row);
    // 2. Rescale the softmax so far to the new largest score.
    for (int64_t r = 0; r < rows; ++r) {
      float* s = scores + r * kKeys;
      const int64_t seen = visible[r] - p0 < 0 ? 0 : visible[r] - p0 < n ? visible[r] - p0 : n;
      const int64_t start = visible[r] - window - p0;
      const int64_t unseen = window == 0 || start < 0 ? 0 : start < seen ? start : seen;  // before the window
      float most = largest[r];
      for (int64_t p = unseen; p < seen; ++p) most = s[p] > most ? s[p] : most;
      const float total = exp_and_sum(s + unseen, seen - unseen, most);
      for (int64_t p = 0; p < unseen; ++p) s[p] = 0.0f;
      for (int64_t p = seen; p < n; ++p) s[p] = 0.0f;
      if (most > largest[r]) {
        const float keep = exp_one(largest[r] - most);
        sum[r] *= keep;
        scale(out + r * d, keep, d);
        largest[r] = most;
      }
      sum[r] += total;
    }
    // 3. Add the weighted values.
    const float* v = reinterpret_cast<const float*>(values_now);
    const int64_t more = p0 + n < end ? bytes : 0;
    if (kv.dtype == DType::i8) {
      scale_columns(scores, rows, n, values_now + d, row);
      for (int64_t p = 0; p < n; ++p) {
        if (p * row < more)
          for (int64_t at = 0; at < row; at += 64) __builtin_prefetch(keys_next + p * row + at);
        for_lanes(d, [&](int64_t c, int64_t m) {
          f_store_n(wide + p * d + c, load_values(values_now + p * row + c, kv.dtype, m), m);
        });
      }
      v = wide;
    } else if (kv.dtype != DType::f32) {
      for_lanes(n * d, [&](int64_t c, int64_t m) {
        if (c * size < more) __builtin_prefetch(keys_next + c * size);
        f_store_n(wide + c, load_values(values_now + c * size, kv.dtype, m), m);
      });
      v = wide;
    }
    gemm(rows, d, n, scores, kKeys, v, d, out, d);
  }
}

void merge_segments(int64_t rows, int64_t head_dim, float* largest, float* sum, float* out, const float* next_largest,
                    const float* next_sum, const float* next_out) {
  for (int64_t r = 0; r < rows; ++r) {
    if (next_sum[r] == 0.0f) continue;
    float keep = 1.0f, take = 1.0f;
    if (next_largest[r] > largest[r]) {
      keep = exp_one(largest[r] - next_largest[r]);
      largest[r] = next_largest[r];
    } else {
      take = exp_one(next_largest[r] - largest[r]);
    }
    sum[r] = std::fma(take, next_sum[r], keep * sum[r]);
    scale(out + r * head_dim, keep, head_dim);
    axpy(take, next_out + r * head_dim, head_dim, out + r * head_dim);
  }
}

inline int64_t lanes_at(int64_t width, int64_t c) { return width - c * 16 < 16 ? width - c * 16 : 16; }

// S ← e^g S; d = (v − Sᵀk)·β; S ← S + k dᵀ; out = Sᵀq, 64 columns of S at a time so that they stay in the L1 cache.
void delta_step(const float* q, const float* k, const float* v, const float* g, const float* beta, int64_t tokens,
                int64_t dk, int64_t dv, int64_t ldq, int64_t ldv, int64_t ldg, float* state, float* out, int64_t ldo) {
  for (int64_t c0 = 0; c0 < dv; c0 += kDeltaColumns) {
    const int64_t width = dv - c0 < kDeltaColumns ? dv - c0 : kDeltaColumns, vectors = (width + 15) / 16;
    for (int64_t t = 0; t < tokens; ++t) {
      const F keep = f_set1(exp_one(g[t * ldg]));
      const F rate = f_set1(beta[t * ldg]);
      F seen[4], delta[4], sum[4];
      for (int c = 0; c < 4; ++c) seen[c] = sum[c] = f_zero();
      for (int64_t i = 0; i < dk; ++i) {
        const F key = f_set1(k[t * ldq + i]);
        for (int64_t c = 0; c < vectors; ++c) {
          float* s = state + i * dv + c0 + c * 16;
          const F kept = f_mul(f_load_n(s, lanes_at(width, c)), keep);
          seen[c] = f_fma(key, kept, seen[c]);
          f_store_n(s, kept, lanes_at(width, c));
        }
      }
      for (int64_t c = 0; c < vectors; ++c)
        delta[c] = f_mul(f_sub(f_load_n(v + t * ldv + c0 + c * 16, lanes_at(width, c)), seen[c]), rate);
      for (int64_t i = 0; i < dk; ++i) {
        const F key = f_set1(k[t * ldq + i]), query = f_set1(q[t * ldq + i]);
        for (int64_t c = 0; c < vectors; ++c) {
          float* s = state + i * dv + c0 + c * 16;
          const F next = f_fma(key, delta[c], f_load_n(s, lanes_at(width, c)));
          sum[c] = f_fma(query, next, sum[c]);
          f_store_n(s, next, lanes_at(width, c));
        }
      }
      for (int64_t c = 0; c < vectors; ++c) f_store_n(out + t * ldo + c0 + c * 16, sum[c], lanes_at(width, c));
    }
  }
}

// With γ_i the sum of g up to token i, and S the state before the chunk:
//   d_i = β_i(v_i − e^{γ_i} Sᵀk_i) − Σ_{j<i} β_i e^{γ_i−γ_j}(k_i·k_j) d_j
//   out_i = e^{γ_i} Sᵀq_i + Σ_{j≤i} e^{γ_i−γ_j}(q_i·k_j) d_j
//   S ← e^{γ_last} S + Σ_j e^{γ_last−γ_j} k_j d_jᵀ
// which is delta_step unrolled; every exponent is ≤ 0. (Yang et al., Gated Delta Networks, 2024.)
void delta_chunk(const float* q, const float* k, const float* v, const float* g, const float* beta, int64_t tokens,
                 int64_t dk, int64_t dv, int64_t ldq, int64_t ldv, int64_t ldg, float* state, float* out, int64_t ldo,
                 float* scratch) {
  constexpr int64_t kLd = kDeltaChunk, kRows = 16;  // rows that are processed together
  float* among_keys = scratch;                      // (tokens, kLd): −β_i e^{γ_i−γ_j}(k_i·k_j), j < i
  float* scores = among_keys + kDeltaChunk * kLd;   // (tokens, kLd): e^{γ_i−γ_j}(q_i·k_j), j ≤ i, else 0
  float* turned = scores + kDeltaChunk * kLd;       // (dk, kLd): keys
  float* deltas = turned + dk * kLd;                // (tokens, dv)
  float* gamma = deltas + kDeltaChunk * dv;         // (tokens)
  float* from_start = gamma + kDeltaChunk;          // e^{γ_i}
  float* to_end = from_start + kDeltaChunk;         // e^{γ_last−γ_i}
  float total = 0.0f;
  for (int64_t i = 0; i < tokens; ++i) gamma[i] = total = total + g[i * ldg];
  for (int64_t i = 0; i < tokens; ++i) {
    from_start[i] = exp_one(gamma[i]);
    to_end[i] = exp_one(gamma[tokens - 1] - gamma[i]);
    for (int64_t r = 0; r < dk; ++r) turned[r * kLd + i] = k[i * ldq + r];
  }
  // 1. Products among the chunk's tokens, each row up to its own token.
  for (int64_t i0 = 0; i0 < tokens; i0 += kRows) {
    const int64_t rows = tokens - i0 < kRows ? tokens - i0 : kRows, n = i0 + rows;
    set_zero(among_keys + i0 * kLd, rows, n, kLd);
    set_zero(scores + i0 * kLd, rows, n, kLd);
    gemm(rows, n, dk, k + i0 * ldq, ldq, turned, kLd, among_keys + i0 * kLd, kLd);
    gemm(rows, n, dk, q + i0 * ldq, ldq, turned, kLd, scores + i0 * kLd, kLd);
    for (int64_t i = i0; i < n; ++i) {
      const F now = f_set1(gamma[i]), rate = f_set1(-beta[i * ldg]);
      for_lanes(n, [&](int64_t c, int64_t m) {
        const F ratio = f_exp(f_sub(now, f_load_n(gamma + c, m)));
        float *key = among_keys + i * kLd + c, *score = scores + i * kLd + c;
        f_store_n(key, f_mul(rate, f_mul(ratio, f_load_n(key, m))), m);
        f_store_n(score, f_mul(ratio, f_load_n(score, m)), m);
      });
      for (int64_t j = i + 1; j < n; ++j) scores[i * kLd + j] = 0.0f;
    }
  }
  // 2. d: a unit triangular system, solved a block of rows at a time.
  set_zero(deltas, tokens, dv, dv);
  gemm(tokens, dv, dk, k, ldq, state, dv, deltas, dv);
  for (int64_t i0 = 0; i0 < tokens; i0 += kRows) {
    const int64_t rows = tokens - i0 < kRows ? tokens - i0 : kRows;
    for (int64_t i = i0; i < i0 + rows; ++i) {
      const F start = f_set1(from_start[i]), rate = f_set1(beta[i * ldg]);
      for_lanes(dv, [&](int64_t c, int64_t m) {
        float* d = deltas + i * dv + c;
        f_store_n(d, f_mul(rate, f_sub(f_load_n(v + i * ldv + c, m), f_mul(start, f_load_n(d, m)))), m);
      });
    }
    gemm(rows, dv, i0, among_keys + i0 * kLd, kLd, deltas, dv, deltas + i0 * dv, dv);
    for (int64_t i = i0 + 1; i < i0 + rows; ++i)
      gemm(1, dv, i - i0, among_keys + i * kLd + i0, kLd, deltas + i0 * dv, dv, deltas + i * dv, dv);
  }
  // 3. The outputs.
  set_zero(out, tokens, dv, ldo);
  gemm(tokens, dv, dk, q, ldq, state, dv, out, ldo);
  for (int64_t i0 = 0; i0 < tokens; i0 += kRows) {
    const int64_t rows = tokens - i0 < kRows ? tokens - i0 : kRows;
    for (int64_t i = i0; i < i0 + rows; ++i) scale(out + i * ldo, from_start[i], dv);
    gemm(rows, dv, i0 + rows, scores + i0 * kLd, kLd, deltas, dv, out + i0 * ldo, ldo);
  }
  // 4. The new state.
  for (int64_t r = 0; r < dk; ++r) {
    scale(state + r * dv, from_start[tokens - 1], dv);
    for (int64_t i = 0; i < tokens; ++i) turned[r * kLd + i] *= to_end[i];
  }
  gemm(dk, dv, tokens, turned, kLd, deltas, dv, state, dv);
}

}  // namespace
