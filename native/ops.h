// The loops of the forward pass: each divides rows, heads or channels among the threads of a pool and calls the
// kernels. No allocation of results here: callers own every buffer. Not thread-safe: one Engine serves one caller at a
// time.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "thread_pool.h"

namespace expertstream {

// The three matrices of one expert: y = down · (silu(gate·x) ∘ (up·x)).
struct Expert {
  Matrix gate, up, down;
};

class Engine {
 public:
  Engine(int threads, const Kernels* kernels) : pool(threads), k(*kernels) {}

  ThreadPool pool;
  const Kernels& k;

  // y (tokens, w.rows) = x (tokens, w.cols) · wᵀ
  void linear(const Matrix& w, const float* x, int64_t tokens, float* y);
  // y (tokens, w.cols): rows of w
  void embed(const Matrix& w, const int64_t* rows, int64_t tokens, float* y);
  // Row p of y (pairs, hidden) = expert of p applied to row pair_token[p] of x (tokens, hidden). Pairs
  // [pair_start[e], pair_start[e+1]) belong to experts[e]; all experts have the same shapes and bits.
  void experts(const std::vector<Expert>& experts, const float* x, const int64_t* pair_start, const int64_t* pair_token,
               float* y);
  // acc[pair_token[p]] += weights[p]·y[p], p ascending. Splits columns, never the order.
  void accumulate(float* acc, const float* y, const int64_t* pair_token, const float* weights, int64_t pairs,
                  int64_t hidden);
  // One attention layer: q, gate, out (tokens, heads, head_dim); token t sees positions [0, position + t].
  void attention(const float* q, const float* gate, const KVLayer& kv, int64_t tokens, int64_t heads, int64_t position,
                 float scale, float* out);
  // Appends k, v (tokens, kv_heads, head_dim) at `position`.
  void append_kv(const KVLayer& kv, const float* k_in, const float* v_in, int64_t tokens, int64_t position);
  // q, k (tokens, key_heads, dk); v, out (tokens, value_heads, dv); g, beta (tokens, value_heads);
  // state (value_heads, dk, dv). Value head h reads key head h / (value_heads / key_heads).
  void gated_delta(bool chunked, const float* q, const float* k_in, const float* v, const float* g, const float* beta,
                   int64_t tokens, int64_t key_heads, int64_t value_heads, int64_t dk, int64_t dv, float* state,
                   float* out);
  // weights, selected (tokens, top_k) ← the top_k largest of softmax(logits (tokens, experts)), divided by their sum;
  // descending, the lower index first among equals.
  void route(const float* logits, int64_t tokens, int64_t experts, int64_t top_k, float* weights, int64_t* selected);

 private:
  Activations prepare(const Matrix& w, const float* x, int64_t tokens, std::vector<uint8_t>& buffer);

  std::vector<uint8_t> input_, hidden_input_;
  std::vector<float> scratch_;
};

// Affine quantization of w (rows, cols) float32: packed (rows, cols·bits/8), scales and biases (rows, cols/group_size)
// as bf16 bits. Chooses for each group the scale of least squared error among a few shrunken ranges.
void quantize_affine(ThreadPool& pool, const float* w, int64_t rows, int64_t cols, int bits, int group_size,
                     uint8_t* packed, uint16_t* scales, uint16_t* biases);

}  // namespace expertstream
