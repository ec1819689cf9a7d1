// The Python module: checks shapes and bounds, releases the GIL, calls. No arithmetic.
#include "bindings.h"

#include <nanobind/stl/unique_ptr.h>

#include <chrono>
#include <cstring>

#include "io/aligned.h"
#include "io/reader.h"

using namespace nb::literals;

namespace expertstream {
namespace {

// A list of new (tokens, rows) arrays, owned by Python.
nb::list project(Engine& engine, const std::vector<const BoundMatrix*>& w, In x) {
  require(!w.empty(), "project: at least one matrix");
  const int64_t cols = w[0]->m.cols, tokens = size_of(x) / cols;
  std::vector<const Matrix*> matrices;
  std::vector<float*> out;
  nb::list arrays;
  for (const BoundMatrix* bound : w) {
    require(bound->m.cols == cols && tokens * cols == size_of(x), "project: shapes");
    const auto rows = static_cast<size_t>(bound->m.rows), count = static_cast<size_t>(tokens);
    auto* y = new float[rows * count];
    arrays.append(nb::ndarray<nb::numpy, float>(
        y, {count, rows}, nb::capsule(y, [](void* p) noexcept { delete[] static_cast<float*>(p); })));
    matrices.push_back(&bound->m);
    out.push_back(y);
  }
  nb::gil_scoped_release release;
  engine.project(matrices.data(), out.data(), static_cast<int64_t>(w.size()), x.data(), tokens);
  return arrays;
}

void embed(Engine& engine, const BoundMatrix& w, Ids rows, Out y) {
  require(size_of(y) == size_of(rows) * w.m.cols, "embed: shapes");
  for (int64_t i = 0; i < size_of(rows); ++i)
    require(rows.data()[i] >= 0 && rows.data()[i] < w.m.rows, "embed: row out of range");
  nb::gil_scoped_release release;
  engine.embed(w.m, rows.data(), size_of(rows), y.data());
}

// Experts in an arena, checked. offsets (count, parts): of the parts of each one's gate, up and down, a matrix's bias
// (float32) after its other parts.
std::vector<Expert> bind_experts(const Arena& arena, const ExpertFormat& format, const int64_t* offsets,
                                 int64_t count) {
  std::vector<Expert> bound(static_cast<size_t>(count));
  const int64_t* at = offsets;
  const auto next = [&](int64_t bytes) {
    require(*at >= 0 && *at + bytes <= static_cast<int64_t>(arena.size()), "experts: offset outside the arena");
    return arena.data() + *at++;
  };
  for (Expert& expert : bound) {
    Matrix* matrices[3] = {&expert.gate, &expert.up, &expert.down};
    for (int i = 0; i < 3; ++i) {
      Matrix& m = *matrices[i] = format.matrices[i];
      const uint8_t* begin[3] = {};
      for (int part = 0; part < part_count(m); ++part) begin[part] = next(part_bytes(m, part));
      point(m, begin);
      if (format.biased) {
        require(*at % 4 == 0, "experts: a bias lies at a multiple of 4");
        m.row_bias = reinterpret_cast<const float*>(next(4 * m.rows));
      }
    }
  }
  return bound;
}

// pair_start (count + 1) and pair_token (pairs), as Engine::experts takes them.
void check_pairs(const int64_t* pair_start, int64_t count, const int64_t* pair_token, int64_t pairs, int64_t tokens) {
  require(pair_start[0] == 0 && pair_start[count] == pairs, "experts: pair_start");
  for (int64_t e = 0; e < count; ++e) require(pair_start[e] <= pair_start[e + 1], "experts: pair_start ascends");
  for (int64_t p = 0; p < pairs; ++p)
    require(pair_token[p] >= 0 && pair_token[p] < tokens, "experts: pair_token out of range");
}

std::vector<Expert> bind_experts(const Arena& arena, const ExpertFormat& format, const Ids& offsets, const In& x,
                                 const Ids& pair_start, const Ids& pair_token) {
  const int64_t parts = format.parts(), count = size_of(offsets) / parts, hidden = format.matrices[0].cols,
                tokens = size_of(x) / hidden;
  require(size_of(offsets) == count * parts && size_of(pair_start) == count + 1, "experts: offsets and pair_start");
  require(tokens * hidden == size_of(x), "experts: x");
  check_pairs(pair_start.data(), count, pair_token.data(), size_of(pair_token), tokens);
  return bind_experts(arena, format, offsets.data(), count);
}

void experts(Engine& engine, const Arena& arena, const ExpertFormat& format, Ids offsets, In x, Ids pair_start,
             Ids pair_token, Out y) {
  const std::vector<Expert> bound = bind_experts(arena, format, offsets, x, pair_start, pair_token);
  require(size_of(y) == size_of(pair_token) * format.matrices[0].cols, "experts: y");
  nb::gil_scoped_release release;
  engine.experts(bound, format.act, x.data(), pair_start.data(), pair_token.data(), y.data());
}

void moe(Engine& engine, const Arena& arena, const ExpertFormat& format, Ids offsets, In x, Ids pair_start,
         Ids pair_token, In weights, Out acc) {
  const std::vector<Expert> bound = bind_experts(arena, format, offsets, x, pair_start, pair_token);
  require(size_of(weights) == size_of(pair_token) && size_of(acc) == size_of(x), "moe: weights and acc");
  nb::gil_scoped_release release;
  engine.moe(bound, format.act, x.data(), pair_start.data(), pair_token.data(), weights.data(), acc.data());
}

// Computes what a GPU asks for in a mailbox (cuda/kernels/exchange.cu), from the question after `step` + layer on,
// until it has asked about the last layer. base: the address at which the GPU reads the arena. counts (layers) +=
// experts. Returns the layer that it has asked about where an expert has no address: the caller is to answer; the
// number of layers at the end; −1 if it has asked nothing for `patience` seconds. answered: the layer that the caller
// has answered meanwhile, or −1.
int64_t answer(Engine& engine, const Arena& arena, int64_t base, const std::vector<const ExpertFormat*>& formats,
               IdsOut control, Ids addresses, Ids pair_start, Ids pair_token, In x, Out y, int64_t step,
               double patience, IdsOut counts, int64_t answered) {
  constexpr int64_t kAsked = 0, kAnswered = 8, kExperts = 24, kPairs = 25;
  const auto layers = static_cast<int64_t>(formats.size());
  require(size_of(control) > kPairs && x.ndim() == 2 && y.ndim() == 2 && x.shape(1) == y.shape(1), "answer: shapes");
  require(addresses.ndim() == 2 && size_of(counts) == layers, "answer: addresses and counts");
  const auto stride = static_cast<int64_t>(addresses.shape(1)), most = static_cast<int64_t>(y.shape(0));
  require(static_cast<int64_t>(addresses.shape(0)) >= most && size_of(pair_start) > most && size_of(pair_token) >= most,
          "answer: room");
  nb::gil_scoped_release release;
  int64_t* words = control.data();
  if (answered >= 0) __atomic_store_n(words + kAnswered, step + answered + 1, __ATOMIC_RELEASE);
  if (answered == layers - 1) return layers;
  std::vector<int64_t> starts, tokens, offsets;
  for (int64_t done = __atomic_load_n(words + kAnswered, __ATOMIC_ACQUIRE);;) {
    const auto limit = std::chrono::steady_clock::now() + std::chrono::duration<double>(patience);
    int64_t asked;
    for (int64_t spins = 1; (asked = __atomic_load_n(words + kAsked, __ATOMIC_ACQUIRE)) <= done; ++spins) {
      relax();
      if (spins % 1024 == 0 && std::chrono::steady_clock::now() > limit) return -1;
    }
    // Copied and checked: the other side may have given up waiting and write its next question.
    const int64_t layer = asked - step - 1, count = words[kExperts], pairs = words[kPairs];
    require(layer >= 0 && layer < layers && count >= 0 && count <= pairs && pairs <= most, "answer: question");
    if (pairs) {
      const ExpertFormat& format = *formats[static_cast<size_t>(layer)];
      const int64_t parts = format.parts();
      require(parts <= stride && static_cast<int64_t>(x.shape(1)) == format.matrices[0].cols, "answer: format");
      starts.assign(pair_start.data(), pair_start.data() + count + 1);
      tokens.assign(pair_token.data(), pair_token.data() + pairs);
      offsets.clear();
      bool missing = false;
      for (int64_t e = 0; e < count; ++e)
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t at = addresses.data()[e * stride + part];
          missing = missing || at == 0;
          offsets.push_back(at - base);
        }
      counts.data()[layer] += count;
      if (missing) return layer;
      check_pairs(starts.data(), count, tokens.data(), pairs, static_cast<int64_t>(x.shape(0)));
      const std::vector<Expert> bound = bind_experts(arena, format, offsets.data(), count);
      engine.experts(bound, format.act, x.data(), starts.data(), tokens.data(), y.data());
    }
    __atomic_store_n(words + kAnswered, asked, __ATOMIC_RELEASE);
    done = asked;
    if (layer == layers - 1) return layers;
  }
}

void accumulate(Engine& engine, Out acc, In y, Ids pair_token, In weights) {
  require(acc.ndim() == 2, "accumulate: acc is (tokens, hidden)");
  const int64_t hidden = static_cast<int64_t>(acc.shape(1)), pairs = size_of(pair_token);
  require(size_of(y) == pairs * hidden && size_of(weights) == pairs, "accumulate: shapes");
  for (int64_t p = 0; p < pairs; ++p)
    require(pair_token.data()[p] >= 0 && pair_token.data()[p] < static_cast<int64_t>(acc.shape(0)),
            "accumulate: token out of range");
  nb::gil_scoped_release release;
  engine.accumulate(acc.data(), y.data(), pair_token.data(), weights.data(), pairs, hidden);
}

KVLayer kv_layer(nb::ndarray<nb::c_contig, nb::device::cpu>& keys, nb::ndarray<nb::c_contig, nb::device::cpu>& values,
                 int64_t first) {
  require(keys.ndim() == 3 && values.ndim() == 3 && keys.size() == values.size(),
          "attention: keys and values (kv_heads, capacity, d)");
  const bool f32 = keys.dtype() == nb::dtype<float>(), bf16 = keys.dtype() == nb::dtype<uint16_t>(),
             i8 = keys.dtype() == nb::dtype<uint8_t>();
  require(
      (f32 || bf16 || i8) && keys.dtype() == values.dtype(),
      "attention: keys and values are float32, bfloat16 bits (uint16), or int8 with a float behind each row (uint8)");
  require(!i8 || keys.shape(2) > 4, "attention: rows of int8 end with a float");
  return {keys.data(),
          values.data(),
          f32    ? DType::f32
          : bf16 ? DType::bf16
                 : DType::i8,
          static_cast<int64_t>(keys.shape(0)),
          static_cast<int64_t>(keys.shape(1)),
          static_cast<int64_t>(keys.shape(2)) - (i8 ? 4 : 0),
          first};
}

void attention(Engine& engine, const BoundAttention& bound, In q, In k, In v, In cos, In sin,
               nb::ndarray<nb::c_contig, nb::device::cpu> keys, nb::ndarray<nb::c_contig, nb::device::cpu> values,
               int64_t position, int64_t first, Out out) {
  const KVLayer kv = kv_layer(keys, values, first);
  AttentionParams p = bound.p;
  const int64_t d = bound.head_dim, width = p.heads * d, tokens = size_of(out) / width;
  require(kv.head_dim == d && kv.kv_heads == bound.kv_heads, "attention: keys and values (kv_heads, capacity, d)");
  require(size_of(out) == tokens * width && size_of(q) == (p.gated ? 2 : 1) * size_of(out),
          "attention: q is (tokens, heads, head_dim), or (tokens, heads, 2, head_dim) with gates");
  require(size_of(k) == tokens * kv.kv_heads * d && size_of(v) == size_of(k), "attention: k and v");
  require(first >= 0 && first % kKeys == 0, "attention: the first row's position is a multiple of 64");
  require(position >= first && position - first + tokens <= kv.capacity, "attention: past the cache's capacity");
  const int64_t seen = p.window == 0 || position < p.window ? 0 : position + 1 - p.window;
  require(first <= seen, "attention: rows inside the window are gone");
  p.cos = cos.data();
  p.sin = sin.data();
  p.rotary_half = tokens ? size_of(cos) / tokens : 0;
  require(size_of(cos) == tokens * p.rotary_half && size_of(sin) == size_of(cos) && 2 * p.rotary_half <= d,
          "attention: cos and sin (tokens, half)");
  nb::gil_scoped_release release;
  engine.attention(q.data(), k.data(), v.data(), p, kv, tokens, position, out.data());
}

void delta_net(Engine& engine, const BoundDelta& bound, bool chunked, Out qkv, In z, In a, In b, Out conv_state,
               Out state, Out out) {
  const DeltaParams& p = bound.p;
  const int64_t value_dim = p.value_heads * p.dv, channels = 2 * p.key_heads * p.dk + value_dim,
                tokens = size_of(qkv) / channels;
  require(size_of(qkv) == tokens * channels && size_of(z) == tokens * value_dim && size_of(out) == size_of(z),
          "delta_net: qkv, z and out");
  require(size_of(a) == tokens * p.value_heads && size_of(b) == size_of(a), "delta_net: a and b");
  require(size_of(conv_state) == (p.kernel - 1) * channels && size_of(state) == value_dim * p.dk, "delta_net: states");
  nb::gil_scoped_release release;
  engine.delta_net(chunked, qkv.data(), z.data(), a.data(), b.data(), p, tokens, conv_state.data(), state.data(),
                   out.data());
}

void shared_expert(Engine& engine, const BoundMatrix& gate, const BoundMatrix& up, const BoundMatrix& down,
                   const BoundMatrix& scale, In x, Out y) {
  const Expert w{gate.m, up.m, down.m};
  const int64_t hidden = w.gate.cols, tokens = size_of(x) / hidden;
  require(w.up.cols == hidden && w.up.rows == w.gate.rows && w.down.cols == w.gate.rows && w.down.rows == hidden &&
              scale.m.rows == 1 && scale.m.cols == hidden,
          "shared_expert: matrix shapes");
  require(tokens * hidden == size_of(x) && size_of(y) == size_of(x), "shared_expert: shapes");
  nb::gil_scoped_release release;
  engine.shared_expert(w, scale.m, x.data(), tokens, y.data());
}

void route(Engine& engine, const BoundMatrix& w, In x, int64_t top_k, bool renormalize, Out weights, IdsOut selected) {
  const int64_t tokens = size_of(x) / w.m.cols;
  require(tokens * w.m.cols == size_of(x) && top_k >= 1 && top_k <= w.m.rows && size_of(weights) == tokens * top_k &&
              size_of(selected) == tokens * top_k,
          "route: shapes");
  nb::gil_scoped_release release;
  engine.route(w.m, x.data(), tokens, top_k, renormalize, weights.data(), selected.data());
}

nb::tuple quantize(Engine& engine, In w, int bits, int group_size, bool symmetric) {
  require(w.ndim() == 2, "quantize: w is (rows, cols)");
  const int64_t rows = static_cast<int64_t>(w.shape(0)), cols = static_cast<int64_t>(w.shape(1));
  make_format(rows, cols, bits, group_size, "bf16", symmetric ? "symmetric" : "affine");
  const size_t groups = static_cast<size_t>(rows * cols / group_size),
               bytes = static_cast<size_t>(rows * cols * bits / 8);
  auto* packed = new uint8_t[bytes];
  auto* scales = new uint16_t[groups];
  auto* biases = new uint16_t[symmetric ? 0 : groups];
  nb::capsule owners[3] = {nb::capsule(packed, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); }),
                           nb::capsule(scales, [](void* p) noexcept { delete[] static_cast<uint16_t*>(p); }),
                           nb::capsule(biases, [](void* p) noexcept { delete[] static_cast<uint16_t*>(p); })};
  {
    nb::gil_scoped_release release;
    quantize_affine(engine.pool, w.data(), rows, cols, bits, group_size, packed, scales, symmetric ? nullptr : biases);
  }
  const size_t r = static_cast<size_t>(rows);
  return nb::make_tuple(nb::ndarray<nb::numpy, uint8_t>(packed, {r, bytes / r}, owners[0]),
                        nb::ndarray<nb::numpy, uint16_t>(scales, {r, groups / r}, owners[1]),
                        nb::ndarray<nb::numpy, uint16_t>(biases, {symmetric ? 0 : r, groups / r}, owners[2]));
}

