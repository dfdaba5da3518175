// What the one-read kernels do with a vector: lane masks, and the running sum of exponentials.
#pragma once
#include <algorithm>
#include <type_traits>

#include "convert.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace potstill {
namespace POTSTILL_ISA {

constexpr int kAtOnce = 4;  // vectors
constexpr double kNegInf = -std::numeric_limits<double>::infinity();

// One bit a lane.
template <class V>
struct lanes;
#if defined(POTSTILL_ISA_AVX512)
template <>
struct lanes<vf> {
  __mmask16 m = 0;
};
POTSTILL_FN uint32_t bits(lanes<vf> x) { return x.m; }
POTSTILL_FN lanes<vf> operator|(lanes<vf> a, lanes<vf> b) { return {static_cast<__mmask16>(a.m | b.m)}; }
POTSTILL_FN lanes<vf> at_least(vf v, vf t) { return {_mm512_cmp_ps_mask((__m512)v, (__m512)t, _CMP_GE_OQ)}; }
POTSTILL_FN lanes<vf> above(vf v, vf t) { return {_mm512_cmp_ps_mask((__m512)v, (__m512)t, _CMP_GT_OQ)}; }
POTSTILL_FN lanes<vf> is_nan(vf v) { return {_mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q)}; }
POTSTILL_FN vf without(lanes<vf> x, vf v, vf other) { return (vf)_mm512_mask_blend_ps(x.m, (__m512)v, (__m512)other); }
#else
template <>
struct lanes<vf> {
  vi m{};
};
POTSTILL_FN uint32_t bits(lanes<vf> x) {
#if defined(POTSTILL_ISA_AVX2)
  return _mm256_movemask_ps((__m256)x.m);
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)x.m);
#else
  uint32_t b = 0;
  for (int i = 0; i < kWidth; ++i) b |= (x.m[i] != 0 ? 1u : 0u) << i;
  return b;
#endif
}
POTSTILL_FN lanes<vf> operator|(lanes<vf> a, lanes<vf> b) { return {a.m | b.m}; }
POTSTILL_FN lanes<vf> at_least(vf v, vf t) { return {v >= t}; }
POTSTILL_FN lanes<vf> above(vf v, vf t) { return {v > t}; }
POTSTILL_FN lanes<vf> is_nan(vf v) { return {v != v}; }
POTSTILL_FN vf without(lanes<vf> x, vf v, vf other) { return x.m ? other : v; }
#endif
template <>
struct lanes<double> {
  bool m = false;
};
POTSTILL_FN uint32_t bits(lanes<double> x) { return x.m; }
POTSTILL_FN lanes<double> operator|(lanes<double> a, lanes<double> b) { return {a.m || b.m}; }
POTSTILL_FN lanes<double> at_least(double v, double t) { return {v >= t}; }
POTSTILL_FN lanes<double> above(double v, double t) { return {v > t}; }
POTSTILL_FN lanes<double> is_nan(double v) { return {v != v}; }
POTSTILL_FN double without(lanes<double> x, double v, double other) { return x.m ? other : v; }

// Memory that a pass may bring near while it computes: `bytes` for every element of the pass.
struct Ahead {
  const char* next = nullptr;
  int64_t bytes = 0;
  POTSTILL_INLINE void operator()(int64_t i, int64_t count) const {
    for (int64_t at = i * bytes; at < (i + count) * bytes; at += 64) __builtin_prefetch(next + at);
  }
};

// exp(z) * 2^-M for z up to M ln2, as p * s: 2^n by the exponent bits, the rest on [-ln2/2, ln2/2] by a polynomial with a
// relative error of 2e-7 and a mean of 2e-9. Below 2^-125 it is 2^-125, never 0; NaN stays NaN. |M| < 2^20.
struct ExpBelow {
  vf magic, floor;
  explicit ExpBelow(double m)
      : magic(lit<vf>(12582912.0 + 127 - m)),  // 1.5 * 2^23: adding it rounds to an integer in the low bits
        floor(lit<vf>((m - 125) * 0.6931471805599453)) {}

