// Matrix products for one instruction set; included after its simd_*.h. Everything here has internal linkage.
//
// One tile is ROWS rows by TOKS tokens. What is computed for one (row, token) does not depend on the tile it falls in.
#pragma once

#include <cstring>

#include "kernels.h"

namespace {

using namespace expertstream;

// 16 values of dtype at p as float32; lanes from n on are 0.
inline F load_values(const uint8_t* p, DType dtype, int64_t n) {
  uint8_t t[64] = {};
  if (n < 16) {
    std::memcpy(t, p, static_cast<size_t>(n) * (dtype == DType::f32 ? 4 : 2));
    p = t;
  }
  if (dtype == DType::bf16) return f_load_bf16(p);
  if (dtype == DType::f16) return f_load_f16(p);
  float f[16];
  std::memcpy(f, p, 64);
  return f_load(f);
}

// Affine weights. A block is 64 bytes of a row; it holds GPB groups, or a group holds BPG blocks.
// Σ_c (q·s + b)·x = Σ_groups dx·(s·Σ q·xq + b·Σ xq); the inner sums are exact integers.
template <int BITS, int GPB, int BPG, int ROWS, int TOKS>
inline void quantized_tile(const Matrix& w, int64_t row, const Activations& x, int64_t token, float* y, int64_t ldy) {
  constexpr int64_t kElements = 512 / BITS;
  const int64_t row_bytes = static_cast<int64_t>(w.cols) * BITS / 8, groups = w.cols / w.group_size;
  const int64_t value_bytes = w.dtype == DType::f32 ? 4 : 2;
  F acc[ROWS][TOKS];
  for (auto& a : acc)
    for (auto& b : a) b = f_zero();

  for (int64_t g0 = 0; g0 < groups; g0 += 16) {
    const int64_t n = groups - g0 < 16 ? groups - g0 : 16;
    F scale[ROWS], dx[TOKS];
    for (int t = 0; t < TOKS; ++t) dx[t] = f_load(x.dx + (token + t) * x.padded_groups + g0);
    for (int r = 0; r < ROWS; ++r) {
      const int64_t at = ((row + r) * groups + g0) * value_bytes;
      scale[r] = load_values(w.scales + at, w.dtype, n);
      F bias = load_values(w.biases + at, w.dtype, n);
      for (int t = 0; t < TOKS; ++t)
        acc[r][t] = f_fma(bias, f_load(x.xsum + (token + t) * x.padded_groups + g0), acc[r][t]);
    }
    const int64_t first_block = g0 * BPG / GPB, blocks = (n * BPG + GPB - 1) / GPB;
    auto block_of = [&](const uint8_t* const(&p)[ROWS], int64_t k) {
      const int group = static_cast<int>(k * GPB / BPG);
      F x_scale[TOKS];
      for (int t = 0; t < TOKS; ++t) x_scale[t] = f_spread<GPB>(dx[t], group);
      for (int r = 0; r < ROWS; ++r) {
        const Planes<BITS> planes = unpack<BITS>(p[r]);
        const F s = f_spread<GPB>(scale[r], group);
        for (int t = 0; t < TOKS; ++t) {
          const int16_t* xq = x.xq + (token + t) * x.padded_cols + (first_block + k) * kElements;
          acc[r][t] = f_fma(f_from_int(dot<BITS>(planes, xq)), f_mul(s, x_scale[t]), acc[r][t]);
        }
      }
    };
    // A row's last block may run into the rows after it (its activations are 0 there), but not past the matrix: that
    // one is copied, so that the loop over the others need not ask.
    const int64_t last_byte = (row + ROWS - 1) * row_bytes + (first_block + blocks) * 64;
    const int64_t inside = last_byte > w.rows * row_bytes ? blocks - 1 : blocks;
    const uint8_t* p[ROWS];
    for (int64_t k = 0; k < inside; ++k) {
      for (int r = 0; r < ROWS; ++r) {
        p[r] = w.data + (row + r) * row_bytes + (first_block + k) * 64;
        // The next tile's same place. Without it waiting for memory and multiplying add up instead of overlapping.
        __builtin_prefetch(p[r] + ROWS * row_bytes);
      }
      block_of(p, k);
    }
    if (inside < blocks) {
      uint8_t copies[ROWS][64] = {};
      const int64_t at = (first_block + inside) * 64;
      for (int r = 0; r < ROWS; ++r) {
        std::memcpy(copies[r], w.data + (row + r) * row_bytes + at, static_cast<size_t>(row_bytes - at));
        p[r] = copies[r];
      }
      block_of(p, inside);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKS; ++t) y[(token + t) * ldy + row + r] = f_sum(acc[r][t]);
}

template <DType DTYPE, int ROWS, int TOKS>
inline void dense_tile(const Matrix& w, int64_t row, const Activations& x, int64_t token, float* y, int64_t ldy) {
  constexpr int64_t kBytes = DTYPE == DType::f32 ? 4 : 2;
  F acc[ROWS][TOKS];
  for (auto& a : acc)
    for (auto& b : a) b = f_zero();
  for (int64_t c = 0; c < w.cols; c += 16) {
    const int64_t n = w.cols - c;
    F xs[TOKS];
    for (int t = 0; t < TOKS; ++t) {
      const float* p = x.x + (token + t) * w.cols + c;
      xs[t] = n >= 16 ? f_load(p) : f_load_n(p, n);
    }
    for (int r = 0; r < ROWS; ++r) {
      const F wv = load_values(w.data + ((row + r) * w.cols + c) * kBytes, DTYPE, n);
      for (int t = 0; t < TOKS; ++t) acc[r][t] = f_fma(wv, xs[t], acc[r][t]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < TOKS; ++t) y[(token + t) * ldy + row + r] = f_sum(acc[r][t]);
}

// Rows [begin, end) by all tokens, in tiles: four rows a step for one token, two rows by four tokens for many.
#define TILES(TILE, ...)                                                                  \
  int64_t r = begin;                                                                      \
  if (x.tokens < 4)                                                                       \
    for (; r + 4 <= end; r += 4)                                                          \
      for (int64_t t = 0; t < x.tokens; ++t) TILE<__VA_ARGS__, 4, 1>(w, r, x, t, y, ldy); \
  else                                                                                    \
    for (; r + 2 <= end; r += 2) {                                                        \
      int64_t t = 0;                                                                      \
      for (; t + 4 <= x.tokens; t += 4) TILE<__VA_ARGS__, 2, 4>(w, r, x, t, y, ldy);      \
      for (; t < x.tokens; ++t) TILE<__VA_ARGS__, 2, 1>(w, r, x, t, y, ldy);              \
    }                                                                                     \
  for (; r < end; ++r)                                                                    \
    for (int64_t t = 0; t < x.tokens; ++t) TILE<__VA_ARGS__, 1, 1>(w, r, x, t, y, ldy)

template <int BITS, int GPB, int BPG>
void quantized_rows(const Matrix& w, int64_t begin, int64_t end, const Activations& x, float* y, int64_t ldy) {
  TILES(quantized_tile, BITS, GPB, BPG);
}
template <DType DTYPE>
void dense_rows(const Matrix& w, int64_t begin, int64_t end, const Activations& x, float* y, int64_t ldy) {
  TILES(dense_tile, DTYPE);
}
#undef TILES

void matmul_rows(const Matrix& w, int64_t begin, int64_t end, const Activations& x, float* y, int64_t ldy) {
  switch (w.bits * 1000 + w.group_size) {
    case 2032:
      return quantized_rows<2, 8, 1>(w, begin, end, x, y, ldy);
    case 2064:
      return quantized_rows<2, 4, 1>(w, begin, end, x, y, ldy);
    case 2128:
      return quantized_rows<2, 2, 1>(w, begin, end, x, y, ldy);
    case 4032:
      return quantized_rows<4, 4, 1>(w, begin, end, x, y, ldy);
    case 4064:
      return quantized_rows<4, 2, 1>(w, begin, end, x, y, ldy);
    case 4128:
      return quantized_rows<4, 1, 1>(w, begin, end, x, y, ldy);
    case 8032:
      return quantized_rows<8, 2, 1>(w, begin, end, x, y, ldy);
    case 8064:
      return quantized_rows<8, 1, 1>(w, begin, end, x, y, ldy);
    case 8128:
      return quantized_rows<8, 1, 2>(w, begin, end, x, y, ldy);
    default:
      break;
  }
  if (w.dtype == DType::bf16) return dense_rows<DType::bf16>(w, begin, end, x, y, ldy);
  if (w.dtype == DType::f16) return dense_rows<DType::f16>(w, begin, end, x, y, ldy);
  return dense_rows<DType::f32>(w, begin, end, x, y, ldy);
}

// Values of one row as float32; affine: fma(q, scale, bias).
void dequantize_row(const Matrix& w, int64_t row, float* y) {
  const int64_t value_bytes = w.dtype == DType::f32 ? 4 : 2;
  if (w.bits >= 16) {
    for (int64_t c = 0; c < w.cols; c += 16)
      f_store_n(y + c, load_values(w.data + (row * w.cols + c) * value_bytes, w.dtype, w.cols - c), w.cols - c);
    return;
  }
  const int64_t groups = w.cols / w.group_size;
  const uint8_t* data = w.data + row * (static_cast<int64_t>(w.cols) * w.bits / 8);
  const int per_byte = 8 / w.bits, mask = (1 << w.bits) - 1;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = (row * groups + g) * value_bytes;
    const F scale = load_values(w.scales + at, w.dtype, 1), bias = load_values(w.biases + at, w.dtype, 1);
    const F s = f_spread<1>(scale, 0), b = f_spread<1>(bias, 0);
    for (int64_t c = g * w.group_size; c < (g + 1) * w.group_size; c += 16) {
      float q[16];
      for (int i = 0; i < 16; ++i)
        q[i] = static_cast<float>((data[(c + i) / per_byte] >> ((c + i) % per_byte * w.bits)) & mask);
      f_store(y + c, f_fma(f_load(q), s, b));
    }
  }
}

void quantize_activations(const float* x, int64_t cols, int bits, int group_size, int16_t* xq, float* dx, float* xsum) {
  const int64_t groups = cols / group_size, block = 512 / bits, planes = 16 / bits;
  std::memset(xq + cols / block * block, 0, static_cast<size_t>(padded_cols(cols, bits) - cols / block * block) * 2);
  for (int64_t g = groups; g < padded_groups(cols, group_size); ++g) dx[g] = xsum[g] = 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    const float* xg = x + g * group_size;
    F largest = f_zero(), poison = f_zero();
    for (int i = 0; i < group_size; i += 16) {
      largest = f_max(f_abs(f_load(xg + i)), largest);
      poison = f_fma(f_load(xg + i), f_zero(), poison);  // 0, or NaN if a value is infinite or NaN
    }
    if (f_sum(poison) != 0.0f) {
      // Integers cannot carry it: the group's scale does, so that every product with it is NaN.
      for (int i = 0; i < group_size; ++i) {
        const int64_t c = g * group_size + i, within = c % block;
        xq[c - within + within % planes * 32 + within / planes] = 0;
      }
      dx[g] = xsum[g] = __builtin_nanf("");
      continue;
    }
    const float most = f_maximum(largest);
    const float inverse = most > 0.0f ? 32767.0f / most : 0.0f;
    dx[g] = most / 32767.0f;
    int32_t sum = 0;
    for (int i = 0; i < group_size; i += 16) {
      int16_t q[16];
      f_store_i16(q, f_round(f_mul(f_load(xg + i), f_set1(inverse))));
      for (int j = 0; j < 16; ++j) {
        const int64_t c = g * group_size + i + j, within = c % block;
        xq[c - within + within % planes * 32 + within / planes] = q[j];
        sum += q[j];
      }
    }
    xsum[g] = dx[g] * static_cast<float>(sum);
  }
}

}  // namespace
