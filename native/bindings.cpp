// The Python module: checks shapes and bounds, releases the GIL, calls. No arithmetic.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <string>

#include "io/aligned.h"
#include "io/reader.h"
#include "ops.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace expertstream {
namespace {

using In = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const int64_t, nb::c_contig, nb::device::cpu>;
using IdsOut = nb::ndarray<int64_t, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using BytesOut = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Release = nb::call_guard<nb::gil_scoped_release>;

void require(bool ok, const char* what) {
  if (!ok) throw nb::value_error(what);
}
int64_t size_of(const auto& array) { return static_cast<int64_t>(array.size()); }

// A matrix without its memory: what the bits of one tensor mean.
Matrix make_format(int64_t rows, int64_t cols, int bits, int group_size, const std::string& dtype, bool symmetric) {
  require(rows > 0 && cols > 0 && rows <= INT32_MAX && cols <= INT32_MAX,
          "a matrix has at least one row and one column");
  require(dtype == "f32" || dtype == "bf16" || dtype == "f16", "dtype is f32, bf16 or f16");
  const DType type = dtype == "f32" ? DType::f32 : dtype == "bf16" ? DType::bf16 : DType::f16;
  if (bits == 2 || bits == 4 || bits == 8) {
    require(group_size == 32 || group_size == 64 || group_size == 128, "group_size is 32, 64 or 128");
    require(cols % group_size == 0, "cols is a multiple of group_size");
  } else {
    require(bits == (type == DType::f32 ? 32 : 16), "bits is 2, 4, 8, or the size of a dense dtype");
    require(!symmetric, "only quantized matrices are symmetric");
    group_size = 0;
  }
  return {nullptr,    nullptr, nullptr,  static_cast<int32_t>(rows), static_cast<int32_t>(cols), bits,
          group_size, type,    symmetric};
}

// A matrix in memory that Python owns; keeps the arrays alive.
struct BoundMatrix {
  Matrix m;
  Bytes data, scales, biases;

  BoundMatrix(const Matrix& format, Bytes d, Bytes s, Bytes b) : m(format), data(d), scales(s), biases(b) {
    require(size_of(d) == data_bytes(m) && size_of(s) == scale_bytes(m) && size_of(b) == bias_bytes(m),
            "the bytes of a matrix do not match its shape");
    m.data = d.data();
    m.scales = s.data();
    m.biases = b.data();
  }
};

// A list of (tokens, rows), new arrays that Python owns.
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

// Experts that lie in an arena, checked. offsets (experts, 9): where each one's gate, up and down data, scales and
// biases lie.
std::vector<Expert> bind_experts(const Arena& arena, const std::vector<Matrix>& formats, const Ids& offsets,
                                 const In& x, const Ids& pair_start, const Ids& pair_token) {
  require(formats.size() == 3, "experts: three matrices");
  const Matrix &gate = formats[0], &up = formats[1], &down = formats[2];
  const int64_t count = size_of(offsets) / 9, pairs = size_of(pair_token), hidden = gate.cols,
                tokens = size_of(x) / hidden;
  require(up.rows == gate.rows && up.cols == hidden && down.cols == gate.rows && down.rows == hidden,
          "experts: matrix shapes");
  require(up.bits == gate.bits && up.group_size == gate.group_size && up.symmetric == gate.symmetric,
          "experts: gate and up share bits and group_size");
  require(size_of(offsets) == count * 9 && size_of(pair_start) == count + 1, "experts: offsets and pair_start");
  require(tokens * hidden == size_of(x), "experts: x");
  require(pair_start.data()[0] == 0 && pair_start.data()[count] == pairs, "experts: pair_start");
  for (int64_t e = 0; e < count; ++e)
    require(pair_start.data()[e] <= pair_start.data()[e + 1], "experts: pair_start ascends");
  for (int64_t p = 0; p < pairs; ++p)
    require(pair_token.data()[p] >= 0 && pair_token.data()[p] < tokens, "experts: pair_token out of range");
  std::vector<Expert> bound(static_cast<size_t>(count));
  for (int64_t e = 0; e < count; ++e) {
    Matrix* parts[3] = {&bound[static_cast<size_t>(e)].gate, &bound[static_cast<size_t>(e)].up,
                        &bound[static_cast<size_t>(e)].down};
    for (int i = 0; i < 3; ++i) {
      *parts[i] = formats[static_cast<size_t>(i)];
      const int64_t* at = offsets.data() + e * 9 + i * 3;
      const int64_t needed[3] = {data_bytes(*parts[i]), scale_bytes(*parts[i]), bias_bytes(*parts[i])};
      for (int j = 0; j < 3; ++j)
        require(at[j] >= 0 && at[j] + needed[j] <= static_cast<int64_t>(arena.size()),
                "experts: offset outside the arena");
      parts[i]->data = arena.data() + at[0];
      parts[i]->scales = arena.data() + at[1];
      parts[i]->biases = arena.data() + at[2];
    }
  }
  return bound;
}

void experts(Engine& engine, const Arena& arena, const std::vector<Matrix>& formats, Ids offsets, In x, Ids pair_start,
             Ids pair_token, Out y) {
  const std::vector<Expert> bound = bind_experts(arena, formats, offsets, x, pair_start, pair_token);
  require(size_of(y) == size_of(pair_token) * formats[0].cols, "experts: y");
  nb::gil_scoped_release release;
  engine.experts(bound, x.data(), pair_start.data(), pair_token.data(), y.data());
}

void moe(Engine& engine, const Arena& arena, const std::vector<Matrix>& formats, Ids offsets, In x, Ids pair_start,
         Ids pair_token, In weights, Out acc) {
  const std::vector<Expert> bound = bind_experts(arena, formats, offsets, x, pair_start, pair_token);
  require(size_of(weights) == size_of(pair_token) && size_of(acc) == size_of(x), "moe: weights and acc");
  nb::gil_scoped_release release;
  engine.moe(bound, x.data(), pair_start.data(), pair_token.data(), weights.data(), acc.data());
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

KVLayer kv_layer(nb::ndarray<nb::c_contig, nb::device::cpu>& keys, nb::ndarray<nb::c_contig, nb::device::cpu>& values) {
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
          static_cast<int64_t>(keys.shape(2)) - (i8 ? 4 : 0)};
}

// The weights of a mixer that are no matrices; keeps the arrays alive.
struct BoundAttention {
  AttentionParams p;
  In q_norm, k_norm;

