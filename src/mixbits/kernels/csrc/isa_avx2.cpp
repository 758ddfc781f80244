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
struct Isa {
  using Vec = __m256i;
  static constexpr int kRows = 8;
  static constexpr bool kWide = false, kSigned8 = true;
  static constexpr int kTileRows8 = 4;
  static constexpr int vectors(int mr) { return mr == 1 ? 8 : mr == 2 ? 4 : 2; }
  static Vec zero() { return _mm256_setzero_si256(); }
  static Vec load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(int32_t* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static Vec broadcast4(const int8_t* p) { int32_t v; std::memcpy(&v, p, 4); return _mm256_set1_epi32(v); }
  static Vec set8(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
  static Vec and_(Vec a, Vec b) { return _mm256_and_si256(a, b); }
  static Vec or_(Vec a, Vec b) { return _mm256_or_si256(a, b); }
  static Vec xor_(Vec a, Vec b) { return _mm256_xor_si256(a, b); }
  static Vec shift_right(Vec v, int n) { return _mm256_srli_epi16(v, n); }
  static Vec shift_left(Vec v, int n) { return _mm256_slli_epi16(v, n); }
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
