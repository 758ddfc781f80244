// Repacking, choice of the instruction set, and single products: what is not the whole model.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "dispatch.h"
#include "pool.h"

namespace mb {
namespace {

bool runs_here(const char* name) {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  if (!std::strcmp(name, "avx2")) return __builtin_cpu_supports("avx2");
  if (!std::strcmp(name, "avx-vnni")) {
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("avxvnni");
#else
    return false;
#endif
  }
  if (!std::strcmp(name, "avx512-vnni")) return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return !std::strcmp(name, "scalar") || !std::strcmp(name, "neon-dot");  // NEON: compiled only where the target has it
}

std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> found;
  for (const Kernels* k : {avx512_kernels(), avx_vnni_kernels(), avx2_kernels(), neon_kernels(), &scalar_kernels()})
    if (k && runs_here(k->name)) found.push_back(k);
  return found;
}

// A small product by each width of codes, compared with the scalar code to the bit: a compiler or processor that gets it wrong is not used.
bool agrees_with_scalar(const Kernels& kernels) {
  for (int bits : {1, 2, 3, 4, 8}) {
    const int64_t rows = 70, cols = 75, m = 7;
    const Cut cut(cols, 0, bits);
    std::vector<uint8_t> packed(static_cast<size_t>(num_blocks(rows) * block_bytes(cut, bits)));
    std::vector<float> scales(static_cast<size_t>(num_blocks(rows) * kBlockRows)), x(static_cast<size_t>(m * cols)), y[2];
    uint32_t state = 1;
    auto next = [&state] { return state = state * 1664525u + 1013904223u, state >> 24; };
    for (auto& b : packed) b = static_cast<uint8_t>(next());
    if (bits == 8) for (auto& b : packed) b = b ? b : 1;
    for (auto& s : scales) s = static_cast<float>(next()) / 64.0f + 0.1f;
    for (auto& v : x) v = static_cast<float>(next()) / 32.0f - 4.0f;
    const mb_matrix w{packed.data(), scales.data(), rows, cols, 0, bits, 1, bits == 8 ? 127 : 1, 0};
    for (int which = 0; which < 2; ++which) {
      const Kernels& k = which ? kernels : scalar_kernels();
      std::vector<int8_t> q(static_cast<size_t>(m * cut.width()));
      std::vector<float> scale(static_cast<size_t>(m));
      std::vector<int32_t> sums(static_cast<size_t>(m));
      for (int64_t i = 0; i < m; ++i) k.quantize(&x[static_cast<size_t>(i * cols)], cut, &q[static_cast<size_t>(i * cut.width())], &scale[static_cast<size_t>(i)], &sums[static_cast<size_t>(i)]);
      y[which].resize(static_cast<size_t>(m * rows));
      k.gemm_int8(w, {q.data(), scale.data(), sums.data()}, 0, m, 0, num_blocks(rows), nullptr, y[which].data(), rows);
    }
    if (std::memcmp(y[0].data(), y[1].data(), y[0].size() * 4)) return false;
  }
  return true;
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* k = current.load(std::memory_order_acquire);
  if (!k) {
    mb_set_isa(nullptr);
    k = current.load(std::memory_order_acquire);
  }
  return *k;
}

int32_t check_matrix(const mb_matrix& w) {
  if (!w.packed) return MB_BAD_POINTER;
  if (w.bits != 1 && w.bits != 2 && w.bits != 3 && w.bits != 4 && w.bits != 8 && w.bits != 16) return MB_BAD_BITS;
  if (w.bits != 16 && !w.scales) return MB_BAD_POINTER;
  if (mb_packed_bytes(w.rows, w.cols, w.group, w.bits) < 0) return MB_BAD_SHAPE;
  if (w.mul < 1 || w.mul > 2 || w.off < 0 || w.off > 255 || (w.mul == 2 && w.bits > 4) || (w.bits == 8 && w.off != 127)) return MB_BAD_BITS;
  return MB_OK;
}

void quantize_rows(const Kernels& k, const float* x, int64_t m, const Cut& cut, int8_t* q, float* scale, int32_t* sums) {
  for (int64_t i = 0; i < m; ++i) k.quantize(x + i * cut.cols, cut, q + i * cut.width(), scale + i, sums + i * cut.num_groups);
}

}  // namespace mb