  BoundAttention(In qn, In kn, int64_t heads, float eps) : q_norm(qn), k_norm(kn) {
    require(size_of(qn) == size_of(kn) && heads > 0, "attention: norms of head_dim, at least one head");
    p = {qn.data(), kn.data(), nullptr, nullptr, heads, 0, eps};
  }
};

void attention(Engine& engine, const BoundAttention& bound, In q_gate, In k, In v, In cos, In sin,
               nb::ndarray<nb::c_contig, nb::device::cpu> keys, nb::ndarray<nb::c_contig, nb::device::cpu> values,
               int64_t position, Out out) {
  const KVLayer kv = kv_layer(keys, values);
  AttentionParams p = bound.p;
  const int64_t d = kv.head_dim, tokens = size_of(q_gate) / (2 * p.heads * d);
  require(size_of(bound.q_norm) == d && p.heads % kv.kv_heads == 0, "attention: heads are a multiple of kv_heads");
  require(size_of(q_gate) == tokens * 2 * p.heads * d && size_of(out) == tokens * p.heads * d,
          "attention: q_gate is (tokens, heads, 2, head_dim)");
  require(size_of(k) == tokens * kv.kv_heads * d && size_of(v) == size_of(k), "attention: k and v");
  require(position >= 0 && position + tokens <= kv.capacity, "attention: past the cache's capacity");
  p.cos = cos.data();
  p.sin = sin.data();
  p.rotary_half = tokens ? size_of(cos) / tokens : 0;
  require(size_of(cos) == tokens * p.rotary_half && size_of(sin) == size_of(cos) && 2 * p.rotary_half <= d,
          "attention: cos and sin (tokens, half)");
  nb::gil_scoped_release release;
  engine.attention(q_gate.data(), k.data(), v.data(), p, kv, tokens, position, out.data());
}

struct BoundDelta {
  DeltaParams p;
  In conv_weight, a_log, dt_bias, norm_weight;

