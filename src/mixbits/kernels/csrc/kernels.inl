// Kernels over a vector type `Isa`, included once per instruction set inside its own namespace.
//
// Integer sums are exact and floating-point work runs in a fixed order of 16 lanes without contraction, so that every instruction
// set and every number of threads gives the same bits. `Isa` offers: Vec, kRows (rows of 4 columns in a vector), kFloats (floats of a
// register), kWide (dot adds into int32), kSigned8 (8-bit codes are read as signed), kWords8 (8-bit codes are multiplied as 16-bit
// words where there are several rows of activations), kTileRows8, vectors(bits, rows of activations), zero, load, store, broadcast4,
// set8, and_, or_, xor_, shift_right, dot (wide), dot8, dot16, widen, add16 and shift_right_signed (narrow); words, even_bytes and
// dot_words (kWords8).

#include "lanes.inl"

// ---- activations to int8 ----

static void quantize(const float* x, const Cut& cut, int8_t* q, float* scale, int32_t* sums) {
  uint32_t top = 0;  // largest |x| as bits, which puts infinity and NaN above every number
  for (int64_t i = 0; i < cut.cols; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    top = bits > top ? bits : top;
  }
  if (top >= 0x7f800000u) {  // the whole row becomes NaN
    *scale = std::numeric_limits<float>::quiet_NaN();
    std::memset(q, 0, static_cast<size_t>(cut.width()));
    for (int64_t g = 0; g < cut.num_groups; ++g) sums[g] = 0;
    return;
  }
  float most;
  std::memcpy(&most, &top, 4);
  most = most < 1e-30f ? 1e-30f : most;
  *scale = most / 127.0f;
  const float inverse = 127.0f / most, magic = 12582912.0f;
  for (int64_t g = 0; g < cut.num_groups; ++g) {
    const int64_t from = g * cut.size, count = (from + cut.size < cut.cols ? cut.size : cut.cols - from);
    const float* in = x + from;
    int8_t* out = q + g * cut.padded;
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float t = in[i] * inverse + magic;  // rounds half to even
      int32_t bits;
      std::memcpy(&bits, &t, 4);
      const int32_t code = bits - 0x4B400000;
      out[i] = static_cast<int8_t>(code);
      sum += code;
    }
    for (int64_t i = count; i < cut.padded; ++i) out[i] = 0;
    sums[g] = sum;
  }
}

// ---- int8 products ----

#define MB_EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < n; ++i)
#include "tiles.inl"

template <int BITS>
static void gemm_bits(const mb_matrix& w, const Rows8& a, int64_t m0, int64_t m1, int64_t b0, int64_t b1, const float* bias, float* y, int64_t ldy) {
  const Cut cut = cut_of(w);
  const int64_t bytes = block_bytes(cut, BITS);
  constexpr int kTile = BITS == 8 ? Isa::kTileRows8 : kMaxTileRows;
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t row = b * kBlockRows, count = w.rows - row < kBlockRows ? w.rows - row : kBlockRows;
    const uint8_t* packed = w.packed + b * bytes;
    const float* scales = w.scales + row * cut.num_groups;
    const float* part = bias ? bias + row : nullptr;
    for (int64_t m = m0; m < m1;) {
      const int64_t left = m1 - m < kTile ? m1 - m : kTile;
      float* out = y + row;
      switch (left) {
        case 1: block<BITS, 1>(w, cut, packed, scales, a, m, count, part, out, ldy); break;
        case 2: block<BITS, 2>(w, cut, packed, scales, a, m, count, part, out, ldy); break;
        case 3: block<BITS, 3>(w, cut, packed, scales, a, m, count, part, out, ldy); break;
        case 4: block<BITS, 4>(w, cut, packed, scales, a, m, count, part, out, ldy); break;
        case 5: if constexpr (kTile >= 5) block<BITS, 5>(w, cut, packed, scales, a, m, count, part, out, ldy); break;
        default: if constexpr (kTile >= 6) block<BITS, 6>(w, cut, packed, scales, a, m, count, part, out, ldy);
      }
      m += left;
    }
  }
}

