// Matrix products of every table against float64 arithmetic and against the scalar table's bits; quantization and
// tiles.
#include <algorithm>

#include "check.h"

namespace expertstream {

namespace {

struct Shape {
  int bits, group, rows, cols;
  DType dtype;
  bool symmetric;
};

void test_matmul_of(const Shape& s, int activation_bits, const std::vector<const Kernels*>& tables) {
  const std::string name = std::to_string(s.bits) + " bits, group " + std::to_string(s.group) + ", " +
                           std::to_string(s.rows) + "x" + std::to_string(s.cols) + ", dtype " +
                           std::to_string(static_cast<int>(s.dtype)) + (s.symmetric ? ", symmetric" : "") + ", " +
                           std::to_string(activation_bits) + "-bit activations";
  const OwnedMatrix w(s.rows, s.cols, s.bits, s.group, s.dtype, s.symmetric);
  const int64_t tokens = 31;  // two blocks and a part of one that no tile size divides
  std::vector<float> x = floats(static_cast<size_t>(tokens * s.cols));
  for (int64_t c = 0; c < s.cols; ++c)
    x[static_cast<size_t>(c)] = c % 2 ? -1.0f : 1.0f;  // the largest value everywhere
  for (int64_t c = 0; c < s.cols; ++c) x[static_cast<size_t>(s.cols + c)] = 0.0f;
  const std::vector<float> reference = project_with(kernels_scalar, w.m, x, tokens, activation_bits);
  const std::vector<float> values = dequantized(kernels_scalar, w.m);
  const double levels = activation_bits == 8 ? 127 : 32512;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < s.rows; ++r) {
      double sum = 0, size = 0, rounding = 0, most = 0, weights = 0;
      for (int64_t c = 0; c < s.cols; ++c) {
        const double wv = static_cast<double>(values[static_cast<size_t>(r * s.cols + c)]),
                     xv = static_cast<double>(x[static_cast<size_t>(t * s.cols + c)]);
        sum += wv * xv;
        size += std::fabs(wv * xv);
        if (s.bits >= 16) continue;
        most = std::max(most, std::fabs(xv));
        weights += std::fabs(wv);
        if ((c + 1) % s.group == 0) {
          rounding += weights * most / levels / 2;  // half a step, whatever the weights' signs
          most = weights = 0;
        }
      }
      const double got = static_cast<double>(reference[static_cast<size_t>(t * s.rows + r)]);
      check(std::fabs(got - sum) <= 1.0001 * rounding + 2e-6 * size + 1e-12, "float64 " + name);
    }
  for (const Kernels* k : tables) {
    check(same_bits(reference, project_with(*k, w.m, x, tokens, activation_bits)), std::string(k->name) + " " + name);
    check(same_bits(values, dequantized(*k, w.m)), std::string(k->name) + " dequantize " + name);
  }
  // Any number of tokens together gives the same as one at a time.
  for (int64_t n : {1, 2, 3, 5, 8, 12, 13})
    for (int64_t t = 0; t + n <= tokens; t += n + 5) {
      const std::vector<float> some(x.begin() + t * s.cols, x.begin() + (t + n) * s.cols);
      const std::vector<float> rows(reference.begin() + t * s.rows, reference.begin() + (t + n) * s.rows);
      check(same_bits(rows, project_with(*tables.back(), w.m, some, n, activation_bits)),
            std::to_string(n) + " tokens, " + name);
    }
  for (int threads : {2, 4})
    check(same_bits(reference, project_with(*tables.back(), w.m, x, tokens, activation_bits, threads)),
          "threads " + name);
}

}  // namespace

void test_matmul(const std::vector<const Kernels*>& tables) {
  for (int bits : {2, 4, 8})
    for (int group : {32, 64, 128})
      for (DType dtype : {DType::f32, DType::bf16, DType::f16})
        for (int activation_bits : {8, 16}) {
          const bool symmetric = (group + static_cast<int>(dtype)) % 2 != 0;
          test_matmul_of({bits, group, 7, group * 3, dtype, symmetric}, activation_bits, tables);  // a padded tile
          test_matmul_of({bits, group, 40, group * 5, dtype, !symmetric}, activation_bits, tables);
          test_matmul_of({bits, group, 1, group, dtype, !symmetric}, activation_bits, tables);
        }
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (int cols : {1, 15, 16, 40, 129})
      test_matmul_of({dtype == DType::f32 ? 32 : 16, 0, 9, cols, dtype, false}, 8, tables);

  for (int rows : {7, 40, 1})
    for (int activation_bits : {8, 16})
      test_matmul_of({4, 32, rows, 32 * rows, DType::e8m0, false}, activation_bits, tables);
  // NaN stays NaN.
  OwnedMatrix nan(16, 32, 4, 32, DType::e8m0);
  nan.scales[3] = 255;
  for (const Kernels* k : tables) {
    const std::vector<float> y = project_with(*k, nan.m, std::vector<float>(32, 1.0f), 1, 8);
    check(std::isnan(y[3]) && !std::isnan(y[2]), "a scale of 255 is NaN");
  }

  // Several kinds of matrices on one input give the same as each alone.
  std::vector<OwnedMatrix> owned;
  owned.emplace_back(40, 128, 4, 64, DType::bf16);
  owned.emplace_back(9, 128, 16, 0, DType::bf16);
  owned.emplace_back(24, 128, 8, 64, DType::f16);
  owned.emplace_back(16, 128, 4, 32, DType::bf16, true);
  owned.emplace_back(5, 128, 2, 32, DType::f32);
  owned.emplace_back(19, 128, 4, 32, DType::e8m0, false, true);
  owned.emplace_back(7, 128, 16, 0, DType::bf16, false, true);
  const std::vector<float> x = floats(7 * 128);
  for (int threads : {1, 3}) {
    Engine engine(threads, tables.back(), 8);
    std::vector<std::vector<float>> y;
    std::vector<const Matrix*> w;
    std::vector<float*> to;
    for (const OwnedMatrix& m : owned) {
      y.emplace_back(static_cast<size_t>(7 * m.m.rows));
      w.push_back(&m.m);
    }
    for (auto& v : y) to.push_back(v.data());
    engine.project(w.data(), to.data(), static_cast<int64_t>(w.size()), x.data(), 7);
    for (size_t i = 0; i < owned.size(); ++i)
      check(same_bits(y[i], project_with(kernels_scalar, owned[i].m, x, 7, 8)), "several matrices at once");
  }
}

