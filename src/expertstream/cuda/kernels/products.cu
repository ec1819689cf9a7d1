// Products with quantized weights, for one format: compiled with BITS, GROUP, CODES (as in common.cuh), DTYPE of the scales, and PLANES of
// int8 for each activation. The arithmetic is that of native/kernels/matmul.h: exact integers inside a group, then one chain of float
// operations over the groups in ascending order. Tiles of 16 rows are read as they lie in a pack.
#include "common.cuh"

constexpr int kSpan = GROUP * BITS / 32;         // vectors of 64 bytes (16 rows) in a group
constexpr int kPerByte = 8 / BITS;               // weights of a byte: a vector has 4 · kPerByte columns of each row
constexpr int kUnit = kSpan > 8 ? kSpan : 8;     // vectors that a warp reads before it adds up lanes: whole groups
constexpr int kLoads = kUnit / 8;                // loads of 512 bytes for a unit
constexpr int kGroups = kUnit / kSpan;           // groups of a unit
constexpr int kAhead = kLoads >= 4 ? 1 : 4 / kLoads;  // units in flight
#if __CUDA_ARCH__ >= 800
constexpr int kBlocks = 6;  // of 256 threads that a multiprocessor is to hold
#else
constexpr int kBlocks = 4;
#endif
constexpr int kZero = CODES == kSymmetric ? 1 << (BITS - 1) : CODES == kE2M1 ? 12 : 0;

// Activations of some tokens: q (tokens, PLANES, cols) int8, scale and sum (tokens, groups), codes (tokens, PLANES, groups), the sum of a
// group's integers. x ≈ scale·q, where q is 256·plane 0 + plane 1 if there are two.

// Quantizes one group: called by a warp, each lane with its GROUP/32 values.
__device__ __forceinline__ void quantize_group(const float* v, int lane, signed char* q, i64 plane, float* scale, float* sum, int* codes,
                                               int groups) {
  constexpr int kOwn = GROUP / 32;
  constexpr float kLevels = PLANES == 1 ? 127.0f : 32512.0f;
  float most = 0.0f;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    most = larger(fabsf(v[i]), most);
    finite = finite && v[i] * 0.0f == 0.0f;
  }
  most = warp_max(most);
  finite = __all_sync(kWarp, finite) != 0;
  const float inverse = finite && most > 0.0f ? kLevels / most : 0.0f;
  int sums[PLANES];
#pragma unroll
  for (int p = 0; p < PLANES; ++p) sums[p] = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    float part[2];
    part[0] = finite ? rintf(v[i] * inverse) : 0.0f;
    part[1] = 0.0f;
    if (PLANES == 2) {
      const float high = rintf(fmaf(part[0], 1.0f / 256, 0.25f / 256));
      part[1] = fmaf(high, -256.0f, part[0]);
      part[0] = high;
    }
#pragma unroll
    for (int p = 0; p < PLANES; ++p) {
      const int whole = static_cast<int>(part[p]);
      sums[p] += whole;
      q[p * plane + lane * kOwn + i] = static_cast<signed char>(whole);
    }
  }
  float total = 0.0f;
#pragma unroll
  for (int p = 0; p < PLANES; ++p) {
    sums[p] = warp_sum(sums[p]);
    total = total * 256.0f + static_cast<float>(sums[p]);
  }
  if (lane != 0) return;
  const float step = finite ? most / kLevels : __uint_as_float(0x7fc00000u);
  *scale = step;
  *sum = step * total;
#pragma unroll
  for (int p = 0; p < PLANES; ++p) codes[p * groups] = sums[p];
}

