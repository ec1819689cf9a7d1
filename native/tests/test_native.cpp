// Tests of the native core without Python, so that they run under sanitizers and under qemu.
//
// 1. Every table the machine can run gives the scalar table's bits, on shapes with and without tails.
// 2. The scalar table agrees with float64 arithmetic.
// 3. The loops give the same bits with 1, 2 and 4 threads.
// 4. Both readers return the right bytes, continue after partial reads, and report errors and short files.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "io/aligned.h"
#include "io/reader.h"

using namespace expertstream;

namespace {

// Runs `f` with every table and compares the bits of its result with the scalar table's.
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
    run("scale", [&](const Kernels& k, float* y) {
      std::memcpy(y, x.data(), size * 4);
      k.scale(y, 0.7f, n);
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
  for (DType dtype : {DType::f32, DType::bf16, DType::i8})
    for (int64_t d : {24, 64, 256}) {
      const int64_t heads = 6, kv_heads = 2, capacity = 40, tokens = 26, half = d / 4;
      const std::vector<float> q_gate = floats(static_cast<size_t>(tokens * heads * 2 * d)),
                               norm = floats(static_cast<size_t>(d)),
                               angle = floats(static_cast<size_t>(tokens * half));
      const std::vector<float> kv = floats(static_cast<size_t>(tokens * kv_heads * d));
      auto run = [&](const Kernels& k, int threads, int64_t cut) {
        Engine engine(threads, &k, 8);
        std::vector<float> keys(static_cast<size_t>(kv_heads * capacity * d)), values(keys.size()),
            out(static_cast<size_t>(tokens * heads * d));
        const KVLayer layer{keys.data(), values.data(), dtype, kv_heads, capacity, d, 0};
        for (int64_t t = 0, n; t < tokens; t += n) {
          n = std::min(cut, tokens - t);
          const AttentionParams p{
              norm.data(), norm.data(), nullptr, angle.data() + t * half, angle.data() + t * half, heads, half,
              0,           1e-6f,       true};
          engine.attention(q_gate.data() + t * heads * 2 * d, kv.data() + t * kv_heads * d,
                           kv.data() + t * kv_heads * d, p, layer, n, t, out.data() + t * heads * d);
        }
        return out;
      };
      const std::string name = "attention d " + std::to_string(d);
      compare(tables, name, [&](const Kernels& k) { return run(k, 1, tokens); });
      for (int threads : {1, 2, 4})
        for (int64_t cut : {1, 7})
          check(same_bits(run(*tables.back(), 1, tokens), run(*tables.back(), threads, cut)), "cut " + name);
    }
  for (int64_t dk : {16, 40, 128}) {
    const int64_t tokens = 130, key_heads = 2, value_heads = 4, dv = dk == 40 ? 72 : dk;
    const int64_t channels = 2 * key_heads * dk + value_heads * dv;
    const std::vector<float> qkv = floats(static_cast<size_t>(tokens * channels)),
                             z = floats(static_cast<size_t>(tokens * value_heads * dv)),
                             a = floats(static_cast<size_t>(tokens * value_heads)), b = floats(a.size()),
                             conv = floats(static_cast<size_t>(4 * channels)),
                             before = floats(static_cast<size_t>(3 * channels)),
                             start = floats(static_cast<size_t>(value_heads * dk * dv), 0.1f),
                             heads = floats(static_cast<size_t>(value_heads)), norm = floats(static_cast<size_t>(dv));
    const DeltaParams p{conv.data(), heads.data(), heads.data(), norm.data(), 4, key_heads, value_heads, dk, dv, 1e-6f};
    auto run = [&](const Kernels& k, bool chunked, int threads) {
      Engine engine(threads, &k, 8);
      std::vector<float> mixed = qkv, conv_state = before, state = start, out(z.size());
      engine.delta_net(chunked, mixed.data(), z.data(), a.data(), b.data(), p, tokens, conv_state.data(), state.data(),
                       out.data());
      out.insert(out.end(), state.begin(), state.end());
      out.insert(out.end(), conv_state.begin(), conv_state.end());
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

// A window and sinks over more than a segment: however the sequence is split, and wherever the remaining rows begin.
void test_windows(const std::vector<const Kernels*>& tables) {
  const int64_t d = 32, heads = 4, kv_heads = 2, tokens = 1300, half = d / 2;
  const std::vector<float> q = floats(static_cast<size_t>(tokens * heads * d)),
                           kv = floats(static_cast<size_t>(tokens * kv_heads * d)),
                           angle = floats(static_cast<size_t>(tokens * half)),
                           sinks = floats(static_cast<size_t>(heads));
  for (int64_t window : {1, 64, 100, 1100}) {
    // Rows that are no longer needed are dropped when there is no room.
    auto run = [&](const Kernels& k, int threads, int64_t cut, bool dropping) {
      Engine engine(threads, &k, 8);
      const int64_t capacity = dropping ? (window + 63) / 64 * 64 + 64 + cut : tokens;
      std::vector<float> keys(static_cast<size_t>(kv_heads * capacity * d)), values(keys.size()),
          out(static_cast<size_t>(tokens * heads * d));
      KVLayer layer{keys.data(), values.data(), DType::f32, kv_heads, capacity, d, 0};
      for (int64_t t = 0, n; t < tokens; t += n) {
        n = std::min(cut, tokens - t);
        if (t + n - layer.first > capacity) {
          const int64_t first = std::max<int64_t>(0, t + 1 - window) / 64 * 64, gone = first - layer.first;
          for (auto* rows : {&keys, &values})
            for (int64_t h = 0; h < kv_heads; ++h)
              std::memmove(rows->data() + h * capacity * d, rows->data() + (h * capacity + gone) * d,
                           static_cast<size_t>((t - first) * d) * 4);
          layer.first = first;
        }
        const AttentionParams p{
            nullptr, nullptr, sinks.data(), angle.data() + t * half, angle.data() + t * half, heads, half,
            window,  1e-6f,   false};
        engine.attention(q.data() + t * heads * d, kv.data() + t * kv_heads * d, kv.data() + t * kv_heads * d, p, layer,
                         n, t, out.data() + t * heads * d);
      }
      return out;
    };
    const std::string name = "window " + std::to_string(window);
    const std::vector<float> expected = run(*tables.back(), 1, tokens, false);
    compare(tables, name, [&](const Kernels& k) { return run(k, 1, 300, true); });
    for (int threads : {1, 3})
      for (int64_t cut : {1, 90, 700})
        check(same_bits(expected, run(*tables.back(), threads, cut, true)), "cut " + name);
  }
}

void test_experts(const std::vector<const Kernels*>& tables) {
  const int hidden = 96, inner = 64;
  // Affine; dense; and gpt-oss's: MXFP4, biases, clamped.
  for (int kind : {0, 1, 2}) {
    const ExpertActivation act = kind == 2 ? ExpertActivation{1.702f, 7.0f} : ExpertActivation{};
    const int bits = kind == 1 ? 16 : 4;
    std::vector<OwnedMatrix> owned;
    for (int i = 0; i < 9; ++i)
      owned.emplace_back(i % 3 == 2 ? hidden : inner, i % 3 == 2 ? inner : hidden, bits, 32,
                         kind == 2 ? DType::e8m0 : DType::bf16, i % 3 == 2, kind == 2);
    std::vector<Expert> experts;
    for (size_t e = 0; e < 3; ++e) experts.push_back({owned[3 * e].m, owned[3 * e + 1].m, owned[3 * e + 2].m});
    const std::vector<float> x = floats(4 * hidden);
    const std::vector<int64_t> start = {0, 1, 6, 8}, token = {2, 0, 1, 2, 3, 0, 1, 3};
    const std::vector<float> weights = floats(8);
    auto run = [&](const Kernels& k, int threads) {
      Engine engine(threads, &k, 8);
      std::vector<float> y(8 * hidden), acc(4 * hidden);
      engine.experts(experts, act, x.data(), start.data(), token.data(), y.data());
      engine.accumulate(acc.data(), y.data(), token.data(), weights.data(), 8, hidden);
      std::vector<float> at_once(4 * hidden);
      engine.moe(experts, act, x.data(), start.data(), token.data(), weights.data(), at_once.data());
      check(same_bits(acc, at_once), "moe is experts and accumulate");
      y.insert(y.end(), acc.begin(), acc.end());
      return y;
    };
    compare(tables, "experts", [&](const Kernels& k) { return run(k, 1); });
    for (int threads : {2, 4})
      check(same_bits(run(*tables.back(), 1), run(*tables.back(), threads)), "threads experts");
    if (kind == 2) continue;
    // The shared expert is an expert times a gate.
    const OwnedMatrix gate(1, hidden, 16, 0, DType::bf16);
    auto shared = [&](const Kernels& k, int threads) {
      Engine engine(threads, &k, 8);
      std::vector<float> y(4 * hidden);
      engine.shared_expert(experts[1], gate.m, x.data(), 4, y.data());
      return y;
    };
    compare(tables, "shared expert", [&](const Kernels& k) { return shared(k, 1); });
    check(same_bits(shared(*tables.back(), 1), shared(*tables.back(), 3)), "threads shared expert");
    const std::vector<int64_t> all = {0, 4}, each = {0, 1, 2, 3};
    std::vector<float> alone(4 * hidden), logits = project_with(*tables.back(), gate.m, x, 4, 8);
    Engine engine(1, tables.back(), 8);
    engine.experts({experts[1]}, act, x.data(), all.data(), each.data(), alone.data());
    tables.back()->sigmoid(logits.data(), 4, logits.data());
    for (size_t t = 0; t < 4; ++t) tables.back()->scale(alone.data() + t * hidden, logits[t], hidden);
    check(same_bits(alone, shared(*tables.back(), 1)), "the shared expert is an expert");
  }

  // Rows 3 and 7 of the router are equal: a tie, the lower index first.
  std::vector<float> router(12 * 8), x(8, 1.0f), weights_out(2);
  std::vector<int64_t> selected(2);
  for (size_t c = 0; c < 8; ++c) router[3 * 8 + c] = router[7 * 8 + c] = 1.0f;
  const auto* bytes = reinterpret_cast<const uint8_t*>(router.data());
  const Matrix w{bytes, nullptr, nullptr, 12, 8, 32, 0, DType::f32, Codes::dense, nullptr};
  Engine engine(2, tables.back(), 8);
  engine.route(w, x.data(), 1, 2, true, weights_out.data(), selected.data());
  check(selected[0] == 3 && selected[1] == 7 && weights_out[0] == 0.5f && weights_out[1] == 0.5f,
        "route breaks ties by index");
}

void test_readers() {
  const RandomFile file(300000);
  const std::vector<uint8_t>& content = file.content;
  for (bool uring : {true, false})
    for (bool direct : {true, false}) {
      const std::string name = std::string(uring ? "uring" : "pread") + (direct ? " direct" : " buffered");
      const int fd = open(file.path, O_RDONLY | (direct ? O_DIRECT : 0));
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
      // The whole file in one request whose last block is past the end, and a part of it in another.
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
  test_windows(tables);
  test_experts(tables);
  test_quantize();
  test_readers();
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures == 0 ? 0 : 1;
}
