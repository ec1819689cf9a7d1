#include "ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace expertstream {

namespace {
// Tiles that a thread takes at a time: enough to outweigh the overhead, few enough to share a small matrix.
int64_t tile_grain(int64_t tiles, int threads) { return std::max<int64_t>(1, tiles / (threads * 8)); }
constexpr int64_t kPairs = 1024;  // of tokens and experts that are processed together, unless one expert has more
}  // namespace

int64_t Engine::buffer_bytes() const {
  return static_cast<int64_t>(input_.memory.size() + inner_.memory.size() +
                              4 * (scratch_.size() + logits_.size() + outputs_.size()));
}

void Engine::release_buffers() {
  for (auto* memory : {&input_.memory, &inner_.memory}) std::vector<uint8_t>().swap(*memory);
  for (auto* buffer : {&scratch_, &logits_, &outputs_}) std::vector<float>().swap(*buffer);
}

void Engine::make_room(PreparedActivations& to, const Matrix& w, const float* x, int64_t tokens) {
  const auto lines = static_cast<size_t>(tokens * planes), groups = static_cast<size_t>(w.cols / w.group_size);
  const size_t values = (lines * static_cast<size_t>(w.cols) + 63) / 64 * 64;
  const size_t sums = static_cast<size_t>(tokens) * groups * 4;
  const size_t bytes = values + 2 * sums + lines * groups * 4;
  make_space(to.memory, bytes);
  uint8_t* at = to.memory.data();
  to.view = {x,
             tokens,
             planes,
             reinterpret_cast<int8_t*>(at),
             reinterpret_cast<float*>(at + values),
             reinterpret_cast<float*>(at + values + sums),
             reinterpret_cast<int32_t*>(at + values + 2 * sums)};
  to.group_size = w.group_size;
  to.zero_point = zero_point(w);
}

ActivationsOut Engine::place(const PreparedActivations& to, int64_t cols, int64_t first, int64_t tokens,
                             int64_t token) const {
  const int64_t block = kBlockLines / planes, begin = token / block * block, m = std::min(block, tokens - begin);
  const int64_t groups = cols / to.group_size, at = first + begin, lane = token - begin;
  const Activations& v = to.view;
  return {const_cast<int8_t*>(v.xq) + at * planes * cols + 4 * planes * lane,
          const_cast<float*>(v.dx) + at * groups + lane, const_cast<float*>(v.xsum) + at * groups + lane,
          const_cast<int32_t*>(v.zsum) + at * planes * groups + planes * lane, m * planes};
}

Activations Engine::part(const Activations& all, const Matrix& w, int64_t first, int64_t tokens) const {
  Activations p = all;
  p.tokens = tokens;
  if (p.x) p.x += first * w.cols;
  if (w.bits < 16) {
    const int64_t groups = w.cols / w.group_size;
    p.xq += first * planes * w.cols;
    p.dx += first * groups;
    p.xsum += first * groups;
    p.zsum += first * planes * groups;
  }
  return p;
}

// Quantizes the activations for w, unless `to` was made from the same x for the same kind of weights; for dense weights
// it only points to x.
void Engine::prepare(PreparedActivations& to, const Matrix& w, const float* x, int64_t tokens) {
  if (w.bits >= 16) {
    to.view.x = x;
    to.view.tokens = tokens;
    return;
  }
  make_room(to, w, x, tokens);
  pool.parallel_for(tokens, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t)
      k.quantize_activations(x + t * w.cols, w.cols, w.group_size, planes, zero_point(w),
                             place(to, w.cols, 0, tokens, t));
  });
}

