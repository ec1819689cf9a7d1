// e^x and log(1 + x) in float64, the same bits on every processor: IEEE operations only, products fused only where `fma` is written.
// Shared by the CPU's kernels and the GPU's, whose libraries differ in the last bits.
#pragma once

#ifndef __CUDACC__
#include <cmath>
#include <cstdint>
#include <cstring>
#endif

#ifdef __CUDACC__
#define EXPERTSTREAM_F64 __device__ __forceinline__
#else
#define EXPERTSTREAM_F64 inline
#endif

namespace expertstream {

EXPERTSTREAM_F64 double f64_of_bits(unsigned long long bits) {
#ifdef __CUDACC__
  return __longlong_as_double(static_cast<long long>(bits));
#else
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
#endif
}

EXPERTSTREAM_F64 unsigned long long bits_of_f64(double x) {
#ifdef __CUDACC__
  return static_cast<unsigned long long>(__double_as_longlong(x));
#else
  unsigned long long bits;
  std::memcpy(&bits, &x, 8);
  return bits;
#endif
}

// e^x, error below 1 ulp: x = n·ln 2 + r, then the Taylor series up to r¹³/13! by Horner's rule. 0 below −708, e^709 above 709; NaN stays
// NaN.
EXPERTSTREAM_F64 double exp_f64(double x) {
  if (x != x) return x;
  if (x < -708.0) return 0.0;
  if (x > 709.0) x = 709.0;
  const double scaled = x * 1.4426950408889634;
  const long long n = static_cast<long long>(scaled < 0.0 ? scaled - 0.5 : scaled + 0.5);
  const double whole = static_cast<double>(n);
  double r = fma(whole, -6.93147180369123816490e-01, x);
  r = fma(whole, -1.90821492927058770002e-10, r);
  double p = 1.0 / 6227020800.0;
  p = fma(p, r, 1.0 / 479001600.0);
  p = fma(p, r, 1.0 / 39916800.0);
  p = fma(p, r, 1.0 / 3628800.0);
  p = fma(p, r, 1.0 / 362880.0);
  p = fma(p, r, 1.0 / 40320.0);
  p = fma(p, r, 1.0 / 5040.0);
  p = fma(p, r, 1.0 / 720.0);
  p = fma(p, r, 1.0 / 120.0);
  p = fma(p, r, 1.0 / 24.0);
  p = fma(p, r, 1.0 / 6.0);
  p = fma(p, r, 0.5);
  p = fma(p, r, 1.0);
  p = fma(p, r, 1.0);
  return p * f64_of_bits(static_cast<unsigned long long>(n + 1023) << 52);
}

// log(1 + x) for x ≥ 0, error below 2 ulp: u = 1 + x = m·2^k with m in [√½, √2), log m = 2·artanh((m − 1)/(m + 1)) as a series, and
// what rounding u lost is added back, divided by u.
EXPERTSTREAM_F64 double log1p_f64(double x) {
  const double u = 1.0 + x;
  if (u - 1.0 == 0.0) return x;
  const unsigned long long bits = bits_of_f64(u);
  long long k = static_cast<long long>(bits >> 52) - 1023;
  double m = f64_of_bits((bits & 0xfffffffffffffull) | 0x3ff0000000000000ull);
  if (m > 1.4142135623730951) {
    m = m * 0.5;
    k = k + 1;
  }
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double p = 1.0 / 23.0;
  p = fma(p, z, 1.0 / 21.0);
  p = fma(p, z, 1.0 / 19.0);
  p = fma(p, z, 1.0 / 17.0);
  p = fma(p, z, 1.0 / 15.0);
  p = fma(p, z, 1.0 / 13.0);
  p = fma(p, z, 1.0 / 11.0);
  p = fma(p, z, 1.0 / 9.0);
  p = fma(p, z, 1.0 / 7.0);
  p = fma(p, z, 1.0 / 5.0);
  p = fma(p, z, 1.0 / 3.0);
  const double log_m = 2.0 * fma(s * z, p, s), lost = (x - (u - 1.0)) / u;
  const double whole = static_cast<double>(k);
  return fma(whole, 6.93147180369123816490e-01, fma(whole, 1.90821492927058770002e-10, log_m + lost));
}

// −e^a_log·softplus(x): the log decay of a gated-delta state at one token.
EXPERTSTREAM_F64 float log_decay(float a, float a_log, float dt_bias) {
  const double x = static_cast<double>(a) + static_cast<double>(dt_bias);
  const double softplus = x > 20.0 ? x : log1p_f64(exp_f64(x));
  return static_cast<float>(-exp_f64(static_cast<double>(a_log)) * softplus);
}

}  // namespace expertstream
