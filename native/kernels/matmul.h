// Matrix products for one instruction set; included after its simd_*.h. Everything here has internal linkage.
//
// The result for one (row, token) does not depend on the other tokens.
#pragma once

#include <cstring>

#include "kernels.h"

namespace {

using namespace expertstream;

// 16 values of dtype at p as float32; lanes from n on are 0.
inline F load_values(const uint8_t* p, DType dtype, int64_t n) {
  uint8_t t[64] = {};
  if (n < 16) {
    std::memcpy(t, p, static_cast<size_t>(n * value_bytes(dtype)));
    p = t;
  }
  if (dtype == DType::bf16) return f_load_bf16(p);
  if (dtype == DType::f16) return f_load_f16(p);
  if (dtype == DType::i8) return f_load_i8(p);
  if (dtype == DType::e8m0) return f_load_e8m0(p);
  float f[16];
  std::memcpy(f, p, 64);
  return f_load(f);
}

// One block of activations, starting at one of its tokens.
struct Lines {
  const int8_t* xq;
  const float *dx, *xsum;
  const int32_t* zsum;
  int64_t tokens;  // of the whole block: the stride
};

// Quantized weights: one tile of 16 rows by TOKENS tokens.
// Σ_c (q·s + b)·x = Σ_groups dx·(s·Σ q·xq + b·Σ xq); the inner sums are exact integers. E2M1: q is looked up and
// halved.
template <int BITS, int PLANES, int TOKENS, bool E2M1>
inline void quantized_tile(const Matrix& w, int64_t tile, const Lines& x, float* y, int64_t ldy) {
  constexpr int kLines = TOKENS * PLANES, kPerByte = 8 / BITS;
  constexpr int kSums = kLines == 1 ? 4 : kLines == 2 ? 2 : 1;  // sums per line: one would wait for its last addition
  constexpr int64_t kAhead = 2048;                              // bytes: far enough for the data to arrive in time
  const int64_t groups = w.cols / w.group_size, vectors = static_cast<int64_t>(w.group_size) * BITS / 32;
  const int64_t values = 16 * value_bytes(w.dtype), stride = 4 * x.tokens * PLANES;
  const bool affine = !E2M1 && w.codes == Codes::affine;
  const uint8_t* p = w.data + tile * groups * vectors * 64;
  const uint8_t* scales = w.scales + tile * groups * values;
  const uint8_t* biases = w.biases + tile * groups * values;
  const int8_t* xq = x.xq;
  F total[TOKENS];
#pragma GCC unroll 12
  for (int t = 0; t < TOKENS; ++t) total[t] = f_zero();

  for (int64_t g = 0; g < groups; ++g) {
    I sum[kLines][kSums];
#pragma GCC unroll 12
    for (int l = 0; l < kLines; ++l) {
      sum[l][0] = i_set1(affine ? 0 : x.zsum[g * x.tokens * PLANES + l]);
#pragma GCC unroll 4
      for (int i = 1; i < kSums; ++i) sum[l][i] = i_set1(0);
    }
    for (int64_t v = 0; v < vectors; v += 2) {
#pragma GCC unroll 2
      for (int pair = 0; pair < 2; ++pair) {
        const W packed = w_load(p);
        __builtin_prefetch(p + kAhead);
        p += 64;
#pragma GCC unroll 4
        for (int plane = 0; plane < kPerByte; ++plane) {
          W q = w_plane<BITS>(packed, plane);
          if (E2M1) q = w_lookup(q, kE2M1);
#pragma GCC unroll 12
          for (int l = 0; l < kLines; ++l) {
            I& s = sum[l][(pair * kPerByte + plane) % kSums];
            s = i_dot<BITS>(s, q, xq + 4 * l);
          }
          xq += stride;
        }
      }
    }
    F scale = load_values(scales, E2M1 ? DType::e8m0 : w.dtype, 16);
    if (E2M1) scale = f_mul(scale, f_set1(0.5f));
    scales += values;
#pragma GCC unroll 12
    for (int t = 0; t < TOKENS; ++t) {
#pragma GCC unroll 2
      for (int l = t * PLANES; l < (t + 1) * PLANES; ++l)
#pragma GCC unroll 4
        for (int i = 1; i < kSums; ++i) sum[l][0] = i_add(sum[l][0], sum[l][i]);
      const I dot = PLANES == 1 ? sum[t][0] : i_join(sum[t * PLANES][0], sum[t * PLANES + PLANES - 1][0]);
      total[t] = f_fma(f_mul(f_from_int(dot), f_set1(x.dx[g * x.tokens + t])), scale, total[t]);
    }
    if (affine) {
      const F bias = load_values(biases, w.dtype, 16);
      biases += values;
#pragma GCC unroll 12
      for (int t = 0; t < TOKENS; ++t) total[t] = f_fma(bias, f_set1(x.xsum[g * x.tokens + t]), total[t]);
    }
  }
  const int64_t rows = w.rows - tile * kTileRows;
#pragma GCC unroll 12
  for (int t = 0; t < TOKENS; ++t) f_store_n(y + t * ldy, total[t], rows < 16 ? rows : 16);
}

// A tile by all tokens of a block, as many at a time as fit in registers.
template <int BITS, int PLANES, int TOKENS, bool E2M1>
inline void quantized_block(const Matrix& w, int64_t tile, Lines x, int64_t left, float* y, int64_t ldy) {
  for (; left >= TOKENS; left -= TOKENS) {
    quantized_tile<BITS, PLANES, TOKENS, E2M1>(w, tile, x, y, ldy);
    x.xq += 4 * PLANES * TOKENS;
    x.dx += TOKENS;
    x.xsum += TOKENS;
    x.zsum += PLANES * TOKENS;
    y += TOKENS * ldy;
  }
  constexpr int kNext = TOKENS > 8 ? 8 : TOKENS > 4 ? 4 : TOKENS > 2 ? 2 : 1;
  if constexpr (TOKENS > 1) quantized_block<BITS, PLANES, kNext, E2M1>(w, tile, x, left, y, ldy);
}

template <int BITS, int PLANES, bool E2M1 = false>
void quantized_rows(const Matrix& w, int64_t begin, int64_t end, const Activations& x, float* y, int64_t ldy) {
  constexpr int64_t kBlock = kBlockLines / PLANES;
  const int64_t groups = w.cols / w.group_size, blocks = (x.tokens + kBlock - 1) / kBlock;
  // As many blocks as stay in the L2 cache while all tiles are multiplied by them.
  const int64_t together = w.cols < (1 << 18) / kBlockLines ? (1 << 18) / (kBlockLines * w.cols) : 1;
  for (int64_t b0 = 0; b0 < blocks; b0 += together)
    for (int64_t tile = begin / kTileRows; tile * kTileRows < end; ++tile)
      for (int64_t b = b0; b < blocks && b < b0 + together; ++b) {
        const int64_t t = b * kBlock, m = x.tokens - t < kBlock ? x.tokens - t : kBlock;
        const Lines lines{x.xq + t * PLANES * w.cols, x.dx + t * groups, x.xsum + t * groups,
                          x.zsum + t * PLANES * groups, m};
        quantized_block<BITS, PLANES, kMaxLines / PLANES, E2M1>(w, tile, lines, m, y + t * ldy + tile * kTileRows, ldy);
      }
}

template <DType DTYPE, int ROWS, int TOKS>
inline void dense_tile(const Matrix& w, int64_t row, const Activations& x, int64_t token, float* y, int64_t ldy) {
  constexpr int64_t kBytes = DTYPE == DType::f32 ? 4 : 2;
  F acc[ROWS][TOKS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < TOKS; ++t) acc[r][t] = f_zero();
  const float* xs = x.x + token * w.cols;
  const uint8_t* ws = w.data + row * w.cols * kBytes;
  int64_t c = 0;
  auto step = [&](int64_t n) __attribute__((always_inline)) {
    F values[TOKS];
#pragma GCC unroll 8
    for (int t = 0; t < TOKS; ++t) values[t] = n >= 16 ? f_load(xs + t * w.cols + c) : f_load_n(xs + t * w.cols + c, n);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const uint8_t* p = ws + (r * w.cols + c) * kBytes;
      if (TOKS == 1) __builtin_prefetch(p + ROWS * w.cols * kBytes);  // the same place in the next rows
      const F weight = load_values(p, DTYPE, n);
#pragma GCC unroll 8
      for (int t = 0; t < TOKS; ++t) acc[r][t] = f_fma(weight, values[t], acc[r][t]);
    }
  };
  for (; c + 16 <= w.cols; c += 16) step(16);
  if (c < w.cols) step(w.cols - c);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < TOKS; ++t) y[(token + t) * ldy + row + r] = f_sum(acc[r][t]);
}