// x (tokens, cols) → activations; a warp a group.
extern "C" __global__ void quantize_rows(const float* x, int tokens, int cols, signed char* q, float* scale, float* sum, int* codes) {
  after_previous_beside_next();
  const int groups = cols / GROUP, lane = threadIdx.x & 31;
  const i64 unit = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) >> 5;
  if (unit >= static_cast<i64>(tokens) * groups) return;
  const i64 token = unit / groups;
  const int g = static_cast<int>(unit % groups);
  constexpr int kOwn = GROUP / 32;
  float v[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) v[i] = x[token * cols + g * GROUP + lane * kOwn + i];
  quantize_group(v, lane, q + token * PLANES * cols + g * GROUP, cols, scale + unit, sum + unit, codes + token * PLANES * groups + g, groups);
}

// y (tokens, cols) ← rms_norm of each row of x, to which a sum is added first, and its activations; a block a row. Shared: 2·cols floats.
extern "C" __global__ void norm_rows(float* x, const Sum sum_of, const float* weight, int cols, float eps, float* y, signed char* q, float* scale,
                                     float* sum, int* codes) {
  DYNAMIC_SHARED(memory);
  __shared__ float factor;
  float* row = reinterpret_cast<float*>(memory);
  float* weights = row + cols;
  const i64 token = blockIdx.x;
  const int groups = cols / GROUP, lane = threadIdx.x & 31;
#pragma unroll 2
  for (int c = threadIdx.x; c < cols; c += blockDim.x) weights[c] = weight[c];
  after_previous_beside_next();
#pragma unroll 1
  for (int c = threadIdx.x; c < cols; c += blockDim.x) row[c] = sum_of.add_to(x, token, cols, c);
  __syncthreads();
  if (threadIdx.x < 32) {
    const float squares = sum_of_squares(row, cols, threadIdx.x & 15);
    if (threadIdx.x == 0) factor = 1.0f / sqrtf(squares / static_cast<float>(cols) + eps);
  }
  __syncthreads();
  constexpr int kOwn = GROUP / 32;
#pragma unroll 1
  for (int g = threadIdx.x >> 5; g < groups; g += blockDim.x >> 5) {
    float v[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int c = g * GROUP + lane * kOwn + i;
      v[i] = row[c] * factor * weights[c];
      y[token * cols + c] = v[i];
    }
    const i64 unit = token * groups + g;
    quantize_group(v, lane, q + token * PLANES * cols + g * GROUP, cols, scale + unit, sum + unit, codes + token * PLANES * groups + g, groups);
  }
}

// act(gate, up) (pairs, inner) → activations, a warp a group. parts: if given, pairs of experts whose address there is 0 are left out.
extern "C" __global__ void activate_rows(const float* gate, const float* up, int pairs, int inner, float alpha, float limit, const u64* parts,
                                         int stride, const i64* pair_expert, signed char* q, float* scale, float* sum, int* codes) {
  after_previous_beside_next();
  const int groups = inner / GROUP, lane = threadIdx.x & 31;
  const i64 unit = (static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x) >> 5;
  if (unit >= static_cast<i64>(pairs) * groups) return;
  const i64 pair = unit / groups;
  if (parts && parts[pair_expert[pair] * stride] == 0) return;
  const int g = static_cast<int>(unit % groups);
  constexpr int kOwn = GROUP / 32;
  float v[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const i64 at = pair * inner + g * GROUP + lane * kOwn + i;
    v[i] = activate(gate[at], up[at], alpha, limit);
  }
  quantize_group(v, lane, q + pair * PLANES * inner + g * GROUP, inner, scale + unit, sum + unit, codes + pair * PLANES * groups + g, groups);
}

// E2M1 codes in four bytes → twice their values, plus 12.
__device__ __forceinline__ u32 e2m1_values(u32 w) {
  const u32 low = w & 0x07070707u, pairs = low | (low >> 4);
  const u32 selector = (pairs & 0xffu) | ((pairs >> 8) & 0xff00u);
  const u32 positive = __byte_perm(0x0f0e0d0cu, 0x18141210u, selector), negative = __byte_perm(0x090a0b0cu, 0x00040608u, selector);
  const u32 sign = ((w >> 3) & 0x01010101u) * 0xffu;
  return (positive & ~sign) | (negative & sign);
}

