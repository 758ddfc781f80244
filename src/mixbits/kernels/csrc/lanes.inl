// Sixteen floats as one value, held in registers of Isa::kFloats. Compilers lower vectors longer than a register through memory, so the parts
// are separate here; an operation acts on each lane, whatever the parts. Included by kernels.inl.

typedef float Part __attribute__((vector_size(4 * Isa::kFloats)));
typedef int32_t PartBits __attribute__((vector_size(4 * Isa::kFloats)));
typedef float Quad __attribute__((vector_size(16)));
constexpr int kLanes = 16, kParts = kLanes / Isa::kFloats;
static_assert(kParts == 1 || kParts == 2 || kParts == 4, "");
struct vf { Part p[kParts]; };

template <class F> static inline vf each_part(F f) {  // indices are constants, so that the parts stay in registers
  vf v;
  v.p[0] = f(0);
  if constexpr (kParts > 1) v.p[1] = f(1);
  if constexpr (kParts > 2) {
    v.p[2] = f(2);
    v.p[3] = f(3);
  }
  return v;
}

static inline Part load_piece(const float* p) { Part v; std::memcpy(&v, p, sizeof v); return v; }
static inline vf load_f(const float* p) { return each_part([p](int i) { return load_piece(p + i * Isa::kFloats); }); }
static inline void store_f(float* p, vf v) {
  _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i) std::memcpy(p + i * Isa::kFloats, &v.p[i], sizeof(Part));
}
static inline vf splat(float x) {
  const Part v = x - Part{};  // not x + 0, which has another sign for -0
  return each_part([v](int) { return v; });
}

#define MB_LANES(op)                                                                                          \
  static inline vf operator op(vf a, vf b) { return each_part([a, b](int i) { return a.p[i] op b.p[i]; }); } \
  static inline vf operator op(vf a, float b) { return a op splat(b); }                                       \
  static inline vf operator op(float a, vf b) { return splat(a) op b; }
MB_LANES(+)
MB_LANES(-)
MB_LANES(*)
MB_LANES(/)
#undef MB_LANES
static inline vf operator-(vf a) { return each_part([a](int i) { return -a.p[i]; }); }
static inline void operator+=(vf& a, vf b) { a = a + b; }

// a < b ? yes : no, lane by lane; `no` where one is NaN
static inline vf if_less(vf a, vf b, vf yes, vf no) {
  return each_part([a, b, yes, no](int i) { return a.p[i] < b.p[i] ? yes.p[i] : no.p[i]; });
}
static inline vf max_f(vf a, vf b) { return if_less(b, a, a, b); }

static inline vf load_part(const float* p, int64_t n, float fill) {
  float t[kLanes];
  for (int i = 0; i < kLanes; ++i) t[i] = i < n ? p[i] : fill;
  return load_f(t);
}
static inline void store_part(float* p, int64_t n, vf v) {
  float t[kLanes];
  store_f(t, v);
  for (int64_t i = 0; i < n; ++i) p[i] = t[i];
}
static inline vf first_lanes(vf v, int64_t n) {  // the others 0
  float t[kLanes];
  store_f(t, v);
  for (int64_t i = n; i < kLanes; ++i) t[i] = 0.0f;
  return load_f(t);
}

// Sums and maxima over the lanes: i and i + 8, then i and i + 4, i + 2, i + 1.
template <int PARTS, class P> static inline Quad four_of(const P* p) {
  if constexpr (PARTS == 4) {
    return (p[0] + p[2]) + (p[1] + p[3]);
  } else if constexpr (PARTS == 2) {
    const P s = p[0] + p[1];
    return Quad{s[0], s[1], s[2], s[3]} + Quad{s[4], s[5], s[6], s[7]};
  } else {
    const P s = *p;
    return (Quad{s[0], s[1], s[2], s[3]} + Quad{s[8], s[9], s[10], s[11]}) + (Quad{s[4], s[5], s[6], s[7]} + Quad{s[12], s[13], s[14], s[15]});
  }
}
static inline Quad sum_to_four(vf v) { return four_of<kParts>(v.p); }
static inline float total(vf v) {
  const Quad q = sum_to_four(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}
static inline Quad totals(vf a, vf b, vf c, vf d) {
  const Quad p = sum_to_four(a), q = sum_to_four(b), r = sum_to_four(c), s = sum_to_four(d);
  const Quad t = Quad{p[0], p[1], q[0], q[1]} + Quad{p[2], p[3], q[2], q[3]}, u = Quad{r[0], r[1], s[0], s[1]} + Quad{r[2], r[3], s[2], s[3]};
  return Quad{t[0], t[2], u[0], u[2]} + Quad{t[1], t[3], u[1], u[3]};
}
static inline float largest(vf v) {
  float t[kLanes];
  store_f(t, v);
  for (int step = 8; step; step /= 2) for (int i = 0; i < step; ++i) t[i] = t[i] > t[i + step] ? t[i] : t[i + step];
  return t[0];
}

// e^x for x in [-87, 88] (clamped), relative error below 2e-7: 2^n by the exponent bits, e^r by a polynomial. NaN stays NaN.
static inline vf exp_f(vf x) {
  x = if_less(splat(88.0f), x, splat(88.0f), x);
  x = if_less(x, splat(-87.0f), splat(-87.0f), x);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, which then stands in the low bits
  const vf t = x * 1.44269504f + magic, n = t - magic;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.3888889e-3f);
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const vf power = each_part([t](int i) { return (Part)(((PartBits)t.p[i] - 0x4B400000 + 127) << 23); });
  return p * power;
}
