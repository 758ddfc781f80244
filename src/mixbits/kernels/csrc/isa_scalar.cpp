// Plain C++: what the other instruction sets are checked against, and what an unknown processor runs.
#include <cmath>
#include <cstring>
#include <limits>

#include "layout.h"

namespace mb {
namespace scalar {
constexpr const char* kName = "scalar";
struct Isa {  // a "vector" is the four columns of one row
  struct Vec { int32_t v[4]; };
  static constexpr int kRows = 1, kFloats = 4;
  static constexpr bool kWide = true, kSigned8 = false, kWords8 = false;
  static constexpr int kTileRows8 = 4;
  static constexpr int vectors(int, int) { return 1; }
  static Vec zero() { return {{0, 0, 0, 0}}; }
  static Vec load(const void* p) {
    const uint8_t* b = static_cast<const uint8_t*>(p);
    return {{b[0], b[1], b[2], b[3]}};
  }
  static void store(int32_t* p, Vec a) { *p = a.v[0]; }
  static Vec broadcast4(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static Vec set8(int x) { return {{x, x, x, x}}; }
  static Vec and_(Vec a, Vec b) { return {{a.v[0] & b.v[0], a.v[1] & b.v[1], a.v[2] & b.v[2], a.v[3] & b.v[3]}}; }
  static Vec or_(Vec a, Vec b) { return {{a.v[0] | b.v[0], a.v[1] | b.v[1], a.v[2] | b.v[2], a.v[3] | b.v[3]}}; }
  static Vec xor_(Vec a, Vec b) { return {{a.v[0] ^ b.v[0], a.v[1] ^ b.v[1], a.v[2] ^ b.v[2], a.v[3] ^ b.v[3]}}; }
  static Vec shift_right(Vec a, int n) { return {{a.v[0] >> n, a.v[1] >> n, a.v[2] >> n, a.v[3] >> n}}; }
  static Vec dot(Vec acc, Vec c, Vec x) {
    acc.v[0] += c.v[0] * x.v[0] + c.v[1] * x.v[1] + c.v[2] * x.v[2] + c.v[3] * x.v[3];
    return acc;
  }
  static Vec dot8(Vec acc, Vec c, Vec x) { return dot(acc, c, x); }
  static Vec dot16(Vec acc, Vec c, Vec x) { return dot(acc, c, x); }
  static void widen(int32_t* out, Vec acc, bool) { store(out, acc); }
};
#include "kernels.inl"
}  // namespace scalar
const Kernels& scalar_kernels() { return scalar::kTable; }
}  // namespace mb
