#include "ops.h"

#include <algorithm>
#include <cstring>

namespace expertstream {

namespace {
// Rows a thread takes at a time: enough to pay for the hand-over, few enough to share a small matrix.
int64_t row_grain(int64_t rows, int threads) { return std::max<int64_t>(4, rows / (threads * 8) / 4 * 4); }
}  // namespace

// Quantizes the activations for w into `buffer`; for dense weights only points at x.
Activations Engine::prepare(const Matrix& w, const float* x, int64_t tokens, std::vector<uint8_t>& buffer) {
  if (w.bits >= 16) return {x, nullptr, nullptr, nullptr, tokens, 0, 0};
  const int64_t cols = padded_cols(w.cols, w.bits), groups = padded_groups(w.cols, w.group_size);
  const size_t values = static_cast<size_t>(tokens * cols) * 2, scales = static_cast<size_t>(tokens * groups) * 4;
  if (buffer.size() < values + 2 * scales) buffer.resize(values + 2 * scales);
  int16_t* xq = reinterpret_cast<int16_t*>(buffer.data());
  float* dx = reinterpret_cast<float*>(buffer.data() + values);
  float* xsum = dx + tokens * groups;
  pool.parallel_for(tokens, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t)
      k.quantize_activations(x + t * w.cols, w.cols, w.bits, w.group_size, xq + t * cols, dx + t * groups,
                             xsum + t * groups);
  });
  return {x, xq, dx, xsum, tokens, cols, groups};
}

void Engine::linear(const Matrix& w, const float* x, int64_t tokens, float* y) {
  const Activations acts = prepare(w, x, tokens, input_);
  pool.parallel_for(w.rows, row_grain(w.rows, pool.threads()),
                    [&](int64_t begin, int64_t end, int) { k.matmul_rows(w, begin, end, acts, y, w.rows); });
}

void Engine::embed(const Matrix& w, const int64_t* rows, int64_t tokens, float* y) {
  pool.parallel_for(tokens, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) k.dequantize_row(w, rows[t], y + t * w.cols);
  });
}

void Engine::experts(const std::vector<Expert>& experts, const float* x, const int64_t* pair_start,
                     const int64_t* pair_token, float* y) {
  if (experts.empty()) return;
  const int64_t pairs = pair_start[experts.size()];
  const int64_t hidden = experts[0].gate.cols, inner = experts[0].gate.rows;
  // 1. Bring each pair's activations together, so that an expert's tokens are neighbours.
  scratch_.resize(static_cast<size_t>(pairs * (hidden + 2 * inner)));
  float* gathered = scratch_.data();
  float* gate = gathered + pairs * hidden;
  float* up = gate + pairs * inner;
  for (int64_t p = 0; p < pairs; ++p)
    std::memcpy(gathered + p * hidden, x + pair_token[p] * hidden, static_cast<size_t>(hidden) * 4);
  const Activations acts = prepare(experts[0].gate, gathered, pairs, input_);

  // 2. gate and up, one task for a few rows of one expert.
  const int64_t count = static_cast<int64_t>(experts.size());
  auto of_expert = [&](const Activations& all, const Matrix& w, int64_t e) {
    const int64_t first = pair_start[e];
    Activations part = all;
    part.tokens = pair_start[e + 1] - first;
    part.x += first * w.cols;
    if (part.xq) {
      part.xq += first * part.padded_cols;
      part.dx += first * part.padded_groups;
      part.xsum += first * part.padded_groups;
    }
    return part;
  };
  auto over_rows = [&](int64_t rows, auto&& body) {
    const int64_t grain = row_grain(rows, pool.threads()), pieces = (rows + grain - 1) / grain;
    pool.parallel_for(count * pieces, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t e = task / pieces, first = task % pieces * grain;
        body(e, first, std::min(first + grain, rows));
      }
    });
  };
  over_rows(inner, [&](int64_t e, int64_t begin, int64_t end) {
    const Expert& expert = experts[static_cast<size_t>(e)];
    const Activations part = of_expert(acts, expert.gate, e);
    const int64_t first = pair_start[e] * inner;
    k.matmul_rows(expert.gate, begin, end, part, gate + first, inner);
    k.matmul_rows(expert.up, begin, end, part, up + first, inner);
    for (int64_t t = 0; t < part.tokens; ++t) {
      const int64_t at = first + t * inner + begin;
      k.swiglu(gate + at, up + at, end - begin, gate + at);
    }
  });

  // 3. down.
  const Activations inner_acts = prepare(experts[0].down, gate, pairs, hidden_input_);
  over_rows(hidden, [&](int64_t e, int64_t begin, int64_t end) {
    const Matrix& down = experts[static_cast<size_t>(e)].down;
    k.matmul_rows(down, begin, end, of_expert(inner_acts, down, e), y + pair_start[e] * hidden, hidden);
  });
}

