// What all kernels share. Compiled by NVRTC without contraction (--fmad=false): every sum has the order of native/kernels, every product is
// fused only where `fmaf` is written, so that results are the CPU's, bit for bit.
#pragma once

#include "float64.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifndef EXPERTSTREAM_EMULATED
// Memory whose size is chosen at launch, as an array of bytes aligned to 16.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]

// Programmatic dependent launch, in graphs: a kernel starts when all blocks of the one before have let it, and reads what earlier ones wrote when
// those are done. What comes before that reads only what no kernel of the graph has written. Without it, all this is without effect.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// acc + Σ over four bytes of w (unsigned) · x (signed).
__device__ __forceinline__ int dot4(u32 w, int x, int acc) {
  int d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(w), "r"(x), "r"(acc));
  return d;
}

// c (16×8) += a (16×32, unsigned bytes) · b (32×8, signed bytes), spread over a warp as mma.m16n8k32 defines.
__device__ __forceinline__ void mma_u8_s8(int* c, const u32* a, const u32* b) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // the same from four smaller ones
  const auto part = [](int* c, u32 a, u32 b) {
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                 : "+r"(c[0]), "+r"(c[1])
                 : "r"(a), "r"(b));
  };
  part(c, a[0], b[0]);
  part(c, a[2], b[1]);
  part(c + 2, a[1], b[0]);
  part(c + 2, a[3], b[1]);
#endif
}

// 16 bytes that are read once: weights do not displace activations from the L1 cache.
__device__ __forceinline__ uint4 load_once(const u8* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Waits until the host has written at least `value`; false if that takes longer than `patience`, in ns.
__device__ __forceinline__ bool wait_for_host(const i64* word, i64 value, i64 patience) {
  u64 begin, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  while (*static_cast<const volatile i64*>(word) < value) {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (static_cast<i64>(now - begin) > patience) return false;
  }
  __threadfence_system();
  return true;
}
#endif

__device__ __forceinline__ void after_previous() {
  wait_for_previous();
  let_next_start();
}
// For kernels of few blocks, which leave room for those of the next one.
__device__ __forceinline__ void after_previous_beside_next() {
  let_next_start();
  wait_for_previous();
}

constexpr u32 kWarp = 0xffffffffu;

// As DType in native/kernels/kernels.h.
enum DType : int { kF32 = 0, kBF16 = 1, kF16 = 2, kI8 = 3, kE8M0 = 4 };
// As Codes there.
enum Codes : int { kDense = 0, kAffine = 1, kSymmetric = 2, kE2M1 = 3 };

__device__ __forceinline__ int value_bytes(int dtype) { return dtype == kF32 ? 4 : dtype == kBF16 || dtype == kF16 ? 2 : 1; }

__device__ __forceinline__ float f16_value(u32 h) {
  const u32 sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  if (exponent == 31u) return __uint_as_float(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));
  if (exponent == 0u) {
    const float f = static_cast<float>(mantissa) * 5.9604644775390625e-08f;  // 2^−24
    return sign ? -f : f;
  }
  return __uint_as_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

// Value i of an array of dtype, as float32.
__device__ __forceinline__ float load_value(const u8* p, i64 i, int dtype) {
  if (dtype == kBF16) return __uint_as_float(static_cast<u32>(reinterpret_cast<const u16*>(p)[i]) << 16);
  if (dtype == kF16) return f16_value(reinterpret_cast<const u16*>(p)[i]);
  if (dtype == kF32) return reinterpret_cast<const float*>(p)[i];
  if (dtype == kI8) return static_cast<float>(static_cast<signed char>(p[i]));
  const u32 e = p[i];
  return __uint_as_float(e == 0u ? 0x400000u : e == 255u ? 0x7fc00000u : e << 23);
}

__device__ __forceinline__ u16 to_bf16(float x) {
  const u32 bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<u16>((bits >> 16) | 0x40u);
  return static_cast<u16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// f_max and f_min of native/kernels/simd_*.h: the second operand if either is NaN.
__device__ __forceinline__ float larger(float a, float b) { return a > b ? a : b; }
__device__ __forceinline__ float smaller(float a, float b) { return a < b ? a : b; }

// f_exp of native/kernels/rows.h.
__device__ __forceinline__ float exp_f32(float x) {
  x = smaller(88.0f, larger(-87.3365f, x));
  const float n = rintf(x * 1.44269504f);
  float r = fmaf(n, -0.693359375f, x);
  r = fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p, r * r, r) + 1.0f;
  return p * __uint_as_float(static_cast<u32>(static_cast<int>(n) + 127) << 23);
}
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + exp_f32(0.0f - x)); }
__device__ __forceinline__ float silu(float x) { return x / (1.0f + exp_f32(0.0f - x)); }

