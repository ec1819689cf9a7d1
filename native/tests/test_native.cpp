// Tests of the native core without Python, so that they run under sanitizers and under qemu.
//
// 1. Every table the machine can run gives the scalar table's bits, on shapes with and without tails.
// 2. The scalar table agrees with float64 arithmetic.
// 3. The loops give the same bits with 1, 2 and 4 threads.
// 4. Both readers bring the right bytes, go on after partial reads, and report errors and short files.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "io/aligned.h"
#include "io/reader.h"
#include "ops.h"

using namespace expertstream;

namespace {

int checks = 0, failures = 0;

void check(bool ok, const std::string& what) {
  ++checks;
  if (!ok) {
    ++failures;
    std::printf("FAILED: %s\n", what.c_str());
  }
}

std::mt19937 rng(7);

std::vector<float> floats(size_t n, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> v(n);
  for (auto& x : v) x = normal(rng);
  return v;
}

uint16_t bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * 4) == 0;
}

// A random matrix that owns its bytes, allocated to the last byte so that a sanitizer sees any read past it.
struct OwnedMatrix {
  std::vector<uint8_t> data, scales, biases;
  Matrix m;

  OwnedMatrix(int rows, int cols, int bits, int group, DType dtype) {
    const size_t value = dtype == DType::f32 ? 4 : 2;
    m = {nullptr, nullptr, nullptr, rows, cols, bits, bits < 16 ? group : 0, dtype};
    if (bits < 16) {
      data.resize(static_cast<size_t>(rows) * static_cast<size_t>(cols) * static_cast<size_t>(bits) / 8);
      for (auto& b : data) b = static_cast<uint8_t>(rng());
      fill(scales, static_cast<size_t>(rows * (cols / group)), value, 0.02f);
      fill(biases, static_cast<size_t>(rows * (cols / group)), value, 0.1f);
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
      // Small magnitudes; as f16 these bit patterns are other numbers, which is as good.
      const uint16_t half = bf16(v[i]) & (m.dtype == DType::f16 ? 0xbfff : 0xffff);
      if (value == 2)
        std::memcpy(bytes.data() + 2 * i, &half, 2);
      else
        std::memcpy(bytes.data() + 4 * i, &v[i], 4);
    }
  }
};

std::vector<float> linear_with(const Kernels& k, const Matrix& m, const std::vector<float>& x, int64_t tokens,
                               int threads = 1) {
  Engine engine(threads, &k);
  std::vector<float> y(static_cast<size_t>(tokens * m.rows));
  engine.linear(m, x.data(), tokens, y.data());
  return y;
}

std::vector<float> dequantized(const Kernels& k, const Matrix& m) {
  std::vector<float> w(static_cast<size_t>(m.rows) * static_cast<size_t>(m.cols));
  for (int64_t r = 0; r < m.rows; ++r) k.dequantize_row(m, r, w.data() + r * m.cols);
  return w;
}

struct Shape {
  int bits, group, rows, cols;
  DType dtype;
};