static void gemm_int8(const mb_matrix& w, const Rows8& a, int64_t m0, int64_t m1, int64_t b0, int64_t b1, const float* bias, float* y, int64_t ldy) {
  switch (w.bits) {
    case 1: gemm_bits<1>(w, a, m0, m1, b0, b1, bias, y, ldy); break;
    case 2: gemm_bits<2>(w, a, m0, m1, b0, b1, bias, y, ldy); break;
    case 3: gemm_bits<3>(w, a, m0, m1, b0, b1, bias, y, ldy); break;
    case 4: gemm_bits<4>(w, a, m0, m1, b0, b1, bias, y, ldy); break;
    default: gemm_bits<8>(w, a, m0, m1, b0, b1, bias, y, ldy);
  }
}

// ---- float32 products: codes of a chunk become numbers, then multiply ----

static inline float half_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h & 0x7fffu) << 13;
  float magnitude;
  std::memcpy(&magnitude, &bits, 4);
  magnitude *= 5.192296858534828e33f;  // 2^112
  uint32_t out;
  std::memcpy(&out, &magnitude, 4);
  out |= static_cast<uint32_t>(h & 0x8000u) << 16;
  std::memcpy(&magnitude, &out, 4);
  return magnitude;
}

// values[k][n] = mul * code - off of a chunk (16 bits: the weights themselves)
static inline void chunk_values(const mb_matrix& w, const uint8_t* p, float* values) {
  if (w.bits == 16) {
    for (int n = 0; n < kBlockRows; ++n) {
      uint16_t h;
      std::memcpy(&h, p + 2 * n, 2);
      values[n] = half_to_float(h);
    }
    return;
  }
  const int steps = chunk_cols(w.bits) / 4, mask = (1 << w.bits) - 1, off = w.bits == 8 ? 128 : w.off;
  for (int j = 0; j < steps; ++j)
    for (int r = 0; r < 4; ++r) {
      float* out = values + (j * 4 + r) * kBlockRows;
      if (w.bits == 3) for (int n = 0; n < kBlockRows; ++n) out[n] = static_cast<float>(w.mul * code_of_three(p, n * 4 + r, j) - off);
      else for (int n = 0; n < kBlockRows; ++n) out[n] = static_cast<float>(w.mul * ((p[n * 4 + r] >> (w.bits * j)) & mask) - off);
    }
}

template <int MR>
static inline void float_tile(const float* values, int64_t count, const float* x, int64_t ldx, float (*acc)[kBlockRows]) {
  for (int n = 0; n < kBlockRows; n += kLanes) {
    vf sum[MR];
    MB_EACH(i, MR) sum[i] = load_f(&acc[i][n]);
    for (int64_t k = 0; k < count; ++k) {
      const vf v = load_f(values + k * kBlockRows + n);
      MB_EACH(i, MR) sum[i] += v * splat(x[i * ldx + k]);
    }
    MB_EACH(i, MR) store_f(&acc[i][n], sum[i]);
  }
}

// One block of weight rows against up to 24 rows of activations: a chunk is unpacked once for all of them.
static void gemm_float(const mb_matrix& w, const float* x, int64_t ldx, int64_t m0, int64_t m1, int64_t b0, int64_t b1, const float* bias, float* y, int64_t ldy) {
  const Cut cut = cut_of(w);
  const int cols = chunk_cols(w.bits);
  const int64_t bytes = block_bytes(cut, w.bits), chunks = cut.padded / cols;
  constexpr int kRows = 24;
  alignas(64) float values[32 * kBlockRows], acc[kRows][kBlockRows], sum[kRows][kBlockRows];
  for (int64_t b = b0; b < b1; ++b) {
    const int64_t row = b * kBlockRows, count = w.rows - row < kBlockRows ? w.rows - row : kBlockRows;
    for (int64_t m = m0; m < m1; m += kRows) {
      const int64_t mr = m1 - m < kRows ? m1 - m : kRows;
      const uint8_t* p = w.packed + b * bytes;
      std::memset(sum, 0, sizeof sum);
      for (int64_t g = 0; g < cut.num_groups; ++g) {
        const int64_t from = g * cut.size, size = from + cut.size < w.cols ? cut.size : w.cols - from;
        std::memset(acc, 0, sizeof acc);
        for (int64_t c = 0; c < chunks; ++c, p += chunk_bytes(w.bits)) {
          const int64_t k = c * cols, valid = size - k < cols ? size - k : cols;
          if (valid <= 0) continue;
          chunk_values(w, p, values);
          const float* in = x + m * ldx + from + k;
          int64_t i = 0;
          for (; i + 4 <= mr; i += 4) float_tile<4>(values, valid, in + i * ldx, ldx, acc + i);
          for (; i < mr; ++i) float_tile<1>(values, valid, in + i * ldx, ldx, acc + i);
        }
        const float* s = w.bits == 16 ? nullptr : w.scales + (b * cut.num_groups + g) * kBlockRows;
        for (int64_t i = 0; i < mr; ++i) for (int n = 0; n < kBlockRows; ++n) sum[i][n] += s ? acc[i][n] * s[n] : acc[i][n];
      }
      for (int64_t i = 0; i < mr; ++i) {
        float* out = y + (m + i) * ldy + row;
        for (int64_t n = 0; n < count; ++n) out[n] = bias ? sum[i][n] + bias[row + n] : sum[i][n];
      }
    }
  }
}

