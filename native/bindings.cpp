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
using Release = nb::call_guard<nb::gil_scoped_release>;

void require(bool ok, const char* what) {
  if (!ok) throw nb::value_error(what);
}
int64_t size_of(const auto& array) { return static_cast<int64_t>(array.size()); }

int64_t data_bytes(const Matrix& m) { return static_cast<int64_t>(m.rows) * m.cols * m.bits / 8; }
int64_t scale_bytes(const Matrix& m) {
  return m.bits >= 16 ? 0 : static_cast<int64_t>(m.rows) * (m.cols / m.group_size) * (m.dtype == DType::f32 ? 4 : 2);
}

// A matrix without its memory: what the bits of one tensor mean.
Matrix make_format(int64_t rows, int64_t cols, int bits, int group_size, const std::string& dtype) {
  require(rows > 0 && cols > 0 && rows <= INT32_MAX && cols <= INT32_MAX,
          "a matrix has at least one row and one column");
  require(dtype == "f32" || dtype == "bf16" || dtype == "f16", "dtype is f32, bf16 or f16");
  const DType type = dtype == "f32" ? DType::f32 : dtype == "bf16" ? DType::bf16 : DType::f16;
  if (bits == 2 || bits == 4 || bits == 8) {
    require(group_size == 32 || group_size == 64 || group_size == 128, "group_size is 32, 64 or 128");
    require(cols % group_size == 0, "cols is a multiple of group_size");
  } else {
    require(bits == (type == DType::f32 ? 32 : 16), "bits is 2, 4, 8, or the size of a dense dtype");
    group_size = 0;
  }
  return {nullptr, nullptr, nullptr, static_cast<int32_t>(rows), static_cast<int32_t>(cols), bits, group_size, type};
}

// A matrix in memory that Python owns; keeps the arrays alive.
struct BoundMatrix {
  Matrix m;
  Bytes data, scales, biases;

  BoundMatrix(const Matrix& format, Bytes d, Bytes s, Bytes b) : m(format), data(d), scales(s), biases(b) {
    require(size_of(d) == data_bytes(m) && size_of(s) == scale_bytes(m) && size_of(b) == scale_bytes(m),
            "the bytes of a matrix do not match its shape");
    m.data = d.data();
    m.scales = s.data();
    m.biases = b.data();
  }
};

void linear(Engine& engine, const BoundMatrix& w, In x, Out y) {
  const int64_t tokens = size_of(x) / w.m.cols;
  require(tokens * w.m.cols == size_of(x) && tokens * w.m.rows == size_of(y), "linear: shapes");
  nb::gil_scoped_release release;
  engine.linear(w.m, x.data(), tokens, y.data());
}

void embed(Engine& engine, const BoundMatrix& w, Ids rows, Out y) {
  require(size_of(y) == size_of(rows) * w.m.cols, "embed: shapes");
  for (int64_t i = 0; i < size_of(rows); ++i)
    require(rows.data()[i] >= 0 && rows.data()[i] < w.m.rows, "embed: row out of range");
  nb::gil_scoped_release release;
  engine.embed(w.m, rows.data(), size_of(rows), y.data());
}

// offsets (experts, 9): where in the arena each expert's gate, up and down data, scales and biases lie.
void experts(Engine& engine, const Arena& arena, const std::vector<Matrix>& formats, Ids offsets, In x, Ids pair_start,
             Ids pair_token, Out y) {
  require(formats.size() == 3, "experts: three matrices");
  const Matrix &gate = formats[0], &up = formats[1], &down = formats[2];
  const int64_t count = size_of(offsets) / 9, pairs = size_of(pair_token), hidden = gate.cols,
                tokens = size_of(x) / hidden;
  require(up.rows == gate.rows && up.cols == hidden && down.cols == gate.rows && down.rows == hidden,
          "experts: matrix shapes");
  require(up.bits == gate.bits && up.group_size == gate.group_size, "experts: gate and up share bits and group_size");
  require(size_of(offsets) == count * 9 && size_of(pair_start) == count + 1, "experts: offsets and pair_start");
  require(tokens * hidden == size_of(x) && size_of(y) == pairs * hidden, "experts: x and y");
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
      const int64_t needed[3] = {data_bytes(*parts[i]), scale_bytes(*parts[i]), scale_bytes(*parts[i])};
      for (int j = 0; j < 3; ++j)
        require(at[j] >= 0 && at[j] + needed[j] <= static_cast<int64_t>(arena.size()),
                "experts: offset outside the arena");
      parts[i]->data = arena.data() + at[0];
      parts[i]->scales = arena.data() + at[1];
      parts[i]->biases = arena.data() + at[2];
    }
  }
  nb::gil_scoped_release release;
  engine.experts(bound, x.data(), pair_start.data(), pair_token.data(), y.data());
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