void test_matmul(const std::vector<const Kernels*>& tables) {
  std::vector<Shape> shapes;
  for (int bits : {2, 4, 8})
    for (int group : {32, 64, 128})
      for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
        shapes.push_back({bits, group, 7, group * 3, dtype});  // tails in rows, blocks and groups
        shapes.push_back({bits, group, 16, group * 32, dtype});
        shapes.push_back({bits, group, 1, group, dtype});
      }
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (int cols : {1, 15, 16, 40, 129}) shapes.push_back({dtype == DType::f32 ? 32 : 16, 0, 9, cols, dtype});
  for (const Shape& s : shapes) {
    const std::string name = std::to_string(s.bits) + " bits, group " + std::to_string(s.group) + ", " +
                             std::to_string(s.rows) + "x" + std::to_string(s.cols) + ", dtype " +
                             std::to_string(static_cast<int>(s.dtype));
    const OwnedMatrix w(s.rows, s.cols, s.bits, s.group, s.dtype);
    const int64_t tokens = 6;
    const std::vector<float> x = floats(static_cast<size_t>(tokens * s.cols));
    const std::vector<float> reference = linear_with(kernels_scalar, w.m, x, tokens);
    const std::vector<float> values = dequantized(kernels_scalar, w.m);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t r = 0; r < s.rows; ++r) {
        double sum = 0, size = 0;
        for (int64_t c = 0; c < s.cols; ++c) {
          const double term = static_cast<double>(values[static_cast<size_t>(r * s.cols + c)]) *
                              static_cast<double>(x[static_cast<size_t>(t * s.cols + c)]);
          sum += term;
          size += std::fabs(term);
        }
        const double got = static_cast<double>(reference[static_cast<size_t>(t * s.rows + r)]);
        // 16-bit activations and float32 sums: far below 1e-4 of the sum of magnitudes.
        check(std::fabs(got - sum) <= 1e-4 * size + 1e-12, "float64 " + name);
      }
    for (const Kernels* k : tables) {
      check(same_bits(reference, linear_with(*k, w.m, x, tokens)), std::string(k->name) + " linear " + name);
      check(same_bits(values, dequantized(*k, w.m)), std::string(k->name) + " dequantize " + name);
    }
    // One token at a time gives what all at once give.
    for (int64_t t = 0; t < tokens; ++t) {
      const std::vector<float> one(x.begin() + t * s.cols, x.begin() + (t + 1) * s.cols);
      const std::vector<float> row(reference.begin() + t * s.rows, reference.begin() + (t + 1) * s.rows);
      check(same_bits(row, linear_with(*tables.back(), w.m, one, 1)), "one token " + name);
    }
    for (int threads : {2, 4})
      check(same_bits(reference, linear_with(*tables.back(), w.m, x, tokens, threads)), "threads " + name);
  }
}

// Runs `f` with every table and compares the bits of what it returns with the scalar table's.
void compare(const std::vector<const Kernels*>& tables, const std::string& name,
             const std::function<std::vector<float>(const Kernels&)>& f) {
  const std::vector<float> reference = f(kernels_scalar);
  for (float v : reference) check(std::isfinite(v), name + " is finite");
  for (const Kernels* k : tables) check(same_bits(reference, f(*k)), std::string(k->name) + " " + name);
}

void test_rows(const std::vector<const Kernels*>& tables) {
  for (int64_t n : {1, 7, 16, 33, 384}) {
    const auto size = static_cast<size_t>(n);
    const std::vector<float> x = floats(size, 3.0f), z = floats(size, 5.0f), w = floats(size);
    const std::string at = " of " + std::to_string(n);
    auto run = [&](const std::string& name, auto&& f) {
      compare(tables, name + at, [&](const Kernels& k) {
        std::vector<float> y(size);
        f(k, y.data());
        return y;
      });
    };
    run("rms_norm", [&](const Kernels& k, float* y) { k.rms_norm(x.data(), w.data(), n, 1e-6f, y); });
    run("gated_rms_norm",
        [&](const Kernels& k, float* y) { k.gated_rms_norm(x.data(), z.data(), w.data(), n, 1e-6f, y); });
    run("l2_norm", [&](const Kernels& k, float* y) { k.l2_norm(x.data(), n, 1e-6f, 0.5f, y); });
    run("swiglu", [&](const Kernels& k, float* y) { k.swiglu(x.data(), z.data(), n, y); });
    run("sigmoid", [&](const Kernels& k, float* y) { k.sigmoid(x.data(), n, y); });
    run("decay", [&](const Kernels& k, float* y) { k.decay(x.data(), w.data(), z.data(), n, y); });
    run("sigmoid_gate", [&](const Kernels& k, float* y) {
      std::memcpy(y, x.data(), size * 4);
      k.sigmoid_gate(y, z.data(), n);
    });
    run("softmax", [&](const Kernels& k, float* y) {
      std::memcpy(y, x.data(), size * 4);
      k.softmax(y, n);
    });
    run("axpy", [&](const Kernels& k, float* y) {
      std::memcpy(y, x.data(), size * 4);
      k.axpy(0.3f, z.data(), n, y);
    });
    run("add_shared", [&](const Kernels& k, float* y) {
      std::memcpy(y, x.data(), size * 4);
      k.add_shared(y, z.data(), w.data(), 0.7f, n);
    });
    run("to_bf16", [&](const Kernels& k, float* y) {
      std::vector<uint16_t> h(size);
      k.to_bf16(x.data(), n, h.data());
      for (size_t i = 0; i < size; ++i) {
        check(h[i] == bf16(x[i]), "to_bf16 rounds to even");
        y[i] = h[i];
      }
    });
    if (n % 2 == 0)
      run("rotary", [&](const Kernels& k, float* y) {
        std::memcpy(y, x.data(), size * 4);
        k.rotary(y, w.data(), z.data(), n / 2);
      });
  }
  // e^x through sigmoid, against float64.
  const std::vector<float> x = floats(4096, 20.0f);
  std::vector<float> y(x.size());
  tables.back()->sigmoid(x.data(), 4096, y.data());
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = 1.0 / (1.0 + std::exp(-static_cast<double>(x[i])));
    check(std::fabs(static_cast<double>(y[i]) - exact) <= 1e-6 * exact + 1e-37, "sigmoid against float64");
  }
}

