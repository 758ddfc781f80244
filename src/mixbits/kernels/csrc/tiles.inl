// Products of codes and int8 activations, 64 rows of weights at a time. Included by kernels.inl. `I` is Isa, as a parameter so that an
// instruction set needs to have only what its tiles use.

template <class I, int BITS> static inline typename I::Vec codes_at(const uint8_t* w, int j) {
  using V = typename I::Vec;
  if constexpr (BITS == 3) {
    if (j < 6) {  // see code_of_three
      const V byte = I::load(w + j / 2 * 256);
      return I::and_(j % 2 ? I::shift_right(byte, 3) : byte, I::set8(7));
    }
    const V low = I::shift_right(I::load(w + (j - 6) * 256), 6), high = I::shift_right(I::load(w + 512), j - 2);
    return I::or_(I::and_(low, I::set8(3)), I::and_(high, I::set8(4)));
  } else if constexpr (BITS == 8) {
    const V code = I::load(w);
    return I::kSigned8 ? I::xor_(code, I::set8(-128)) : code;
  } else {
    const V byte = I::load(w);
    return I::and_(j ? I::shift_right(byte, BITS * j) : byte, I::set8((1 << BITS) - 1));
  }
}

// Rows of activations that come alone wait for the weights: the first pass over a block asks early for all of it.
constexpr int64_t kAhead = 2048, kFarAhead = 8192;
template <int MR, int BITS> static inline void ask_ahead(const uint8_t* w, bool first_pass) {
  if constexpr (MR > 1) __builtin_prefetch(w + kAhead);
  else if (first_pass) for (int line = 0; line < chunk_bytes(BITS) / 64; ++line) __builtin_prefetch(w + kFarAhead + 64 * line);
}

// Chunks after which int16 sums of pairs of products (at most 2 * 127 * largest code each) have to be widened.
template <int BITS> static constexpr int narrow_chunks() { return BITS == 1 ? 16 : BITS == 2 ? 10 : BITS == 3 ? 2 : 4; }

// All of `chunks` with sums that fit int32.
template <class I, int BITS, int NV, int MR>
static inline void wide_tile(const uint8_t* w, const int8_t* a, int64_t lda, int64_t chunks, bool first_pass, int32_t* out) {
  using V = typename I::Vec;
  constexpr int kSteps = chunk_cols(BITS) / 4, kBytes = chunk_bytes(BITS);
  V acc[MR][NV];
  MB_EACH(m, MR) MB_EACH(v, NV) acc[m][v] = I::zero();
  for (int64_t c = 0; c < chunks; ++c, w += kBytes, a += 4 * kSteps) {
    ask_ahead<MR, BITS>(w, first_pass);
    MB_EACH(j, kSteps) {
      V code[NV];
      MB_EACH(v, NV) code[v] = codes_at<I, BITS>(w + v * I::kRows * 4, j);
      MB_EACH(m, MR) {
        const V x = I::broadcast4(a + m * lda + j * 4);
        MB_EACH(v, NV) {
          if constexpr (BITS == 8) acc[m][v] = I::dot8(acc[m][v], code[v], x);
          else acc[m][v] = I::dot(acc[m][v], code[v], x);
        }
      }
    }
  }
  MB_EACH(m, MR) MB_EACH(v, NV) I::store(out + m * kBlockRows + v * I::kRows, acc[m][v]);
}

