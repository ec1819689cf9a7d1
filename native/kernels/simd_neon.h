// 16 lanes as four NEON registers.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace {

struct F {
  float32x4_t v[4];
};
struct I {
  int32x4_t v[4];
};
template <int BITS>
struct Planes {
  int16x8_t v[16 / BITS][4];
};

#define QUARTERS(expression)                         \
  F r;                                               \
  for (int i = 0; i < 4; ++i) r.v[i] = (expression); \
  return r

inline F f_set1(float a) { QUARTERS(vdupq_n_f32(a)); }
inline F f_zero() { return f_set1(0.0f); }
inline F f_load(const float* p) { QUARTERS(vld1q_f32(p + 4 * i)); }
inline F f_load_n(const float* p, int64_t n) {
  if (n >= 16) return f_load(p);
  float t[16] = {};
  std::memcpy(t, p, 4 * n);
  return f_load(t);
}
inline void f_store(float* p, F a) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
inline void f_store_n(float* p, F a, int64_t n) {
  if (n >= 16) return f_store(p, a);
  float t[16];
  f_store(t, a);
  std::memcpy(p, t, 4 * n);
}
inline F f_add(F a, F b) { QUARTERS(vaddq_f32(a.v[i], b.v[i])); }
inline F f_sub(F a, F b) { QUARTERS(vsubq_f32(a.v[i], b.v[i])); }
inline F f_mul(F a, F b) { QUARTERS(vmulq_f32(a.v[i], b.v[i])); }
inline F f_div(F a, F b) { QUARTERS(vdivq_f32(a.v[i], b.v[i])); }
inline F f_fma(F a, F b, F c) { QUARTERS(vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
// x86's max and min return the second operand when the comparison fails; a select does the same.
inline F f_max(F a, F b) { QUARTERS(vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
inline F f_min(F a, F b) { QUARTERS(vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
inline F f_abs(F a) { QUARTERS(vabsq_f32(a.v[i])); }
inline F f_round(F a) { QUARTERS(vrndnq_f32(a.v[i])); }
inline float f_sum(F a) {
  float32x4_t q = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  float32x2_t d = vadd_f32(vget_low_f32(q), vget_high_f32(q));
  return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
}
inline float f_maximum(F a) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3]))); }
inline F f_exp2_int(F n) {
  QUARTERS(vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23)));
}
inline F f_load_bf16(const uint8_t* p) {
  QUARTERS(vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p + 8 * i)), 16)));
}
inline F f_load_f16(const uint8_t* p) { QUARTERS(vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 8 * i)))); }
inline void f_store_bf16(uint16_t* p, F a) {
  for (int i = 0; i < 4; ++i) {
    uint32x4_t bits = vreinterpretq_u32_f32(a.v[i]), high = vshrq_n_u32(bits, 16);
    uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
    uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    uint32x4_t number = vceqq_f32(a.v[i], a.v[i]);
    vst1_u16(p + 4 * i, vmovn_u32(vbslq_u32(number, rounded, vorrq_u32(high, vdupq_n_u32(0x40)))));
  }
}
inline void f_store_i16(int16_t* p, F a) {
  for (int i = 0; i < 4; ++i) vst1_s16(p + 4 * i, vmovn_s32(vcvtq_s32_f32(a.v[i])));
}

template <int BITS>
inline Planes<BITS> unpack(const uint8_t* w) {
  Planes<BITS> r;
  const uint16x8_t mask = vdupq_n_u16((1 << BITS) - 1);
  for (int i = 0; i < 4; ++i) {
    uint16x8_t words = vreinterpretq_u16_u8(vld1q_u8(w + 16 * i));
    for (int p = 0; p < 16 / BITS; ++p)
      r.v[p][i] =
          vreinterpretq_s16_u16(vandq_u16(vshlq_u16(words, vdupq_n_s16(static_cast<int16_t>(-p * BITS))), mask));
  }
  return r;
}
template <int BITS>
inline I dot(const Planes<BITS>& w, const int16_t* xq) {
  I r;
  for (int i = 0; i < 4; ++i) {
    int32x4_t low = vdupq_n_s32(0), high = vdupq_n_s32(0);
    for (int p = 0; p < 16 / BITS; ++p) {
      int16x8_t x = vld1q_s16(xq + 32 * p + 8 * i);
      low = vmlal_s16(low, vget_low_s16(w.v[p][i]), vget_low_s16(x));
      high = vmlal_high_s16(high, w.v[p][i], x);
    }
    r.v[i] = vpaddq_s32(low, high);
  }
  return r;
}
inline F f_from_int(I a) { QUARTERS(vcvtq_f32_s32(a.v[i])); }
template <int N>
inline F f_spread(F s, int first) {
  float t[16];
  f_store(t, s);
  const float* g = t + first;
  QUARTERS((N == 8) ? vcombine_f32(vdup_n_f32(g[(2 * i) % N]), vdup_n_f32(g[(2 * i + 1) % N]))
                    : vdupq_n_f32(g[i * N / 4]));
}

#undef QUARTERS

}  // namespace