void test_mixers(const std::vector<const Kernels*>& tables) {
  for (int64_t channels : {5, 48, 70}) {
    const std::vector<float> x = floats(static_cast<size_t>(9 * channels)),
                             w = floats(static_cast<size_t>(4 * channels));
    const std::vector<float> before = floats(static_cast<size_t>(3 * channels));
    compare(tables, "conv " + std::to_string(channels), [&](const Kernels& k) {
      std::vector<float> state = before, y(x.size());
      k.conv(x.data(), w.data(), state.data(), 9, channels, 4, 0, channels, y.data());
      y.insert(y.end(), state.begin(), state.end());
      return y;
    });
  }
  for (DType dtype : {DType::f32, DType::bf16})
    for (int64_t d : {24, 64, 256}) {
      const int64_t heads = 6, kv_heads = 2, capacity = 40, tokens = 5, position = 21;
      const std::vector<float> q = floats(static_cast<size_t>(tokens * heads * d)), gate = floats(q.size());
      const std::vector<float> kv = floats(static_cast<size_t>((position + tokens) * kv_heads * d));
      auto run = [&](const Kernels& k, int threads) {
        Engine engine(threads, &k);
        std::vector<float> keys(static_cast<size_t>(kv_heads * capacity * d)), values(keys.size()), out(q.size());
        const KVLayer layer{keys.data(), values.data(), dtype, kv_heads, capacity, d};
        engine.append_kv(layer, kv.data(), kv.data(), position + tokens, 0);
        engine.attention(q.data(), gate.data(), layer, tokens, heads, position, 0.1f, out.data());
        return out;
      };
      const std::string name = "attention d " + std::to_string(d);
      compare(tables, name, [&](const Kernels& k) { return run(k, 1); });
      for (int threads : {2, 4})
        check(same_bits(run(*tables.back(), 1), run(*tables.back(), threads)), "threads " + name);
    }
  for (int64_t dk : {16, 40, 128}) {
    const int64_t tokens = 130, key_heads = 2, value_heads = 4, dv = dk == 40 ? 72 : dk;
    std::vector<float> q = floats(static_cast<size_t>(tokens * key_heads * dk), 0.1f), k_in = floats(q.size(), 0.1f);
    const std::vector<float> v = floats(static_cast<size_t>(tokens * value_heads * dv)),
                             start = floats(static_cast<size_t>(value_heads * dk * dv), 0.1f);
    std::vector<float> g = floats(static_cast<size_t>(tokens * value_heads)), beta = floats(g.size());
    for (auto& x : g) x = -std::fabs(x) * 0.2f;
    for (auto& x : beta) x = 1.0f / (1.0f + std::exp(-x));
    auto run = [&](const Kernels& k, bool chunked, int threads) {
      Engine engine(threads, &k);
      std::vector<float> state = start, out(v.size());
      engine.gated_delta(chunked, q.data(), k_in.data(), v.data(), g.data(), beta.data(), tokens, key_heads,
                         value_heads, dk, dv, state.data(), out.data());
      out.insert(out.end(), state.begin(), state.end());
      return out;
    };
    const std::string name = "gated_delta dk " + std::to_string(dk);
    for (bool chunked : {false, true}) {
      compare(tables, name, [&](const Kernels& k) { return run(k, chunked, 1); });
      for (int threads : {2, 4})
        check(same_bits(run(*tables.back(), chunked, 1), run(*tables.back(), chunked, threads)), "threads " + name);
    }
    const std::vector<float> steps = run(*tables.back(), false, 1), chunks = run(*tables.back(), true, 1);
    double difference = 0, size = 0;
    for (size_t i = 0; i < steps.size(); ++i) {
      difference += std::pow(static_cast<double>(steps[i]) - static_cast<double>(chunks[i]), 2);
      size += std::pow(static_cast<double>(steps[i]), 2);
    }
    check(std::sqrt(difference / size) < 1e-5, "chunked equals stepwise, " + name);
  }
}