// Sums of pairs in int16, added to int32 ones before they can overflow.
template <class I, int BITS, int NV, int MR>
static inline void narrow_tile(const uint8_t* w, const int8_t* a, int64_t lda, int64_t chunks, bool first_pass, int32_t* out) {
  using V = typename I::Vec;
  constexpr int kSteps = chunk_cols(BITS) / 4, kBytes = chunk_bytes(BITS);
  V acc[MR][NV];
  MB_EACH(m, MR) MB_EACH(v, NV) acc[m][v] = I::zero();
  for (int64_t c = 0; c < chunks;) {
    const bool first = c == 0;
    const int64_t stop = c + narrow_chunks<BITS>() < chunks ? c + narrow_chunks<BITS>() : chunks;
    for (; c < stop; ++c, w += kBytes, a += 4 * kSteps) {
      ask_ahead<MR, BITS>(w, first_pass);
      MB_EACH(j, kSteps) {
        if constexpr (MR * NV > 8) asm("" : "+r"(w));  // codes are read again from the cache: no register holds them from step to step
        if constexpr (MR == 1) {
          const V x = I::broadcast4(a + j * 4);
          MB_EACH(v, NV) acc[0][v] = I::dot16(acc[0][v], codes_at<I, BITS>(w + v * I::kRows * 4, j), x);
          continue;
        }
        V code[NV];
        MB_EACH(v, NV) code[v] = codes_at<I, BITS>(w + v * I::kRows * 4, j);
        MB_EACH(m, MR) {
          const V x = I::broadcast4(a + m * lda + j * 4);
          MB_EACH(v, NV) acc[m][v] = I::dot16(acc[m][v], code[v], x);
        }
      }
    }
    MB_EACH(m, MR) MB_EACH(v, NV) {
      I::widen(out + m * kBlockRows + v * I::kRows, acc[m][v], first);
      acc[m][v] = I::zero();
    }
  }
}

// One row of activations, 1 or 2 bits: unpacking is most of the work. Codes stay where they stand in a half byte, times 2^(BITS * s);
// each s has its own sums, which are shifted back at the end.
template <class I, int BITS, int NV>
static inline void one_row_tile(const uint8_t* w, const int8_t* a, int64_t chunks, bool first_pass, int32_t* out) {
  using V = typename I::Vec;
  constexpr int kPlaces = 4 / BITS, kBytes = chunk_bytes(BITS), kTop = ((1 << BITS) - 1) << (BITS * (kPlaces - 1));
  constexpr int64_t kChunks = 32767 / (2 * 127 * kTop) / 2;  // two steps a chunk at each place
  V acc[kPlaces][NV];
  MB_EACH(s, kPlaces) MB_EACH(v, NV) acc[s][v] = I::zero();
  for (int64_t c = 0; c < chunks;) {
    const bool first = c == 0;
    const int64_t stop = c + kChunks < chunks ? c + kChunks : chunks;
    for (; c < stop; ++c, w += kBytes, a += 8 * kPlaces) {
      ask_ahead<1, BITS>(w, first_pass);
      V bytes[NV];
      MB_EACH(v, NV) bytes[v] = I::load(w + v * I::kRows * 4);
      MB_EACH(half, 2) {
        MB_EACH(s, kPlaces) {
          const V x = I::broadcast4(a + (half * kPlaces + s) * 4), mask = I::set8(((1 << BITS) - 1) << (BITS * s));
          MB_EACH(v, NV) acc[s][v] = I::dot16(acc[s][v], I::and_(bytes[v], mask), x);
        }
        if (half == 0) MB_EACH(v, NV) bytes[v] = I::shift_right(bytes[v], 4);
      }
    }
    MB_EACH(v, NV) {
      V sum = acc[0][v];
      acc[0][v] = I::zero();
      _Pragma("GCC unroll 8") for (int s = 1; s < kPlaces; ++s) {
        sum = I::add16(sum, I::shift_right_signed(acc[s][v], BITS * s));
        acc[s][v] = I::zero();
      }
      I::widen(out + v * I::kRows, sum, first);
    }
  }
}

// 8 bits, activations as words (I::words): products in pairs straight into int32.
template <class I, int NV, int MR>
static inline void words_tile(const uint8_t* w, const int16_t* words, int64_t ldw, int64_t chunks, bool first, int32_t* out) {
  using V = typename I::Vec;
  V acc[MR][NV];
  MB_EACH(m, MR) MB_EACH(v, NV) acc[m][v] = first ? I::zero() : I::load(out + m * kBlockRows + v * I::kRows);
  for (int64_t c = 0; c < chunks; ++c, w += chunk_bytes(8), words += 4) {
    ask_ahead<MR, 8>(w, true);
    V even[NV], odd[NV];
    MB_EACH(v, NV) {
      const V code = I::load(w + v * I::kRows * 4);
      even[v] = I::even_bytes(code);
      odd[v] = I::shift_right(code, 8);
    }
    MB_EACH(m, MR) {
      const V x = I::broadcast4(words + m * ldw), z = I::broadcast4(words + m * ldw + 2);
      MB_EACH(v, NV) acc[m][v] = I::dot_words(I::dot_words(acc[m][v], even[v], x), odd[v], z);
    }
  }
  MB_EACH(m, MR) MB_EACH(v, NV) I::store(out + m * kBlockRows + v * I::kRows, acc[m][v]);
}

