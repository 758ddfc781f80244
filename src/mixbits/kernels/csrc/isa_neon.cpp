// NEON with the dot-product extension (ARMv8.2): 4 rows a vector; codes of at most 4 bits are signed as they are, 8-bit ones are shifted.
#include "layout.h"
#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

#include <cmath>
#include <cstring>
#include <limits>

namespace mb {
namespace neon {
constexpr const char* kName = "neon-dot";
struct Isa {
  using Vec = int8x16_t;
  static constexpr int kRows = 4, kFloats = 4;
  static constexpr bool kWide = true, kSigned8 = true, kWords8 = false;
  static constexpr int kTileRows8 = 6;
  static constexpr int vectors(int, int mr) { return mr == 1 ? 16 : mr == 2 ? 8 : 4; }
  static Vec zero() { return vdupq_n_s8(0); }
  static Vec load(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }
  static void store(int32_t* p, Vec v) { vst1q_s32(p, vreinterpretq_s32_s8(v)); }
  static Vec broadcast4(const void* p) { int32_t v; std::memcpy(&v, p, 4); return vreinterpretq_s8_s32(vdupq_n_s32(v)); }
  static Vec set8(int v) { return vdupq_n_s8(static_cast<int8_t>(v)); }
  static Vec and_(Vec a, Vec b) { return vandq_s8(a, b); }
  static Vec or_(Vec a, Vec b) { return vorrq_s8(a, b); }
  static Vec xor_(Vec a, Vec b) { return veorq_s8(a, b); }
  static Vec shift_right(Vec v, int n) { return vreinterpretq_s8_u16(vshlq_u16(vreinterpretq_u16_s8(v), vdupq_n_s16(static_cast<int16_t>(-n)))); }
  static Vec dot(Vec acc, Vec code, Vec x) { return vreinterpretq_s8_s32(vdotq_s32(vreinterpretq_s32_s8(acc), code, x)); }
  static Vec dot8(Vec acc, Vec code, Vec x) { return dot(acc, code, x); }
  static Vec dot16(Vec acc, Vec code, Vec x) { return dot(acc, code, x); }
  static void widen(int32_t* out, Vec acc, bool) { store(out, acc); }
};
#include "kernels.inl"
}  // namespace neon
const Kernels* neon_kernels() { return &neon::kTable; }
}  // namespace mb
#else
namespace mb { const Kernels* neon_kernels() { return nullptr; } }
#endif