  BoundDelta(In conv, In a, In dt, In norm, int64_t key_heads, int64_t value_heads, int64_t dk, float eps)
      : conv_weight(conv), a_log(a), dt_bias(dt), norm_weight(norm) {
    require(conv.ndim() == 2 && key_heads > 0 && value_heads > 0 && value_heads % key_heads == 0 && dk > 0,
            "delta_net: heads");
    const int64_t kernel = static_cast<int64_t>(conv.shape(0)), dv = size_of(norm);
    require(kernel >= 2 && kernel <= 8 &&
                static_cast<int64_t>(conv.shape(1)) == 2 * key_heads * dk + value_heads * dv &&
                size_of(a) == value_heads && size_of(dt) == value_heads,
            "delta_net: weights");
    p = {conv.data(), a.data(), dt.data(), norm.data(), kernel, key_heads, value_heads, dk, dv, eps};
  }
};

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

void route(Engine& engine, const BoundMatrix& w, In x, int64_t top_k, Out weights, IdsOut selected) {
  const int64_t tokens = size_of(x) / w.m.cols;
  require(tokens * w.m.cols == size_of(x) && top_k >= 1 && top_k <= w.m.rows && size_of(weights) == tokens * top_k &&
              size_of(selected) == tokens * top_k,
          "route: shapes");
  nb::gil_scoped_release release;
  engine.route(w.m, x.data(), tokens, top_k, weights.data(), selected.data());
}

nb::tuple quantize(Engine& engine, In w, int bits, int group_size, bool symmetric) {
  require(w.ndim() == 2, "quantize: w is (rows, cols)");
  const int64_t rows = static_cast<int64_t>(w.shape(0)), cols = static_cast<int64_t>(w.shape(1));
  make_format(rows, cols, bits, group_size, "bf16", symmetric);
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

// Rows as checkpoints have them → tiles. Sources have m.rows rows, destinations whole tiles; both may be one memory if
// the rows fill their tiles.
void tile(Engine& engine, const Matrix& m, Bytes data, Bytes scales, Bytes biases, BytesOut data_out,
          BytesOut scales_out, BytesOut biases_out) {
  require(m.bits < 16, "tile: only quantized matrices are tiled");
  const int64_t groups = m.cols / m.group_size, values = m.rows * groups * value_bytes(m.dtype);
  require(size_of(data) == static_cast<int64_t>(m.rows) * m.cols * m.bits / 8 && size_of(scales) == values &&
              size_of(biases) == (m.symmetric ? 0 : values),
          "tile: the bytes of a matrix do not match its shape");
  require(size_of(data_out) == data_bytes(m) && size_of(scales_out) == scale_bytes(m) &&
              size_of(biases_out) == bias_bytes(m),
          "tile: destinations");
  require(m.rows % kTileRows == 0 || data.data() != data_out.data(), "tile: in place only where rows fill tiles");
  nb::gil_scoped_release release;
  tile_rows(engine.pool, m, data.data(), scales.data(), biases.data(), data_out.data(), scales_out.data(),
            biases_out.data());
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
             bool symmetric) { new (self) Matrix(make_format(rows, cols, bits, group_size, dtype, symmetric)); },
          "rows"_a, "cols"_a, "bits"_a, "group_size"_a, "dtype"_a, "symmetric"_a = false);
  nb::class_<BoundMatrix>(m, "Matrix")
      .def(nb::init<const Matrix&, Bytes, Bytes, Bytes>(), "format"_a, "data"_a, "scales"_a, "biases"_a);

  nb::class_<BoundAttention>(m, "Attention")
      .def(nb::init<In, In, int64_t, float>(), "q_norm"_a, "k_norm"_a, "heads"_a, "eps"_a);
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
      .def("moe", &moe, "arena"_a, "formats"_a, "offsets"_a, "x"_a, "pair_start"_a, "pair_token"_a, "weights"_a,
           "acc"_a.noconvert())
      .def("shared_expert", &shared_expert, "gate"_a, "up"_a, "down"_a, "scale"_a, "x"_a, "y"_a.noconvert())
      .def("accumulate", &accumulate, "acc"_a.noconvert(), "y"_a, "pair_token"_a, "weights"_a)
      .def("attention", &attention, "params"_a, "q_gate"_a, "k"_a, "v"_a, "cos"_a, "sin"_a, "keys"_a.noconvert(),
           "values"_a.noconvert(), "position"_a, "out"_a.noconvert())
      .def("delta_net", &delta_net, "params"_a, "chunked"_a, "qkv"_a.noconvert(), "z"_a, "a"_a, "b"_a,
           "conv_state"_a.noconvert(), "state"_a.noconvert(), "out"_a.noconvert())
      .def("quantize", &quantize, "w"_a, "bits"_a, "group_size"_a, "symmetric"_a = false)
      .def("tile", &tile, "format"_a, "data"_a, "scales"_a, "biases"_a, "data_out"_a.noconvert(),
           "scales_out"_a.noconvert(), "biases_out"_a.noconvert())
      .def("route", &route, "w"_a, "x"_a, "top_k"_a, "weights"_a.noconvert(), "selected"_a.noconvert())
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