template <class I, int BITS, int MR> static constexpr bool as_words() { return BITS == 8 && MR > 3 && I::kWords8; }

// Sums of code * activation of 64 rows and MR rows of activations of a group.
template <class I, int BITS, int MR>
__attribute__((noinline)) static void group_sums(const uint8_t* packed, const int8_t* a, int64_t lda, int64_t padded, int32_t (*sums)[kBlockRows]) {
  constexpr int NV = I::vectors(BITS, MR), kStep = NV * I::kRows;
  const int64_t chunks = padded / chunk_cols(BITS);
  if constexpr (as_words<I, BITS, MR>()) {
    constexpr int64_t kPart = 512;
    alignas(32) int16_t words[MR][kPart];
    for (int64_t k = 0; k < padded; k += kPart) {
      const int64_t count = padded - k < kPart ? padded - k : kPart;
      for (int m = 0; m < MR; ++m) I::words(a + m * lda + k, count, words[m]);
      for (int n = 0; n < kBlockRows; n += kStep)
        words_tile<I, NV, MR>(packed + k / 4 * chunk_bytes(8) + n * 4, words[0], kPart, count / 4, k == 0, &sums[0][n]);
    }
  } else {
    for (int n = 0; n < kBlockRows; n += kStep) {
      if constexpr (I::kWide || BITS == 8) wide_tile<I, BITS, NV, MR>(packed + n * 4, a, lda, chunks, n == 0, &sums[0][n]);
      else if constexpr (MR == 1 && BITS <= 2) one_row_tile<I, BITS, NV>(packed + n * 4, a, chunks, n == 0, &sums[0][n]);
      else narrow_tile<I, BITS, NV, MR>(packed + n * 4, a, lda, chunks, n == 0, &sums[0][n]);
    }
  }
}

// out = (mul * sum - shift) * s * scale + bias of rows with one scale
static inline void scale_sums(const int32_t* __restrict sums, int32_t mul, int32_t shift, const float* __restrict s, float scale, const float* __restrict bias, float* __restrict out, int64_t count) {
  if (bias) for (int64_t n = 0; n < count; ++n) out[n] = static_cast<float>(mul * sums[n] - shift) * s[n] * scale + bias[n];
  else for (int64_t n = 0; n < count; ++n) out[n] = static_cast<float>(mul * sums[n] - shift) * s[n] * scale;
}

template <int BITS, int MR>
static void block(const mb_matrix& w, const Cut& cut, const uint8_t* packed, const float* scales, const Rows8& a, int64_t m, int64_t count, const float* bias, float* y, int64_t ldy) {
  const int64_t bytes = cut.padded / chunk_cols(BITS) * chunk_bytes(BITS), lda = cut.width();
  constexpr bool kSigned = Isa::kSigned8 && !as_words<Isa, BITS, MR>();
  const int32_t mul = w.mul, off = BITS == 8 ? (kSigned ? 0 : 128) : w.off;
  alignas(64) int32_t sums[MR][kBlockRows];
  if (cut.num_groups == 1) {
    group_sums<Isa, BITS, MR>(packed, a.q + m * lda, lda, cut.padded, sums);
    for (int i = 0; i < MR; ++i) {
      const int32_t shift = off * a.sums[m + i];
      float* out = y + (m + i) * ldy;
      if (count == kBlockRows) scale_sums(sums[i], mul, shift, scales, a.scale[m + i], bias, out, kBlockRows);
      else scale_sums(sums[i], mul, shift, scales, a.scale[m + i], bias, out, count);
    }
    return;
  }
  alignas(64) float acc[MR][kBlockRows];
  for (int64_t g = 0; g < cut.num_groups; ++g, packed += bytes) {
    group_sums<Isa, BITS, MR>(packed, a.q + m * lda + g * cut.padded, lda, cut.padded, sums);
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

