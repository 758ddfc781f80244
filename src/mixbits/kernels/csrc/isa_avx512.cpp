// AVX-512 VNNI: 16 rows a vector, dot products of unsigned codes and signed activations straight into int32.
#include "layout.h"
#if (defined(__x86_64__) || defined(_M_X64)) && defined(__AVX512VNNI__)
#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <limits>

namespace mb {
namespace avx512 {
constexpr const char* kName = "avx512-vnni";
struct Isa {
  using Vec = __m512i;
  static constexpr int kRows = 16, kFloats = 16;
  static constexpr bool kWide = true, kSigned8 = false, kWords8 = false;
  static constexpr int kTileRows8 = 6;
  static constexpr int vectors(int, int) { return 4; }
  static Vec zero() { return _mm512_setzero_si512(); }
  static Vec load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(int32_t* p, Vec v) { _mm512_storeu_si512(p, v); }
  static Vec broadcast4(const void* p) { int32_t v; std::memcpy(&v, p, 4); return _mm512_set1_epi32(v); }
  static Vec set8(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
  static Vec and_(Vec a, Vec b) { return _mm512_and_si512(a, b); }
  static Vec or_(Vec a, Vec b) { return _mm512_or_si512(a, b); }
  static Vec xor_(Vec a, Vec b) { return _mm512_xor_si512(a, b); }
  static Vec shift_right(Vec v, int n) { return _mm512_srli_epi16(v, static_cast<unsigned>(n)); }
  static Vec dot(Vec acc, Vec code, Vec x) { return _mm512_dpbusd_epi32(acc, code, x); }
  static Vec dot8(Vec acc, Vec code, Vec x) { return dot(acc, code, x); }
  static Vec dot16(Vec acc, Vec code, Vec x) { return dot(acc, code, x); }
  static void widen(int32_t* out, Vec acc, bool) { store(out, acc); }
};
#include "kernels.inl"
}  // namespace avx512
const Kernels* avx512_kernels() { return &avx512::kTable; }
}  // namespace mb
#else
namespace mb { const Kernels* avx512_kernels() { return nullptr; } }
#endif
