// The arithmetic of every instruction set, as one table of function pointers over row ranges.
//
// Every table computes bit-identical values: sums run over 16 lanes in one fixed order, products are fused only where
// `fma` is written, and integer dot products are exact. Results therefore depend neither on the machine nor on how rows
// are divided among threads.
//
// All functions are re-entrant; none allocates; pointers never alias unless stated.
#pragma once

#include <cstdint>

namespace expertstream {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, e8m0 = 4 };  // e8m0: 2^(byte − 127)

// The meaning of a quantized matrix's integers: w = q·scale + bias; (q − 2^(bits−1))·scale; or four-bit floating point,
// a code's value times scale, where twice the value is an integer from −12 to 12.
enum class Codes : int32_t { dense = 0, affine = 1, symmetric = 2, e2m1 = 3 };
constexpr uint8_t kE2M1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};  // twice the value, + 12

// One weight matrix in memory; owns nothing.
//
// bits 2, 4, 8: see Codes; biases is null where they have none. cols is a multiple of group_size. Rows are stored in
//   tiles of 16, the last one padded with arbitrary values; a tile is cols·bits/32 vectors of 64 bytes, and lane r of a
//   vector is four bytes of the tile's row r: bits [p·bits, (p+1)·bits) of byte b of vector v are column
//   v·32/bits + 4p + b. So one vector is multiplied by four broadcast activations of each plane p, and the sums of 16
//   rows stay in the lanes. scales and biases: (tiles, groups, 16 rows) of `dtype`. tile_rows() converts rows to tiles.
// bits 16, 32: dense (rows, cols) of `dtype`, row by row; scales and biases are null.
// row_bias (rows), or null: added to every product with the matrix; kernels ignore it.
struct Matrix {
  const uint8_t* data;
  const uint8_t* scales;
  const uint8_t* biases;
  int32_t rows, cols, bits, group_size;
  DType dtype;
  Codes codes;
  const float* row_bias;
};

constexpr int64_t kTileRows = 16;
static inline int64_t value_bytes(DType dtype) {
  return dtype == DType::f32 ? 4 : dtype == DType::i8 || dtype == DType::e8m0 ? 1 : 2;
}
static inline int64_t row_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }
static inline int64_t data_bytes(const Matrix& m) {
  return (m.bits >= 16 ? m.rows : row_tiles(m.rows) * kTileRows) * (static_cast<int64_t>(m.cols) * m.bits / 8);
}
static inline int64_t scale_bytes(const Matrix& m) {
  return m.bits >= 16 ? 0 : row_tiles(m.rows) * kTileRows * (m.cols / m.group_size) * value_bytes(m.dtype);
}
static inline int64_t bias_bytes(const Matrix& m) { return m.codes == Codes::affine ? scale_bytes(m) : 0; }
// The number of a matrix's arrays: values, scales, biases.
static inline int part_count(const Matrix& m) { return m.codes == Codes::dense ? 1 : m.codes == Codes::affine ? 3 : 2; }
// What is subtracted from every stored integer, for codes without biases.
static inline int zero_point(const Matrix& m) {
  return m.codes == Codes::symmetric ? 1 << (m.bits - 1) : m.codes == Codes::e2m1 ? 12 : 0;
}

// Activations of several tokens, ready for matrices of one group size.
//
// For quantized weights x ≈ dx·q with one float dx per group and one integer q per element, in one plane of int8 (|q| ≤
// 127; error at most max|x|/254 per group) or in two, q = 256·high + low (|q| ≤ 32,512; error at most max|x|/65,024). A
// line is one plane of one token. Tokens are stored in blocks of kBlockLines lines, the last block with the remaining
// ones; within a block of m tokens, the lines alternate every four columns: (cols/4, m·planes lines, 4). For dense
// weights only `x` is used.
struct Activations {
  const float* x;  // (tokens, cols)
  int64_t tokens;
  int planes;
  const int8_t* xq;     // as above; a token takes planes·cols bytes
  const float* dx;      // (blocks, groups, m)
  const float* xsum;    // (blocks, groups, m): dx·Σq, which a group's bias multiplies
  const int32_t* zsum;  // (blocks, groups, m·planes): −zero_point·Σq of each line, the start value of a dot product
};
constexpr int64_t kBlockLines = 12;

// The destination of one token's activations: pointers to its first line of one group, strides in elements.
struct ActivationsOut {
  int8_t* xq;        // next four columns: + 4·lines
  float *dx, *xsum;  // next group: + lines / planes
  int32_t* zsum;     // next group: + lines
  int64_t lines;     // of the block
};

// Keys and values of one layer: (kv_heads, capacity) rows of head_dim values of f32, bf16, or i8, where each row ends
// with its scale. Row 0 is position `first`, a multiple of kKeys.
struct KVLayer {
  void* k;
  void* v;
  DType dtype;
  int64_t kv_heads, capacity, head_dim, first;

  int64_t row_bytes() const { return head_dim * value_bytes(dtype) + (dtype == DType::i8 ? 4 : 0); }
};

struct Kernels {
  const char* name;

  // One token: x (cols) → lines, scales and sums as described at Activations.
  void (*quantize_activations)(const float* x, int64_t cols, int group_size, int planes, int zero_point,
                               const ActivationsOut& out);
  // y[t·ldy + r] = Σ_c w[r, c]·x[t, c] for rows [begin, end) and all tokens; begin is a multiple of 16.
  void (*matmul_rows)(const Matrix& w, int64_t begin, int64_t end, const Activations& x, float* y, int64_t ldy);
  // y (cols) ← row `row` of w as float32.
  void (*dequantize_row)(const Matrix& w, int64_t row, float* y);

