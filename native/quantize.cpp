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
  // Clipping an outlier can cost less than a coarse grid, especially with few levels; at 8 bits it never does.
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
            // The grid extends one step further down than up: the larger end goes there, whatever its sign.
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

namespace {
// 32 bits of a row, columns ascending from the least significant bits, to four bytes of a tile: byte b, plane p is
// column 4p + b. Swaps ever smaller fields, as in transposing a bit matrix (Warren, Hacker's Delight, 7-3).
uint32_t to_planes(uint32_t x, int bits) {
  auto swap = [&](int distance, uint32_t mask) {
    const uint32_t t = (x ^ (x >> distance)) & mask;
    x ^= t ^ (t << distance);
  };
  if (bits == 4) {
    swap(8, 0x0000ff00);
    swap(4, 0x00f000f0);
  } else if (bits == 2) {
    swap(6, 0x00cc00cc);
    swap(12, 0x0000f0f0);
  }
  return x;
}
}  // namespace

void tile_rows(ThreadPool& pool, const Matrix& m, const uint8_t* data, const uint8_t* scales, const uint8_t* biases,
               uint8_t* data_out, uint8_t* scales_out, uint8_t* biases_out) {
  const int64_t groups = m.cols / m.group_size, words = static_cast<int64_t>(m.cols) * m.bits / 32;
  const int64_t size = value_bytes(m.dtype);
  pool.parallel_for(row_tiles(m.rows), 4, [&](int64_t begin, int64_t end, int) {
    std::vector<uint32_t> rows(static_cast<size_t>(kTileRows * words));
    std::vector<uint8_t> values(static_cast<size_t>(kTileRows * groups * size));
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t present = std::min<int64_t>(kTileRows, m.rows - tile * kTileRows);
      std::fill(rows.begin(), rows.end(), 0);
      std::memcpy(rows.data(), data + tile * kTileRows * words * 4, static_cast<size_t>(present * words) * 4);
      uint8_t* out = data_out + tile * kTileRows * words * 4;
      for (int64_t v = 0; v < words; ++v) {
        uint32_t lanes[kTileRows];
        for (int64_t r = 0; r < kTileRows; ++r) lanes[r] = to_planes(rows[static_cast<size_t>(r * words + v)], m.bits);
        std::memcpy(out + v * 64, lanes, 64);
      }
      auto transpose = [&](const uint8_t* from, uint8_t* to) {
        std::fill(values.begin(), values.end(), uint8_t{0});
        std::memcpy(values.data(), from + tile * kTileRows * groups * size,
                    static_cast<size_t>(present * groups * size));
        for (int64_t g = 0; g < groups; ++g)
          for (int64_t r = 0; r < kTileRows; ++r)
            std::memcpy(to + ((tile * groups + g) * kTileRows + r) * size, values.data() + (r * groups + g) * size,
                        static_cast<size_t>(size));
      };
      transpose(scales, scales_out);
      if (m.codes == Codes::affine) transpose(biases, biases_out);
    }
  });
}

}  // namespace expertstream