// Rows as stored in checkpoints → tiles. Sources have m.rows rows, destinations whole tiles; both may be the same
// memory if the rows fill their tiles.
void tile(Engine& engine, const Matrix& m, const std::vector<Bytes>& from, std::vector<BytesOut> to) {
  require(m.codes != Codes::dense, "tile: only quantized matrices are tiled");
  const int64_t values = static_cast<int64_t>(m.rows) * (m.cols / m.group_size) * value_bytes(m.dtype);
  const int64_t stored[3] = {static_cast<int64_t>(m.rows) * m.cols * m.bits / 8, values, values};
  const auto parts = static_cast<size_t>(part_count(m));
  require(from.size() == parts && to.size() == parts, "tile: one array for each part of the matrix");
  const uint8_t* in[3] = {};
  uint8_t* out[3] = {};
  for (size_t i = 0; i < parts; ++i) {
    require(size_of(from[i]) == stored[i], "tile: the bytes of a matrix do not match its shape");
    require(size_of(to[i]) == part_bytes(m, static_cast<int>(i)), "tile: destinations");
    in[i] = from[i].data();
    out[i] = to[i].data();
  }
  require(m.rows % kTileRows == 0 || in[0] != out[0], "tile: in place only where rows fill tiles");
  nb::gil_scoped_release release;
  tile_rows(engine.pool, m, in[0], in[1], in[2], out[0], out[1], out[2]);
}

