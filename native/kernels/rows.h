// Norms, activations, rotary and convolution for one instruction set; included after its simd_*.h.
#pragma once

#include <cmath>
#include <cstring>

#include "float64.h"
#include "kernels.h"

namespace {

using namespace expertstream;

// e^x: x = n·ln 2 + r, then a polynomial of degree 7 in r (coefficients of Cephes' expf); error below 2 ulp.
// Clamped to [2^−126, 2^127]; NaN stays NaN, which is why x is the second operand.
inline F f_exp(F x) {
  x = f_min(f_set1(88.0f), f_max(f_set1(-87.3365f), x));
  const F n = f_round(f_mul(x, f_set1(1.44269504f)));
  F r = f_fma(n, f_set1(-0.693359375f), x);
  r = f_fma(n, f_set1(2.12194440e-4f), r);
  F p = f_set1(1.9875691500e-4f);
  p = f_fma(p, r, f_set1(1.3981999507e-3f));
  p = f_fma(p, r, f_set1(8.3334519073e-3f));
  p = f_fma(p, r, f_set1(4.1665795894e-2f));
  p = f_fma(p, r, f_set1(1.6666665459e-1f));
  p = f_fma(p, r, f_set1(5.0000001201e-1f));
  p = f_add(f_fma(p, f_mul(r, r), r), f_set1(1.0f));
  return f_mul(p, f_exp2_int(n));
}
inline F f_sigmoid(F x) { return f_div(f_set1(1.0f), f_add(f_set1(1.0f), f_exp(f_sub(f_zero(), x)))); }
inline F f_silu(F x) { return f_div(x, f_add(f_set1(1.0f), f_exp(f_sub(f_zero(), x)))); }
inline float exp_one(float x) {
  float t[16];
  f_store(t, f_exp(f_set1(x)));
  return t[0];
}

// Calls body(c, n) for 16 values at a time; n < 16 only in the last call.
template <class Body>
inline void for_lanes(int64_t count, Body body) {
  for (int64_t c = 0; c < count; c += 16) body(c, count - c < 16 ? count - c : 16);
}

inline float sum_of_squares(const float* x, int64_t n) {
  F sum = f_zero();
  for_lanes(n, [&](int64_t c, int64_t m) {
    const F v = f_load_n(x + c, m);
    sum = f_fma(v, v, sum);
  });
  return f_sum(sum);
}

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
  const F scale = f_set1(1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + eps));
  for_lanes(n, [&](int64_t c, int64_t m) {
    f_store_n(y + c, f_mul(f_mul(f_load_n(x + c, m), scale), f_load_n(weight + c, m)), m);
  });
}

void gated_rms_norm(const float* x, const float* z, const float* weight, int64_t n, float eps, float* y) {
  const F scale = f_set1(1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + eps));
  for_lanes(n, [&](int64_t c, int64_t m) {
    const F normed = f_mul(f_mul(f_load_n(x + c, m), scale), f_load_n(weight + c, m));
    f_store_n(y + c, f_mul(normed, f_silu(f_load_n(z + c, m))), m);
  });
}

void l2_norm(const float* x, int64_t n, float eps, float scale, float* y) {
  const F factor = f_set1(scale / std::sqrt(sum_of_squares(x, n) + eps));
  for_lanes(n, [&](int64_t c, int64_t m) { f_store_n(y + c, f_mul(f_load_n(x + c, m), factor), m); });
}

void swiglu(const float* gate, const float* up, int64_t n, float* y) {
  for_lanes(
      n, [&](int64_t c, int64_t m) { f_store_n(y + c, f_mul(f_silu(f_load_n(gate + c, m)), f_load_n(up + c, m)), m); });
}

void clamped_swiglu(const float* gate, const float* up, int64_t n, float alpha, float limit, float* y) {
  const F most = f_set1(limit), least = f_set1(-limit), one = f_set1(1.0f);
  for_lanes(n, [&](int64_t c, int64_t m) {
    // The limits come first, so that NaN stays NaN.
    const F g = f_min(most, f_load_n(gate + c, m)), u = f_max(least, f_min(most, f_load_n(up + c, m)));
    f_store_n(y + c, f_mul(f_mul(f_add(u, one), g), f_sigmoid(f_mul(f_set1(alpha), g))), m);
  });
}

