// The run-time layout of a matrix and what the kernels of one instruction set offer.
#pragma once
#include <cstdint>
#include <cstddef>

#include "mixbits.h"

namespace mb {

constexpr int kBlockRows = 64;
constexpr int kMaxTileRows = 6;      // activation rows of one tile
constexpr int64_t kMaxCols = 65536;  // int32 sums of 8-bit products cannot overflow below 66,000

// Columns of a chunk: 4 columns for each position a code can have in a byte (3 bits: 8 positions in 3 bytes, see code_of_three).
constexpr int chunk_cols(int bits) { return bits == 3 ? 32 : bits == 16 ? 1 : 32 / bits; }
constexpr int chunk_bytes(int bits) { return bits == 3 ? 768 : bits == 16 ? 128 : 256; }
// 3 bits: three planes of 256 bytes; position j < 6 is the lower or upper three bits of six of plane j / 2, positions 6 and 7 have two
// bits at the top of plane 0 and 1, and their highest as bit 6 and 7 of plane 2.
static inline int code_of_three(const uint8_t* chunk, int at, int j) {
  return j < 6 ? chunk[j / 2 * 256 + at] >> (3 * (j % 2)) & 7 : chunk[(j - 6) * 256 + at] >> 6 | (chunk[512 + at] >> (j - 2) & 4);
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a row of columns is cut: num_groups groups of `size` columns, each padded to `padded`. Rows with one scale are padded to 32
// columns whatever the bits, so that matrices of different bits share quantized activations.
struct Cut {
  int64_t cols, num_groups, size, padded;
  Cut(int64_t cols_, int64_t group, int bits) : cols(cols_) {
    num_groups = group ? ceil_div(cols, group) : 1;
    size = group && group < cols ? group : cols;
    if (bits == 16) padded = size;
    else padded = num_groups == 1 ? ceil_div(size, 32) * 32 : ceil_div(size, chunk_cols(bits)) * chunk_cols(bits);
  }
  int64_t width() const { return num_groups * padded; }
  bool operator==(const Cut& o) const { return cols == o.cols && num_groups == o.num_groups && size == o.size && padded == o.padded; }
};
inline Cut cut_of(const mb_matrix& w) { return Cut(w.cols, w.group, w.bits); }
inline int64_t num_blocks(int64_t rows) { return ceil_div(rows, kBlockRows); }
inline int64_t block_bytes(const Cut& cut, int bits) { return cut.width() / chunk_cols(bits) * chunk_bytes(bits); }

// Activations of some rows, int8 with one scale a row and the sums of each group.
struct Rows8 {
  const int8_t* q;      // (m, width)
  const float* scale;   // (m,)
  const int32_t* sums;  // (m, num_groups)
};

// Products of rows [m0, m1) with row blocks [b0, b1) of w into y (m, ldy); bias may be null.
struct Kernels {
  const char* name;
  void (*quantize)(const float* x, const Cut& cut, int8_t* q, float* scale, int32_t* sums);
  void (*gemm_int8)(const mb_matrix& w, const Rows8& a, int64_t m0, int64_t m1, int64_t b0, int64_t b1, const float* bias, float* y, int64_t ldy);
  void (*gemm_float)(const mb_matrix& w, const float* x, int64_t ldx, int64_t m0, int64_t m1, int64_t b0, int64_t b1, const float* bias, float* y, int64_t ldy);
  void (*weight_row)(const mb_matrix& w, int64_t row, float* out);
  void (*layer_norm)(const float* x, const float* gain, const float* bias, float eps, int64_t n, float* out);
  void (*rms_norm)(const float* x, const float* gain, float eps, int64_t n, float* out);
  void (*activate)(int kind, float* x, int64_t n);
  void (*multiply)(float* x, const float* y, int64_t n);
  void (*add)(float* x, const float* y, int64_t n);
  // softmax(scale * q K^T) V over the rows `context` of K and V (row length ld), one head; `scratch` holds count rounded up to 16
  void (*attend)(const float* q, const float* k, const float* v, int64_t ld, const int32_t* context, int64_t count, int64_t head_dim, float scale, float* scratch, float* out);
  // running maximum and sum of exponentials of a row of logits
  void (*log_sum)(const float* logits, int64_t n, float* maximum, float* sum);
};

const Kernels& scalar_kernels();
const Kernels* avx2_kernels();      // null: not compiled for this processor family
const Kernels* avx_vnni_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

}  // namespace mb