// requests (n, 6): tag, fd, direct, offset, length, needed; dests: offsets in the arena.
void submit(Reader& reader, const Arena& arena, Ids requests, Ids dests) {
  const int64_t count = size_of(dests);
  require(size_of(requests) == count * 6, "submit: six numbers a request");
  std::vector<ReadRequest> batch(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* r = requests.data() + i * 6;
    const int64_t dest = dests.data()[i];
    require(r[3] >= 0 && r[4] > 0 && r[5] <= r[4], "submit: offset, length or needed");
    require(dest >= 0 && dest + r[4] <= static_cast<int64_t>(arena.size()), "submit: destination outside the arena");
    batch[static_cast<size_t>(i)] = {static_cast<uint64_t>(r[0]), static_cast<int>(r[1]), r[2] != 0, r[3], r[4], r[5],
                                     arena.data() + dest};
  }
  nb::gil_scoped_release release;
  reader.submit(batch.data(), batch.size());
}

// A list of (tag, error, bytes, cached_bytes).
nb::list wait(Reader& reader, size_t at_least) {
  std::vector<Completion> done;
  {
    nb::gil_scoped_release release;
    done = reader.wait(at_least);
  }
  nb::list out;
  for (const Completion& c : done) out.append(nb::make_tuple(c.tag, c.error, c.bytes, c.cached_bytes));
  return out;
}

