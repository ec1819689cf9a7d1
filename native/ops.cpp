#include "ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace expertstream {

namespace {
// Tiles a thread takes at a time: enough to pay for the hand-over, few enough to share a small matrix.
int64_t tile_grain(int64_t tiles, int threads) { return std::max<int64_t>(1, tiles / (threads * 8)); }
constexpr int64_t kPairs = 1024;    // of tokens and experts that are worked on together, unless one expert has more
constexpr int64_t kQueryRows = 48;  // of a block of attention: their sums stay in the second-level cache
int zero_point(const Matrix& m) { return m.symmetric ? 1 << (m.bits - 1) : 0; }
}  // namespace

void Engine::make_room(PreparedActivations& to, const Matrix& w, const float* x, int64_t tokens) {
  const auto lines = static_cast<size_t>(tokens * planes), groups = static_cast<size_t>(w.cols / w.group_size);
  const size_t values = (lines * static_cast<size_t>(w.cols) + 63) / 64 * 64;
  const size_t sums = static_cast<size_t>(tokens) * groups * 4;
  const size_t bytes = values + 2 * sums + lines * groups * 4;
  if (to.memory.size() < bytes) to.memory.resize(bytes);
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

// Quantizes the activations for w, unless `to` has been made from the same x for the same kind of weights; for dense
// weights it only points at x.
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
  // Matrices of one kind of activations are multiplied in one parallel loop.
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
          k.matmul_rows(*w[i], from * kTileRows, std::min<int64_t>(to * kTileRows, w[i]->rows), input_.view, y[i],
                        w[i]->rows);
        start += own;
      }
    });
  }
}

void Engine::embed(const Matrix& w, const int64_t* rows, int64_t tokens, float* y) {
  pool.parallel_for(tokens, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) k.dequantize_row(w, rows[t], y + t * w.cols);
  });
}

