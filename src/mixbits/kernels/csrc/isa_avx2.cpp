// AVX2: products of unsigned codes and signed activations are added in pairs to int16, which holds several before it must be widened.
#include "layout.h"
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>

namespace mb {
namespace avx2 {
constexpr const char* kName = "avx2";
#include "rows256.inl"
struct Isa : Rows256 {
  static constexpr bool kWide = false, kSigned8 = true, kWords8 = true;
  static constexpr int kTileRows8 = 5;
  static constexpr int vectors(int bits, int mr) { return mr == 1 ? (bits == 1 ? 2 : bits < 4 ? 4 : 8) : mr == 2 ? 4 : 2; }
  // An accumulator passes through an empty asm after each product: left alone, GCC reorders the sums and keeps them in memory.
  static Vec kept(Vec acc) { asm("" : "+x"(acc)); return acc; }
  static Vec dot16(Vec acc, Vec code, Vec x) { return kept(_mm256_add_epi16(acc, _mm256_maddubs_epi16(code, x))); }
  static Vec dot8(Vec acc, Vec code, Vec x) {  // |x| <= 127 and |code| <= 127: a pair stays below 32767
    const Vec pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(code, x));
    return kept(_mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
  }
  static Vec dot_words(Vec acc, Vec code, Vec x) { return kept(_mm256_add_epi32(acc, _mm256_madd_epi16(code, x))); }
  static Vec add16(Vec a, Vec b) { return _mm256_add_epi16(a, b); }
  static Vec shift_right_signed(Vec v, int n) { return _mm256_srai_epi16(v, n); }
  static Vec even_bytes(Vec v) { return _mm256_and_si256(v, _mm256_set1_epi16(255)); }
  // Activations as 16-bit words, of every four the even ones before the odd ones.
  __attribute__((always_inline)) static void words(const int8_t* x, int64_t count, int16_t* out) {
    int64_t i = 0;
    const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    for (; i + 16 <= count; i += 16) {
      const __m128i v = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)), order);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_cvtepi8_epi16(v));
    }
    for (; i < count; i += 4) out[i] = x[i], out[i + 1] = x[i + 2], out[i + 2] = x[i + 1], out[i + 3] = x[i + 3];
  }
  static void widen(int32_t* out, Vec acc, bool first) {
    Vec wide = _mm256_madd_epi16(acc, _mm256_set1_epi16(1));
    if (!first) wide = _mm256_add_epi32(wide, load(out));
    store(out, wide);
  }
};
#include "kernels.inl"
}  // namespace avx2
const Kernels* avx2_kernels() { return &avx2::kTable; }
}  // namespace mb
#else
namespace mb { const Kernels* avx2_kernels() { return nullptr; } }
#endif
