// Attention and the gated-delta rule: heads, tokens and segments divided among threads.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops.h"

namespace expertstream {

namespace {
constexpr int64_t kQueryRows = 48;  // per attention block: their sums stay in the L2 cache
}

// d values as int8, followed by their float32 scale; the largest becomes 127.
static void store_i8(const float* x, int64_t d, uint8_t* row) {
  float most = 0.0f;
  for (int64_t i = 0; i < d; ++i) most = std::max(most, std::fabs(x[i]));
  const float step = most / 127.0f, inverse = most > 0.0f ? 127.0f / most : 0.0f;
  for (int64_t i = 0; i < d; ++i) row[i] = static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(x[i] * inverse)));
  std::memcpy(row + d, &step, 4);
}

void Engine::attention(const float* q_in, const float* k_in, const float* v_in, const AttentionParams& p,
                       const KVLayer& kv, int64_t tokens, int64_t position, float* out) {
  const int64_t d = kv.head_dim, per_kv = p.heads / kv.kv_heads;
  // Rows are the query heads of a KV head for several tokens. A task computes such rows against one segment of
  // positions or, for many tokens, against all segments in turn. Both give the same bits.
  const int64_t together = std::clamp<int64_t>(kQueryRows / per_kv, 1, tokens), rows = together * per_kv;
  const int64_t stride = p.gated ? 2 * d : d;  // per head of q_in
  // The first position that any query sees, and the number of segments before it.
  const int64_t oldest = p.window ? std::max<int64_t>(0, position + 1 - p.window) : 0, skipped = oldest / kSegment;
  const int64_t blocks = (tokens + together - 1) / together,
                segments = (position + tokens + kSegment - 1) / kSegment - skipped;
  const bool split = blocks * kv.kv_heads < 2 * pool.threads();
  const int64_t state = rows * (d + 2), own = rows * d + 2 * state + segment_scratch(d, rows);
  const int64_t query_floats = tokens * p.heads * d;
  const int64_t partial_floats = split ? blocks * kv.kv_heads * segments * state : 0;
  make_space(scratch_, static_cast<size_t>(query_floats + partial_floats + pool.threads() * own));
  float *q = scratch_.data(), *partials = q + query_floats, *keys = partials + partial_floats;
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  // 1. Norm and rotate; store keys and values in the cache.
  pool.parallel_for(tokens, 8, [&](int64_t begin, int64_t end, int thread) {
    float* key = keys + thread * own;
    for (int64_t t = begin; t < end; ++t) {
      const float *cos = p.cos + t * p.rotary_half, *sin = p.sin + t * p.rotary_half;
      for (int64_t h = 0; h < p.heads; ++h) {
        float* to = q + (t * p.heads + h) * d;
        const float* from = q_in + (t * p.heads + h) * stride;
        if (p.q_norm != nullptr)
          k.rms_norm(from, p.q_norm, d, p.eps, to);
        else
          std::memcpy(to, from, static_cast<size_t>(d) * 4);
        k.rotary(to, cos, sin, p.rotary_half);
        k.scale(to, scale, d);
      }
      for (int64_t h = 0; h < kv.kv_heads; ++h) {
        const int64_t from = (t * kv.kv_heads + h) * d, at = h * kv.capacity + position - kv.first + t, to = at * d;
        if (p.k_norm != nullptr)
          k.rms_norm(k_in + from, p.k_norm, d, p.eps, key);
        else
          std::memcpy(key, k_in + from, static_cast<size_t>(d) * 4);
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
      const int64_t start = (skipped + s) * kSegment, end = std::min(start + kSegment, position + t0 + count);
      // Whole blocks of keys from the first position that these tokens see: this depends on what they see, not on their
      // number.
      const int64_t seen = p.window ? std::max<int64_t>(0, position + t0 + 1 - p.window) / kKeys * kKeys : 0;
      const int64_t begin = std::max(start, seen);
      float* to = s == first ? result : next;
      if (begin >= end && s > first) continue;
      k.attend_segment(queries, n, visible.data(), p.window, kv, kv_head, begin, std::max(begin, end), to + rows * d,
                       to + rows * d + rows, to, scratch);
      if (s > first)
        k.merge_segments(n, d, result + rows * d, result + rows * d + rows, result, to + rows * d, to + rows * d + rows,
                         to);
    }
  };
  const std::vector<float> nothing(p.sinks != nullptr ? static_cast<size_t>(d) : 0);
  auto finish = [&](int64_t block, int64_t kv_head, float* result) {
    const int64_t t0 = block * together, count = std::min(together, tokens - t0);
    for (int64_t t = 0; t < count; ++t)
      for (int64_t h = 0; h < per_kv; ++h) {
        const int64_t row = t * per_kv + h, head = (t0 + t) * p.heads + kv_head * per_kv + h;
        float *largest = result + rows * d + row, *sum = largest + rows;
        const float one = 1.0f;
        if (p.sinks != nullptr)  // one more position, with a zero value
          k.merge_segments(1, d, largest, sum, result + row * d, p.sinks + kv_head * per_kv + h, &one, nothing.data());
        std::memcpy(out + head * d, result + row * d, static_cast<size_t>(d) * 4);
        k.scale(out + head * d, 1.0f / *sum, d);
        if (p.gated) k.sigmoid_gate(out + head * d, q_in + (2 * head + 1) * d, d);
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
  make_space(scratch_, static_cast<size_t>(scratch + 2 * tokens * p.value_heads));
  float *g = scratch_.data() + scratch, *beta = g + tokens * p.value_heads;
  // 1. Mix each channel with its own past. A few tokens are not worth waking threads for.
  pool.parallel_for(channels, tokens < 8 ? channels : 64, [&](int64_t begin, int64_t end, int) {
    k.conv(qkv, p.conv_weight, conv_state, tokens, channels, p.kernel, begin, end, qkv);
  });
  // 2. Scale keys and queries to unit length, queries also by 1/√dk; compute each head's decay and beta.
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
  // 3. The delta rule and the gated norm, one head at a time.
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

}  // namespace expertstream