// Rows [begin, end) by all tokens: four rows per step for one token, blocks of rows and tokens for many.
template <DType DTYPE>
void dense_rows(const Matrix& w, int64_t begin, int64_t end, const Activations& x, float* y, int64_t ldy) {
  int64_t r = begin;
  if (x.tokens < kDenseTokens) {
    for (; r + 4 <= end; r += 4)
      for (int64_t t = 0; t < x.tokens; ++t) dense_tile<DTYPE, 4, 1>(w, r, x, t, y, ldy);
  } else {
    for (; r + kDenseRows <= end; r += kDenseRows) {
      int64_t t = 0;
      for (; t + kDenseTokens <= x.tokens; t += kDenseTokens)
        dense_tile<DTYPE, kDenseRows, kDenseTokens>(w, r, x, t, y, ldy);
      for (; t < x.tokens; ++t) dense_tile<DTYPE, kDenseRows, 1>(w, r, x, t, y, ldy);
    }
  }
  for (; r < end; ++r)
    for (int64_t t = 0; t < x.tokens; ++t) dense_tile<DTYPE, 1, 1>(w, r, x, t, y, ldy);
}

void matmul_rows(const Matrix& w, int64_t begin, int64_t end, const Activations& x, float* y, int64_t ldy) {
  if (w.codes == Codes::e2m1)
    return x.planes == 1 ? quantized_rows<4, 1, true>(w, begin, end, x, y, ldy)
                         : quantized_rows<4, 2, true>(w, begin, end, x, y, ldy);
  if (w.bits == 4)
    return x.planes == 1 ? quantized_rows<4, 1>(w, begin, end, x, y, ldy)
                         : quantized_rows<4, 2>(w, begin, end, x, y, ldy);
  if (w.bits == 8)
    return x.planes == 1 ? quantized_rows<8, 1>(w, begin, end, x, y, ldy)
                         : quantized_rows<8, 2>(w, begin, end, x, y, ldy);
  if (w.bits == 2)
    return x.planes == 1 ? quantized_rows<2, 1>(w, begin, end, x, y, ldy)
                         : quantized_rows<2, 2>(w, begin, end, x, y, ldy);
  if (w.dtype == DType::bf16) return dense_rows<DType::bf16>(w, begin, end, x, y, ldy);
  if (w.dtype == DType::f16) return dense_rows<DType::f16>(w, begin, end, x, y, ldy);
  return dense_rows<DType::f32>(w, begin, end, x, y, ldy);
}