void Engine::shared_expert(const Expert& w, const Matrix& scale, const float* x, int64_t tokens, float* y) {
  const int64_t inner = w.gate.rows, hidden = w.down.rows;
  scratch_.resize(static_cast<size_t>(tokens * (2 * inner + 1)));
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

void Engine::experts_inner(const Expert* experts, int64_t count, const float* x, const int64_t* pair_start,
                           const int64_t* pair_token) {
  const int64_t pairs = pair_start[count];
  const Matrix &gate_format = experts[0].gate, &down_format = experts[0].down;
  const int64_t hidden = gate_format.cols, inner = gate_format.rows;
  const bool dense_in = gate_format.bits >= 16, dense_inner = down_format.bits >= 16;
  scratch_.resize(static_cast<size_t>(pairs * (2 * inner + (dense_in ? hidden : 0))));
  float *gate = scratch_.data(), *up = gate + pairs * inner, *gathered = up + pairs * inner;
  std::vector<int64_t> expert_of(static_cast<size_t>(pairs));
  for (int64_t e = 0; e < count; ++e)
    for (int64_t p = pair_start[e]; p < pair_start[e + 1]; ++p) expert_of[static_cast<size_t>(p)] = e;

  // 1. Each pair's activations, an expert's tokens as neighbours.
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

  // 2. gate and up, one task for a few rows of one expert; they are whole groups of down's activations, which the task
  // quantizes as well.
  if (!dense_inner) make_room(inner_, down_format, nullptr, pairs);
  inner_.view.x = gate;
  over_expert_rows(count, pair_start, inner, dense_inner ? kTileRows : down_format.group_size,
                   [&](int64_t e, int64_t begin, int64_t end) {
                     const Expert& expert = experts[e];
                     const int64_t first = pair_start[e], tokens = pair_start[e + 1] - first;
                     const Activations acts = part(input_.view, expert.gate, first, tokens);
                     k.matmul_rows(expert.gate, begin, end, acts, gate + first * inner, inner);
                     k.matmul_rows(expert.up, begin, end, acts, up + first * inner, inner);
                     for (int64_t t = 0; t < tokens; ++t) {
                       const int64_t at = (first + t) * inner + begin;
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

void Engine::experts(const std::vector<Expert>& experts, const float* x, const int64_t* pair_start,
                     const int64_t* pair_token, float* y) {
  if (experts.empty()) return;
  const int64_t count = static_cast<int64_t>(experts.size()), hidden = experts[0].down.rows;
  experts_inner(experts.data(), count, x, pair_start, pair_token);
  over_expert_rows(count, pair_start, hidden, kTileRows, [&](int64_t e, int64_t begin, int64_t end) {
    const Matrix& down = experts[static_cast<size_t>(e)].down;
    const int64_t first = pair_start[e];
    k.matmul_rows(down, begin, end, part(inner_.view, down, first, pair_start[e + 1] - first), y + first * hidden,
                  hidden);
  });
}

void Engine::moe(const std::vector<Expert>& experts, const float* x, const int64_t* pair_start,
                 const int64_t* pair_token, const float* weights, float* acc) {
  const int64_t count = static_cast<int64_t>(experts.size());
  // Some experts at a time: what they need besides their weights is small then, whatever the routing.
  std::vector<int64_t> starts;
  for (int64_t e0 = 0, e1; e0 < count; e0 = e1) {
    const int64_t first = pair_start[e0];
    starts.assign(1, 0);
    for (e1 = e0; e1 < count && (e1 == e0 || pair_start[e1 + 1] - first <= kPairs); ++e1)
      starts.push_back(pair_start[e1 + 1] - first);
    moe_group(experts.data() + e0, e1 - e0, x, starts.data(), pair_token + first, weights + first, acc);
  }
}

void Engine::moe_group(const Expert* experts, int64_t count, const float* x, const int64_t* pair_start,
                       const int64_t* pair_token, const float* weights, float* acc) {
  experts_inner(experts, count, x, pair_start, pair_token);
  const int64_t hidden = experts[0].down.rows;
  int64_t most = 0;
  for (int64_t e = 0; e < count; ++e) most = std::max(most, pair_start[e + 1] - pair_start[e]);
  // A task owns some columns of acc and takes the experts in order: no output of an expert leaves the cache.
  constexpr int64_t kColumns = 64;
  outputs_.resize(static_cast<size_t>(pool.threads() * most * kColumns));
  pool.parallel_for((hidden + kColumns - 1) / kColumns, 1, [&](int64_t first_block, int64_t end_block, int thread) {
    for (int64_t block = first_block; block < end_block; ++block) {
      const int64_t begin = block * kColumns, end = std::min(begin + kColumns, hidden);
      float* y = outputs_.data() + thread * most * kColumns;
      for (int64_t e = 0; e < count; ++e) {
        const Matrix& down = experts[e].down;
        const int64_t first = pair_start[e], tokens = pair_start[e + 1] - first;
        if (tokens == 0) continue;
        k.matmul_rows(down, begin, end, part(inner_.view, down, first, tokens), y - begin, kColumns);
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

// d values as int8 with the float that they are times behind them; the largest becomes 127.
static void store_i8(const float* x, int64_t d, uint8_t* row) {
  float most = 0.0f;
  for (int64_t i = 0; i < d; ++i) most = std::max(most, std::fabs(x[i]));
  const float step = most / 127.0f, inverse = most > 0.0f ? 127.0f / most : 0.0f;
  for (int64_t i = 0; i < d; ++i) row[i] = static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(x[i] * inverse)));
  std::memcpy(row + d, &step, 4);
}

void Engine::attention(const float* q_gate, const float* k_in, const float* v_in, const AttentionParams& p,
                       const KVLayer& kv, int64_t tokens, int64_t position, float* out) {
  const int64_t d = kv.head_dim, per_kv = p.heads / kv.kv_heads;
  // Rows are the query heads of a KV head, of several tokens; a task is such rows against one segment of positions, or
  // for many tokens against all of them, one after another. Both give the same bits.
  const int64_t together = std::clamp<int64_t>(kQueryRows / per_kv, 1, tokens), rows = together * per_kv;
  const int64_t blocks = (tokens + together - 1) / together, segments = (position + tokens + kSegment - 1) / kSegment;
  const bool split = blocks * kv.kv_heads < 2 * pool.threads();
  const int64_t state = rows * (d + 2), own = rows * d + 2 * state + segment_scratch(d, rows);
  const int64_t query_floats = tokens * p.heads * d;
  const int64_t partial_floats = split ? blocks * kv.kv_heads * segments * state : 0;
  scratch_.resize(static_cast<size_t>(query_floats + partial_floats + pool.threads() * own));
  float *q = scratch_.data(), *partials = q + query_floats, *keys = partials + partial_floats;
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  // 1. Norm and rotate; keys and values go into the cache.
  pool.parallel_for(tokens, 8, [&](int64_t begin, int64_t end, int thread) {
    float* key = keys + thread * own;
    for (int64_t t = begin; t < end; ++t) {
      const float *cos = p.cos + t * p.rotary_half, *sin = p.sin + t * p.rotary_half;
      for (int64_t h = 0; h < p.heads; ++h) {
        float* to = q + (t * p.heads + h) * d;
        k.rms_norm(q_gate + (t * p.heads + h) * 2 * d, p.q_norm, d, p.eps, to);
        k.rotary(to, cos, sin, p.rotary_half);
        k.scale(to, scale, d);
      }
      for (int64_t h = 0; h < kv.kv_heads; ++h) {
        const int64_t from = (t * kv.kv_heads + h) * d, at = h * kv.capacity + position + t, to = at * d;
        k.rms_norm(k_in + from, p.k_norm, d, p.eps, key);
        k.rotary(key, cos, sin, p.rotary_half);
        if (kv.dtype == DType::bf16) {
          k.to_bf16(key, d, static_cast<uint16_t*>(kv.k) + to);
          k.to_bf16(v_in + from, d, static_cast<uint16_t*>(kv.v) + to);
        } else if (kv.dtype == DType::i8) {
          store_i8(key, d, static_cast<uint8_t*>(kv.k) + at * kv.row_bytes());
          store_i8(v_in + from, d, static_cast<uint8_t*>(kv.v) + at * kv.row_bytes());
        } else {
          std::memcpy(static_cast<float*>(kv.k) + to, key, static_cast<size_t>(d) * 4);
          std::memcpy(static_cast<float*>(kv.v) + to, v_in + from, static_cast<size_t>(d) * 4);
        }
      }
    }
  });
  // 2. Attend.
  auto attend = [&](int64_t block, int64_t kv_head, int64_t first, int64_t last, float* result, float* room) {
    const int64_t t0 = block * together, count = std::min(together, tokens - t0), n = count * per_kv;
    float *queries = room, *next = queries + rows * d, *scratch = next + state;
    std::vector<int64_t> visible(static_cast<size_t>(n));
    for (int64_t t = 0; t < count; ++t) {
      std::memcpy(queries + t * per_kv * d, q + ((t0 + t) * p.heads + kv_head * per_kv) * d,
                  static_cast<size_t>(per_kv * d) * 4);
      for (int64_t h = 0; h < per_kv; ++h) visible[static_cast<size_t>(t * per_kv + h)] = position + t0 + t + 1;
    }
    for (int64_t s = first; s < last; ++s) {
      const int64_t begin = s * kSegment, end = std::min(begin + kSegment, position + t0 + count);
      float* to = s == first ? result : next;
      if (begin >= end && s > first) break;
      k.attend_segment(queries, n, visible.data(), kv, kv_head, begin, std::max(begin, end), to + rows * d,
                       to + rows * d + rows, to, scratch);
      if (s > first)
        k.merge_segments(n, d, result + rows * d, result + rows * d + rows, result, to + rows * d, to + rows * d + rows,
                         to);
    }
  };
  auto finish = [&](int64_t block, int64_t kv_head, const float* result) {
    const int64_t t0 = block * together, count = std::min(together, tokens - t0);
    for (int64_t t = 0; t < count; ++t)
      for (int64_t h = 0; h < per_kv; ++h) {
        const int64_t row = t * per_kv + h, head = (t0 + t) * p.heads + kv_head * per_kv + h;
        std::memcpy(out + head * d, result + row * d, static_cast<size_t>(d) * 4);
        k.scale(out + head * d, 1.0f / result[rows * d + rows + row], d);
        k.sigmoid_gate(out + head * d, q_gate + (2 * head + 1) * d, d);
      }
  };
  const int64_t tasks = blocks * kv.kv_heads;
  if (!split) {
    pool.parallel_for(tasks, 1, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t task = begin; task < end; ++task) {
        float* room = keys + thread * own;
        float* result = room + own - state;
        attend(task / kv.kv_heads, task % kv.kv_heads, 0, segments, result, room);
        finish(task / kv.kv_heads, task % kv.kv_heads, result);
      }
    });
    return;
  }
  pool.parallel_for(tasks * segments, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i)
      attend(i / segments / kv.kv_heads, i / segments % kv.kv_heads, i % segments, i % segments + 1,
             partials + i * state, keys + thread * own);
  });
  pool.parallel_for(tasks, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t task = begin; task < end; ++task) {
      float* result = partials + task * segments * state;
      for (int64_t s = 1; s < segments; ++s) {
        const float* next = result + s * state;
        k.merge_segments(rows, d, result + rows * d, result + rows * d + rows, result, next + rows * d,
                         next + rows * d + rows, next);
      }
      finish(task / kv.kv_heads, task % kv.kv_heads, result);
    }
  });
}

void Engine::delta_net(bool chunked, float* qkv, const float* z, const float* a, const float* b, const DeltaParams& p,
                       int64_t tokens, float* conv_state, float* state, float* out) {
  const int64_t key_dim = p.key_heads * p.dk, value_dim = p.value_heads * p.dv, channels = 2 * key_dim + value_dim;
  const int64_t own = delta_scratch(p.dk, p.dv), scratch = pool.threads() * own;
  scratch_.resize(static_cast<size_t>(scratch + 2 * tokens * p.value_heads));
  float *g = scratch_.data() + scratch, *beta = g + tokens * p.value_heads;
  // 1. Mix each channel with its own past. One token is not worth waking threads for.
  pool.parallel_for(channels, tokens < 8 ? channels : 64, [&](int64_t begin, int64_t end, int) {
    k.conv(qkv, p.conv_weight, conv_state, tokens, channels, p.kernel, begin, end, qkv);
  });
  // 2. Keys and queries of unit length, queries with the 1/√dk; what each head keeps of its state, and how strongly it
  // writes.
  const float scale = 1.0f / std::sqrt(static_cast<float>(p.dk));
  pool.parallel_for(tokens, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) {
      float* row = qkv + t * channels;
      for (int64_t h = 0; h < p.key_heads; ++h) {
        k.l2_norm(row + h * p.dk, p.dk, 1e-6f, scale, row + h * p.dk);
        k.l2_norm(row + key_dim + h * p.dk, p.dk, 1e-6f, 1.0f, row + key_dim + h * p.dk);
      }
      k.decay(a + t * p.value_heads, p.a_log, p.dt_bias, p.value_heads, g + t * p.value_heads);
      k.sigmoid(b + t * p.value_heads, p.value_heads, beta + t * p.value_heads);
    }
  });
  // 3. The delta rule and the gated norm, a head at a time.
  pool.parallel_for(p.value_heads, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t h = begin; h < end; ++h) {
      const int64_t key_head = h / (p.value_heads / p.key_heads), step = chunked ? kDeltaChunk : tokens;
      for (int64_t t = 0; t < tokens; t += step) {
        const int64_t n = std::min(step, tokens - t);
        const float *q = qkv + t * channels + key_head * p.dk, *key = q + key_dim;
        const float* v = qkv + t * channels + 2 * key_dim + h * p.dv;
        const float *gt = g + t * p.value_heads + h, *bt = beta + t * p.value_heads + h;
        float *s = state + h * p.dk * p.dv, *o = out + t * value_dim + h * p.dv;
        if (chunked)
          k.delta_chunk(q, key, v, gt, bt, n, p.dk, p.dv, channels, channels, p.value_heads, s, o, value_dim,
                        scratch_.data() + thread * own);
        else
          k.delta_step(q, key, v, gt, bt, n, p.dk, p.dv, channels, channels, p.value_heads, s, o, value_dim);
        for (int64_t i = 0; i < n; ++i)
          k.gated_rms_norm(o + i * value_dim, z + (t + i) * value_dim + h * p.dv, p.norm_weight, p.dv, p.eps,
                           o + i * value_dim);
      }
    }
  });
}

