// 16 lanes as two AVX2 registers (with FMA and F16C); with AVX-VNNI if the including file is compiled for it.
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
// 64 bytes of a weight tile: lane r holds four bytes of row r.
struct W {
  __m256i lo, hi;
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
inline F f_load_i8(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8))))};
}
inline __m256 load_e8m0(const uint8_t* p) {
  const __m256i byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m256i zero = _mm256_cmpeq_epi32(byte, _mm256_setzero_si256()),
                nan = _mm256_cmpeq_epi32(byte, _mm256_set1_epi32(255));
  __m256i bits = _mm256_slli_epi32(byte, 23);
  bits = _mm256_or_si256(bits, _mm256_and_si256(zero, _mm256_set1_epi32(0x400000)));
  bits = _mm256_or_si256(bits, _mm256_and_si256(nan, _mm256_set1_epi32(0x7fc00000)));
  return _mm256_castsi256_ps(bits);
}
inline F f_load_e8m0(const uint8_t* p) { return {load_e8m0(p), load_e8m0(p + 8)}; }
inline F f_load_f16(const uint8_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
}
// Narrows eight int32 in the range of int16 or uint16 to 16 bits, in order.
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
inline void f_store_i8(int8_t* p, F a) {
  __m128i lo = narrow(_mm256_cvttps_epi32(a.lo)), hi = narrow(_mm256_cvttps_epi32(a.hi));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(lo, hi));
}

// Transposes eight registers as an 8 × 8 matrix: out[i · ld + r] = r-th[i].
inline void transpose8(const __m256* rows, float* out, int64_t ld) {
  __m256 pairs[8], fours[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(out + j * ld, _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x20));
    _mm256_storeu_ps(out + (4 + j) * ld, _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x31));
  }
}

// Transposes sixteen vectors as a 16 × 16 matrix: out[i · ld + r] = rows[r][i].
inline void f_transpose(const F* rows, float* out, int64_t ld) {
  for (int r = 0; r < 16; r += 8) {
    __m256 low[8], high[8];
    for (int i = 0; i < 8; ++i) low[i] = rows[r + i].lo, high[i] = rows[r + i].hi;
    transpose8(low, out + r, ld);
    transpose8(high, out + 8 * ld + r, ld);
  }
}

constexpr int kMaxLines = 4;
constexpr int kGemmRows = 3, kGemmVectors = 2;  // sums of a float product that fit in registers
constexpr int kDenseRows = 2, kDenseTokens = 3;

inline W w_load(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
template <int BITS>
inline W w_plane(W w, int plane) {
  if (BITS == 8) return w;
  const __m256i mask = _mm256_set1_epi8(static_cast<char>((1 << BITS) - 1));
  return {_mm256_and_si256(_mm256_srli_epi16(w.lo, plane * BITS), mask),
          _mm256_and_si256(_mm256_srli_epi16(w.hi, plane * BITS), mask)};
}
inline W w_lookup(W w, const uint8_t* table) {
  const __m256i lanes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm256_shuffle_epi8(lanes, w.lo), _mm256_shuffle_epi8(lanes, w.hi)};
}
inline I i_set1(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
inline I i_add(I a, I b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline I i_join(I high, I low) {
  return {_mm256_add_epi32(_mm256_slli_epi32(high.lo, 8), low.lo),
          _mm256_add_epi32(_mm256_slli_epi32(high.hi, 8), low.hi)};
}
template <int BITS>
inline I i_dot(I acc, W w, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  const __m256i xs = _mm256_set1_epi32(four);
#ifdef __AVXVNNI__
  return {_mm256_dpbusd_avx_epi32(acc.lo, w.lo, xs), _mm256_dpbusd_avx_epi32(acc.hi, w.hi, xs)};
#else
  if (BITS <= 4) {
    // Pairs are below 2·32·128 and so fit in the 16 bits that this instruction saturates to.
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(acc.lo, _mm256_madd_epi16(_mm256_maddubs_epi16(w.lo, xs), ones)),
            _mm256_add_epi32(acc.hi, _mm256_madd_epi16(_mm256_maddubs_epi16(w.hi, xs), ones))};
  }
  // 8 bits would not fit: even and odd bytes separately, as 16-bit values.
  const __m256i low_byte = _mm256_set1_epi16(255);
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(xs, 8), 8), odd = _mm256_srai_epi16(xs, 8);
  auto four_of = [&](__m256i v) {
    return _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(v, low_byte), even),
                            _mm256_madd_epi16(_mm256_srli_epi16(v, 8), odd));
  };
  return {_mm256_add_epi32(acc.lo, four_of(w.lo)), _mm256_add_epi32(acc.hi, four_of(w.hi))};
#endif
}
inline F f_from_int(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }

}  // namespace