// Applies a per-row kernel to every row of x, rows divided among threads.
template <class Row>
void over_rows(Engine& engine, int64_t rows, Row row) {
  nb::gil_scoped_release release;
  engine.pool.parallel_for(rows, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) row(r);
  });
}

KVLayer kv_layer(nb::ndarray<nb::c_contig, nb::device::cpu>& keys, nb::ndarray<nb::c_contig, nb::device::cpu>& values) {
  require(keys.ndim() == 3 && values.ndim() == 3 && keys.size() == values.size(),
          "attention: keys and values (kv_heads, capacity, d)");
  const bool f32 = keys.dtype() == nb::dtype<float>(), bf16 = keys.dtype() == nb::dtype<uint16_t>();
  require((f32 || bf16) && keys.dtype() == values.dtype(),
          "attention: keys and values are float32 or bfloat16 bits (uint16)");
  return {keys.data(),
          values.data(),
          f32 ? DType::f32 : DType::bf16,
          static_cast<int64_t>(keys.shape(0)),
          static_cast<int64_t>(keys.shape(1)),
          static_cast<int64_t>(keys.shape(2))};
}

void attention(Engine& engine, In q, In k, In v, In gate, nb::ndarray<nb::c_contig, nb::device::cpu> keys,
               nb::ndarray<nb::c_contig, nb::device::cpu> values, int64_t position, float scale, Out out) {
  const KVLayer kv = kv_layer(keys, values);
  require(q.ndim() == 3 && static_cast<int64_t>(q.shape(2)) == kv.head_dim,
          "attention: q is (tokens, heads, head_dim)");
  const int64_t tokens = static_cast<int64_t>(q.shape(0)), heads = static_cast<int64_t>(q.shape(1));
  require(heads % kv.kv_heads == 0, "attention: heads are a multiple of kv_heads");
  require(size_of(k) == tokens * kv.kv_heads * kv.head_dim && size_of(v) == size_of(k), "attention: k and v");
  require(size_of(gate) == size_of(q) && size_of(out) == size_of(q), "attention: gate and out");
  require(position >= 0 && position + tokens <= kv.capacity, "attention: past the cache's capacity");
  nb::gil_scoped_release release;
  engine.append_kv(kv, k.data(), v.data(), tokens, position);
  engine.attention(q.data(), gate.data(), kv, tokens, heads, position, scale, out.data());
}

void gated_delta(Engine& engine, bool chunked, In q, In k, In v, In g, In beta, Out state, Out out) {
  require(q.ndim() == 3 && v.ndim() == 3 && state.ndim() == 3, "gated_delta: q, v and state have three axes");
  const int64_t tokens = static_cast<int64_t>(q.shape(0)), key_heads = static_cast<int64_t>(q.shape(1));
  const int64_t dk = static_cast<int64_t>(q.shape(2)), value_heads = static_cast<int64_t>(v.shape(1)),
                dv = static_cast<int64_t>(v.shape(2));
  require(static_cast<int64_t>(v.shape(0)) == tokens && value_heads % key_heads == 0, "gated_delta: v");
  require(size_of(k) == size_of(q) && size_of(out) == size_of(v), "gated_delta: k and out");
  require(size_of(g) == tokens * value_heads && size_of(beta) == size_of(g), "gated_delta: g and beta");
  require(size_of(state) == value_heads * dk * dv, "gated_delta: state");
  nb::gil_scoped_release release;
  engine.gated_delta(chunked, q.data(), k.data(), v.data(), g.data(), beta.data(), tokens, key_heads, value_heads, dk,
                     dv, state.data(), out.data());
}

void conv(Engine& engine, In x, In weight, Out state, Out y) {
  require(x.ndim() == 2 && weight.ndim() == 2, "conv: x (tokens, channels), weight (kernel, channels)");
  const int64_t tokens = static_cast<int64_t>(x.shape(0)), channels = static_cast<int64_t>(x.shape(1));
  const int64_t kernel = static_cast<int64_t>(weight.shape(0));
  require(static_cast<int64_t>(weight.shape(1)) == channels && kernel >= 2 && kernel <= 8, "conv: weight");
  require(size_of(state) == (kernel - 1) * channels && size_of(y) == size_of(x), "conv: state and y");
  nb::gil_scoped_release release;
  engine.pool.parallel_for(channels, 64, [&](int64_t begin, int64_t end, int) {
    engine.k.conv(x.data(), weight.data(), state.data(), tokens, channels, kernel, begin, end, y.data());
  });
}