void Engine::route(const Matrix& w, const float* x, int64_t tokens, int64_t top_k, float* weights, int64_t* selected) {
  const int64_t experts = w.rows;
  logits_.resize(static_cast<size_t>(tokens * experts));
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
      std::sort(order.begin(), order.begin() + top_k);
      for (int64_t i = 0; i < top_k; ++i) {
        selected[t * top_k + i] = order[static_cast<size_t>(i)];
        weights[t * top_k + i] = probs[order[static_cast<size_t>(i)]] / sum;
      }
    }
  });
}

namespace {
// 32 bits of a row, columns ascending from the least significant bits, to four bytes of a tile: byte b, plane p is
// column 4p + b. Swaps of ever smaller fields, as a bit matrix is transposed (Warren, Hacker's Delight, 7-3).
uint32_t to_planes(uint32_t x, int bits) {
  auto swap = [&](int distance, uint32_t mask) {
    const uint32_t t = (x ^ (x >> distance)) & mask;
    x ^= t ^ (t << distance);
  };
  if (bits == 4) {
    swap(8, 0x0000ff00);
    swap(4, 0x00f000f0);
  } else if (bits == 2) {
    swap(6, 0x00cc00cc);
    swap(12, 0x0000f0f0);
  }
  return x;
}
}  // namespace