void sigmoid_gate(float* y, const float* gate, int64_t n) {
  for_lanes(n, [&](int64_t c, int64_t m) {
    f_store_n(y + c, f_mul(f_load_n(y + c, m), f_sigmoid(f_load_n(gate + c, m))), m);
  });
}

void sigmoid(const float* x, int64_t n, float* y) {
  for_lanes(n, [&](int64_t c, int64_t m) { f_store_n(y + c, f_sigmoid(f_load_n(x + c, m)), m); });
}

void axpy(float a, const float* x, int64_t n, float* y) {
  const F factor = f_set1(a);
  for_lanes(n,
            [&](int64_t c, int64_t m) { f_store_n(y + c, f_fma(factor, f_load_n(x + c, m), f_load_n(y + c, m)), m); });
}

void scale(float* y, float a, int64_t n) {
  const F factor = f_set1(a);
  for_lanes(n, [&](int64_t c, int64_t m) { f_store_n(y + c, f_mul(factor, f_load_n(y + c, m)), m); });
}

// x ← e^(x − most); returns the sum.
inline float exp_and_sum(float* x, int64_t n, float most) {
  const F shift = f_set1(most);
  F total = f_zero();
  for_lanes(n, [&](int64_t c, int64_t m) {
    f_store_n(x + c, f_exp(f_sub(f_load_n(x + c, m), shift)), m);
    total = f_add(total, f_load_n(x + c, m));  // reloaded so that lanes past the end count as 0
  });
  return f_sum(total);
}

void softmax(float* x, int64_t n) {
  float most = x[0];
  for (int64_t i = 1; i < n; ++i) most = x[i] > most ? x[i] : most;
  const F sum = f_set1(exp_and_sum(x, n, most));
  for_lanes(n, [&](int64_t c, int64_t m) { f_store_n(x + c, f_div(f_load_n(x + c, m), sum), m); });
}

void decay(const float* a, const float* a_log, const float* dt_bias, int64_t n, float* g) {
  for (int64_t i = 0; i < n; ++i) g[i] = log_decay(a[i], a_log[i], dt_bias[i]);
}

void rotary(float* x, const float* cos, const float* sin, int64_t half) {
  for_lanes(half, [&](int64_t c, int64_t m) {
    const F x1 = f_load_n(x + c, m), x2 = f_load_n(x + half + c, m), co = f_load_n(cos + c, m),
            si = f_load_n(sin + c, m);
    f_store_n(x + c, f_fma(x1, co, f_sub(f_zero(), f_mul(x2, si))), m);
    f_store_n(x + half + c, f_fma(x2, co, f_mul(x1, si)), m);
  });
}

void to_bf16(const float* x, int64_t n, uint16_t* y) {
  for_lanes(n, [&](int64_t c, int64_t m) {
    uint16_t t[16];
    f_store_bf16(t, f_load_n(x + c, m));
    std::memcpy(y + c, t, static_cast<size_t>(m) * 2);
  });
}

void conv(const float* x, const float* weight, float* state, int64_t tokens, int64_t channels, int64_t kernel,
          int64_t begin, int64_t end, float* y) {
  for_lanes(end - begin, [&](int64_t offset, int64_t m) {
    const int64_t c = begin + offset;
    F window[8], taps[8];
    for (int64_t i = 0; i < kernel; ++i) taps[i] = f_load_n(weight + i * channels + c, m);
    for (int64_t i = 0; i + 1 < kernel; ++i) window[i] = f_load_n(state + i * channels + c, m);
    for (int64_t t = 0; t < tokens; ++t) {
      window[kernel - 1] = f_load_n(x + t * channels + c, m);
      F sum = f_zero();
      for (int64_t i = 0; i < kernel; ++i) sum = f_fma(taps[i], window[i], sum);
      f_store_n(y + t * channels + c, f_silu(sum), m);
      for (int64_t i = 0; i + 1 < kernel; ++i) window[i] = window[i + 1];
    }
    for (int64_t i = 0; i + 1 < kernel; ++i) f_store_n(state + i * channels + c, window[i], m);
  });
}

}  // namespace
