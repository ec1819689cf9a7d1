// Shared by the native tests: check counters, random values, matrices that own their bytes.
#pragma once

#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "ops.h"

namespace expertstream {

inline int checks = 0, failures = 0;

inline void check(bool ok, const std::string& what) {
  ++checks;
  if (!ok) {
    ++failures;
    std::printf("FAILED: %s\n", what.c_str());
  }
}

inline std::mt19937 rng(7);

inline std::vector<float> floats(size_t n, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> v(n);
  for (auto& x : v) x = normal(rng);
  return v;
}

inline uint16_t bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 4) == 0;
}

// A file of random bytes in /tmp, deleted with this object.
struct RandomFile {
  char path[32] = "/tmp/expertstream-test-XXXXXX";
  std::vector<uint8_t> content;

  explicit RandomFile(size_t size) : content(size) {
    const int out = mkstemp(path);
    for (auto& b : content) b = static_cast<uint8_t>(rng());
    check(write(out, content.data(), size) == static_cast<ssize_t>(size), "write");
    close(out);
  }
  RandomFile(const RandomFile&) = delete;
  RandomFile& operator=(const RandomFile&) = delete;
  ~RandomFile() { unlink(path); }
};

// A random matrix that owns its bytes, allocated to the last byte so that a sanitizer sees any read past it.
struct OwnedMatrix {
  std::vector<uint8_t> data, scales, biases;
  std::vector<float> row_bias;
  Matrix m;

  OwnedMatrix(int rows, int cols, int bits, int group, DType dtype, bool symmetric = false, bool biased = false) {
    const Codes codes = bits >= 16             ? Codes::dense
                        : dtype == DType::e8m0 ? Codes::e2m1
                        : symmetric            ? Codes::symmetric
                                               : Codes::affine;
    if (biased) row_bias = floats(static_cast<size_t>(rows));
    m = {nullptr,
         nullptr,
         nullptr,
         rows,
         cols,
         bits,
         bits < 16 ? group : 0,
         dtype,
         codes,
         biased ? row_bias.data() : nullptr};
    const auto value = static_cast<size_t>(value_bytes(dtype));
    if (bits < 16) {
      data.resize(static_cast<size_t>(data_bytes(m)));
      for (auto& b : data) b = static_cast<uint8_t>(rng());
      fill(scales, static_cast<size_t>(scale_bytes(m)) / value, value, 0.02f);
      fill(biases, static_cast<size_t>(bias_bytes(m)) / value, value, 0.1f);
    } else {
      fill(data, static_cast<size_t>(rows) * static_cast<size_t>(cols), value, 1.0f);
    }
    data.shrink_to_fit();
    m.data = data.data();
    m.scales = scales.data();
    m.biases = biases.data();
  }

 private:
  void fill(std::vector<uint8_t>& bytes, size_t count, size_t value, float scale) {
    const std::vector<float> v = floats(count, scale);
    bytes.resize(count * value);
    for (size_t i = 0; i < count; ++i) {
      // Small magnitudes; as f16 these bit patterns are other numbers, which serve as well.
      const uint16_t half = bf16(v[i]) & (m.dtype == DType::f16 ? 0xbfff : 0xffff);
      if (value == 1)
        bytes[i] = static_cast<uint8_t>(rng() % 256 < 3 ? rng() % 4 : 100 + rng() % 40);
      else if (value == 2)
        std::memcpy(bytes.data() + 2 * i, &half, 2);
      else
        std::memcpy(bytes.data() + 4 * i, &v[i], 4);
    }
  }
};

inline std::vector<float> project_with(const Kernels& k, const Matrix& m, const std::vector<float>& x, int64_t tokens,
                                       int activation_bits, int threads = 1) {
  Engine engine(threads, &k, activation_bits);
  std::vector<float> y(static_cast<size_t>(tokens * m.rows));
  const Matrix* w[1] = {&m};
  float* to[1] = {y.data()};
  engine.project(w, to, 1, x.data(), tokens);
  return y;
}

inline std::vector<float> dequantized(const Kernels& k, const Matrix& m) {
  std::vector<float> w(static_cast<size_t>(m.rows) * static_cast<size_t>(m.cols));
  for (int64_t r = 0; r < m.rows; ++r) k.dequantize_row(m, r, w.data() + r * m.cols);
  return w;
}

void test_matmul(const std::vector<const Kernels*>& tables);
void test_quantize();

}  // namespace expertstream