nb::tuple quantize(Engine& engine, In w, int bits, int group_size) {
  require(w.ndim() == 2, "quantize: w is (rows, cols)");
  const int64_t rows = static_cast<int64_t>(w.shape(0)), cols = static_cast<int64_t>(w.shape(1));
  make_format(rows, cols, bits, group_size, "bf16");
  const size_t groups = static_cast<size_t>(rows * cols / group_size),
               bytes = static_cast<size_t>(rows * cols * bits / 8);
  auto* packed = new uint8_t[bytes];
  auto* scales = new uint16_t[groups];
  auto* biases = new uint16_t[groups];
  nb::capsule owners[3] = {nb::capsule(packed, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); }),
                           nb::capsule(scales, [](void* p) noexcept { delete[] static_cast<uint16_t*>(p); }),
                           nb::capsule(biases, [](void* p) noexcept { delete[] static_cast<uint16_t*>(p); })};
  {
    nb::gil_scoped_release release;
    quantize_affine(engine.pool, w.data(), rows, cols, bits, group_size, packed, scales, biases);
  }
  const size_t r = static_cast<size_t>(rows);
  return nb::make_tuple(nb::ndarray<nb::numpy, uint8_t>(packed, {r, bytes / r}, owners[0]),
                        nb::ndarray<nb::numpy, uint16_t>(scales, {r, groups / r}, owners[1]),
                        nb::ndarray<nb::numpy, uint16_t>(biases, {r, groups / r}, owners[2]));
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
          [](Matrix* self, int64_t rows, int64_t cols, int bits, int group_size, const std::string& dtype) {
            new (self) Matrix(make_format(rows, cols, bits, group_size, dtype));
          },
          "rows"_a, "cols"_a, "bits"_a, "group_size"_a, "dtype"_a)
      .def_prop_ro("data_bytes", &data_bytes)
      .def_prop_ro("scale_bytes", &scale_bytes);
  nb::class_<BoundMatrix>(m, "Matrix")
      .def(nb::init<const Matrix&, Bytes, Bytes, Bytes>(), "format"_a, "data"_a, "scales"_a, "biases"_a);

  nb::class_<Arena>(m, "Arena")
      .def(nb::init<size_t>(), "size"_a)
      .def_prop_ro("size", &Arena::size)
      .def_prop_ro("huge_pages", &Arena::huge_pages)
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
          [](Engine* self, int threads, const std::string& isa) {
            require(threads >= 1 && threads <= 1024, "threads is 1 to 1024");
            const Kernels* kernels = find_kernels(isa.c_str());
            require(kernels != nullptr, "unknown instruction set");
            new (self) Engine(threads, kernels);
          },
          "threads"_a, "isa"_a)
      .def_prop_ro("isa", [](const Engine& e) { return e.k.name; })
      .def_prop_ro("threads", [](const Engine& e) { return e.pool.threads(); })
      .def("linear", &linear, "w"_a, "x"_a, "y"_a.noconvert())
      .def("embed", &embed)
      .def("experts", &experts)
      .def("accumulate", &accumulate, "acc"_a.noconvert(), "y"_a, "pair_token"_a, "weights"_a)
      .def("attention", &attention, "q"_a, "k"_a, "v"_a, "gate"_a, "keys"_a.noconvert(), "values"_a.noconvert(),
           "position"_a, "scale"_a, "out"_a.noconvert())
      .def("gated_delta", &gated_delta, "chunked"_a, "q"_a, "k"_a, "v"_a, "g"_a, "beta"_a, "state"_a.noconvert(),
           "out"_a.noconvert())
      .def("conv", &conv, "x"_a, "weight"_a, "state"_a.noconvert(), "y"_a.noconvert())
      .def("quantize", &quantize)
      .def("route",
           [](Engine& e, In logits, int64_t top_k, Out weights, IdsOut selected) {
             require(logits.ndim() == 2, "route: logits (tokens, experts)");
             const int64_t tokens = static_cast<int64_t>(logits.shape(0)),
                           count = static_cast<int64_t>(logits.shape(1));
             require(top_k >= 1 && top_k <= count && size_of(weights) == tokens * top_k &&
                         size_of(selected) == tokens * top_k,
                     "route: shapes");
             nb::gil_scoped_release release;
             e.route(logits.data(), tokens, count, top_k, weights.data(), selected.data());
           })
      .def("rms_norm",
           [](Engine& e, In x, In weight, float eps, Out y) {
             const int64_t n = size_of(weight), rows = size_of(x) / n;
             require(rows * n == size_of(x) && size_of(y) == size_of(x), "rms_norm: shapes");
             over_rows(e, rows,
                       [&](int64_t r) { e.k.rms_norm(x.data() + r * n, weight.data(), n, eps, y.data() + r * n); });
           })
      .def("gated_rms_norm",
           [](Engine& e, In x, In z, In weight, float eps, Out y) {
             const int64_t n = size_of(weight), rows = size_of(x) / n;
             require(rows * n == size_of(x) && size_of(z) == size_of(x) && size_of(y) == size_of(x),
                     "gated_rms_norm: shapes");
             over_rows(e, rows, [&](int64_t r) {
               e.k.gated_rms_norm(x.data() + r * n, z.data() + r * n, weight.data(), n, eps, y.data() + r * n);
             });
           })
      .def("l2_norm",
           [](Engine& e, In x, int64_t n, float eps, float scale, Out y) {
             require(n > 0 && size_of(x) % n == 0 && size_of(y) == size_of(x), "l2_norm: shapes");
             over_rows(e, size_of(x) / n,
                       [&](int64_t r) { e.k.l2_norm(x.data() + r * n, n, eps, scale, y.data() + r * n); });
           })
      .def("swiglu",
           [](Engine& e, In gate, In up, Out y) {
             require(size_of(gate) == size_of(up) && size_of(y) == size_of(up), "swiglu: shapes");
             const int64_t n = size_of(up), rows = (n + 4095) / 4096;
             over_rows(e, rows, [&](int64_t r) {
               const int64_t at = r * 4096, m2 = n - at < 4096 ? n - at : 4096;
               e.k.swiglu(gate.data() + at, up.data() + at, m2, y.data() + at);
             });
           })
      .def(
          "add_shared",
          [](Engine& e, Out h, In acc, In shared, In gate) {
            const int64_t tokens = size_of(gate);
            require(
                tokens > 0 && size_of(h) % tokens == 0 && size_of(acc) == size_of(h) && size_of(shared) == size_of(h),
                "add_shared: shapes");
            const int64_t n = size_of(h) / tokens;
            over_rows(e, tokens, [&](int64_t r) {
              float weight;
              e.k.sigmoid(gate.data() + r, 1, &weight);
              e.k.add_shared(h.data() + r * n, acc.data() + r * n, shared.data() + r * n, weight, n);
            });
          },
          "h"_a.noconvert(), "acc"_a, "shared"_a, "gate"_a)
      .def("gates",
           [](Engine& e, In a, In b, In a_log, In dt_bias, Out g, Out beta) {
             const int64_t n = size_of(a_log), tokens = size_of(a) / n;
             require(tokens * n == size_of(a) && size_of(b) == size_of(a) && size_of(dt_bias) == n, "gates: a and b");
             require(size_of(g) == size_of(a) && size_of(beta) == size_of(a), "gates: g and beta");
             over_rows(e, tokens, [&](int64_t r) {
               e.k.decay(a.data() + r * n, a_log.data(), dt_bias.data(), n, g.data() + r * n);
               e.k.sigmoid(b.data() + r * n, n, beta.data() + r * n);
             });
           })
      .def(
          "rotary",
          [](Engine& e, Out x, In cos, In sin) {
            require(x.ndim() == 3 && cos.ndim() == 2, "rotary: x (tokens, heads, d), cos and sin (tokens, half)");
            const int64_t tokens = static_cast<int64_t>(x.shape(0)), heads = static_cast<int64_t>(x.shape(1)),
                          d = static_cast<int64_t>(x.shape(2));
            const int64_t half = static_cast<int64_t>(cos.shape(1));
            require(static_cast<int64_t>(cos.shape(0)) == tokens && size_of(sin) == size_of(cos) && 2 * half <= d,
                    "rotary: shapes");
            over_rows(e, tokens * heads, [&](int64_t r) {
              e.k.rotary(x.data() + r * d, cos.data() + r / heads * half, sin.data() + r / heads * half, half);
            });
          },
          "x"_a.noconvert(), "cos"_a, "sin"_a);
}

}  // namespace expertstream