nb::list names_of(int (*list)(const Kernels**, int)) {
  const Kernels* tables[8];
  const int count = list(tables, 8);
  nb::list names;
  for (int i = 0; i < count; ++i) names.append(tables[i]->name);
  return names;
}

}  // namespace

NB_MODULE(_native, m) {
  m.attr("SHORT_READ") = kShortRead;

  nb::class_<Matrix>(m, "Format")
      .def(
          "__init__",
          [](Matrix* self, int64_t rows, int64_t cols, int bits, int group_size, const std::string& dtype,
             const std::string& codes) { new (self) Matrix(make_format(rows, cols, bits, group_size, dtype, codes)); },
          "rows"_a, "cols"_a, "bits"_a, "group_size"_a, "dtype"_a, "codes"_a);
  nb::class_<BoundMatrix>(m, "Matrix")
      .def(nb::init<const Matrix&, std::vector<Bytes>, std::optional<In>>(), "format"_a, "parts"_a,
           "bias"_a = nb::none());
  nb::class_<ExpertFormat>(m, "ExpertFormat")
      .def(nb::init<const Matrix&, const Matrix&, const Matrix&, bool, float, float>(), "gate"_a, "up"_a, "down"_a,
           "biased"_a = false, "alpha"_a = 1.0f, "limit"_a = 0.0f);

  nb::class_<BoundAttention>(m, "Attention")
      .def(nb::init<int64_t, int64_t, int64_t, float, std::optional<In>, std::optional<In>, bool, std::optional<In>,
                    int64_t>(),
           "heads"_a, "kv_heads"_a, "head_dim"_a, "eps"_a, "q_norm"_a = nb::none(), "k_norm"_a = nb::none(),
           "gated"_a = false, "sinks"_a = nb::none(), "window"_a = 0);
  nb::class_<BoundDelta>(m, "DeltaNet")
      .def(nb::init<In, In, In, In, int64_t, int64_t, int64_t, float>(), "conv_weight"_a, "a_log"_a, "dt_bias"_a,
           "norm_weight"_a, "key_heads"_a, "value_heads"_a, "dk"_a, "eps"_a);

  nb::class_<Arena>(m, "Arena")
      .def(nb::init<size_t>(), "size"_a)
      .def_prop_ro("size", &Arena::size)
      .def_prop_ro("huge_pages", &Arena::huge_pages)
      .def(
          "release",
          [](Arena& arena, size_t offset, size_t bytes) {
            require(offset % 4096 == 0 && bytes % 4096 == 0 && offset + bytes <= arena.size(), "release: whole pages");
            arena.release(offset, bytes);
          },
          "offset"_a, "bytes"_a)
      .def("view", [](nb::handle self) {
        const Arena& arena = nb::cast<const Arena&>(self);
        return nb::ndarray<nb::numpy, uint8_t>(arena.data(), {arena.size()}, self);
      });

  nb::class_<Reader>(m, "Reader")
      .def("submit", &submit, "arena"_a, "requests"_a, "dests"_a, nb::keep_alive<1, 2>())
      .def("wait", &wait, "at_least"_a = 1)
      .def(
          "register_memory", [](Reader& r, const Arena& arena) { r.register_memory(arena.data(), arena.size()); },
          "arena"_a, nb::keep_alive<1, 2>())
      .def("unregister_memory",
           [](Reader& r) {
             require(r.pending() == 0, "unregister_memory: reads are pending");
             r.unregister_memory();
           })
      .def_prop_ro("pending", &Reader::pending)
      .def_prop_ro("reads", [](const Reader& r) { return r.stats().reads; })
      .def("take_peak", &Reader::take_peak)
      .def_prop_ro("registered_buffers", [](const Reader& r) { return r.stats().registered_buffers; });
  m.def("uring_reader", &make_uring_reader, "queue_depth"_a, "split_bytes"_a, Release());
  m.def("pread_reader", &make_pread_reader, "queue_depth"_a, "split_bytes"_a, Release());
  m.def("set_fault", &set_fault, "after"_a, "count"_a, "value"_a);
  m.def("clear_faults", &clear_faults);

  m.def("known_isas", [] { return names_of(&all_kernels); });
  m.def("available_isas", [] { return names_of(&available_kernels); });

  nb::class_<Engine>(m, "Engine")
      .def(
          "__init__",
          [](Engine* self, int threads, const std::string& isa, int activation_bits) {
            require(threads >= 1 && threads <= 1024, "threads is 1 to 1024");
            require(activation_bits == 8 || activation_bits == 16, "activation_bits is 8 or 16");
            const Kernels* kernels = find_kernels(isa.c_str());
            require(kernels != nullptr, "unknown instruction set");
            new (self) Engine(threads, kernels, activation_bits);
          },
          "threads"_a, "isa"_a, "activation_bits"_a)
      .def_prop_ro("isa", [](const Engine& e) { return e.k.name; })
      .def_prop_ro("buffer_bytes", &Engine::buffer_bytes)
      .def("release_buffers", &Engine::release_buffers)
      .def_prop_ro("threads", [](const Engine& e) { return e.pool.threads(); })
      .def(
          "read_memory",
          [](Engine& e, Bytes memory) {
            constexpr int64_t kPart = 1 << 20;
            require(size_of(memory) % kPart == 0, "read_memory: whole MiB");
            nb::gil_scoped_release release;
            e.pool.parallel_for(size_of(memory) / kPart, 8, [&](int64_t begin, int64_t end, int) {
              e.k.read_memory(memory.data() + begin * kPart, (end - begin) * kPart);
            });
          },
          "memory"_a)
      .def(
          "multiply",
          [](Engine& e, int64_t rounds) {
            nb::gil_scoped_release release;
            std::vector<int64_t> done(static_cast<size_t>(e.pool.threads()) * 32);
            e.pool.parallel_for(static_cast<int64_t>(done.size()), 1, [&](int64_t begin, int64_t, int) {
              int32_t result;
              done[static_cast<size_t>(begin)] = e.k.multiply(rounds, &result);
            });
            int64_t total = 0;
            for (int64_t n : done) total += n;
            return total;
          },
          "rounds"_a)
      .def("project", &project, "w"_a, "x"_a)
      .def("embed", &embed)
      .def("experts", &experts)
      .def("answer", &answer, "arena"_a, "base"_a, "formats"_a, "control"_a.noconvert(), "addresses"_a.noconvert(),
           "pair_start"_a.noconvert(), "pair_token"_a.noconvert(), "x"_a.noconvert(), "y"_a.noconvert(), "step"_a,
           "patience"_a, "counts"_a.noconvert(), "answered"_a = -1)
      .def("moe", &moe, "arena"_a, "format"_a, "offsets"_a, "x"_a, "pair_start"_a, "pair_token"_a, "weights"_a,
           "acc"_a.noconvert())
      .def("shared_expert", &shared_expert, "gate"_a, "up"_a, "down"_a, "scale"_a, "x"_a, "y"_a.noconvert())
      .def("accumulate", &accumulate, "acc"_a.noconvert(), "y"_a, "pair_token"_a, "weights"_a)
      .def("attention", &attention, "params"_a, "q"_a, "k"_a, "v"_a, "cos"_a, "sin"_a, "keys"_a.noconvert(),
           "values"_a.noconvert(), "position"_a, "first"_a, "out"_a.noconvert())
      .def("delta_net", &delta_net, "params"_a, "chunked"_a, "qkv"_a.noconvert(), "z"_a, "a"_a, "b"_a,
           "conv_state"_a.noconvert(), "state"_a.noconvert(), "out"_a.noconvert())
      .def("quantize", &quantize, "w"_a, "bits"_a, "group_size"_a, "symmetric"_a = false)
      .def("tile", &tile, "format"_a, "parts"_a, "tiles"_a.noconvert())
      .def("route", &route, "w"_a, "x"_a, "top_k"_a, "renormalize"_a, "weights"_a.noconvert(), "selected"_a.noconvert())
      .def(
          "rms_norm",
          [](Engine& e, In x, In weight, float eps, Out y) {
            const int64_t n = size_of(weight), rows = size_of(x) / n;
            require(rows * n == size_of(x) && size_of(y) == size_of(x), "rms_norm: shapes");
            nb::gil_scoped_release release;
            e.pool.parallel_for(rows, 16, [&](int64_t begin, int64_t end, int) {
              for (int64_t r = begin; r < end; ++r)
                e.k.rms_norm(x.data() + r * n, weight.data(), n, eps, y.data() + r * n);
            });
          },
          "x"_a, "weight"_a, "eps"_a, "y"_a.noconvert());
}

}  // namespace expertstream
