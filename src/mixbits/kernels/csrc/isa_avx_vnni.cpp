// AVX-VNNI: 256-bit vectors with dot products into int32 (processors with VNNI but without AVX-512).
#include "layout.h"
#if (defined(__x86_64__) || defined(_M_X64)) && defined(__AVXVNNI__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>

namespace mb {
namespace avx_vnni {
constexpr const char* kName = "avx-vnni";
struct Isa {
  using Vec = __m256i;
  static constexpr int kRows = 8;
  static constexpr bool kWide = true, kSigned8 = false;
  static constexpr int kTileRows8 = 6;
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
  static Vec dot(Vec acc, Vec code, Vec x) { return _mm256_dpbusd_avx_epi32(acc, code, x); }
  static Vec dot8(Vec acc, Vec code, Vec x) { return dot(acc, code, x); }
  static Vec dot16(Vec acc, Vec code, Vec x) { return dot(acc, code, x); }
  static void widen(int32_t* out, Vec acc, bool) { store(out, acc); }
};
#include "kernels.inl"
}  // namespace avx_vnni
const Kernels* avx_vnni_kernels() { return &avx_vnni::kTable; }
}  // namespace mb
#else
namespace mb { const Kernels* avx_vnni_kernels() { return nullptr; } }
#endif