void test_experts(const std::vector<const Kernels*>& tables) {
  const int hidden = 96, inner = 64;
  std::vector<OwnedMatrix> owned;
  for (int i = 0; i < 9; ++i)
    owned.emplace_back(i % 3 == 2 ? hidden : inner, i % 3 == 2 ? inner : hidden, 4, 32, DType::bf16);
  std::vector<Expert> experts;
  for (size_t e = 0; e < 3; ++e) experts.push_back({owned[3 * e].m, owned[3 * e + 1].m, owned[3 * e + 2].m});
  const std::vector<float> x = floats(4 * hidden);
  const std::vector<int64_t> start = {0, 1, 6, 8}, token = {2, 0, 1, 2, 3, 0, 1, 3};
  const std::vector<float> weights = floats(8);
  auto run = [&](const Kernels& k, int threads) {
    Engine engine(threads, &k);
    std::vector<float> y(8 * hidden), acc(4 * hidden);
    engine.experts(experts, x.data(), start.data(), token.data(), y.data());
    engine.accumulate(acc.data(), y.data(), token.data(), weights.data(), 8, hidden);
    y.insert(y.end(), acc.begin(), acc.end());
    return y;
  };
  compare(tables, "experts", [&](const Kernels& k) { return run(k, 1); });
  for (int threads : {2, 4}) check(same_bits(run(*tables.back(), 1), run(*tables.back(), threads)), "threads experts");

  std::vector<float> weights_out(10), logits = floats(5 * 12);
  std::vector<int64_t> selected(10);
  logits[3] = logits[7] = 9.0f;  // a tie: the lower index first
  Engine engine(2, tables.back());
  engine.route(logits.data(), 5, 12, 2, weights_out.data(), selected.data());
  check(selected[0] == 3 && selected[1] == 7 && weights_out[0] == 0.5f && weights_out[1] == 0.5f,
        "route breaks ties by index");
}

void test_quantize() {
  ThreadPool pool(2);
  for (int bits : {2, 4, 8}) {
    const std::vector<float> w = floats(6 * 128);
    std::vector<uint8_t> packed(6 * 128 * static_cast<size_t>(bits) / 8);
    std::vector<uint16_t> scales(12), biases(12);
    quantize_affine(pool, w.data(), 6, 128, bits, 64, packed.data(), scales.data(), biases.data());
    const Matrix m{packed.data(),
                   reinterpret_cast<uint8_t*>(scales.data()),
                   reinterpret_cast<uint8_t*>(biases.data()),
                   6,
                   128,
                   bits,
                   64,
                   DType::bf16};
    const std::vector<float> back = dequantized(kernels_scalar, m);
    double error = 0, size = 0;
    for (size_t i = 0; i < w.size(); ++i) {
      error += std::pow(static_cast<double>(w[i] - back[i]), 2);
      size += std::pow(static_cast<double>(w[i]), 2);
    }
    // A normal group of 64 spans about ±2.4σ; a grid of 2^bits over it errs by its step over √12.
    const double bound = bits == 2 ? 0.5 : bits == 4 ? 0.1 : 0.01;
    check(std::sqrt(error / size) < bound, "quantize to " + std::to_string(bits) + " bits");
  }
  const std::vector<float> constant(64, 0.25f);
  std::vector<uint8_t> packed(32);
  uint16_t scale, bias;
  quantize_affine(pool, constant.data(), 1, 64, 4, 64, packed.data(), &scale, &bias);
  check(bias == bf16(0.25f), "a constant group keeps its value");
}