// Row `row` of the matrix in float32: (mul * code - off) * scale.
static void weight_row(const mb_matrix& w, int64_t row, float* out) {
  const Cut cut = cut_of(w);
  const int cols = chunk_cols(w.bits);
  const int64_t b = row / kBlockRows, n = row % kBlockRows;
  const uint8_t* p = w.packed + b * block_bytes(cut, w.bits);
  const int off = w.bits == 8 ? 128 : w.off;
  for (int64_t g = 0; g < cut.num_groups; ++g) {
    const int64_t from = g * cut.size, size = from + cut.size < w.cols ? cut.size : w.cols - from;
    const float s = w.bits == 16 ? 1.0f : w.scales[(b * cut.num_groups + g) * kBlockRows + n];
    for (int64_t c = 0; c < cut.padded / cols; ++c, p += chunk_bytes(w.bits)) {
      for (int k = 0; k < cols && c * cols + k < size; ++k) {
        float value;
        if (w.bits == 16) {
          uint16_t h;
          std::memcpy(&h, p + 2 * n, 2);
          value = half_to_float(h);
        } else {
          const int j = k / 4, at = static_cast<int>(n) * 4 + k % 4;
          int code;
          if (w.bits == 3) code = code_of_three(p, at, j);
          else if (w.bits == 8) code = p[at];
          else code = (p[at] >> (w.bits * j)) & ((1 << w.bits) - 1);
          value = static_cast<float>(w.mul * code - off) * s;
        }
        out[from + c * cols + k] = value;
      }
    }
  }
}

// ---- the rest of a Transformer ----

static void layer_norm(const float* x, const float* gain, const float* bias, float eps, int64_t n, float* out) {
  vf sum = splat(0), squares = splat(0);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load_f(x + i);
  if (i < n) sum += load_part(x + i, n - i, 0.0f);
  const float mean = total(sum) / static_cast<float>(n);
  for (i = 0; i + kLanes <= n; i += kLanes) { const vf d = load_f(x + i) - mean; squares += d * d; }
  if (i < n) { const vf d = load_part(x + i, n - i, mean) - mean; squares += d * d; }
  const float inverse = 1.0f / std::sqrt(total(squares) / static_cast<float>(n) + eps);
  for (i = 0; i < n; ++i) out[i] = (x[i] - mean) * inverse * (gain ? gain[i] : 1.0f) + (bias ? bias[i] : 0.0f);
}

static void rms_norm(const float* x, const float* gain, float eps, int64_t n, float* out) {
  vf squares = splat(0);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) { const vf v = load_f(x + i); squares += v * v; }
  if (i < n) { const vf v = load_part(x + i, n - i, 0.0f); squares += v * v; }
  const float inverse = 1.0f / std::sqrt(total(squares) / static_cast<float>(n) + eps);
  for (i = 0; i < n; ++i) out[i] = x[i] * inverse * gain[i];
}

// erf by Abramowitz and Stegun 7.1.26, absolute error below 2e-7
static inline vf erf_f(vf x) {
  const vf a = if_less(x, splat(0), -x, x);
  const vf t = 1.0f / (1.0f + 0.3275911f * a);
  const vf p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  const vf e = 1.0f - p * exp_f(-(a * a));
  return if_less(x, splat(0), -e, e);
}

static inline vf activation(int kind, vf x) {
  switch (kind) {
    case MB_RELU: return if_less(x, splat(0), splat(0), x);
    case MB_GELU: return 0.5f * x * (1.0f + erf_f(x * 0.70710678f));
    case MB_GELU_TANH: return x / (1.0f + exp_f(-1.5957691216f * (x + 0.044715f * x * x * x)));
    default: return x / (1.0f + exp_f(-x));
  }
}

