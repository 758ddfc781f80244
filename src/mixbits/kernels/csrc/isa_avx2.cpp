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
  static constexpr bool kWide = false, kSigned8 = true;
  static constexpr int kTileRows8 = 4;
  static Vec dot(Vec acc, Vec code, Vec x) { return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(code, x), _mm256_set1_epi16(1))); }
  static Vec dot16(Vec acc, Vec code, Vec x) { return _mm256_add_epi16(acc, _mm256_maddubs_epi16(code, x)); }
  static Vec dot8(Vec acc, Vec code, Vec x) {  // |x| <= 127 and |code| <= 127: a pair stays below 32767
    const Vec pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(code, x));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
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