void Engine::project(const Matrix* const* w, float* const* y, int64_t count, const float* x, int64_t tokens) {
  // Matrices that need the same kind of activations are multiplied in one parallel loop.
  for (int64_t first = 0, last; first < count; first = last) {
    int64_t tiles = row_tiles(w[first]->rows), model = first;
    for (last = first + 1; last < count; ++last) {
      const Matrix &a = *w[model], &b = *w[last];
      if (a.bits < 16 && b.bits < 16 && (a.group_size != b.group_size || zero_point(a) != zero_point(b))) break;
      if (a.bits >= 16) model = last;
      tiles += row_tiles(b.rows);
    }
    prepare(input_, *w[model], x, tokens);
    pool.parallel_for(tiles, tile_grain(tiles, pool.threads()), [&](int64_t begin, int64_t end, int) {
      int64_t start = 0;  // the matrix's first tile
      for (int64_t i = first; i < last && start < end; ++i) {
        const int64_t own = row_tiles(w[i]->rows), from = std::max<int64_t>(begin - start, 0),
                      to = std::min(end - start, own);
        if (from < to)
          multiply(*w[i], from * kTileRows, std::min<int64_t>(to * kTileRows, w[i]->rows), input_.view, y[i],
                   w[i]->rows);
        start += own;
      }
    });
  }
}

void Engine::multiply(const Matrix& w, int64_t begin, int64_t end, const Activations& x, float* y, int64_t ldy) const {
  k.matmul_rows(w, begin, end, x, y, ldy);
  if (w.row_bias != nullptr)
    for (int64_t t = 0; t < x.tokens; ++t) k.axpy(1.0f, w.row_bias + begin, end - begin, y + t * ldy + begin);
}

void Engine::embed(const Matrix& w, const int64_t* rows, int64_t tokens, float* y) {
  pool.parallel_for(tokens, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) k.dequantize_row(w, rows[t], y + t * w.cols);
  });
}

void Engine::shared_expert(const Expert& w, const Matrix& scale, const float* x, int64_t tokens, float* y) {
  const int64_t inner = w.gate.rows, hidden = w.down.rows;
  make_space(scratch_, static_cast<size_t>(tokens * (2 * inner + 1)));
  float *gate = scratch_.data(), *up = gate + tokens * inner, *weight = up + tokens * inner;
  const Matrix* first[3] = {&w.gate, &w.up, &scale};
  float* to[3] = {gate, up, weight};
  project(first, to, 3, x, tokens);
  pool.parallel_for(tokens, 16, [&](int64_t begin, int64_t end, int) {
    k.swiglu(gate + begin * inner, up + begin * inner, (end - begin) * inner, gate + begin * inner);
    k.sigmoid(weight + begin, end - begin, weight + begin);
  });
  const Matrix* second[1] = {&w.down};
  project(second, &y, 1, gate, tokens);
  pool.parallel_for(tokens, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) k.scale(y + t * hidden, weight[t], hidden);
  });
}

template <class Body>
void Engine::over_expert_rows(int64_t count, const int64_t* pair_start, int64_t rows, int64_t unit, Body body) {
  const int64_t units = (rows + unit - 1) / unit, each = tile_grain(units * count, pool.threads()),
                grain = std::min(each, units), pieces = (units + grain - 1) / grain;
  pool.parallel_for(count * pieces, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t e = task / pieces, first = task % pieces * grain * unit;
      if (pair_start[e] < pair_start[e + 1]) body(e, first, std::min(first + grain * unit, rows));
    }
  });
}

