// What AVX2 and AVX-VNNI share: 256-bit vectors of eight rows of four columns. Included inside the namespace of each, so that nothing compiled
// for one of them is linked into the other.
struct Rows256 {
  using Vec = __m256i;
  static constexpr int kRows = 8, kFloats = 8;
  static Vec zero() { return _mm256_setzero_si256(); }
  static Vec load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(int32_t* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static Vec broadcast4(const void* p) { int32_t v; std::memcpy(&v, p, 4); return _mm256_set1_epi32(v); }
  static Vec set8(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
  static Vec and_(Vec a, Vec b) { return _mm256_and_si256(a, b); }
  static Vec or_(Vec a, Vec b) { return _mm256_or_si256(a, b); }
  static Vec xor_(Vec a, Vec b) { return _mm256_xor_si256(a, b); }
  static Vec shift_right(Vec v, int n) { return _mm256_srli_epi16(v, n); }
};
