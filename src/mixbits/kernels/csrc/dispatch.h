// What matrix.cpp and the engine share.
#pragma once
#include "layout.h"

namespace mb {

const Kernels& kernels();                    // of the instruction set in use
int32_t check_matrix(const mb_matrix& w);
void quantize_rows(const Kernels& k, const float* x, int64_t m, const Cut& cut, int8_t* q, float* scale, int32_t* sums);
// As mb_log_softmax_at, arguments checked. Throws std::bad_alloc.
void log_softmax_at(const Kernels& k, const mb_matrix& w, int activations, const float* x, int64_t m, const float* bias, const int64_t* offsets, const int64_t* targets, float* out, float* log_partition);

}  // namespace mb