void Engine::accumulate(float* acc, const float* y, const int64_t* pair_token, const float* weights, int64_t pairs,
                        int64_t hidden) {
  pool.parallel_for(hidden, std::max<int64_t>(64, hidden / pool.threads() / 16 * 16),
                    [&](int64_t begin, int64_t end, int) {
                      for (int64_t p = 0; p < pairs; ++p)
                        k.axpy(weights[p], y + p * hidden + begin, end - begin, acc + pair_token[p] * hidden + begin);
                    });
}

void Engine::append_kv(const KVLayer& kv, const float* k_in, const float* v_in, int64_t tokens, int64_t position) {
  const int64_t d = kv.head_dim, width = kv.kv_heads * d;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t h = 0; h < kv.kv_heads; ++h) {
      const int64_t at = (h * kv.capacity + position + t) * d;
      const float *key = k_in + t * width + h * d, *value = v_in + t * width + h * d;
      if (kv.dtype == DType::bf16) {
        k.to_bf16(key, d, static_cast<uint16_t*>(kv.k) + at);
        k.to_bf16(value, d, static_cast<uint16_t*>(kv.v) + at);
      } else {
        std::memcpy(static_cast<float*>(kv.k) + at, key, static_cast<size_t>(d) * 4);
        std::memcpy(static_cast<float*>(kv.v) + at, value, static_cast<size_t>(d) * 4);
      }
    }
}

void Engine::attention(const float* q, const float* gate, const KVLayer& kv, int64_t tokens, int64_t heads,
                       int64_t position, float scale, float* out) {
  const int64_t d = kv.head_dim, per_kv = heads / kv.kv_heads, longest = position + tokens;
  const int64_t parts = (per_kv + 3) / 4;  // up to four query heads share a pass over their keys
  scratch_.resize(static_cast<size_t>(pool.threads() * 4 * longest));
  pool.parallel_for(tokens * kv.kv_heads * parts, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t t = task / (kv.kv_heads * parts), kv_head = task / parts % kv.kv_heads;
      const int64_t first = kv_head * per_kv + task % parts * 4,
                    count = std::min<int64_t>(4, (kv_head + 1) * per_kv - first);
      const int64_t at = (t * heads + first) * d;
      k.attend(q + at, kv, kv_head, count, position + t + 1, scale, scratch_.data() + thread * 4 * longest, out + at);
      k.sigmoid_gate(out + at, gate + at, count * d);
    }
  });
}

void Engine::gated_delta(bool chunked, const float* q, const float* k_in, const float* v, const float* g,
                         const float* beta, int64_t tokens, int64_t key_heads, int64_t value_heads, int64_t dk,
                         int64_t dv, float* state, float* out) {
  scratch_.resize(static_cast<size_t>(pool.threads() * kDeltaScratch));
  pool.parallel_for(value_heads, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t h = begin; h < end; ++h) {
      const int64_t key_head = h / (value_heads / key_heads), ldq = key_heads * dk, ldv = value_heads * dv;
      const int64_t step = chunked ? kDeltaChunk : tokens;
      for (int64_t t = 0; t < tokens; t += step) {
        const int64_t n = std::min(step, tokens - t);
        const float *qt = q + t * ldq + key_head * dk, *kt = k_in + t * ldq + key_head * dk, *vt = v + t * ldv + h * dv;
        const float *gt = g + t * value_heads + h, *bt = beta + t * value_heads + h;
        float *s = state + h * dk * dv, *o = out + t * ldv + h * dv;
        if (chunked)
          k.delta_chunk(qt, kt, vt, gt, bt, n, dk, dv, ldq, ldv, value_heads, s, o,
                        scratch_.data() + thread * kDeltaScratch);
        else
          k.delta_step(qt, kt, vt, gt, bt, n, dk, dv, ldq, ldv, value_heads, s, o);
      }
    }
  });
}

void Engine::route(const float* logits, int64_t tokens, int64_t experts, int64_t top_k, float* weights,
                   int64_t* selected) {
  pool.parallel_for(tokens, 16, [&](int64_t begin, int64_t end, int) {
    std::vector<float> probs(static_cast<size_t>(experts));
    std::vector<int64_t> order(static_cast<size_t>(experts));
    for (int64_t t = begin; t < end; ++t) {
      std::memcpy(probs.data(), logits + t * experts, static_cast<size_t>(experts) * 4);
      k.softmax(probs.data(), experts);
      for (int64_t e = 0; e < experts; ++e) order[static_cast<size_t>(e)] = e;
      std::partial_sort(order.begin(), order.begin() + top_k, order.end(), [&](int64_t a, int64_t b) {
        const float pa = probs[static_cast<size_t>(a)], pb = probs[static_cast<size_t>(b)];
        return pa > pb || (pa == pb && a < b);
      });
      float sum = 0.0f;
      for (int64_t i = 0; i < top_k; ++i) sum += probs[static_cast<size_t>(order[static_cast<size_t>(i)])];
      for (int64_t i = 0; i < top_k; ++i) {
        selected[t * top_k + i] = order[static_cast<size_t>(i)];
        weights[t * top_k + i] = probs[static_cast<size_t>(order[static_cast<size_t>(i)])] / sum;
      }
    }
  });
}

}  // namespace expertstream
