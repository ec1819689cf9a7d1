// Matrices, experts and mixers bound to Python's arrays: checked once, with the arrays kept alive.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "ops.h"

namespace nb = nanobind;

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

// A matrix format, without memory: the meaning of its arrays' bits.
Matrix make_format(int64_t rows, int64_t cols, int bits, int group_size, const std::string& dtype,
                   const std::string& codes) {
  require(rows > 0 && cols > 0 && rows <= INT32_MAX && cols <= INT32_MAX,
          "a matrix has at least one row and one column");
  const auto size = [&](DType type, Codes meaning) {
    return Matrix{nullptr, nullptr, nullptr, static_cast<int32_t>(rows), static_cast<int32_t>(cols), bits, group_size,
                  type,    meaning, nullptr};
  };
  if (codes == "e2m1") {
    require(bits == 4 && group_size == 32 && dtype == "e8m0" && cols % 32 == 0,
            "e2m1 has 4 bits, groups of 32 and scales of e8m0");
    return size(DType::e8m0, Codes::e2m1);
  }
  require(dtype == "f32" || dtype == "bf16" || dtype == "f16", "dtype is f32, bf16 or f16");
  const DType type = dtype == "f32" ? DType::f32 : dtype == "bf16" ? DType::bf16 : DType::f16;
  if (codes == "dense") {
    require(bits == (type == DType::f32 ? 32 : 16) && group_size == 0, "bits is the size of a dense dtype");
    return size(type, Codes::dense);
  }
  require(codes == "affine" || codes == "symmetric", "codes is dense, affine, symmetric or e2m1");
  require(bits == 2 || bits == 4 || bits == 8, "bits is 2, 4 or 8");
  require(group_size == 32 || group_size == 64 || group_size == 128, "group_size is 32, 64 or 128");
  require(cols % group_size == 0, "cols is a multiple of group_size");
  return size(type, codes == "affine" ? Codes::affine : Codes::symmetric);
}

// Points a matrix to its arrays, in the order of `parts`.
void point(Matrix& m, const uint8_t* const* parts) {
  m.data = parts[0];
  if (part_count(m) > 1) m.scales = parts[1];
  if (part_count(m) > 2) m.biases = parts[2];
}
int64_t part_bytes(const Matrix& m, int part) {
  return part == 0 ? data_bytes(m) : part == 1 ? scale_bytes(m) : bias_bytes(m);
}

// A matrix in memory that Python owns; keeps the arrays alive.
struct BoundMatrix {
  Matrix m;
  std::vector<Bytes> parts;
  std::optional<In> row_bias;

  BoundMatrix(const Matrix& format, std::vector<Bytes> given, std::optional<In> bias)
      : m(format), parts(std::move(given)), row_bias(std::move(bias)) {
    require(static_cast<int>(parts.size()) == part_count(m), "a matrix has one array for each of its parts");
    const uint8_t* at[3] = {};
    for (size_t i = 0; i < parts.size(); ++i) {
      require(size_of(parts[i]) == part_bytes(m, static_cast<int>(i)), "the bytes of a matrix do not match its shape");
      at[i] = parts[i].data();
    }
    point(m, at);
    require(!row_bias || size_of(*row_bias) == m.rows, "a matrix has one bias for each row");
    m.row_bias = row_bias ? row_bias->data() : nullptr;
  }
};

// The format that all experts of a layer share.
struct ExpertFormat {
  Matrix matrices[3];  // gate, up, down
  bool biased;
  ExpertActivation act;

  ExpertFormat(const Matrix& gate, const Matrix& up, const Matrix& down, bool with_bias, float alpha, float limit)
      : matrices{gate, up, down}, biased(with_bias), act{alpha, limit} {
    require(up.rows == gate.rows && up.cols == gate.cols && down.cols == gate.rows && down.rows == gate.cols,
            "experts: matrix shapes");
    require(up.bits == gate.bits && up.group_size == gate.group_size && up.codes == gate.codes,
            "experts: gate and up have one quantization");
    require(limit >= 0.0f, "experts: limit is at least 0");
  }
  int64_t parts() const {
    int64_t count = biased ? 3 : 0;
    for (const Matrix& m : matrices) count += part_count(m);
    return count;
  }
};

// Attention without its projections; keeps the arrays alive.
struct BoundAttention {
  AttentionParams p;
  int64_t kv_heads, head_dim;
  std::optional<In> q_norm, k_norm, sinks;

  BoundAttention(int64_t heads, int64_t kv, int64_t d, float eps, std::optional<In> qn, std::optional<In> kn,
                 bool gated, std::optional<In> sink, int64_t window)
      : kv_heads(kv), head_dim(d), q_norm(std::move(qn)), k_norm(std::move(kn)), sinks(std::move(sink)) {
    require(kv > 0 && d > 0 && heads > 0 && heads % kv == 0, "attention: heads are a multiple of kv_heads");
    require((!q_norm || size_of(*q_norm) == d) && (!k_norm || size_of(*k_norm) == d), "attention: norms of head_dim");
    require(!sinks || size_of(*sinks) == heads, "attention: a sink for each head");
    require(window >= 0, "attention: window is at least 0");
    const auto of = [](const std::optional<In>& a) { return a ? a->data() : nullptr; };
    p = {of(q_norm), of(k_norm), of(sinks), nullptr, nullptr, heads, 0, window, eps, gated};
  }
};

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

}  // namespace
}  // namespace expertstream