// The bits [plane·BITS, (plane + 1)·BITS) of every byte, as what is multiplied.
__device__ __forceinline__ u32 plane_of(u32 w, int plane) {
  if (BITS == 8) return w;
  constexpr u32 kMask = BITS == 4 ? 0x0f0f0f0fu : 0x03030303u;
  const u32 q = (w >> (plane * BITS)) & kMask;
  return CODES == kE2M1 ? e2m1_values(q) : q;
}

// The value that a group's integers are multiplied by.
__device__ __forceinline__ float scale_value(const u8* p, i64 i) {
  if (CODES == kE2M1) return load_value(p, i, kE8M0) * 0.5f;
  return load_value(p, i, DTYPE);
}

// Adds up four integers, of rows 4·(lane % 4) + j, over the lanes that share a group. Afterwards a lane has `kRowsLeft` of them, from row
// first_row(lane) on.
constexpr int kRowsLeft = kSpan >= 8 ? 1 : kSpan == 4 ? 1 : 2;
__device__ __forceinline__ int first_row(int lane) {
  const int own = 4 * (lane & 3);
  if (kSpan >= 8) return own + (lane >> 4 & 1) * 2 + (lane >> 3 & 1);
  if (kSpan == 4) return own + (lane >> 3 & 1) * 2 + (lane >> 2 & 1);
  return own + (lane >> 2 & 1) * 2;
}
__device__ __forceinline__ int group_of(int lane) { return kSpan >= 8 ? 0 : (lane >> 2) / kSpan; }
// Which of the lanes that have the same sums is to store them.
__device__ __forceinline__ bool stores(int lane) { return kSpan < 8 || (lane & 4) == 0; }

__device__ __forceinline__ void halve(int* v, int lane, int bit) {  // four to two
  const bool high = (lane & bit) != 0;
  const int a = __shfl_xor_sync(kWarp, high ? v[0] : v[2], bit), b = __shfl_xor_sync(kWarp, high ? v[1] : v[3], bit);
  v[0] = (high ? v[2] : v[0]) + a;
  v[1] = (high ? v[3] : v[1]) + b;
}
__device__ __forceinline__ void halve_again(int* v, int lane, int bit) {  // two to one
  const bool high = (lane & bit) != 0;
  const int a = __shfl_xor_sync(kWarp, high ? v[0] : v[1], bit);
  v[0] = (high ? v[1] : v[0]) + a;
}
__device__ __forceinline__ void add_lanes(int* v, int lane) {
  if (kSpan >= 8) {
    halve(v, lane, 16);
    halve_again(v, lane, 8);
    v[0] += __shfl_xor_sync(kWarp, v[0], 4);
  } else if (kSpan == 4) {
    halve(v, lane, 8);
    halve_again(v, lane, 4);
  } else {
    halve(v, lane, 4);
  }
}

// A warp's part of a tile on its way: units warp, warp + warps, …
struct Units {
  uint4 w[kAhead][kLoads];

  __device__ __forceinline__ void load(const u8* data, int vectors, int first, int warps, int lane) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
#pragma unroll
      for (int c = 0; c < kLoads; ++c) {
        const int v = (first + a * warps) * kUnit + c * 8 + (lane >> 2);
        w[a][c] = v < vectors ? load_once(data + static_cast<i64>(v) * 64 + (lane & 3) * 16) : make_uint4(0u, 0u, 0u, 0u);
      }
  }
};

