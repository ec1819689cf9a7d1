// Attention over a KV cache and the gated-delta rule for one instruction set; included after rows.h.
#pragma once

#include "rows.h"

namespace {

template <int HEADS>
void attend_heads(const float* q, const KVLayer& kv, int64_t kv_head, int64_t length, float scale, float* scores,
                  float* out) {
  const int64_t d = kv.head_dim, row_bytes = d * (kv.dtype == DType::f32 ? 4 : 2);
  const int64_t value_bytes = row_bytes / d;
  const uint8_t* keys = static_cast<const uint8_t*>(kv.k) + kv_head * kv.capacity * row_bytes;
  const uint8_t* values = static_cast<const uint8_t*>(kv.v) + kv_head * kv.capacity * row_bytes;
  for (int64_t p = 0; p < length; ++p) {
    F acc[HEADS];
    for (auto& a : acc) a = f_zero();
    for_lanes(d, [&](int64_t c, int64_t m) {
      const F key = load_values(keys + p * row_bytes + c * value_bytes, kv.dtype, m);
      for (int h = 0; h < HEADS; ++h) acc[h] = f_fma(f_load_n(q + h * d + c, m), key, acc[h]);
    });
    for (int h = 0; h < HEADS; ++h) scores[h * length + p] = f_sum(acc[h]) * scale;
  }
  for (int h = 0; h < HEADS; ++h) softmax(scores + h * length, length);
  // 64 columns at a time: their sums stay in registers while every position passes once.
  for (int64_t c0 = 0; c0 < d; c0 += 64) {
    F acc[HEADS][4];
    for (auto& a : acc)
      for (auto& b : a) b = f_zero();
    const int64_t width = d - c0 < 64 ? d - c0 : 64;
    for (int64_t p = 0; p < length; ++p) {
      const uint8_t* row = values + p * row_bytes + c0 * value_bytes;
      for (int64_t c = 0; c * 16 < width; ++c) {
        const F value = load_values(row + c * 16 * value_bytes, kv.dtype, width - c * 16);
        for (int h = 0; h < HEADS; ++h) acc[h][c] = f_fma(f_set1(scores[h * length + p]), value, acc[h][c]);
      }
    }
    for (int h = 0; h < HEADS; ++h)
      for (int64_t c = 0; c * 16 < width; ++c) {
        const int64_t n = width - c * 16;
        f_store_n(out + h * d + c0 + c * 16, acc[h][c], n < 16 ? n : 16);
      }
  }
}

void attend(const float* q, const KVLayer& kv, int64_t kv_head, int64_t heads, int64_t length, float scale,
            float* scores, float* out) {
  switch (heads) {
    case 4:
      return attend_heads<4>(q, kv, kv_head, length, scale, scores, out);
    case 3:
      return attend_heads<3>(q, kv, kv_head, length, scale, scores, out);
    case 2:
      return attend_heads<2>(q, kv, kv_head, length, scale, scores, out);
    default:
      return attend_heads<1>(q, kv, kv_head, length, scale, scores, out);
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

inline float dot_of(const float* a, const float* b, int64_t n) {
  F sum = f_zero();
  for_lanes(n, [&](int64_t c, int64_t m) { sum = f_fma(f_load_n(a + c, m), f_load_n(b + c, m), sum); });
  return f_sum(sum);
}

// acc[c] = Sᵀx for one token and up to 64 columns.
inline void state_times(const float* state, const float* x, int64_t dk, int64_t dv, int64_t width, F acc[4]) {
  const int64_t vectors = (width + 15) / 16;
  for (int c = 0; c < 4; ++c) acc[c] = f_zero();
  for (int64_t i = 0; i < dk; ++i) {
    const F xi = f_set1(x[i]);
    for (int64_t c = 0; c < vectors; ++c)
      acc[c] = f_fma(xi, f_load_n(state + i * dv + c * 16, lanes_at(width, c)), acc[c]);
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
  float* among_keys = scratch;                             // (tokens, 64): β_i e^{γ_i−γ_j}(k_i·k_j), j < i
  float* scores = among_keys + kDeltaChunk * kDeltaChunk;  // (tokens, 64): e^{γ_i−γ_j}(q_i·k_j), j ≤ i
  float* deltas = scores + kDeltaChunk * kDeltaChunk;      // (tokens, 64 columns)
  float* gamma = deltas + kDeltaChunk * kDeltaColumns;     // (tokens)
  float* from_start = gamma + kDeltaChunk;                 // e^{γ_i}
  float* to_end = from_start + kDeltaChunk;                // e^{γ_last−γ_i}
  float sum = 0.0f;
  for (int64_t i = 0; i < tokens; ++i) gamma[i] = sum = sum + g[i * ldg];
  for (int64_t i = 0; i < tokens; ++i) {
    from_start[i] = exp_one(gamma[i]);
    to_end[i] = exp_one(gamma[tokens - 1] - gamma[i]);
    for (int64_t j = 0; j <= i; ++j) {
      const float ratio = exp_one(gamma[i] - gamma[j]);
      scores[i * kDeltaChunk + j] = ratio * dot_of(q + i * ldq, k + j * ldq, dk);
      among_keys[i * kDeltaChunk + j] = beta[i * ldg] * ratio * dot_of(k + i * ldq, k + j * ldq, dk);
    }
  }
  for (int64_t c0 = 0; c0 < dv; c0 += kDeltaColumns) {
    const int64_t width = dv - c0 < kDeltaColumns ? dv - c0 : kDeltaColumns, vectors = (width + 15) / 16;
    float* s = state + c0;
    for (int64_t i = 0; i < tokens; ++i) {
      F seen[4], query[4];
      state_times(s, k + i * ldq, dk, dv, width, seen);
      state_times(s, q + i * ldq, dk, dv, width, query);
      const F start = f_set1(from_start[i]), rate = f_set1(beta[i * ldg]);
      F delta[4], result[4];
      for (int64_t c = 0; c < vectors; ++c) {
        const F value = f_load_n(v + i * ldv + c0 + c * 16, lanes_at(width, c));
        delta[c] = f_mul(rate, f_sub(value, f_mul(start, seen[c])));
        result[c] = f_mul(start, query[c]);
      }
      for (int64_t j = 0; j < i; ++j) {
        const F key = f_set1(-among_keys[i * kDeltaChunk + j]), score = f_set1(scores[i * kDeltaChunk + j]);
        for (int64_t c = 0; c < vectors; ++c) {
          const F earlier = f_load(deltas + j * kDeltaColumns + c * 16);
          delta[c] = f_fma(key, earlier, delta[c]);
          result[c] = f_fma(score, earlier, result[c]);
        }
      }
      const F own = f_set1(scores[i * kDeltaChunk + i]);
      for (int64_t c = 0; c < vectors; ++c) {
        f_store(deltas + i * kDeltaColumns + c * 16, delta[c]);
        f_store_n(out + i * ldo + c0 + c * 16, f_fma(own, delta[c], result[c]), lanes_at(width, c));
      }
    }
    const F keep = f_set1(from_start[tokens - 1]);
    for (int64_t r = 0; r < dk; ++r)
      for (int64_t c = 0; c < vectors; ++c) {
        float* at = s + r * dv + c * 16;
        F next = f_mul(keep, f_load_n(at, lanes_at(width, c)));
        for (int64_t j = 0; j < tokens; ++j)
          next = f_fma(f_set1(k[j * ldq + r] * to_end[j]), f_load(deltas + j * kDeltaColumns + c * 16), next);
        f_store_n(at, next, lanes_at(width, c));
      }
  }
}

}  // namespace
