// Kernels over a vector type `Isa`, included once per instruction set inside its own namespace.
//
// Integer sums are exact and floating-point work runs in a fixed order of 16 lanes without contraction, so that every instruction
// set and every number of threads gives the same bits. `Isa` offers: Vec, kRows (rows of 4 columns in a vector), kWide
// (dot adds into int32), kSigned8 (8-bit codes are read as signed), rows_of_vectors(mr), zero, load, store, broadcast4, set8,
// and_, xor_, shift<n>, low_or_high, dot (wide), dot16 and widen (narrow), dot8.

typedef float vf __attribute__((vector_size(64), aligned(4)));
typedef int32_t vi __attribute__((vector_size(64), aligned(4)));
constexpr int kLanes = 16;

static inline vf load_f(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
static inline void store_f(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline vf splat(float x) { vf v; for (int i = 0; i < kLanes; ++i) v[i] = x; return v; }
static inline vf load_part(const float* p, int64_t n, float fill) {
  float t[kLanes];
  for (int i = 0; i < kLanes; ++i) t[i] = i < n ? p[i] : fill;
  return load_f(t);
}
static inline void store_part(float* p, int64_t n, vf v) {
  float t[kLanes];
  store_f(t, v);
  for (int64_t i = 0; i < n; ++i) p[i] = t[i];
}
static inline float total(vf v) {
  float t[kLanes];
  store_f(t, v);
  for (int step = 8; step; step /= 2) for (int i = 0; i < step; ++i) t[i] += t[i + step];
  return t[0];
}
static inline float largest(vf v) {
  float t[kLanes];
  store_f(t, v);
  for (int step = 8; step; step /= 2) for (int i = 0; i < step; ++i) t[i] = t[i] > t[i + step] ? t[i] : t[i + step];
  return t[0];
}
static inline vf max_f(vf a, vf b) { return a > b ? a : b; }

// e^x for x in [-87, 88] (clamped), relative error below 2e-7: 2^n by the exponent bits, e^r by a polynomial. NaN stays NaN.
static inline vf exp_f(vf x) {
  x = x > splat(88.0f) ? splat(88.0f) : x;
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, which then stands in the low bits
  const vf t = x * 1.44269504f + magic, n = t - magic;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.3888889e-3f);
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  vi bits;
  std::memcpy(&bits, &t, sizeof bits);
  bits = (bits - 0x4B400000 + 127) << 23;
  vf power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

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

// ---- int8 products: sums of code * activation of 64 rows ----

template <int BITS> static inline typename Isa::Vec codes_at(const uint8_t* w, int j) {
  using V = typename Isa::Vec;
  if constexpr (BITS == 3) {
    const V low = Isa::and_(Isa::shift_right(Isa::load(w + (j / 4) * 256), 2 * (j % 4)), Isa::set8(3));
    const V high = Isa::load(w + 512);
    return Isa::or_(low, Isa::and_(j < 2 ? Isa::shift_left(high, 2 - j) : Isa::shift_right(high, j - 2), Isa::set8(4)));
  } else if constexpr (BITS == 8) {
    const V code = Isa::load(w);
    return Isa::kSigned8 ? Isa::xor_(code, Isa::set8(-128)) : code;
  } else {
    const V byte = Isa::load(w);
    return Isa::and_(j ? Isa::shift_right(byte, BITS * j) : byte, Isa::set8((1 << BITS) - 1));
  }
}

// Chunks after which int16 sums of pairs of products (at most 2 * 127 * largest code each) have to be widened.
template <int BITS> constexpr int narrow_chunks() { return BITS == 1 ? 16 : BITS == 2 ? 10 : BITS == 3 ? 2 : 4; }

template <int BITS, int NV, int MR>
static inline void tile(const uint8_t* w, const int8_t* a, int64_t lda, int64_t chunks, int32_t* out) {
  using V = typename Isa::Vec;
  constexpr int kSteps = chunk_cols(BITS) / 4, kBytes = chunk_bytes(BITS);
  constexpr bool wide = Isa::kWide || BITS == 8;
  V acc[MR][NV];
  _Pragma("GCC unroll 8") for (int m = 0; m < MR; ++m) _Pragma("GCC unroll 8") for (int v = 0; v < NV; ++v) acc[m][v] = Isa::zero();
  if constexpr (wide) {
    for (int64_t c = 0; c < chunks; ++c, w += kBytes, a += 4 * kSteps) {
      __builtin_prefetch(w + 2048);
      _Pragma("GCC unroll 8") for (int j = 0; j < kSteps; ++j) {
        V code[NV];
        _Pragma("GCC unroll 8") for (int v = 0; v < NV; ++v) code[v] = codes_at<BITS>(w + v * Isa::kRows * 4, j);
        _Pragma("GCC unroll 8") for (int m = 0; m < MR; ++m) {
          const V x = Isa::broadcast4(a + m * lda + j * 4);
          _Pragma("GCC unroll 8") for (int v = 0; v < NV; ++v)
            acc[m][v] = BITS == 8 ? Isa::dot8(acc[m][v], code[v], x) : Isa::dot(acc[m][v], code[v], x);
        }
      }
    }
    _Pragma("GCC unroll 8") for (int m = 0; m < MR; ++m) _Pragma("GCC unroll 8") for (int v = 0; v < NV; ++v) Isa::store(out + m * kBlockRows + v * Isa::kRows, acc[m][v]);
  } else {
    bool first = true;
    for (int64_t c = 0; c < chunks;) {
      const int64_t stop = c + narrow_chunks<BITS>() < chunks ? c + narrow_chunks<BITS>() : chunks;
      for (; c < stop; ++c, w += kBytes, a += 4 * kSteps) {
        __builtin_prefetch(w + 2048);
        _Pragma("GCC unroll 8") for (int j = 0; j < kSteps; ++j) {
          V code[NV];
          _Pragma("GCC unroll 8") for (int v = 0; v < NV; ++v) code[v] = codes_at<BITS>(w + v * Isa::kRows * 4, j);
          _Pragma("GCC unroll 8") for (int m = 0; m < MR; ++m) {
            const V x = Isa::broadcast4(a + m * lda + j * 4);
            _Pragma("GCC unroll 8") for (int v = 0; v < NV; ++v) acc[m][v] = Isa::dot16(acc[m][v], code[v], x);
          }
        }
      }
      _Pragma("GCC unroll 8") for (int m = 0; m < MR; ++m) _Pragma("GCC unroll 8") for (int v = 0; v < NV; ++v) {
        Isa::widen(out + m * kBlockRows + v * Isa::kRows, acc[m][v], first);
        acc[m][v] = Isa::zero();
      }
      first = false;
    }
  }
}

template <int BITS, int MR>
static void block(const mb_matrix& w, const Cut& cut, const uint8_t* packed, const float* scales, const Rows8& a, int64_t m, int64_t count, const float* bias, float* y, int64_t ldy) {
  constexpr int NV = Isa::vectors(MR), kStep = NV * Isa::kRows;
  const int64_t chunks = cut.padded / chunk_cols(BITS), lda = cut.width();
  const int32_t mul = w.mul, off = BITS == 8 ? (Isa::kSigned8 ? 0 : 128) : w.off;
  alignas(64) int32_t sums[MR][kBlockRows];
  alignas(64) float acc[MR][kBlockRows];
  for (int64_t g = 0; g < cut.num_groups; ++g, packed += chunks * chunk_bytes(BITS)) {
    for (int n = 0; n < kBlockRows; n += kStep) tile<BITS, NV, MR>(packed + n * 4, a.q + m * lda + g * cut.padded, lda, chunks, &sums[0][n]);
    const float* s = scales + g * kBlockRows;
    for (int i = 0; i < MR; ++i) {
      const int32_t shift = off * a.sums[(m + i) * cut.num_groups + g];
      if (g == 0) for (int n = 0; n < kBlockRows; ++n) acc[i][n] = static_cast<float>(mul * sums[i][n] - shift) * s[n];
      else for (int n = 0; n < kBlockRows; ++n) acc[i][n] += static_cast<float>(mul * sums[i][n] - shift) * s[n];
    }
  }
  for (int i = 0; i < MR; ++i) {
    const float scale = a.scale[m + i];
    float* out = y + (m + i) * ldy;
    if (bias) for (int64_t n = 0; n < count; ++n) out[n] = acc[i][n] * scale + bias[n];
    else for (int64_t n = 0; n < count; ++n) out[n] = acc[i][n] * scale;
  }
}

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
  const int steps = chunk_cols(w.bits) / 4, mask = w.bits == 8 ? 255 : (1 << (w.bits == 3 ? 2 : w.bits)) - 1;
  const int off = w.bits == 8 ? 128 : w.off;
  for (int j = 0; j < steps; ++j) {
    const uint8_t* low = w.bits == 3 ? p + (j / 4) * 256 : p;
    const int shift = w.bits == 3 ? 2 * (j % 4) : w.bits * j;
    for (int r = 0; r < 4; ++r) {
      float* out = values + (j * 4 + r) * kBlockRows;
      if (w.bits == 3) for (int n = 0; n < kBlockRows; ++n) out[n] = static_cast<float>(w.mul * (((low[n * 4 + r] >> shift) & 3) | (((p[512 + n * 4 + r] >> j) & 1) << 2)) - off);
      else for (int n = 0; n < kBlockRows; ++n) out[n] = static_cast<float>(w.mul * ((low[n * 4 + r] >> shift) & mask) - off);
    }
  }
}

template <int MR>
static inline void float_tile(const float* values, int64_t count, const float* x, int64_t ldx, float (*acc)[kBlockRows]) {
  for (int n = 0; n < kBlockRows; n += kLanes) {
    vf sum[MR];
    _Pragma("GCC unroll 8") for (int i = 0; i < MR; ++i) sum[i] = load_f(&acc[i][n]);
    for (int64_t k = 0; k < count; ++k) {
      const vf v = load_f(values + k * kBlockRows + n);
      _Pragma("GCC unroll 8") for (int i = 0; i < MR; ++i) sum[i] += v * splat(x[i * ldx + k]);
    }
    _Pragma("GCC unroll 8") for (int i = 0; i < MR; ++i) store_f(&acc[i][n], sum[i]);
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
          if (w.bits == 3) code = ((p[(j / 4) * 256 + at] >> (2 * (j % 4))) & 3) | (((p[512 + at] >> j) & 1) << 2);
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
  const vf a = x < splat(0) ? -x : x;
  const vf t = 1.0f / (1.0f + 0.3275911f * a);
  const vf p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  const vf e = 1.0f - p * exp_f(-(a * a));
  return x < splat(0) ? -e : e;
}

static inline vf activation(int kind, vf x) {
  switch (kind) {
    case MB_RELU: return x < splat(0) ? splat(0) : x;
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
  for (int64_t j = 0; j < count; ++j) {
    const float s = dot_f(q, k + context[j] * ld, head_dim) * scale;
    scratch[j] = s;
    most = s > most ? s : most;
  }
  const int64_t padded = ceil_div(count, kLanes) * kLanes;
  for (int64_t j = count; j < padded; ++j) scratch[j] = -1e30f;
  vf sum = splat(0);
  for (int64_t j = 0; j < padded; j += kLanes) {
    vf e = exp_f(load_f(scratch + j) - most);
    if (j + kLanes > count) for (int i = 0; i < kLanes; ++i) e[i] = j + i < count ? e[i] : 0.0f;
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
      _Pragma("GCC unroll 4") for (int i = 0; i < 4; ++i) acc[i] += p * load_f(row + i * kLanes);
    }
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; ++i) store_f(out + d + i * kLanes, acc[i] * inverse);
  }
  for (; d < head_dim; d += kLanes) {
    const int64_t n = head_dim - d < kLanes ? head_dim - d : kLanes;
    vf acc = splat(0);
    for (int64_t j = 0; j < count; ++j) acc += splat(scratch[j]) * (n == kLanes ? load_f(v + context[j] * ld + d) : load_part(v + context[j] * ld + d, n, 0.0f));
    store_part(out + d, n, acc * inverse);
  }
}

static void log_sum(const float* logits, int64_t n, float* maximum, float* sum) {
  vf most = splat(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  bool bad = false;
  for (; i + kLanes <= n; i += kLanes) most = max_f(load_f(logits + i), most);
  if (i < n) most = max_f(load_part(logits + i, n - i, -std::numeric_limits<float>::infinity()), most);
  for (int64_t j = 0; j < n; ++j) bad |= !(logits[j] - logits[j] == 0.0f);
  const float here = largest(most), top = here > *maximum ? here : *maximum;
  vf acc = splat(0);
  for (i = 0; i + kLanes <= n; i += kLanes) acc += exp_f(load_f(logits + i) - top);
  if (i < n) {
    vf e = exp_f(load_part(logits + i, n - i, top) - top);
    for (int64_t j = n - i; j < kLanes; ++j) e[j] = 0.0f;
    acc += e;
  }
  *sum = *sum * std::exp(*maximum - top) + total(acc);
  *maximum = top;
  if (bad) *sum = std::numeric_limits<float>::quiet_NaN();
}

static const Kernels kTable = {
    kName, quantize, gemm_int8, gemm_float, weight_row, layer_norm, rms_norm, activate, multiply, add, attend, log_sum,
};