// Dot products of one tile with some tokens, by `warps` warps, this one being `warp`, whose first units are in `units`: dots[(t·groups + g)·16
// + row] ← scale of the activations · Σ w·q, as floats in shared memory. xs: the tokens' integers in shared memory, (tokens, PLANES, cols/4)
// words.
__device__ __forceinline__ void tile_dots(Units& units, const u8* data, int cols, const int* xs, int tokens, const float* scale,
                                          const int* codes, int warp, int warps, int lane, float* dots) {
  const int vectors = cols * BITS / 32, count = (vectors + kUnit - 1) / kUnit, groups = cols / GROUP, words = cols / 4;
  const int quad = lane >> 2;
#pragma unroll 1
  for (int u0 = warp; u0 < count; u0 += warps * kAhead) {
    if (u0 != warp) units.load(data, vectors, u0, warps, lane);
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int u = u0 + a * warps;
      if (u >= count) break;
#pragma unroll 1
      for (int t = 0; t < tokens; ++t) {
        int joined[4];
#pragma unroll
        for (int p = 0; p < PLANES; ++p) {
          int sums[4] = {0, 0, 0, 0};
#pragma unroll
          for (int c = 0; c < kLoads; ++c) {
            const int v = u * kUnit + c * 8 + quad;
            if (v < vectors) {
              const u32 own[4] = {units.w[a][c].x, units.w[a][c].y, units.w[a][c].z, units.w[a][c].w};
              const int* x = xs + (t * PLANES + p) * words + v * kPerByte;
#pragma unroll
              for (int b = 0; b < kPerByte; ++b) {
                const int four = x[b];
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[j] = dot4(plane_of(own[j], b), four, sums[j]);
              }
            }
          }
          add_lanes(sums, lane);
#pragma unroll
          for (int j = 0; j < kRowsLeft; ++j) joined[j] = p == 0 ? sums[j] : joined[j] * 256 + sums[j];
        }
        const int g = u * kGroups + group_of(lane);
        if (stores(lane) && g < groups) {
          const int at = t * groups + g;
          int zero = 0;
          if (kZero != 0) {
            zero = codes[t * PLANES * groups + g];
            if (PLANES == 2) zero = zero * 256 + codes[(t * PLANES + 1) * groups + g];
          }
#pragma unroll
          for (int j = 0; j < kRowsLeft; ++j)
            dots[at * 16 + first_row(lane) + j] = static_cast<float>(joined[j] - kZero * zero) * scale[at];
        }
      }
    }
  }
}

__device__ __forceinline__ void copy_words(int* to, const void* from, int words) {
#pragma unroll 1
  for (int i = threadIdx.x; i < words; i += blockDim.x) to[i] = static_cast<const int*>(from)[i];
}

// Where the activations of one token come from, if they are quantized by each block that needs them: x, or act(x, up).
struct Raw {
  const float* x;
  const float* up;
  float alpha, limit;
};