void Engine::experts_inner(const Expert* experts, int64_t count, ExpertActivation act, const float* x,
                           const int64_t* pair_start, const int64_t* pair_token) {
  const int64_t pairs = pair_start[count];
  const Matrix &gate_format = experts[0].gate, &down_format = experts[0].down;
  const int64_t hidden = gate_format.cols, inner = gate_format.rows;
  const bool dense_in = gate_format.bits >= 16, dense_inner = down_format.bits >= 16;
  make_space(scratch_, static_cast<size_t>(pairs * (2 * inner + (dense_in ? hidden : 0))));
  float *gate = scratch_.data(), *up = gate + pairs * inner, *gathered = up + pairs * inner;
  std::vector<int64_t> expert_of(static_cast<size_t>(pairs));
  for (int64_t e = 0; e < count; ++e)
    for (int64_t p = pair_start[e]; p < pair_start[e + 1]; ++p) expert_of[static_cast<size_t>(p)] = e;

  // 1. Each pair's activations, grouped by expert.
  input_.view = {dense_in ? gathered : nullptr, pairs, planes, nullptr, nullptr, nullptr, nullptr};
  if (!dense_in) make_room(input_, gate_format, nullptr, pairs);
  pool.parallel_for(pairs, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      const float* row = x + pair_token[p] * hidden;
      const int64_t e = expert_of[static_cast<size_t>(p)], first = pair_start[e];
      if (dense_in)
        std::memcpy(gathered + p * hidden, row, static_cast<size_t>(hidden) * 4);
      else
        k.quantize_activations(row, hidden, gate_format.group_size, planes, zero_point(gate_format),
                               place(input_, hidden, first, pair_start[e + 1] - first, p - first));
    }
  });

  // 2. gate and up: each task computes a few rows of one expert, which are whole groups of down's activations, and
  // quantizes them as well.
  if (!dense_inner) make_room(inner_, down_format, nullptr, pairs);
  inner_.view.x = gate;
  over_expert_rows(count, pair_start, inner, dense_inner ? kTileRows : down_format.group_size,
                   [&](int64_t e, int64_t begin, int64_t end) {
                     const Expert& expert = experts[e];
                     const int64_t first = pair_start[e], tokens = pair_start[e + 1] - first;
                     const Activations acts = part(input_.view, expert.gate, first, tokens);
                     multiply(expert.gate, begin, end, acts, gate + first * inner, inner);
                     multiply(expert.up, begin, end, acts, up + first * inner, inner);
                     for (int64_t t = 0; t < tokens; ++t) {
                       const int64_t at = (first + t) * inner + begin;
                       if (act.limit > 0.0f)
                         k.clamped_swiglu(gate + at, up + at, end - begin, act.alpha, act.limit, gate + at);
                       else
                         k.swiglu(gate + at, up + at, end - begin, gate + at);
                       if (dense_inner) continue;
                       ActivationsOut out = place(inner_, inner, first, tokens, t);
                       const int64_t group = begin / down_format.group_size;
                       out.xq += begin * out.lines;
                       out.dx += group * (out.lines / planes);
                       out.xsum += group * (out.lines / planes);
                       out.zsum += group * out.lines;
                       k.quantize_activations(gate + at, end - begin, down_format.group_size, planes,
                                              zero_point(down_format), out);
                     }
                   });
}

void Engine::experts(const std::vector<Expert>& experts, ExpertActivation act, const float* x,
                     const int64_t* pair_start, const int64_t* pair_token, float* y) {
  if (experts.empty()) return;
  const int64_t count = static_cast<int64_t>(experts.size()), hidden = experts[0].down.rows;
  experts_inner(experts.data(), count, act, x, pair_start, pair_token);
  over_expert_rows(count, pair_start, hidden, kTileRows, [&](int64_t e, int64_t begin, int64_t end) {
    const Matrix& down = experts[static_cast<size_t>(e)].down;
    const int64_t first = pair_start[e];
    multiply(down, begin, end, part(inner_.view, down, first, pair_start[e + 1] - first), y + first * hidden, hidden);
  });
}

void Engine::moe(const std::vector<Expert>& experts, ExpertActivation act, const float* x, const int64_t* pair_start,
                 const int64_t* pair_token, const float* weights, float* acc) {
  const int64_t count = static_cast<int64_t>(experts.size());
  // Some experts at a time, so that they need little memory besides their weights, whatever the routing.
  std::vector<int64_t> starts;
  for (int64_t e0 = 0, e1; e0 < count; e0 = e1) {
    const int64_t first = pair_start[e0];
    starts.assign(1, 0);
    for (e1 = e0; e1 < count && (e1 == e0 || pair_start[e1 + 1] - first <= kPairs); ++e1)
      starts.push_back(pair_start[e1 + 1] - first);
    moe_group(experts.data() + e0, e1 - e0, act, x, starts.data(), pair_token + first, weights + first, acc);
  }
}