// Values of one row as float32; quantized: fma(q, scale, bias).
void dequantize_row(const Matrix& w, int64_t row, float* y) {
  const int64_t size = value_bytes(w.dtype);
  if (w.bits >= 16) {
    for (int64_t c = 0; c < w.cols; c += 16)
      f_store_n(y + c, load_values(w.data + (row * w.cols + c) * size, w.dtype, w.cols - c), w.cols - c);
    return;
  }
  const int64_t groups = w.cols / w.group_size, tile = row / kTileRows, lane = row % kTileRows;
  const int64_t per_vector = 32 / w.bits;
  const uint8_t* data = w.data + tile * (w.cols / per_vector) * 64 + lane * 4;
  const int mask = (1 << w.bits) - 1;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = ((tile * groups + g) * kTileRows + lane) * size;
    float one[16];
    f_store(one, load_values(w.scales + at, w.dtype, 1));
    const bool e2m1 = w.codes == Codes::e2m1;
    const float scale = e2m1 ? 0.5f * one[0] : one[0];
    float bias = -static_cast<float>(zero_point(w)) * scale;
    if (w.codes == Codes::affine) {
      f_store(one, load_values(w.biases + at, w.dtype, 1));
      bias = one[0];
    }
    for (int64_t c = g * w.group_size; c < (g + 1) * w.group_size; c += 16) {
      float q[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t within = (c + i) % per_vector;
        const int code = (data[(c + i) / per_vector * 64 + within % 4] >> (within / 4 * w.bits)) & mask;
        q[i] = static_cast<float>(e2m1 ? kE2M1[code] : code);
      }
      f_store(y + c, f_fma(f_load(q), f_set1(scale), f_set1(bias)));
    }
  }
}