// One tile by some tokens, by a block: y[t·rows + row] ← … + row_bias. kWait: the matrix is known and constant, so it is read before the kernel
// before is done. kRaw: one token, from raw instead of q, scale, sum and codes. memory: shared, for the tokens' integers, dots and sums, with kRaw
// scales and codes, and the matrix's scales and biases.
template <bool kWait, bool kRaw>
__device__ __forceinline__ void multiply_tile(const Place& w, int tile, int cols, const signed char* q, const float* scale, const float* sum,
                                              const int* codes, const Raw& raw, int tokens, u8* memory, float* y) {
  constexpr int kValueBytes = CODES == kE2M1 || DTYPE == kE8M0 ? 1 : DTYPE == kF32 ? 4 : 2;
  const int words = tokens * PLANES * cols / 4, groups = cols / GROUP, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, lane = threadIdx.x & 31;
  const u8* data = w.data + static_cast<i64>(tile) * cols * BITS * 2;
  Units units;
  units.load(data, cols * BITS / 32, warp, warps, lane);
  int* xs = reinterpret_cast<int*>(memory);
  float* dots = reinterpret_cast<float*>(xs + words);
  float* sums = dots + tokens * groups * 16;
  float* own_scale = sums + tokens * groups;
  int* own_codes = reinterpret_cast<int*>(own_scale + (kRaw ? groups : 0));
  int* scales = own_codes + (kRaw ? PLANES * groups : 0);
  int* biases = scales + groups * 4 * kValueBytes;
  copy_words(scales, w.scales + static_cast<i64>(tile) * groups * 16 * kValueBytes, groups * 4 * kValueBytes);
  if (CODES == kAffine) copy_words(biases, w.biases + static_cast<i64>(tile) * groups * 16 * kValueBytes, groups * 4 * kValueBytes);
  if (kWait) after_previous();
  if (kRaw) {
    constexpr int kOwn = GROUP / 32;
#pragma unroll 1
    for (int g = warp; g < groups; g += warps) {
      float v[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const int c = g * GROUP + lane * kOwn + i;
        v[i] = raw.up ? activate(raw.x[c], raw.up[c], raw.alpha, raw.limit) : raw.x[c];
      }
      quantize_group(v, lane, reinterpret_cast<signed char*>(xs) + g * GROUP, cols, own_scale + g, sums + g, own_codes + g, groups);
    }
    scale = own_scale;
    codes = own_codes;
  } else {
    copy_words(xs, q, words);
    if (CODES == kAffine) copy_words(reinterpret_cast<int*>(sums), sum, tokens * groups);
  }
  __syncthreads();
  tile_dots(units, data, cols, xs, tokens, scale, codes, warp, warps, lane, dots);
  __syncthreads();
  const u8* own_scales = reinterpret_cast<const u8*>(scales);
  const u8* own_biases = reinterpret_cast<const u8*>(biases);
#pragma unroll 1
  for (int i = threadIdx.x; i < 16 * tokens; i += blockDim.x) {
    const int t = i >> 4, r = i & 15, row = tile * 16 + r;
    if (row >= w.rows) continue;
    float total = 0.0f;
#pragma unroll 8
    for (int g = 0; g < groups; ++g) {
      total = fmaf(dots[(t * groups + g) * 16 + r], scale_value(own_scales, g * 16 + r), total);
      if (CODES == kAffine) total = fmaf(load_value(own_biases, g * 16 + r, DTYPE), sums[t * groups + g], total);
    }
    if (w.row_bias) total = fmaf(1.0f, w.row_bias[row], total);
    y[static_cast<i64>(t) * w.rows + row] = total;
  }
}

// Some matrices by few tokens, `together` of them in one pass; grid (tiles of all matrices, passes). y: the results one after another, each
// (tokens, rows).
__device__ __forceinline__ void multiply_tiles(const Places& matrices, int count, int cols, const signed char* q, const float* scale,
                                               const float* sum, const int* codes, int tokens, int together, float* y,
                                               u8* memory) {
  const Place w = matrices.of_tile(blockIdx.x, count);
  const i64 first = static_cast<i64>(blockIdx.y) * together, groups = cols / GROUP;
  const int here = tokens - first < together ? static_cast<int>(tokens - first) : together;
  multiply_tile<true, false>(w, blockIdx.x - static_cast<int>(w.first_tile), cols, q + first * PLANES * cols, scale + first * groups,
                             sum + first * groups, codes + first * PLANES * groups, {}, here, memory,
                             y + w.first_row * tokens + first * w.rows);
}
extern "C" __global__ void multiply_few(const Places matrices, int count, int cols, const signed char* q, const float* scale, const float* sum,
                                        const int* codes, int tokens, int together, float* y) {
  DYNAMIC_SHARED(memory);
  multiply_tiles(matrices, count, cols, q, scale, sum, codes, tokens, together, y, memory);
}
// The same for so many tiles that more of them at once matter more than registers.
extern "C" __global__ void __launch_bounds__(256, kBlocks) multiply_wide(const Places matrices, int count, int cols, const signed char* q,
                                                                         const float* scale, const float* sum, const int* codes, int tokens,
                                                                         int together, float* y) {
  DYNAMIC_SHARED(memory);
  multiply_tiles(matrices, count, cols, q, scale, sum, codes, tokens, together, y, memory);
}

