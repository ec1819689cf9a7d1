// The loops of the forward pass: each divides rows, heads or channels among the threads of a pool and calls the
// kernels. Results are not allocated here: callers own every buffer. Not thread-safe: one Engine serves one caller at a
// time.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "thread_pool.h"

namespace expertstream {

// The three matrices of one expert: y = down · act(gate·x, up·x).
struct Expert {
  Matrix gate, up, down;
};

// act: silu(gate)·up if limit is 0, otherwise Kernels::clamped_swiglu.
struct ExpertActivation {
  float alpha = 1.0f, limit = 0.0f;
};

// Grouped-query attention of one layer: norms of queries and keys (head_dim) or null, sinks (heads) or null, angles of
// this call's tokens (tokens, rotary_half). gated: each head's query is followed by its output gate. window: positions
// that a query sees, 0 for all before it.
struct AttentionParams {
  const float *q_norm, *k_norm, *sinks, *cos, *sin;
  int64_t heads, rotary_half, window;
  float eps;
  bool gated;
};

// A gated-delta layer. Channels of qkv: q (key_heads, dk), k (key_heads, dk), v (value_heads, dv).
struct DeltaParams {
  const float* conv_weight;  // (kernel, channels)
  const float *a_log, *dt_bias, *norm_weight;
  int64_t kernel, key_heads, value_heads, dk, dv;
  float eps;
};

// Activations that own their memory.
struct PreparedActivations {
  std::vector<uint8_t> memory;
  Activations view{};
  int group_size = 0, zero_point = 0;
};

// Grows to exactly n values if there are fewer; old ones are lost. Passes of one size thus allocate only once.
template <class T>
void make_space(std::vector<T>& buffer, size_t n) {
  if (buffer.size() >= n) return;
  std::vector<T>().swap(buffer);
  buffer.resize(n);
}

class Engine {
 public:
  // activation_bits 8 or 16: the precision that products with quantized weights round their activations to.
  Engine(int threads, const Kernels* kernels, int activation_bits)
      : pool(threads), k(*kernels), planes(activation_bits / 8) {}

  // The memory that the engine keeps between calls, as large as the largest call needed; and its release.
  int64_t buffer_bytes() const;
  void release_buffers();

  ThreadPool pool;
  const Kernels& k;
  const int planes;

  // y[i] (tokens, w[i].rows) = x (tokens, cols) · w[i]ᵀ; all matrices have the same columns.
  void project(const Matrix* const* w, float* const* y, int64_t count, const float* x, int64_t tokens);
  // y (tokens, w.cols): rows of w
  void embed(const Matrix& w, const int64_t* rows, int64_t tokens, float* y);
  // y (tokens, hidden) = sigmoid(scale·x) · (down · (silu(gate·x) ∘ (up·x))): the shared expert; scale has one row.
  void shared_expert(const Expert& w, const Matrix& scale, const float* x, int64_t tokens, float* y);
  // Row p of y (pairs, hidden) = expert of p applied to row pair_token[p] of x (tokens, hidden). Pairs
  // [pair_start[e], pair_start[e+1]) belong to experts[e]; all experts have the same shapes and bits.
  void experts(const std::vector<Expert>& experts, ExpertActivation act, const float* x, const int64_t* pair_start,
               const int64_t* pair_token, float* y);
  // The same, summed at once: acc[pair_token[p]] += weights[p]·(expert of p applied to x[pair_token[p]]), p ascending.
  // The bits are those of experts() and then accumulate().
  void moe(const std::vector<Expert>& experts, ExpertActivation act, const float* x, const int64_t* pair_start,
           const int64_t* pair_token, const float* weights, float* acc);
  // acc[pair_token[p]] += weights[p]·y[p], p ascending. Splits columns, never the order.
  void accumulate(float* acc, const float* y, const int64_t* pair_token, const float* weights, int64_t pairs,
                  int64_t hidden);
  // q_in (tokens, heads, head_dim), or (tokens, heads, 2, head_dim) with gates; k_in, v_in (tokens, kv_heads, head_dim)
  // are normed, rotated and stored at `position`; token t sees positions [0, position + t], or the last `window` of
  // them. out (tokens, heads, head_dim).
  void attention(const float* q_in, const float* k_in, const float* v_in, const AttentionParams& p, const KVLayer& kv,
                 int64_t tokens, int64_t position, float* out);
  // qkv (tokens, channels) is overwritten; z, out (tokens, value_heads, dv); a, b (tokens, value_heads); conv_state
  // (kernel − 1, channels) and state (value_heads, dk, dv) are updated. Value head h reads key head h / (value_heads /
  // key_heads).
  void delta_net(bool chunked, float* qkv, const float* z, const float* a, const float* b, const DeltaParams& p,
                 int64_t tokens, float* conv_state, float* state, float* out);
  // weights, selected (tokens, top_k) ← the top_k largest of softmax(w·x), divided by their sum if `renormalize`, in
  // ascending order of expert; ties go to the lower indices.
  void route(const Matrix& w, const float* x, int64_t tokens, int64_t top_k, bool renormalize, float* weights,
             int64_t* selected);

 private:
  // Kernels::matmul_rows, plus the matrix's bias.
  void multiply(const Matrix& w, int64_t begin, int64_t end, const Activations& x, float* y, int64_t ldy) const;
  // The first half of experts(): act(gate·x, up·x) of every pair, ready for down, in inner_.
  void experts_inner(const Expert* experts, int64_t count, ExpertActivation act, const float* x,
                     const int64_t* pair_start, const int64_t* pair_token);
  // moe() of a few experts; at least one has pairs.
  void moe_group(const Expert* experts, int64_t count, ExpertActivation act, const float* x, const int64_t* pair_start,
                 const int64_t* pair_token, const float* weights, float* acc);
  // body(expert, first row, end row) over all experts that have pairs, rows in multiples of `unit`.
  template <class Body>
  void over_expert_rows(int64_t count, const int64_t* pair_start, int64_t rows, int64_t unit, Body body);
  void prepare(PreparedActivations& to, const Matrix& w, const float* x, int64_t tokens);
  // Room in `to` for activations of `tokens` tokens.
  void make_room(PreparedActivations& to, const Matrix& w, const float* x, int64_t tokens);
  ActivationsOut place(const PreparedActivations& to, int64_t cols, int64_t first, int64_t tokens, int64_t token) const;
  // Activations of tokens [first, first + tokens) whose blocks begin at `first`.
  Activations part(const Activations& all, const Matrix& w, int64_t first, int64_t tokens) const;

  PreparedActivations input_, inner_;
  std::vector<float> scratch_;
  std::vector<float> logits_, outputs_;
};

// Affine quantization of w (rows, cols) float32, or symmetric where biases is null: packed (rows, cols·bits/8), least
// significant bits first, row by row; scales and biases (rows, cols/group_size) as bf16 bits. Chooses for each group
// the scale of least squared error among a few shrunken ranges.
void quantize_affine(ThreadPool& pool, const float* w, int64_t rows, int64_t cols, int bits, int group_size,
                     uint8_t* packed, uint16_t* scales, uint16_t* biases);

// Converts rows as stored in checkpoints (the order of quantize_affine and MLX) to the tiles described at Matrix.
// Source and destination may be the same memory if m.rows is a multiple of 16.
void tile_rows(ThreadPool& pool, const Matrix& m, const uint8_t* data, const uint8_t* scales, const uint8_t* biases,
               uint8_t* data_out, uint8_t* scales_out, uint8_t* biases_out);

}  // namespace expertstream