// The activation between an expert's matrices: formats.Activation.
__device__ __forceinline__ float activate(float gate, float up, float alpha, float limit) {
  if (limit > 0.0f) {
    const float g = smaller(limit, gate), u = larger(-limit, smaller(limit, up));
    return (u + 1.0f) * g * sigmoid(alpha * g);
  }
  return silu(gate) * up;
}

// The sum of 16 lanes in the order of f_sum: called by whole warps, for each half on its own; all its lanes get the sum.
__device__ __forceinline__ float lane_sum(float v) {
#pragma unroll
  for (int half = 8; half; half /= 2) v = v + __shfl_xor_sync(kWarp, v, half);
  return v;
}
// Σx² of n values in the order of native/kernels/rows.h; called by a half-warp with its lane.
__device__ __forceinline__ float sum_of_squares(const float* x, int n, int lane) {
  float sum = 0.0f;
#pragma unroll 8
  for (int c = lane; c < n; c += 16) sum = fmaf(x[c], x[c], sum);
  return lane_sum(sum);
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v = larger(v, __shfl_xor_sync(kWarp, v, step));
  return v;
}
__device__ __forceinline__ int warp_sum(int v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(kWarp, v, step);
  return v;
}

// The largest of a warp's words.
__device__ __forceinline__ u32 warp_max_word(u32 v) {
#if __CUDA_ARCH__ >= 800
  u32 most;
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(most) : "r"(v));
  return most;
#else
#pragma unroll
  for (int step = 16; step; step /= 2) {
    const u32 other = __shfl_xor_sync(kWarp, v, step);
    v = other > v ? other : v;
  }
  return v;
#endif
}

// What an expert layer adds to the residual stream: acc (tokens, n), or nothing; or, with y, Σ weights[p]·y[p] over a token's top_k pairs,
// ascending, added to acc, or to sigmoid(factor of the token)·shared if that is given.
struct Sum {
  const float* acc;
  const float* y;
  const float* weights;
  const float* shared;
  const float* factor;
  i64 top_k;

  __device__ __forceinline__ float of(i64 token, int n, int c) const {
    const i64 at = token * n + c;
    float total = shared ? sigmoid(factor[token]) * shared[at] : acc[at];
    if (y)
#pragma unroll 4
      for (i64 p = token * top_k; p < (token + 1) * top_k; ++p) total = fmaf(weights[p], y[p * n + c], total);
    return total;
  }
  // x[token, c], to which it is added in place.
  __device__ __forceinline__ float add_to(float* x, i64 token, int n, int c) const {
    const i64 at = token * n + c;
    if (!acc) return x[at];
    return x[at] = x[at] + of(token, n, c);
  }
};

// Where a matrix lies, and in a list of matrices with one input: the first of its tiles and of its rows among all of them.
struct Place {
  const u8* data;
  const u8* scales;
  const u8* biases;
  const float* row_bias;
  i64 rows, first_tile, first_row;
};
// Up to four matrices, a kernel's parameter.
struct Places {
  Place at[4];

  // The matrix that has a tile, of `count`.
  __device__ __forceinline__ Place of_tile(i64 tile, int count) const {
    Place found = at[0];
#pragma unroll
    for (int m = 1; m < 4; ++m)
      if (m < count && tile >= at[m].first_tile) found = at[m];
    return found;
  }
};