void tile_rows(ThreadPool& pool, const Matrix& m, const uint8_t* data, const uint8_t* scales, const uint8_t* biases,
               uint8_t* data_out, uint8_t* scales_out, uint8_t* biases_out) {
  const int64_t groups = m.cols / m.group_size, words = static_cast<int64_t>(m.cols) * m.bits / 32;
  const int64_t size = value_bytes(m.dtype);
  pool.parallel_for(row_tiles(m.rows), 4, [&](int64_t begin, int64_t end, int) {
    std::vector<uint32_t> rows(static_cast<size_t>(kTileRows * words));
    std::vector<uint8_t> values(static_cast<size_t>(kTileRows * groups * size));
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t present = std::min<int64_t>(kTileRows, m.rows - tile * kTileRows);
      std::fill(rows.begin(), rows.end(), 0);
      std::memcpy(rows.data(), data + tile * kTileRows * words * 4, static_cast<size_t>(present * words) * 4);
      uint8_t* out = data_out + tile * kTileRows * words * 4;
      for (int64_t v = 0; v < words; ++v) {
        uint32_t lanes[kTileRows];
        for (int64_t r = 0; r < kTileRows; ++r) lanes[r] = to_planes(rows[static_cast<size_t>(r * words + v)], m.bits);
        std::memcpy(out + v * 64, lanes, 64);
      }
      auto transpose = [&](const uint8_t* from, uint8_t* to) {
        std::fill(values.begin(), values.end(), uint8_t{0});
        std::memcpy(values.data(), from + tile * kTileRows * groups * size,
                    static_cast<size_t>(present * groups * size));
        for (int64_t g = 0; g < groups; ++g)
          for (int64_t r = 0; r < kTileRows; ++r)
            std::memcpy(to + ((tile * groups + g) * kTileRows + r) * size, values.data() + (r * groups + g) * size,
                        static_cast<size_t>(size));
      };
      transpose(scales, scales_out);
      if (!m.symmetric) transpose(biases, biases_out);
    }
  });
}

}  // namespace expertstream