void test_quantize() {
  ThreadPool pool(2);
  for (int bits : {2, 4, 8})
    for (bool symmetric : {false, true})
      for (int rows : {6, 32}) {
        const std::vector<float> w = floats(static_cast<size_t>(rows) * 128);
        const auto groups = static_cast<size_t>(rows) * 2;
        std::vector<uint8_t> packed(w.size() * static_cast<size_t>(bits) / 8);
        std::vector<uint16_t> scales(groups), biases(symmetric ? 0 : groups);
        quantize_affine(pool, w.data(), rows, 128, bits, 64, packed.data(), scales.data(),
                        symmetric ? nullptr : biases.data());
        Matrix m{
            nullptr, nullptr, nullptr, rows, 128, bits, 64, DType::bf16, symmetric ? Codes::symmetric : Codes::affine,
            nullptr};
        auto as_bytes = [](std::vector<uint16_t>& v) { return reinterpret_cast<uint8_t*>(v.data()); };
        std::vector<uint8_t> data(static_cast<size_t>(data_bytes(m)));
        std::vector<uint16_t> tiled_scales(static_cast<size_t>(scale_bytes(m)) / 2),
            tiled_biases(static_cast<size_t>(bias_bytes(m)) / 2);
        tile_rows(pool, m, packed.data(), as_bytes(scales), as_bytes(biases), data.data(), as_bytes(tiled_scales),
                  as_bytes(tiled_biases));
        m.data = data.data();
        m.scales = as_bytes(tiled_scales);
        m.biases = as_bytes(tiled_biases);
        const std::vector<float> back = dequantized(kernels_scalar, m);
        const std::string name = std::to_string(bits) + " bits" + (symmetric ? ", symmetric" : "");
        double error = 0, size = 0;
        bool as_packed = true;  // a tile has the same values as the rows
        for (size_t i = 0; i < w.size(); ++i) {
          error += std::pow(static_cast<double>(w[i] - back[i]), 2);
          size += std::pow(static_cast<double>(w[i]), 2);
          const size_t per_byte = 8 / static_cast<size_t>(bits), g = i / 64;
          const int q = (packed[i / per_byte] >> (i % per_byte * static_cast<size_t>(bits))) & ((1 << bits) - 1);
          auto value = [](uint16_t h) {
            const uint32_t wide = static_cast<uint32_t>(h) << 16;
            float f;
            std::memcpy(&f, &wide, 4);
            return f;
          };
          const float scale = value(scales[g]);
          as_packed &= back[i] == (symmetric ? static_cast<float>(q - (1 << (bits - 1))) * scale
                                             : std::fma(static_cast<float>(q), scale, value(biases[g])));
        }
        check(as_packed, "tiles of " + name);
        // A normal group of 64 spans about ±2.4σ; a grid of 2^bits over it errs by its step over √12.
        const double bound = bits == 2 ? 0.55 : bits == 4 ? 0.12 : 0.012;
        check(std::sqrt(error / size) < bound, "quantize to " + name);
        if (rows == 32) {
          tile_rows(pool, m, packed.data(), as_bytes(scales), as_bytes(biases), packed.data(), as_bytes(scales),
                    as_bytes(biases));
          check(packed == data && scales == tiled_scales && biases == tiled_biases, "tiles in place, " + name);
        }
      }
  const std::vector<float> constant(64, 0.25f);
  std::vector<uint8_t> packed(32);
  uint16_t scale, bias;
  quantize_affine(pool, constant.data(), 1, 64, 4, 64, packed.data(), &scale, &bias);
  check(bias == bf16(0.25f), "a constant group keeps its value");
}

}  // namespace expertstream