// Some matrices by one token that each block quantizes: fewer kernels where there are few tiles.
extern "C" __global__ void multiply_raw(const Places matrices, int count, int cols, const float* x, float* y) {
  DYNAMIC_SHARED(memory);
  const Place w = matrices.of_tile(blockIdx.x, count);
  const Raw raw = {x, nullptr, 0.0f, 0.0f};
  multiply_tile<true, true>(w, blockIdx.x - static_cast<int>(w.first_tile), cols, nullptr, nullptr, nullptr, nullptr, raw, 1, memory,
                            y + w.first_row);
}

// Experts: `parts` gives each one's addresses, `stride` of them per expert, from `first` on: values, scales, biases if the codes have them,
// and the row bias if `biased`.
__device__ __forceinline__ Place place_of(const u64* parts, i64 expert, int stride, int first, int biased, int rows) {
  const u64* at = parts + expert * stride + first;
  constexpr int kParts = CODES == kAffine ? 3 : 2;
  Place p;
  p.data = reinterpret_cast<const u8*>(at[0]);
  p.scales = reinterpret_cast<const u8*>(at[1]);
  p.biases = CODES == kAffine ? reinterpret_cast<const u8*>(at[2]) : nullptr;
  p.row_bias = biased ? reinterpret_cast<const float*>(at[kParts]) : nullptr;
  p.rows = rows;
  p.first_tile = p.first_row = 0;
  return p;
}

// y (z, pairs, rows) ← matrix z of each pair's expert · that pair's activations; grid (tiles, pairs, matrices): gate and up, or down. The
// parts of matrix z begin at first + z·step. pair_token: whose activations, or null: the pair's own. From pair `routed` on: a shared expert, one
// pair a token, whose matrices are `own`.
extern "C" __global__ void __launch_bounds__(256, kBlocks) multiply_pairs(const u64* parts, int stride, int first, int step, int biased, const i64* pair_expert,
                                          const int* pair_token, const Places own, int routed, int rows, int cols, const signed char* q,
                                          const float* scale, const float* sum, const int* codes, float* y) {
  DYNAMIC_SHARED(memory);
  after_previous();  // in this order: multiply_down reads pair_expert before it waits
  const int pair = blockIdx.y, groups = cols / GROUP;
  const bool shared = pair >= routed;
  const i64 token = !pair_token ? pair : shared ? pair - routed : pair_token[pair];
  const i64 expert = shared ? 0 : pair_expert[pair];
  if (expert < 0) return;  // the host's
  Place w = own.at[0];
  if (!shared)
    w = place_of(parts, expert, stride, first + static_cast<int>(blockIdx.z) * step, biased, rows);
  else if (blockIdx.z != 0)
    w = own.at[1];
  multiply_tile<false, false>(w, blockIdx.x, cols, q + token * PLANES * cols, scale + token * groups, sum + token * groups,
                              codes + token * PLANES * groups, {}, 1, memory,
                              y + (static_cast<i64>(blockIdx.z) * gridDim.y + pair) * rows);
}

// y (pairs, rows) ← the last matrix of each pair's expert · act(gate, up) (pairs, cols), for few pairs: each block quantizes its pair's; grid
// (tiles, pairs). The kernel before must be multiply_pairs, which lets this one start when pair_expert is there.
extern "C" __global__ void multiply_down(const u64* parts, int stride, int first, int biased, const i64* pair_expert, const Places own,
                                         int routed, int rows, int cols, const float* gate, const float* up, float alpha, float limit,
                                         float* y) {
  DYNAMIC_SHARED(memory);
  const i64 pair = blockIdx.y, expert = pair < routed ? pair_expert[pair] : 0;
  if (expert < 0) {  // the host's
    after_previous();
    return;
  }
  Place w = own.at[0];
  if (pair < routed) w = place_of(parts, expert, stride, first, biased, rows);
  const Raw raw = {gate + pair * cols, up + pair * cols, alpha, limit};
  multiply_tile<true, true>(w, blockIdx.x, cols, nullptr, nullptr, nullptr, nullptr, raw, 1, memory, y + pair * rows);
}

