// 16 lanes as four NEON registers; with the dot-product extension if the including file is compiled for it.
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
// 64 bytes of a weight tile: lane r holds four bytes of row r.
struct W {
  uint8x16_t v[4];
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
inline F f_load_i8(const uint8_t* p) {
  F r;
  for (int half = 0; half < 2; ++half) {
    const int16x8_t w = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p + 8 * half)));
    r.v[2 * half] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(w)));
    r.v[2 * half + 1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(w)));
  }
  return r;
}
inline F f_load_e8m0(const uint8_t* p) {
  F r;
  for (int i = 0; i < 4; ++i) {
    uint32_t four;
    std::memcpy(&four, p + 4 * i, 4);
    const uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
    const uint32x4_t byte = vmovl_u16(vget_low_u16(wide));
    uint32x4_t bits = vshlq_n_u32(byte, 23);
    bits = vorrq_u32(bits, vandq_u32(vceqq_u32(byte, vdupq_n_u32(0)), vdupq_n_u32(0x400000)));
    bits = vorrq_u32(bits, vandq_u32(vceqq_u32(byte, vdupq_n_u32(255)), vdupq_n_u32(0x7fc00000)));
    r.v[i] = vreinterpretq_f32_u32(bits);
  }
  return r;
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
inline void f_store_i8(int8_t* p, F a) {
  int16x8_t lo = vcombine_s16(vmovn_s32(vcvtq_s32_f32(a.v[0])), vmovn_s32(vcvtq_s32_f32(a.v[1])));
  int16x8_t hi = vcombine_s16(vmovn_s32(vcvtq_s32_f32(a.v[2])), vmovn_s32(vcvtq_s32_f32(a.v[3])));
  vst1q_s8(p, vcombine_s8(vmovn_s16(lo), vmovn_s16(hi)));
}

// Transposes sixteen vectors as a 16 × 16 matrix: out[i · ld + r] = rows[r][i].
inline void f_transpose(const F* rows, float* out, int64_t ld) {
  float t[16];
  for (int r = 0; r < 16; ++r) {
    f_store(t, rows[r]);
    for (int i = 0; i < 16; ++i) out[i * ld + r] = t[i];
  }
}

#ifdef __ARM_FEATURE_DOTPROD
constexpr int kMaxLines = 4;
#else
constexpr int kMaxLines = 2;
#endif
constexpr int kGemmRows = 3, kGemmVectors = 2;  // sums of a float product that fit in registers
constexpr int kDenseRows = 2, kDenseTokens = 3;

inline W w_load(const uint8_t* p) { return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}; }
template <int BITS>
inline W w_plane(W w, int plane) {
  if (BITS == 8) return w;
  const uint8x16_t mask = vdupq_n_u8((1 << BITS) - 1);
  for (int i = 0; i < 4; ++i) w.v[i] = vandq_u8(vshlq_u8(w.v[i], vdupq_n_s8(static_cast<int8_t>(-plane * BITS))), mask);
  return w;
}
inline W w_lookup(W w, const uint8_t* table) {
  const uint8x16_t lanes = vld1q_u8(table);
  for (int i = 0; i < 4; ++i) w.v[i] = vqtbl1q_u8(lanes, w.v[i]);
  return w;
}
inline I i_set1(int32_t a) { return {{vdupq_n_s32(a), vdupq_n_s32(a), vdupq_n_s32(a), vdupq_n_s32(a)}}; }
inline I i_add(I a, I b) {
  for (int i = 0; i < 4; ++i) a.v[i] = vaddq_s32(a.v[i], b.v[i]);
  return a;
}
inline I i_join(I high, I low) {
  for (int i = 0; i < 4; ++i) high.v[i] = vaddq_s32(vshlq_n_s32(high.v[i], 8), low.v[i]);
  return high;
}
template <int BITS>
inline I i_dot(I acc, W w, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(four));
#ifdef __ARM_FEATURE_DOTPROD
  if (BITS <= 4) {
    for (int i = 0; i < 4; ++i) acc.v[i] = vdotq_s32(acc.v[i], vreinterpretq_s8_u8(w.v[i]), xs);
  } else {  // w = (w − 128) + 128, the former a signed byte, the latter twice 64
    const int8x16_t half = vdupq_n_s8(64);
    for (int i = 0; i < 4; ++i) {
      const int8x16_t ws = vreinterpretq_s8_u8(veorq_u8(w.v[i], vdupq_n_u8(128)));
      acc.v[i] = vdotq_s32(vdotq_s32(vdotq_s32(acc.v[i], ws, xs), half, xs), half, xs);
    }
  }
#else
  for (int i = 0; i < 4; ++i) {
    int16x8_t lo, hi;  // products of rows 0 and 1, and of rows 2 and 3
    int32x4_t a, b;
    if (BITS <= 4) {  // products of signed bytes fit in 16 bits
      const int8x16_t ws = vreinterpretq_s8_u8(w.v[i]);
      lo = vmull_s8(vget_low_s8(ws), vget_low_s8(xs));
      hi = vmull_high_s8(ws, xs);
      a = vpaddlq_s16(lo);
      b = vpaddlq_s16(hi);
    } else {
      const int16x8_t x16 = vmovl_s8(vget_low_s8(xs));
      lo = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(w.v[i])));
      hi = vreinterpretq_s16_u16(vmovl_high_u8(w.v[i]));
      a = vpaddq_s32(vmull_s16(vget_low_s16(lo), vget_low_s16(x16)), vmull_high_s16(lo, x16));
      b = vpaddq_s32(vmull_s16(vget_low_s16(hi), vget_low_s16(x16)), vmull_high_s16(hi, x16));
    }
    acc.v[i] = vaddq_s32(acc.v[i], vpaddq_s32(a, b));
  }
#endif
  return acc;
}
inline F f_from_int(I a) { QUARTERS(vcvtq_f32_s32(a.v[i])); }

#undef QUARTERS

}  // namespace