static void activate(int kind, float* x, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_f(x + i, activation(kind, load_f(x + i)));
  if (i < n) store_part(x + i, n - i, activation(kind, load_part(x + i, n - i, 0.0f)));
}

static void multiply(float* x, const float* y, int64_t n) { for (int64_t i = 0; i < n; ++i) x[i] *= y[i]; }
static void add(float* x, const float* y, int64_t n) { for (int64_t i = 0; i < n; ++i) x[i] += y[i]; }

static inline float dot_f(const float* a, const float* b, int64_t n) {
  vf sum = splat(0);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load_f(a + i) * load_f(b + i);
  if (i < n) sum += load_part(a + i, n - i, 0.0f) * load_part(b + i, n - i, 0.0f);
  return total(sum);
}

static void attend(const float* q, const float* k, const float* v, int64_t ld, const int32_t* context, int64_t count, int64_t head_dim, float scale, float* scratch, float* out) {
  float most = -std::numeric_limits<float>::infinity();
  int64_t first = 0;
  for (; first + 4 <= count && head_dim % kLanes == 0; first += 4) {  // four sums over lanes at once, each in the order of dot_f
    const float* row[4];
    vf sum[4];
    MB_EACH(r, 4) row[r] = k + context[first + r] * ld, sum[r] = splat(0);
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const vf x = load_f(q + d);
      MB_EACH(r, 4) sum[r] += x * load_f(row[r] + d);
    }
    const Quad s = totals(sum[0], sum[1], sum[2], sum[3]) * scale;
    std::memcpy(scratch + first, &s, sizeof s);
  }
  for (; first < count; ++first) scratch[first] = dot_f(q, k + context[first] * ld, head_dim) * scale;
  for (int64_t j = 0; j < count; ++j) most = scratch[j] > most ? scratch[j] : most;
  const int64_t padded = ceil_div(count, kLanes) * kLanes;
  for (int64_t j = count; j < padded; ++j) scratch[j] = -1e30f;
  vf sum = splat(0);
  for (int64_t j = 0; j < padded; j += kLanes) {
    vf e = exp_f(load_f(scratch + j) - most);
    if (j + kLanes > count) e = first_lanes(e, count - j);
    sum += e;
    store_f(scratch + j, e);
  }
  const float inverse = 1.0f / total(sum);
  int64_t d = 0;
  for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes) {
    vf acc[4] = {splat(0), splat(0), splat(0), splat(0)};
    for (int64_t j = 0; j < count; ++j) {
      const float* row = v + context[j] * ld + d;
      const vf p = splat(scratch[j]);
      MB_EACH(i, 4) acc[i] += p * load_f(row + i * kLanes);
    }
    MB_EACH(i, 4) store_f(out + d + i * kLanes, acc[i] * inverse);
  }
  for (; d < head_dim; d += kLanes) {
    const int64_t n = head_dim - d < kLanes ? head_dim - d : kLanes;
    vf acc = splat(0);
    for (int64_t j = 0; j < count; ++j) acc += splat(scratch[j]) * (n == kLanes ? load_f(v + context[j] * ld + d) : load_part(v + context[j] * ld + d, n, 0.0f));
    store_part(out + d, n, acc * inverse);
  }
}

static void log_sum(const float* logits, int64_t n, float* maximum, float* sum) {
  constexpr float kLeast = -std::numeric_limits<float>::infinity();
  vf most = splat(kLeast), zero = splat(0);  // zero: NaN as soon as a logit is not finite
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vf x = load_f(logits + i);
    most = max_f(x, most);
    zero += x - x;
  }
  if (i < n) {
    most = max_f(load_part(logits + i, n - i, kLeast), most);
    const vf x = load_part(logits + i, n - i, 0.0f);
    zero += x - x;
  }
  const float here = largest(most), top = here > *maximum ? here : *maximum;
  vf acc = splat(0);
  for (i = 0; i + kLanes <= n; i += kLanes) acc += exp_f(load_f(logits + i) - top);
  if (i < n) acc += first_lanes(exp_f(load_part(logits + i, n - i, top) - top), n - i);
  *sum = *sum * std::exp(*maximum - top) + total(acc);
  *maximum = top;
  if (total(zero) != 0.0f) *sum = std::numeric_limits<float>::quiet_NaN();
}

static const Kernels kTable = {
    kName, quantize, gemm_int8, gemm_float, weight_row, layer_norm, rms_norm, activate, multiply, add, attend, log_sum,
};

#undef MB_EACH