  // U vectors at once, step by step: one alone waits for its own chain of products
  template <int U>
  POTSTILL_INLINE void run(vf* z, vf* s) const {
    static constexpr float c[] = {1.0f, 9.999997020e-01f, 4.999923408e-01f, 1.666766256e-01f, 4.189228639e-02f, 8.291675709e-03f};
    vf p[U];
    for (int u = 0; u < U; ++u) z[u] = floor > z[u] ? floor : z[u];
    for (int u = 0; u < U; ++u) s[u] = z[u] * 1.44269504f + magic;
    for (int u = 0; u < U; ++u) z[u] = less_ln2(z[u], s[u] - magic);
    for (int u = 0; u < U; ++u) s[u] = (vf)((vi)s[u] << 23);
    for (int u = 0; u < U; ++u) p[u] = z[u] * lit<vf>(c[5]) + lit<vf>(c[4]);
    for (int i = 3; i >= 0; --i)
      for (int u = 0; u < U; ++u) p[u] = p[u] * z[u] + lit<vf>(c[i]);
    for (int u = 0; u < U; ++u) z[u] = p[u];
  }
  static POTSTILL_INLINE vf less_ln2(vf z, vf n) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return z - n * 0.69314718f;  // the fp32 constant is off by 3e-9 of itself
#else
    return (z - n * 0.693359375f) - n * -2.12194440e-4f;
#endif
  }
};

// Terms >= 0 added with their rounding errors kept: hundreds of equal ones else round the same way each time.
struct Sum {
  double total = 0, lost = 0;
  POTSTILL_INLINE void add(double x) {
    const double next = total + x;
    lost += total >= x ? (total - next) + x : (x - next) + total;
    total = next;
  }
  POTSTILL_INLINE double value() const { return total + lost; }
};

// A running sum of exp(z * f), relative to exp(reference): fp32 lanes of at most 64 terms each, total in fp64.
template <class C, bool Scaled = false>
struct ExpSum {
  using V = typename vector_of<C>::type;
  static constexpr int W = traits<V>::width;
  static constexpr double kFar = 700000;  // beyond it, and in fp64, entry by entry with the library's exp
  double f, top, reference, total;

  explicit ExpSum(double factor = 1) : f(factor) { reset(); }
  void reset() { top = kNegInf, reference = total = 0; }

  // Adds the n entries that `skip` (V -> lanes) does not name; the largest of them is `high`. False, and nothing added,
  // where one of them is NaN.
  template <class Skip>
  POTSTILL_INLINE bool add(const C* z, int64_t n, C high, Skip skip, Ahead ahead = {}) {
    if (static_cast<double>(high) > top) raise(high);
    if constexpr (W > 1)
      if (std::fabs(top) < kFar) return add_near(z, n, skip, ahead);
    return add_far(z, n, skip);
  }

  template <class Skip>
  POTSTILL_INLINE bool add_near(const C* z, int64_t n, Skip skip, Ahead ahead) {
    const ExpBelow exp(reference * 1.4426950408889634);
    const V low = exp.floor, factor = lit<V>(f);
    V sums[2] = {};
    const auto terms = [&](int64_t i, auto count) __attribute__((always_inline)) {
      constexpr int U = decltype(count)::value;
      V v[U], s[U];
      for (int u = 0; u < U; ++u) {
        v[u] = load<V>(z + i + u * W);
        v[u] = without(skip(v[u]), Scaled ? v[u] * factor : v[u], low);
      }
      exp.template run<U>(v, s);
      for (int u = 0; u < U; ++u) sums[u % 2] += v[u] * s[u];
    };
    int64_t i = 0;
    for (; i + kAtOnce * W <= n; i += kAtOnce * W) {
      ahead(i, kAtOnce * W);
      terms(i, std::integral_constant<int, kAtOnce>());
    }
    for (; i < n; i += W) terms(i, std::integral_constant<int, 1>());
    const double more = sum(sums[0] + sums[1]);
    if (more != more) return false;
    total += more;
    return true;
  }

  void raise(double high) {
    double next = high * f;
    if (W > 1 && std::fabs(high) < kFar) next = std::ceil(next * 1.4426950408889634) * 0.6931471805599453;
    total = total == 0 ? 0 : total * std::exp(reference - next);
    top = high, reference = next;
  }

  template <class Skip>
  __attribute__((noinline)) bool add_far(const C* z, int64_t n, Skip skip) {
    Sum more;
    for (int64_t i = 0; i < n; i += W) {
      const uint32_t gone = bits(skip(load<V>(z + i)));
      for (int64_t l = i; l < std::min<int64_t>(i + W, n); ++l) {
        if (gone >> (l - i) & 1) continue;
        if (z[l] != z[l]) return false;
        if (std::fabs(top) < -kNegInf) more.add(std::exp(z[l] * f - reference));
      }
    }
    total += more.value();
    return true;
  }

  // log of the sum
  double value() const {
    if (top == -kNegInf) return top;
    return total == 0 ? kNegInf : reference + std::log(total);
  }
};

}  // namespace POTSTILL_ISA
}  // namespace potstill
