// One value type for formulas and loops: a vector of floats (width by instruction set) or one double.
// Polynomials are accurate to about 2 ulp in fp32 and keep NaN, and -inf and +inf where the formulas rely on them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define POTSTILL_INLINE inline __attribute__((always_inline))
#define POTSTILL_FN static POTSTILL_INLINE

namespace potstill {
namespace POTSTILL_ISA {

#if defined(POTSTILL_ISA_AVX512)
constexpr int kWidth = 16;
#elif defined(POTSTILL_ISA_AVX2)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kWidth)));
typedef int32_t vi __attribute__((vector_size(4 * kWidth)));

template <class V>
struct two {
  V a, b;
};

template <class V>
struct traits;
template <>
struct traits<vf> {
  using scalar = float;
  static constexpr int width = kWidth;
};
template <>
struct traits<double> {
  using scalar = double;
  static constexpr int width = 1;
};
template <class C>
struct vector_of;
template <>
struct vector_of<float> {
  using type = vf;
};
template <>
struct vector_of<double> {
  using type = double;
};

template <class V>
POTSTILL_FN V lit(double x) {
  return V{} + static_cast<typename traits<V>::scalar>(x);
}
template <class V>
POTSTILL_FN V load(const typename traits<V>::scalar* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
POTSTILL_FN void store(typename traits<V>::scalar* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

POTSTILL_FN vf where(vi c, vf a, vf b) { return c ? a : b; }
POTSTILL_FN double where(bool c, double a, double b) { return c ? a : b; }
POTSTILL_FN vf abs(vf x) { return (vf)((vi)x & 0x7fffffff); }
POTSTILL_FN double abs(double x) { return std::fabs(x); }
POTSTILL_FN vf vmax(vf a, vf b) { return a > b ? a : b; }  // b where either is NaN
POTSTILL_FN double vmax(double a, double b) { return a > b ? a : b; }
POTSTILL_FN double sum(vf x) {
  double s = 0;
  for (int i = 0; i < kWidth; ++i) s += x[i];
  return s;
}
POTSTILL_FN double sum(double x) { return x; }
POTSTILL_FN float highest(vf x) {
  float m = x[0];
  for (int i = 1; i < kWidth; ++i) m = x[i] > m ? x[i] : m;
  return m;
}
POTSTILL_FN double highest(double x) { return x; }

constexpr float kInf = std::numeric_limits<float>::infinity();

// x = n ln2 + r, |r| <= ln2 / 2; scale = 2^n. Valid for |x| < 88.
POTSTILL_FN vf reduce_ln2(vf x, vf& scale) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const vf t = x * 1.44269504f + magic;
  const vi n = (vi)t - (vi)lit<vf>(magic);
  const vf nf = t - magic;
  scale = (vf)((n + 127) << 23);
  return (x - nf * 0.693359375f) - nf * -2.12194440e-4f;
}

// exp(r) - 1 for |r| <= ln2 / 2
POTSTILL_FN vf expm1_core(vf r) {
  vf p = lit<vf>(1.9875691500e-4);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r;
}

POTSTILL_FN vf exp(vf x) {
  vf scale;
  const vf r = reduce_ln2(x, scale);
  const vf y = expm1_core(r) * scale + scale;
  return where(x < -87.3f, vf{}, where(x > 88.37f, lit<vf>(kInf), y));
}
POTSTILL_FN double exp(double x) { return std::exp(x); }

POTSTILL_FN vf expm1(vf x) {
  vf scale;
  const vf r = reduce_ln2(x, scale);
  const vf y = expm1_core(r) * scale + (scale - 1.0f);
  return where(x < -87.3f, lit<vf>(-1.0), where(x > 88.37f, lit<vf>(kInf), y));
}
POTSTILL_FN double expm1(double x) { return std::expm1(x); }

POTSTILL_FN vf log1p(vf x) {
  const vf u = 1.0f + x;
  const vf lost = (x - (u - 1.0f)) / u;  // what the rounding of u lost
  const vi bits = (vi)u - 0x3f3504f3;    // from sqrt(1/2), so that the mantissa is in [sqrt(1/2), sqrt(2))
  const vi e = bits >> 23;
  const vf f = (vf)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  const vf s = f / (2.0f + f), s2 = s * s;
  const vf p = s2 * (0.6666666667f + s2 * (0.4f + s2 * (0.2857142857f + s2 * (0.2222222222f + s2 * 0.1818181818f))));
  const vf ef = __builtin_convertvector(e, vf);
  const vf y = ef * 0.693359375f + (2.0f * s + (s * p + (ef * -2.12194440e-4f + lost)));
  const vf edge = where(u == 0.0f, lit<vf>(-kInf), lit<vf>(std::numeric_limits<float>::quiet_NaN()));
  return where(u > 0.0f, where(x == kInf, x, y), edge);
}
POTSTILL_FN double log1p(double x) { return std::log1p(x); }
POTSTILL_FN double log(double x) { return std::log(x); }

POTSTILL_FN vf tanh(vf x) {
  const vf e = expm1(-2.0f * abs(x));
  const vf t = -e / (2.0f + e);
  return where(x < 0.0f, -t, t);
}
POTSTILL_FN double tanh(double x) { return std::tanh(x); }

}  // namespace POTSTILL_ISA
}  // namespace potstill
