// 16 lanes in plain C++: defines every operation that the other simd_*.h implement.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct F {
  float v[16];
};
struct I {
  int32_t v[16];
};
// 64 bytes of a weight tile: lane r holds four bytes of row r.
struct W {
  uint8_t v[64];
};

#define LANEWISE(expression)                          \
  F r;                                                \
  for (int i = 0; i < 16; ++i) r.v[i] = (expression); \
  return r

inline F f_set1(float a) { LANEWISE(a); }
inline F f_zero() { return f_set1(0.0f); }
inline F f_load(const float* p) { LANEWISE(p[i]); }
inline F f_load_n(const float* p, int64_t n) { LANEWISE(i < n ? p[i] : 0.0f); }
inline void f_store(float* p, F a) { std::memcpy(p, a.v, 64); }
inline void f_store_n(float* p, F a, int64_t n) { std::memcpy(p, a.v, n < 16 ? 4 * static_cast<size_t>(n) : 64); }
inline F f_add(F a, F b) { LANEWISE(a.v[i] + b.v[i]); }
inline F f_sub(F a, F b) { LANEWISE(a.v[i] - b.v[i]); }
inline F f_mul(F a, F b) { LANEWISE(a.v[i] * b.v[i]); }
inline F f_div(F a, F b) { LANEWISE(a.v[i] / b.v[i]); }
inline F f_fma(F a, F b, F c) { LANEWISE(std::fma(a.v[i], b.v[i], c.v[i])); }
inline F f_max(F a, F b) { LANEWISE(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F f_min(F a, F b) { LANEWISE(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F f_abs(F a) { LANEWISE(std::fabs(a.v[i])); }
inline F f_round(F a) { LANEWISE(std::nearbyintf(a.v[i])); }
inline float f_sum(F a) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] + a.v[i + half];
  return a.v[0];
}
inline float f_maximum(F a) {
  float m = a.v[0];
  for (int i = 1; i < 16; ++i) m = m > a.v[i] ? m : a.v[i];
  return m;
}
// 2^n for integer n in [−126, 127].
inline F f_exp2_int(F n) {
  F r;
  for (int i = 0; i < 16; ++i) {
    uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23;
    std::memcpy(&r.v[i], &bits, 4);
  }
  return r;
}

inline uint16_t half_at(const uint8_t* p, int i) { return static_cast<uint16_t>(p[2 * i] | p[2 * i + 1] << 8); }
inline float bf16_to_f32(uint16_t h) {
  uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float f16_to_f32(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000u | (mantissa << 13);
    if (mantissa) bits |= 0x400000u;  // conversions quiet a NaN
  } else if (exponent == 0) {
    float f = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -f : f;
  } else {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline F f_load_bf16(const uint8_t* p) { LANEWISE(bf16_to_f32(half_at(p, i))); }
inline F f_load_i8(const uint8_t* p) { LANEWISE(static_cast<float>(static_cast<int8_t>(p[i]))); }
inline F f_load_f16(const uint8_t* p) { LANEWISE(f16_to_f32(half_at(p, i))); }
// 2^(byte − 127); 255 is NaN.
inline float e8m0_to_f32(uint8_t byte) {
  const uint32_t bits = byte == 0 ? 0x400000u : byte == 255 ? 0x7fc00000u : static_cast<uint32_t>(byte) << 23;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline F f_load_e8m0(const uint8_t* p) { LANEWISE(e8m0_to_f32(p[i])); }
// Round to nearest even; a NaN stays one.
inline void f_store_bf16(uint16_t* p, F a) {
  for (int i = 0; i < 16; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &a.v[i], 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
      p[i] = static_cast<uint16_t>((bits >> 16) | 0x40);
    else
      p[i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}
// Integer values in [−128, 127] to int8.
inline void f_store_i8(int8_t* p, F a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}

// Transposes sixteen vectors as a 16 × 16 matrix: out[i · ld + r] = rows[r][i].
inline void f_transpose(const F* rows, float* out, int64_t ld) {
  float t[16];
  for (int r = 0; r < 16; ++r) {
    f_store(t, rows[r]);
    for (int i = 0; i < 16; ++i) out[i * ld + r] = t[i];
  }
}

constexpr int kMaxLines = 4;  // lines of activations per pass over a tile: as many as have sums in registers
constexpr int kGemmRows = 2, kGemmVectors = 1;  // sums of a float product that fit in registers
constexpr int kDenseRows = 2, kDenseTokens = 2;

inline W w_load(const uint8_t* p) {
  W r;
  std::memcpy(r.v, p, 64);
  return r;
}
// The bits [plane·BITS, (plane + 1)·BITS) of every byte.
template <int BITS>
inline W w_plane(W w, int plane) {
  for (int i = 0; i < 64; ++i) w.v[i] = static_cast<uint8_t>((w.v[i] >> (plane * BITS)) & ((1 << BITS) - 1));
  return w;
}
// table[byte] for every byte; all are below 16.
inline W w_lookup(W w, const uint8_t* table) {
  for (int i = 0; i < 64; ++i) w.v[i] = table[w.v[i]];
  return w;
}
inline I i_set1(int32_t a) {
  I r;
  for (int i = 0; i < 16; ++i) r.v[i] = a;
  return r;
}
inline I i_add(I a, I b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
// 256·high + low.
inline I i_join(I high, I low) {
  for (int i = 0; i < 16; ++i) high.v[i] = high.v[i] * 256 + low.v[i];
  return high;
}
// Lane r: acc + Σ over its four bytes of w·x[0..3]; w below 2^BITS, or 32 if BITS is 4.
template <int BITS>
inline I i_dot(I acc, W w, const int8_t* x) {
  for (int i = 0; i < 64; ++i) acc.v[i / 4] += w.v[i] * x[i % 4];
  return acc;
}
inline F f_from_int(I a) { LANEWISE(static_cast<float>(a.v[i])); }

#undef LANEWISE

}  // namespace