using namespace mb;

extern "C" {

int32_t mb_abi_version(void) { return MB_ABI_VERSION; }

const char* mb_error_text(int32_t error) {
  switch (error) {
    case MB_OK: return "no error";
    case MB_BAD_SHAPE: return "impossible shape: rows and columns from 1, at most 65536 columns, a group of 1 or more columns (0: none), sizes that fit memory";
    case MB_BAD_BITS: return "no such bit width; expected 1, 2, 3, 4, 8 or 16, with levels that belong to it";
    case MB_BAD_SIZE: return "a buffer does not have the size that the shape asks for";
    case MB_BAD_TOKEN: return "a token id is outside the vocabulary";
    case MB_BAD_TREE: return "not a forest: a parent must stand before its children, in the same tree";
    case MB_TOO_LONG: return "a sequence is longer than the model's context";
    case MB_NO_MEMORY: return "out of memory";
    case MB_BAD_POINTER: return "a pointer that must be given is missing";
    case MB_BAD_ISA: return "no such instruction set on this machine";
    default: return "unknown error";
  }
}

const char* mb_isa(void) { return kernels().name; }

const char* mb_isas(void) {
  static const std::string names = [] {
    std::string text;
    for (const Kernels* k : usable()) text += (text.empty() ? "" : ",") + std::string(k->name);
    return text;
  }();
  return names.c_str();
}

int32_t mb_set_isa(const char* name) {
  for (const Kernels* k : usable()) {
    if (name ? std::strcmp(name, k->name) != 0 : (k != &scalar_kernels() && !agrees_with_scalar(*k))) continue;
    current.store(k, std::memory_order_release);
    return MB_OK;
  }
  return MB_BAD_ISA;
}

void mb_set_num_threads(int32_t num_threads) { set_num_threads(num_threads); }
int32_t mb_get_num_threads(void) { return num_threads(); }

int64_t mb_packed_bytes(int64_t rows, int64_t cols, int64_t group, int32_t bits) {
  if (bits != 1 && bits != 2 && bits != 3 && bits != 4 && bits != 8 && bits != 16) return -1;
  if (rows < 1 || cols < 1 || cols > kMaxCols || rows > (int64_t{1} << 31) || group < 0 || group > kMaxCols) return -1;
  return num_blocks(rows) * block_bytes(Cut(cols, group, bits), bits);
}

int64_t mb_num_scales(int64_t rows, int64_t cols, int64_t group) {
  if (mb_packed_bytes(rows, cols, group, 8) < 0) return -1;
  return num_blocks(rows) * kBlockRows * (group ? ceil_div(cols, group) : 1);
}

int32_t mb_repack(const uint8_t* codes, int64_t num_bytes, int64_t rows, int64_t cols, int64_t group, int32_t bits, int32_t ternary, uint8_t* packed) {
  const int64_t total = mb_packed_bytes(rows, cols, group, bits);
  if (total < 0 || (ternary && bits != 2)) return MB_BAD_SHAPE;
  if (!codes || !packed) return MB_BAD_POINTER;
  if (num_bytes != (ternary ? ceil_div(rows * cols, 5) : ceil_div(rows * cols * bits, 8))) return MB_BAD_SIZE;
  const Cut cut(cols, group, bits);
  const int64_t bytes = block_bytes(cut, bits);
  static const uint8_t powers[5] = {1, 3, 9, 27, 81};
  if (bits == 8 && std::memchr(codes, 255, static_cast<size_t>(num_bytes))) return MB_BAD_BITS;  // 8 bits have 255 levels
  parallel_for(num_blocks(rows), [&](int64_t b) {
    uint8_t* out = packed + b * bytes;
    std::memset(out, bits == 8 ? 128 : 0, static_cast<size_t>(bytes));  // padding: 8-bit codes stand there shifted by one
    for (int n = 0; n < kBlockRows && b * kBlockRows + n < rows; ++n) {
      const int64_t start = (b * kBlockRows + n) * cols;
      for (int64_t c = 0; c < cols; ++c) {
        const int64_t i = start + c, g = c / cut.size, k = g * cut.padded + (c - g * cut.size);
        uint8_t* chunk = out + k / chunk_cols(bits) * chunk_bytes(bits);
        if (bits == 16) {
          std::memcpy(chunk + 2 * n, codes + 2 * i, 2);
          continue;
        }
        const int in_chunk = static_cast<int>(k % chunk_cols(bits)), j = in_chunk / 4, at = n * 4 + in_chunk % 4;
        unsigned code;
        if (ternary) code = codes[i / 5] / powers[i % 5] % 3;
        else if (bits == 8) code = codes[i];
        else {
          const int64_t bit = i * bits;
          unsigned word = codes[bit >> 3];
          if ((bit & 7) + bits > 8) word |= static_cast<unsigned>(codes[(bit >> 3) + 1]) << 8;
          code = word >> (bit & 7) & ((1u << bits) - 1);
        }
        if (bits == 3 && j < 6) {
          chunk[j / 2 * 256 + at] |= static_cast<uint8_t>(code << (3 * (j % 2)));
        } else if (bits == 3) {
          chunk[(j - 6) * 256 + at] |= static_cast<uint8_t>((code & 3) << 6);
          chunk[512 + at] |= static_cast<uint8_t>((code >> 2) << j);
        } else if (bits == 8) {
          chunk[at] = static_cast<uint8_t>(code + 1);
        } else {
          chunk[at] |= static_cast<uint8_t>(code << (bits * j));
        }
      }
    }
  });
  return MB_OK;
}

int32_t mb_repack_scales(const float* scales, int64_t scales_per_row, float factor, int64_t rows, int64_t cols, int64_t group, float* out) {
  if (mb_num_scales(rows, cols, group) < 0) return MB_BAD_SHAPE;
  if (!scales || !out) return MB_BAD_POINTER;
  const int64_t groups = group ? ceil_div(cols, group) : 1;
  if (scales_per_row != 0 && scales_per_row != groups) return MB_BAD_SIZE;
  for (int64_t b = 0; b < num_blocks(rows); ++b)
    for (int64_t g = 0; g < groups; ++g)
      for (int n = 0; n < kBlockRows; ++n) {
        const int64_t row = b * kBlockRows + n;
        out[(b * groups + g) * kBlockRows + n] = row < rows ? (scales_per_row ? scales[row * groups + g] : scales[0]) * factor : 0.0f;
      }
  return MB_OK;
}

int32_t mb_linear(const mb_matrix* w, int32_t activations, const float* x, int64_t m, const float* bias, float* y) {
  if (!w || (m > 0 && (!x || !y))) return MB_BAD_POINTER;
  if (const int32_t error = check_matrix(*w)) return error;
  if (m < 0 || (activations != MB_INT8 && activations != MB_FLOAT32)) return MB_BAD_SHAPE;
  const Kernels& k = kernels();
  const Cut cut = cut_of(*w);
  const int64_t blocks = num_blocks(w->rows);
  // Chunks: whole row blocks, and for many rows of activations parts of those too, so that a part stays in the cache.
  const int64_t m_part = std::max<int64_t>(6, std::min<int64_t>(96, (256 << 10) / cut.width() / 6 * 6));
  const int64_t m_chunks = ceil_div(m, m_part), wanted = static_cast<int64_t>(num_threads()) * 4;
  const int64_t b_chunks = std::min(blocks, std::max<int64_t>(1, ceil_div(wanted, std::max<int64_t>(1, m_chunks))));
  try {
    if (activations == MB_FLOAT32 || w->bits == 16) {
      parallel_for(m_chunks * b_chunks, [&](int64_t i) {
        const int64_t c = i % b_chunks, from = i / b_chunks * m_part;
        k.gemm_float(*w, x, w->cols, from, std::min(m, from + m_part), blocks * c / b_chunks, blocks * (c + 1) / b_chunks, bias, y, w->rows);
      });
      return MB_OK;
    }
    const int64_t at_once = std::max<int64_t>(m_part, std::min<int64_t>(m, (32 << 20) / cut.width() / m_part * m_part));
    thread_local std::vector<int8_t> q;
    thread_local std::vector<float> scale;
    thread_local std::vector<int32_t> sums;
    const int64_t held = std::min(m, at_once);
    q.resize(static_cast<size_t>(held * cut.width()));
    scale.resize(static_cast<size_t>(held));
    sums.resize(static_cast<size_t>(held * cut.num_groups));
    int8_t* const qp = q.data();
    float* const sp = scale.data();
    int32_t* const up = sums.data();
    for (int64_t first = 0; first < m; first += at_once) {
      const int64_t count = std::min(at_once, m - first), parts = ceil_div(count, m_part);
      const float* in = x + first * w->cols;
      float* out = y + first * w->rows;
      if (count == 1) quantize_rows(k, in, 1, cut, qp, sp, up);
      else parallel_for(parts, [&](int64_t p) {
        const int64_t from = p * m_part, n = std::min(m_part, count - from);
        quantize_rows(k, in + from * w->cols, n, cut, qp + from * cut.width(), sp + from, up + from * cut.num_groups);
      });
      const int64_t pieces = std::min(blocks, std::max<int64_t>(1, ceil_div(wanted, parts)));
      parallel_for(parts * pieces, [&](int64_t i) {
        const int64_t c = i % pieces, from = i / pieces * m_part;
        k.gemm_int8(*w, {qp, sp, up}, from, std::min(count, from + m_part), blocks * c / pieces, blocks * (c + 1) / pieces, bias, out, w->rows);
      });
    }
  } catch (const std::bad_alloc&) {
    return MB_NO_MEMORY;
  }
  return MB_OK;
}

int32_t mb_embedding(const mb_matrix* w, const int64_t* ids, int64_t n, float* y) {
  if (!w || (n > 0 && (!ids || !y))) return MB_BAD_POINTER;
  if (const int32_t error = check_matrix(*w)) return error;
  if (n < 0) return MB_BAD_SHAPE;
  for (int64_t i = 0; i < n; ++i) if (ids[i] < 0 || ids[i] >= w->rows) return MB_BAD_TOKEN;
  const Kernels& k = kernels();
  const int64_t part = 16;
  parallel_for(ceil_div(n, part), [&](int64_t p) {
    for (int64_t i = p * part; i < std::min(n, (p + 1) * part); ++i) k.weight_row(*w, ids[i], y + i * w->cols);
  });
  return MB_OK;
}

int32_t mb_log_softmax_at(const mb_matrix* w, int32_t activations, const float* x, int64_t m, const float* bias, const int64_t* offsets, const int64_t* targets, float* out, float* log_partition) {
  if (!w || !offsets || (m > 0 && !x)) return MB_BAD_POINTER;
  if (const int32_t error = check_matrix(*w)) return error;
  if (m < 0 || (activations != MB_INT8 && activations != MB_FLOAT32)) return MB_BAD_SHAPE;
  if (offsets[0] != 0) return MB_BAD_SIZE;
  for (int64_t i = 0; i < m; ++i) if (offsets[i + 1] < offsets[i]) return MB_BAD_SIZE;  // before any target is read
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t t = offsets[i]; t < offsets[i + 1]; ++t)
      if (!targets || !out || targets[t] < 0 || targets[t] >= w->rows || (t > offsets[i] && targets[t] < targets[t - 1])) return MB_BAD_TOKEN;
  }
  try {
    log_softmax_at(kernels(), *w, activations, x, m, bias, offsets, targets, out, log_partition);
  } catch (const std::bad_alloc&) {
    return MB_NO_MEMORY;
  }
  return MB_OK;
}

}  // extern "C"
