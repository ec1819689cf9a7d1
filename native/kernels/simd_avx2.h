// 16 lanes as two AVX2 registers (with FMA and F16C).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct F {
  __m256 lo, hi;
};
struct I {
  __m256i lo, hi;
};
template <int BITS>
struct Planes {
  __m256i lo[16 / BITS], hi[16 / BITS];
};

inline F f_set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline F f_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F f_load_n(const float* p, int64_t n) {
  if (n >= 16) return f_load(p);
  float t[16] = {};
  std::memcpy(t, p, 4 * n);
  return f_load(t);
}
inline void f_store(float* p, F a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void f_store_n(float* p, F a, int64_t n) {
  if (n >= 16) return f_store(p, a);
  float t[16];
  f_store(t, a);
  std::memcpy(p, t, 4 * n);
}
inline F f_add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F f_sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F f_mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F f_div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F f_fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline F f_max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F f_min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F f_abs(F a) {
  __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(a.lo, mask), _mm256_and_ps(a.hi, mask)};
}
inline F f_round(F a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
inline float f_sum(F a) {
  __m256 h = _mm256_add_ps(a.lo, a.hi);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline float f_maximum(F a) {
  __m256 h = _mm256_max_ps(a.lo, a.hi);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline __m256 exp2_int(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvttps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline F f_exp2_int(F n) { return {exp2_int(n.lo), exp2_int(n.hi)}; }
inline __m256 load_bf16(const uint8_t* p) {
  __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline F f_load_bf16(const uint8_t* p) { return {load_bf16(p), load_bf16(p + 16)}; }
inline F f_load_f16(const uint8_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
}
// Eight int32 within int16's or uint16's range to eight 16-bit values, in order.
inline __m128i narrow(__m256i a) {
  __m256i low = _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  return _mm256_castsi256_si128(packed);
}
inline void store_bf16(uint16_t* p, __m256 a) {
  __m256i bits = _mm256_castps_si256(a), high = _mm256_srli_epi32(bits, 16);
  __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(rounded));
}
inline void f_store_bf16(uint16_t* p, F a) {
  store_bf16(p, a.lo);
  store_bf16(p + 8, a.hi);
}
inline void f_store_i16(int16_t* p, F a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(_mm256_cvttps_epi32(a.lo)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), narrow(_mm256_cvttps_epi32(a.hi)));
}

template <int BITS>
inline Planes<BITS> unpack(const uint8_t* w) {
  Planes<BITS> r;
  __m256i lo = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  __m256i hi = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32));
  __m256i mask = _mm256_set1_epi16((1 << BITS) - 1);
#pragma GCC unroll 8
  for (int p = 0; p < 16 / BITS; ++p) {
    r.lo[p] = _mm256_and_si256(_mm256_srli_epi16(lo, p * BITS), mask);
    r.hi[p] = _mm256_and_si256(_mm256_srli_epi16(hi, p * BITS), mask);
  }
  return r;
}
template <int BITS>
inline I dot(const Planes<BITS>& w, const int16_t* xq) {
  I r = {_mm256_setzero_si256(), _mm256_setzero_si256()};
#pragma GCC unroll 8
  for (int p = 0; p < 16 / BITS; ++p) {
    __m256i x0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(xq + 32 * p));
    __m256i x1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(xq + 32 * p + 16));
    r.lo = _mm256_add_epi32(r.lo, _mm256_madd_epi16(w.lo[p], x0));
    r.hi = _mm256_add_epi32(r.hi, _mm256_madd_epi16(w.hi[p], x1));
  }
  return r;
}
inline F f_from_int(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
template <int N>
inline F f_spread(F s, int first) {
  constexpr int shift = N == 1 ? 4 : N == 2 ? 3 : N == 4 ? 2 : 1;
  const __m256i lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  __m256 from = first >= 8 ? s.hi : s.lo;
  __m256i base = _mm256_set1_epi32(first & 7);
  __m256i lo = _mm256_add_epi32(_mm256_srli_epi32(lane, shift), base);
  __m256i hi = _mm256_add_epi32(_mm256_srli_epi32(_mm256_add_epi32(lane, _mm256_set1_epi32(8)), shift), base);
  return {_mm256_permutevar8x32_ps(from, lo), _mm256_permutevar8x32_ps(from, hi)};
}

}  // namespace
