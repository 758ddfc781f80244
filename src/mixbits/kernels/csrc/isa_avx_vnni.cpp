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
#include "rows256.inl"
struct Isa : Rows256 {
  static constexpr bool kWide = true, kSigned8 = false, kWords8 = false;
  static constexpr int kTileRows8 = 6;
  static constexpr int vectors(int, int mr) { return mr == 1 ? 8 : mr == 2 ? 4 : 2; }
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
