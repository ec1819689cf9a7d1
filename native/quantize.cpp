#include <algorithm>
#include <cmath>
#include <cstring>

#include "ops.h"

namespace expertstream {

namespace {

uint16_t to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
float from_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Squared error of the group with this scale and bias, both already rounded to bf16; writes the codes.
double try_scale(const float* w, int n, float scale, float bias, int levels, uint8_t* codes) {
  double error = 0.0;
  const float inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
  for (int i = 0; i < n; ++i) {
    const float q = std::min(std::max(std::nearbyintf((w[i] - bias) * inverse), 0.0f), static_cast<float>(levels));
    codes[i] = static_cast<uint8_t>(q);
    const double miss = static_cast<double>(w[i]) - static_cast<double>(q * scale + bias);
    error += miss * miss;
  }
  return error;
}

}  // namespace

void quantize_affine(ThreadPool& pool, const float* w, int64_t rows, int64_t cols, int bits, int group_size,
                     uint8_t* packed, uint16_t* scales, uint16_t* biases) {
  const int64_t groups = cols / group_size;
  const int levels = (1 << bits) - 1, middle_level = 1 << (bits - 1), per_byte = 8 / bits;
  // A clipped outlier can cost less than a coarse grid, the more so the fewer the levels; at 8 bits it never does.
  const int shrinks = bits == 8 ? 1 : 8;
  pool.parallel_for(rows, std::max<int64_t>(1, rows / (pool.threads() * 8)), [&](int64_t begin, int64_t end, int) {
    uint8_t codes[128], best[128] = {};
    for (int64_t r = begin; r < end; ++r)
      for (int64_t g = 0; g < groups; ++g) {
        const float* x = w + r * cols + g * group_size;
        const auto [low, high] = std::minmax_element(x, x + group_size);
        double least = INFINITY;
        uint16_t scale = 0, bias = 0;
        auto consider = [&](uint16_t step, float zero, uint16_t zero_bits) {
          const double error = try_scale(x, group_size, from_bf16(step), zero, levels, codes);
          if (error < least) {
            least = error;
            scale = step;
            bias = zero_bits;
            std::memcpy(best, codes, sizeof best);
          }
        };
        for (int s = 0; s < shrinks; ++s) {
          const float keep = 1.0f - 0.04f * static_cast<float>(s);
          if (biases) {
            const float middle = *low / 2 + *high / 2;
            const float a = middle + (*low - middle) * keep, b = middle + (*high - middle) * keep;
            const uint16_t zero = to_bf16(a);
            consider(to_bf16((b - a) / static_cast<float>(levels)), from_bf16(zero), zero);
          } else {
            // The grid reaches one step further down than up: the larger end goes there, whichever sign it has.
            const float most = (-*low > *high ? *low : *high) * keep;
            const uint16_t step = to_bf16(-most / static_cast<float>(middle_level));
            consider(step, -from_bf16(step) * static_cast<float>(middle_level), 0);
          }
        }
        scales[r * groups + g] = scale;
        if (biases) biases[r * groups + g] = bias;
        uint8_t* out = packed + (r * cols + g * group_size) / per_byte;
        for (int i = 0; i < group_size; i += per_byte) {
          int byte = 0;
          for (int j = 0; j < per_byte; ++j) byte |= best[i + j] << (j * bits);
          out[i / per_byte] = static_cast<uint8_t>(byte);
        }
      }
  });
}

}  // namespace expertstream
