// Float matrix products of small blocks for one instruction set; included after rows.h.
#pragma once

#include "rows.h"

namespace {

// c (R, 16·V) += a (R, k) · b (k, 16·V). Every element is summed from c on in ascending order of k, for any tile size.
template <int R, int V>
inline void gemm_tile(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc) {
  F sum[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = f_load(c + r * ldc + 16 * v);
  for (int64_t i = 0; i < k; ++i) {
    F row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = f_load(b + i * ldb + 16 * v);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const F x = f_set1(a[r * lda + i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] = f_fma(x, row[v], sum[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) f_store(c + r * ldc + 16 * v, sum[r][v]);
}

// The last columns, fewer than 16.
inline void gemm_edge(int64_t n, int64_t k, const float* a, const float* b, int64_t ldb, float* c) {
  F sum = f_load_n(c, n);
  for (int64_t i = 0; i < k; ++i) sum = f_fma(f_set1(a[i]), f_load_n(b + i * ldb, n), sum);
  f_store_n(c, sum, n);
}

template <int V>
inline void gemm_columns(int64_t m, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                         int64_t ldc) {
  int64_t r = 0;
  for (; r + kGemmRows <= m; r += kGemmRows) gemm_tile<kGemmRows, V>(k, a + r * lda, lda, b, ldb, c + r * ldc, ldc);
  for (; r + 2 <= m; r += 2) gemm_tile<2, V>(k, a + r * lda, lda, b, ldb, c + r * ldc, ldc);
  for (; r < m; ++r) gemm_tile<1, V>(k, a + r * lda, lda, b, ldb, c + r * ldc, ldc);
}

// c (m, n) += a (m, k) · b (k, n).
inline void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                 int64_t ldc) {
  constexpr int64_t kWide = 16 * kGemmVectors;
  int64_t j = 0;
  for (; j + kWide <= n; j += kWide) gemm_columns<kGemmVectors>(m, k, a, lda, b + j, ldb, c + j, ldc);
  for (; j + 16 <= n; j += 16) gemm_columns<1>(m, k, a, lda, b + j, ldb, c + j, ldc);
  if (j < n)
    for (int64_t r = 0; r < m; ++r) gemm_edge(n - j, k, a + r * lda, b + j, ldb, c + r * ldc + j);
}

inline void set_zero(float* x, int64_t rows, int64_t cols, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) std::memset(x + r * ld, 0, static_cast<size_t>(cols) * 4);
}

}  // namespace