void quantize_activations(const float* x, int64_t cols, int group_size, int planes, int zero_point,
                          const ActivationsOut& out) {
  const float levels = planes == 1 ? 127.0f : 32512.0f;
  for (int64_t g = 0; g < cols / group_size; ++g) {
    const float* xg = x + g * group_size;
    int8_t* to = out.xq + g * group_size * out.lines;
    float* dx = out.dx + g * (out.lines / planes);
    float* xsum = out.xsum + g * (out.lines / planes);
    int32_t* zsum = out.zsum + g * out.lines;
    F largest = f_zero(), poison = f_zero();
    for (int i = 0; i < group_size; i += 16) {
      largest = f_max(f_abs(f_load(xg + i)), largest);
      poison = f_fma(f_load(xg + i), f_zero(), poison);  // 0, or NaN if a value is infinite or NaN
    }
    const float most = f_maximum(largest);
    const bool finite = f_sum(poison) == 0.0f;
    const F inverse = f_set1(finite && most > 0.0f ? levels / most : 0.0f);
    F sums[2] = {f_zero(), f_zero()};
    for (int i = 0; i < group_size; i += 16) {
      F parts[2];
      parts[0] = finite ? f_round(f_mul(f_load(xg + i), inverse)) : f_zero();
      if (planes == 2) {
        // The quarter prevents ties, so that low stays within [−128, 127].
        const F high = f_round(f_fma(parts[0], f_set1(1.0f / 256), f_set1(0.25f / 256)));
        parts[1] = f_fma(high, f_set1(-256.0f), parts[0]);
        parts[0] = high;
      }
      for (int plane = 0; plane < planes; ++plane) {
        sums[plane] = f_add(sums[plane], parts[plane]);
        int8_t bytes[16];
        f_store_i8(bytes, parts[plane]);
        for (int j = 0; j < 4; ++j) std::memcpy(to + (i / 4 + j) * 4 * out.lines + 4 * plane, bytes + 4 * j, 4);
      }
    }
    float sum = 0.0f;
    for (int plane = 0; plane < planes; ++plane) {
      const float of_plane = f_sum(sums[plane]);  // an integer below 2^24: exact
      zsum[plane] = -zero_point * static_cast<int32_t>(of_plane);
      sum = sum * 256.0f + of_plane;
    }
    // Integers cannot represent non-finite values: the group's scale becomes NaN, and so does every product with it.
    *dx = finite ? most / levels : __builtin_nanf("");
    *xsum = *dx * sum;
  }
}

int64_t read_memory(const uint8_t* p, int64_t n) {
  const int8_t ones[4] = {1, 1, 1, 1};
  I sums[4] = {i_set1(0), i_set1(0), i_set1(0), i_set1(0)};
  for (int64_t i = 0; i < n; i += 256) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) __builtin_prefetch(p + i + 2048 + 64 * j);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] = i_dot<2>(sums[j], w_load(p + i + 64 * j), ones);
  }
  float out[16];
  f_store(out, f_from_int(i_add(i_add(sums[0], sums[1]), i_add(sums[2], sums[3]))));
  return static_cast<int64_t>(out[0]);
}

int64_t multiply(int64_t rounds, int32_t* result) {
  uint8_t weights[64];
  int8_t x[4 * kMaxLines];
  for (int i = 0; i < 64; ++i) weights[i] = static_cast<uint8_t>(i & 15);
  for (int i = 0; i < 4 * kMaxLines; ++i) x[i] = static_cast<int8_t>(i);
  const W w = w_load(weights);
  I sums[kMaxLines];
#pragma GCC unroll 12
  for (int l = 0; l < kMaxLines; ++l) sums[l] = i_set1(0);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int l = 0; l < kMaxLines; ++l) sums[l] = i_dot<4>(sums[l], w, x + 4 * l);
    asm volatile("" : : "r"(x) : "memory");  // otherwise the compiler multiplies only once
  }
#pragma GCC unroll 12
  for (int l = 1; l < kMaxLines; ++l) sums[0] = i_add(sums[0], sums[l]);
  float out[16];
  f_store(out, f_from_int(sums[0]));
  *result = static_cast<int32_t>(out[0]);
  return rounds * kMaxLines * 64;
}

}  // namespace