  // For measuring a machine: the first reads n bytes, a multiple of 256, and does next to nothing with them; the second
  // multiplies and adds 4-bit weights in registers and returns the number of products.
  int64_t (*read_memory)(const uint8_t* p, int64_t n);
  int64_t (*multiply)(int64_t rounds, int32_t* result);

  // y ← x·rsqrt(mean(x²) + eps)·weight. y may be x.
  void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* y);
  // y ← rms_norm(x)·silu(z). y may be x.
  void (*gated_rms_norm)(const float* x, const float* z, const float* weight, int64_t n, float eps, float* y);
  // y ← x·rsqrt(Σx² + eps)·scale. y may be x.
  void (*l2_norm)(const float* x, int64_t n, float eps, float scale, float* y);
  // y ← silu(gate)·up. y may be gate or up.
  void (*swiglu)(const float* gate, const float* up, int64_t n, float* y);
  // y ← (clamp(up, ±limit) + 1)·g·sigmoid(alpha·g) with g = min(gate, limit). y may be gate or up.
  void (*clamped_swiglu)(const float* gate, const float* up, int64_t n, float alpha, float limit, float* y);
  // y ← y·sigmoid(gate).
  void (*sigmoid_gate)(float* y, const float* gate, int64_t n);
  // y ← y + a·x.
  void (*axpy)(float a, const float* x, int64_t n, float* y);
  // y ← a·y.
  void (*scale)(float* y, float a, int64_t n);
  // x ← softmax(x).
  void (*softmax)(float* x, int64_t n);
  // y ← sigmoid(x); y may be x.
  void (*sigmoid)(const float* x, int64_t n, float* y);
  // g ← −exp(a_log)·softplus(a + dt_bias): the log decay of a gated-delta state at one token. In float64.
  void (*decay)(const float* a, const float* a_log, const float* dt_bias, int64_t n, float* g);
  // Rotate-half rotary embedding of the first 2·half values of x, in place; cos, sin (half).
  void (*rotary)(float* x, const float* cos, const float* sin, int64_t half);
  void (*to_bf16)(const float* x, int64_t n, uint16_t* y);  // round to nearest even

  // Causal depthwise convolution and SiLU over channels [begin, end): x, y (tokens, channels), weight (kernel,
  // channels), state (kernel−1, channels) holds the inputs before x, and the last inputs afterwards. kernel ≤ 8; y may
  // be x.
  void (*conv)(const float* x, const float* weight, float* state, int64_t tokens, int64_t channels, int64_t kernel,
               int64_t begin, int64_t end, float* y);

  // One segment of attention: `rows` scaled queries q (rows, head_dim) against positions [begin, end) of one KV head,
  // end − begin ≤ kSegment; row r sees those below visible[r], of these only the last `window` (all if 0). Per row: the
  // largest score, Σ e^(score − largest), and Σ e^(score − largest)·v in out (rows, head_dim); a row that sees nothing
  // gives −1e30, 0, 0. scratch: segment_scratch(head_dim, rows) floats.
  void (*attend_segment)(const float* q, int64_t rows, const int64_t* visible, int64_t window, const KVLayer& kv,
                         int64_t kv_head, int64_t begin, int64_t end, float* largest, float* sum, float* out,
                         float* scratch);
  // Merges a later segment of the same rows into (largest, sum, out).
  void (*merge_segments)(int64_t rows, int64_t head_dim, float* largest, float* sum, float* out,
                         const float* next_largest, const float* next_sum, const float* next_out);

  // Gated-delta rule, one value head. q, k (tokens, dk) with row stride ldq; v (tokens, dv) with row stride ldv, out
  // likewise with ldo; g (log decay), beta (tokens) with stride ldg; state (dk, dv), updated.
  void (*delta_step)(const float* q, const float* k, const float* v, const float* g, const float* beta, int64_t tokens,
                     int64_t dk, int64_t dv, int64_t ldq, int64_t ldv, int64_t ldg, float* state, float* out,
                     int64_t ldo);
  // The same in chunked form for at most kDeltaChunk tokens. scratch: delta_scratch(dk, dv) floats.
  void (*delta_chunk)(const float* q, const float* k, const float* v, const float* g, const float* beta, int64_t tokens,
                      int64_t dk, int64_t dv, int64_t ldq, int64_t ldv, int64_t ldg, float* state, float* out,
                      int64_t ldo, float* scratch);
};

constexpr int64_t kSegment = 1024;  // positions; segment boundaries do not depend on how a sequence is split
constexpr int64_t kKeys = 64;       // of a segment that are processed together
static inline int64_t segment_scratch(int64_t head_dim, int64_t rows) { return 2 * kKeys * head_dim + rows * kKeys; }

constexpr int64_t kDeltaChunk = 64;
constexpr int64_t kDeltaColumns = 64;  // columns of the state that a step processes together
static inline int64_t delta_scratch(int64_t dk, int64_t dv) {
  return 2 * kDeltaChunk * kDeltaChunk + dk * kDeltaChunk + kDeltaChunk * dv + 3 * kDeltaChunk;
}

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx2_vnni, kernels_avx512_vnni;
#elif defined(__aarch64__)
extern const Kernels kernels_neon, kernels_neon_dot;
#endif

// All tables of this program, slowest first, and those that this machine can run.
int all_kernels(const Kernels** tables, int capacity);
int available_kernels(const Kernels** tables, int capacity);
// The fastest available table, or the one named; null if the name is unknown or the machine cannot run it.
const Kernels* find_kernels(const char* name);

}  // namespace expertstream