// Many tokens, on tensor cores. A warp has one tile of 16 rows and 8·kColumns tokens; a block has blockDim.x/32 tiles and the same tokens.
// `tasks` gives each block of tokens as (expert, first pair, pairs): for a single matrix, expert 0 and pairs that are tokens. Integers of an
// 8-bit group stay below 2²², so that they are exact as floats: sums start at the float 1.5·2²³ and need no conversion.
constexpr int kColumns = 4;
constexpr int kTokens = 8 * kColumns;
constexpr int kSteps = GROUP / 32;  // of 32 columns
constexpr int kRow = GROUP + 32;    // bytes of a token in shared memory: no two lanes of a load share a bank
constexpr bool kMagic = PLANES == 1;
constexpr int kStart = kMagic ? 0x4b400000 : 0;

// Two registers of A for 32 columns from column 32·step of a group: rows 2·gid and 2·gid + 1. The order of the columns is B's below.
__device__ __forceinline__ void weights_of(const u8* group, int step, int gid, int q, u32* a) {
  if (BITS == 4) {  // vector q of this step: columns 8q to 8q + 7
    const uint2 w = *reinterpret_cast<const uint2*>(group + (step * 4 + q) * 64 + gid * 8);
    a[0] = plane_of(w.x, 0);
    a[1] = plane_of(w.y, 0);
    a[2] = plane_of(w.x, 1);
    a[3] = plane_of(w.y, 1);
  } else if (BITS == 8) {  // vectors 2q and 2q + 1
    const uint2 w = *reinterpret_cast<const uint2*>(group + (step * 8 + 2 * q) * 64 + gid * 8);
    const uint2 v = *reinterpret_cast<const uint2*>(group + (step * 8 + 2 * q + 1) * 64 + gid * 8);
    a[0] = w.x;
    a[1] = w.y;
    a[2] = v.x;
    a[3] = v.y;
  } else {  // half of vector q/2: columns 8q to 8q + 7 again
    const uint2 w = *reinterpret_cast<const uint2*>(group + (step * 2 + q / 2) * 64 + gid * 8);
    const int plane = q % 2 * 2;
    a[0] = plane_of(w.x >> (plane * 2), 0);
    a[1] = plane_of(w.y >> (plane * 2), 0);
    a[2] = plane_of(w.x >> (plane * 2 + 2), 0);
    a[3] = plane_of(w.y >> (plane * 2 + 2), 0);
  }
}

