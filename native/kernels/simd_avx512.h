// 16 lanes as one AVX-512 register; the integer dot product is VNNI's.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

using F = __m512;
using I = __m512i;
using W = __m512i;  // 64 bytes of a weight tile: lane r holds four bytes of row r

inline __mmask16 first_lanes(int64_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }

inline F f_set1(float a) { return _mm512_set1_ps(a); }
inline F f_zero() { return _mm512_setzero_ps(); }
inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
inline F f_load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void f_store(float* p, F a) { _mm512_storeu_ps(p, a); }
inline void f_store_n(float* p, F a, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }
inline F f_add(F a, F b) { return _mm512_add_ps(a, b); }
inline F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F f_div(F a, F b) { return _mm512_div_ps(a, b); }
inline F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F f_max(F a, F b) { return _mm512_max_ps(a, b); }
inline F f_min(F a, F b) { return _mm512_min_ps(a, b); }
inline F f_abs(F a) { return _mm512_abs_ps(a); }
inline F f_round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline float f_sum(F a) {
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_shuffle_ps(q, q, 1)));
}
inline float f_maximum(F a) { return _mm512_reduce_max_ps(a); }
inline F f_exp2_int(F n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvttps_epi32(n), _mm512_set1_epi32(127)), 23));
}
inline F f_load_bf16(const uint8_t* p) {
  __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline F f_load_i8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline F f_load_e8m0(const uint8_t* p) {
  const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  __m512i bits = _mm512_slli_epi32(byte, 23);
  bits = _mm512_mask_set1_epi32(bits, _mm512_cmpeq_epi32_mask(byte, _mm512_setzero_si512()), 0x400000);
  bits = _mm512_mask_set1_epi32(bits, _mm512_cmpeq_epi32_mask(byte, _mm512_set1_epi32(255)), 0x7fc00000);
  return _mm512_castsi512_ps(bits);
}
inline F f_load_f16(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void f_store_bf16(uint16_t* p, F a) {
  __m512i bits = _mm512_castps_si512(a), high = _mm512_srli_epi32(bits, 16);
  __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
inline void f_store_i8(int8_t* p, F a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(a)));
}

// Transposes sixteen vectors as a 16 × 16 matrix: out[i · ld + r] = rows[r][i]. First pairs, then fours, then quarters
// of registers.
inline void f_transpose(const F* rows, float* out, int64_t ld) {
  F pairs[16], fours[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  auto low = [](F a, F b) { return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); };
  auto high = [](F a, F b) { return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))); };
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // fours[i + j]: column j of each quarter, of rows i to i + 3
    fours[i] = low(pairs[i], pairs[i + 2]);
    fours[i + 1] = high(pairs[i], pairs[i + 2]);
    fours[i + 2] = low(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = high(pairs[i + 1], pairs[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const F a = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x44);       // quarters 0 and 1 of rows 0 to 7
    const F b = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xee);       // quarters 2 and 3
    const F c = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x44);  // the same of rows 8 to 15
    const F e = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xee);
    _mm512_storeu_ps(out + j * ld, _mm512_shuffle_f32x4(a, c, 0x88));
    _mm512_storeu_ps(out + (4 + j) * ld, _mm512_shuffle_f32x4(a, c, 0xdd));
    _mm512_storeu_ps(out + (8 + j) * ld, _mm512_shuffle_f32x4(b, e, 0x88));
    _mm512_storeu_ps(out + (12 + j) * ld, _mm512_shuffle_f32x4(b, e, 0xdd));
  }
}

constexpr int kMaxLines = 12;
constexpr int kGemmRows = 6, kGemmVectors = 4;  // sums of a float product that fit in registers
constexpr int kDenseRows = 4, kDenseTokens = 6;

inline W w_load(const uint8_t* p) { return _mm512_loadu_si512(p); }
template <int BITS>
inline W w_plane(W w, int plane) {
  if (BITS == 8) return w;
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << BITS) - 1));
  return _mm512_and_si512(plane ? _mm512_srli_epi16(w, static_cast<unsigned>(plane * BITS)) : w, mask);
}
inline W w_lookup(W w, const uint8_t* table) {
  const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(sixteen), w);
}
inline I i_set1(int32_t a) { return _mm512_set1_epi32(a); }
inline I i_add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I i_join(I high, I low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low); }
template <int BITS>
inline I i_dot(I acc, W w, const int8_t* x) {
  // In assembly because the compiler first broadcasts into a separate register, and then runs out of registers.
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*reinterpret_cast<const int32_t*>(x)));
  return acc;
}
inline F f_from_int(I a) { return _mm512_cvtepi32_ps(a); }

}  // namespace