void Engine::moe_group(const Expert* experts, int64_t count, ExpertActivation act, const float* x,
                       const int64_t* pair_start, const int64_t* pair_token, const float* weights, float* acc) {
  experts_inner(experts, count, act, x, pair_start, pair_token);
  const int64_t hidden = experts[0].down.rows;
  int64_t most = 0;
  for (int64_t e = 0; e < count; ++e) most = std::max(most, pair_start[e + 1] - pair_start[e]);
  // A task owns some columns of acc and processes the experts in order: no expert's output leaves the cache.
  constexpr int64_t kColumns = 64;
  make_space(outputs_, static_cast<size_t>(pool.threads() * most * kColumns));
  pool.parallel_for((hidden + kColumns - 1) / kColumns, 1, [&](int64_t first_block, int64_t end_block, int thread) {
    for (int64_t block = first_block; block < end_block; ++block) {
      const int64_t begin = block * kColumns, end = std::min(begin + kColumns, hidden);
      float* y = outputs_.data() + thread * most * kColumns;
      for (int64_t e = 0; e < count; ++e) {
        const Matrix& down = experts[e].down;
        const int64_t first = pair_start[e], tokens = pair_start[e + 1] - first;
        if (tokens == 0) continue;
        multiply(down, begin, end, part(inner_.view, down, first, tokens), y - begin, kColumns);
        for (int64_t t = 0; t < tokens; ++t)
          k.axpy(weights[first + t], y + t * kColumns, end - begin, acc + pair_token[first + t] * hidden + begin);
      }
    }
  });
}

void Engine::accumulate(float* acc, const float* y, const int64_t* pair_token, const float* weights, int64_t pairs,
                        int64_t hidden) {
  // A few tokens are not worth waking threads for.
  const int64_t grain = pairs * hidden < 65536 ? hidden : std::max<int64_t>(64, hidden / pool.threads() / 16 * 16);
  pool.parallel_for(hidden, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = 0; p < pairs; ++p)
      k.axpy(weights[p], y + p * hidden + begin, end - begin, acc + pair_token[p] * hidden + begin);
  });
}

void Engine::route(const Matrix& w, const float* x, int64_t tokens, int64_t top_k, bool renormalize, float* weights,
                   int64_t* selected) {
  const int64_t experts = w.rows;
  make_space(logits_, static_cast<size_t>(tokens * experts));
  const Matrix* one[1] = {&w};
  float* to[1] = {logits_.data()};
  project(one, to, 1, x, tokens);
  pool.parallel_for(tokens, 16, [&](int64_t begin, int64_t end, int) {
    std::vector<int64_t> order(static_cast<size_t>(experts));
    for (int64_t t = begin; t < end; ++t) {
      float* probs = logits_.data() + t * experts;
      k.softmax(probs, experts);
      for (int64_t e = 0; e < experts; ++e) order[static_cast<size_t>(e)] = e;
      std::partial_sort(order.begin(), order.begin() + top_k, order.end(),
                        [&](int64_t i, int64_t j) { return probs[i] > probs[j] || (probs[i] == probs[j] && i < j); });
      float sum = 0.0f;
      for (int64_t i = 0; i < top_k; ++i) sum += probs[order[static_cast<size_t>(i)]];
      if (!renormalize) sum = 1.0f;
      std::sort(order.begin(), order.begin() + top_k);
      for (int64_t i = 0; i < top_k; ++i) {
        selected[t * top_k + i] = order[static_cast<size_t>(i)];
        weights[t * top_k + i] = probs[order[static_cast<size_t>(i)]] / sum;
      }
    }
  });
}

}  // namespace expertstream