extern "C" __global__ void __launch_bounds__(256) multiply_many(const u64* parts, int stride, int first, int biased, const int* tasks,
                                                                const int* pair_token, int rows, int cols, const signed char* q,
                                                                const float* scale, const float* sum, const int* codes, float* y) {
  after_previous();
  __shared__ __align__(16) u8 xs[2][PLANES * kTokens * kRow];
  __shared__ float sc[2][kTokens], su[2][kTokens];
  __shared__ int zs[2][kTokens];
  __shared__ int token_of[kTokens];
  const int* task = tasks + 3 * blockIdx.y;
  const int first_pair = task[1], count = task[2], groups = cols / GROUP;
  if (count == 0) return;
  const Place w = place_of(parts, task[0], stride, first, biased, rows);
  if (!w.data) return;  // not here yet
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, gid = lane >> 2, quad = lane & 3;
  const int tiles = (rows + 15) / 16, tile = blockIdx.x * (blockDim.x >> 5) + warp;
  const bool works = tile < tiles;
  if (threadIdx.x < kTokens) {
    const int p = first_pair + (static_cast<int>(threadIdx.x) < count ? static_cast<int>(threadIdx.x) : 0);
    token_of[threadIdx.x] = pair_token ? pair_token[p] : p;
  }
  __syncthreads();
  constexpr int kWords = PLANES * kTokens * GROUP / 16;  // loads of 16 bytes for a group
  auto fetch = [&](int g, int stage) {
    for (int i = threadIdx.x; i < kWords; i += blockDim.x) {
      const int part = i % (GROUP / 16), line = i / (GROUP / 16), t = line % kTokens, p = line / kTokens;
      const signed char* from = q + (static_cast<i64>(token_of[t]) * PLANES + p) * cols + g * GROUP + part * 16;
      *reinterpret_cast<uint4*>(xs[stage] + (p * kTokens + t) * kRow + part * 16) = *reinterpret_cast<const uint4*>(from);
    }
    if (threadIdx.x < kTokens) {
      const i64 at = token_of[threadIdx.x];
      sc[stage][threadIdx.x] = scale[at * groups + g];
      su[stage][threadIdx.x] = sum[at * groups + g];
      if (kZero != 0) {
        int zero = codes[at * PLANES * groups + g];
        if (PLANES == 2) zero = zero * 256 + codes[(at * PLANES + 1) * groups + g];
        zs[stage][threadIdx.x] = kZero * zero;
      }
    }
  };
  float total[kColumns][4];
#pragma unroll
  for (int n = 0; n < kColumns; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) total[n][i] = 0.0f;
  const u8* data = w.data + static_cast<i64>(works ? tile : 0) * cols * BITS * 2;
  const i64 values = static_cast<i64>(works ? tile : 0) * groups * 16 + 2 * gid;
  fetch(0, 0);
  for (int g = 0; g < groups; ++g) {
    const int stage = g & 1;
    __syncthreads();
    if (g + 1 < groups) fetch(g + 1, stage ^ 1);
    if (!works) continue;
    int dots[PLANES][kColumns][4];
#pragma unroll
    for (int p = 0; p < PLANES; ++p)
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) dots[p][n][i] = kStart;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      u32 a[4];
      weights_of(data + static_cast<i64>(g) * kSpan * 64, step, gid, quad, a);
#pragma unroll
      for (int p = 0; p < PLANES; ++p)
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const uint2 x = *reinterpret_cast<const uint2*>(xs[stage] + (p * kTokens + n * 8 + gid) * kRow + step * 32 + quad * 8);
          const u32 b[2] = {x.x, x.y};
          mma_u8_s8(dots[p][n], a, b);
        }
    }
    float scales[2], biases[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scales[i] = scale_value(w.scales, values + g * 16 + i);
      biases[i] = CODES == kAffine ? load_value(w.biases, values + g * 16 + i, DTYPE) : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // row 2·gid + i/2, token 8n + 2·quad + i%2
        const int t = n * 8 + 2 * quad + (i & 1);
        float dot;
        if (kMagic) {
          dot = __int_as_float(dots[0][n][i] - (kZero != 0 ? zs[stage][t] : 0)) - 12582912.0f;
        } else {
          const int joined = dots[0][n][i] * 256 + dots[PLANES - 1][n][i];
          dot = static_cast<float>(joined - (kZero != 0 ? zs[stage][t] : 0));
        }
        total[n][i] = fmaf(dot * sc[stage][t], scales[i >> 1], total[n][i]);
        if (CODES == kAffine) total[n][i] = fmaf(biases[i >> 1], su[stage][t], total[n][i]);
      }
  }
  if (!works) return;
#pragma unroll
  for (int n = 0; n < kColumns; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = n * 8 + 2 * quad + (i & 1), row = tile * 16 + 2 * gid + (i >> 1);
      if (t >= count || row >= rows) continue;
      float v = total[n][i];
      if (w.row_bias) v = fmaf(1.0f, w.row_bias[row], v);
      y[static_cast<i64>(first_pair + t) * rows + row] = v;
    }
}