void test_readers() {
  char path[] = "/tmp/expertstream-test-XXXXXX";
  const int out = mkstemp(path);
  std::vector<uint8_t> content(300000);
  for (auto& b : content) b = static_cast<uint8_t>(rng());
  check(write(out, content.data(), content.size()) == static_cast<ssize_t>(content.size()), "write");
  close(out);
  for (bool uring : {true, false})
    for (bool direct : {true, false}) {
      const std::string name = std::string(uring ? "uring" : "pread") + (direct ? " direct" : " buffered");
      const int fd = open(path, O_RDONLY | (direct ? O_DIRECT : 0));
      if (fd < 0) {
        std::printf("no O_DIRECT in /tmp\n");
        continue;
      }
      std::unique_ptr<Reader> reader;
      try {
        reader = uring ? make_uring_reader(4, 16384) : make_pread_reader(4, 16384);
      } catch (const std::exception& e) {
        std::printf("no io_uring here: %s\n", e.what());
        close(fd);
        continue;
      }
      Arena arena(1 << 20);
      reader->register_memory(arena.data(), arena.size());
      const auto size = static_cast<int64_t>(content.size());
      // The whole file in one request whose last block lies past the end, and a part of it in another.
      auto read_all = [&] {
        std::memset(arena.data(), 0, arena.size());
        const ReadRequest requests[] = {{1, fd, direct, 0, (size + 4095) / 4096 * 4096, size, arena.data()},
                                        {2, fd, direct, 8192, 40960, 40960, arena.data() + 524288}};
        reader->submit(requests, 2);
        std::vector<Completion> done;
        while (reader->pending()) {
          for (const Completion& c : reader->wait(1)) done.push_back(c);
        }
        return done;
      };
      auto all_right = [&](const std::vector<Completion>& done) {
        return done.size() == 2 && done[0].error == 0 && done[1].error == 0 &&
               std::memcmp(arena.data(), content.data(), content.size()) == 0 &&
               std::memcmp(arena.data() + 524288, content.data() + 8192, 40960) == 0;
      };
      check(all_right(read_all()), name + " reads");
      check(reader->take_peak() > 1, name + " has several reads in flight");
      set_fault(1, 3, -1);
      check(all_right(read_all()), name + " goes on after partial reads");
      set_fault(2, 1, EINTR);
      check(all_right(read_all()), name + " goes on after EINTR");
      set_fault(2, 1, EIO);
      std::vector<Completion> done = read_all();
      check(done.size() == 2 && (done[0].error == EIO) != (done[1].error == EIO), name + " reports EIO once");
      set_fault(0, 1, 0);
      done = read_all();
      check(done.size() == 2 && (done[0].error == kShortRead) != (done[1].error == kShortRead),
            name + " reports a short read");
      clear_faults();
      const ReadRequest beyond{9, fd, direct, 290816, 65536, 65536, arena.data()};
      reader->submit(&beyond, 1);
      done = reader->wait(1);
      check(done.size() == 1 && done[0].error == kShortRead, name + " reports the end of the file");
      check(all_right(read_all()), name + " works after errors");
      reader.reset();
      close(fd);
    }
  unlink(path);
}

}  // namespace

int main() {
  const Kernels* found[8];
  const int count = available_kernels(found, 8);
  const std::vector<const Kernels*> tables(found, found + count);
  for (const Kernels* k : tables) std::printf("table %s\n", k->name);
  check(find_kernels("nonsense") == nullptr && find_kernels(nullptr) == tables.back(), "find_kernels");
  test_matmul(tables);
  test_rows(tables);
  test_mixers(tables);
  test_experts(tables);
  test_quantize();
  test_readers();
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures == 0 ? 0 : 1;
}
