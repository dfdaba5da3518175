// Blocks of raw elements to and from the computing type, with the side's scale and softcap on the way.
#pragma once
#include "kernels.h"
#include "simd.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace potstill {
namespace POTSTILL_ISA {

constexpr int64_t kBlock = 1024;  // elements: 4 KB of floats, a few of which live in the first-level cache

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

POTSTILL_FN float from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
POTSTILL_FN uint32_t to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

POTSTILL_FN void widen(const float* in, int64_t n, float* out) { std::memcpy(out, in, n * sizeof(float)); }
POTSTILL_FN void widen(const double* in, int64_t n, double* out) { std::memcpy(out, in, n * sizeof(double)); }
POTSTILL_FN void widen(const bf16* in, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_bits(static_cast<uint32_t>(in[i].bits) << 16);
}
POTSTILL_FN float widen_one(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | ((rest & 0x3ff) << 13));
  return from_bits(sign | to_bits(from_bits(rest << 13) * 0x1p112f));  // subnormals come out right
}
POTSTILL_FN void widen(const f16* in, int64_t n, float* out) {
#if defined(__F16C__)
  const int64_t whole = n / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#else
  const int64_t whole = 0;
#endif
  for (int64_t i = whole; i < n; ++i) out[i] = widen_one(in[i]);
}

POTSTILL_FN void narrow(const float* in, int64_t n, float* out) { std::memcpy(out, in, n * sizeof(float)); }
POTSTILL_FN void narrow(const double* in, int64_t n, double* out) { std::memcpy(out, in, n * sizeof(double)); }
POTSTILL_FN void narrow(const float* in, int64_t n, bf16* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = to_bits(in[i]);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    out[i].bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}
POTSTILL_FN f16 narrow_one(float x) {
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to infinity
  if (rest < 0x38800000)  // subnormal: adding 0.5 leaves the rounded units of 2^-24 in the low bits
    return {static_cast<uint16_t>(sign | (to_bits(from_bits(rest) + 0.5f) - 0x3f000000))};
  return {static_cast<uint16_t>(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13))};
}
POTSTILL_FN void narrow(const float* in, int64_t n, f16* out) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
#endif
  for (; i < n; ++i) out[i] = narrow_one(in[i]);
}

// The computing type of an element type, and its vector.
template <class T>
struct compute {
  using type = float;
};
template <>
struct compute<double> {
  using type = double;
};

// z[0..n) of one block of a row; `chain`, if given, receives dz/dx. Lanes from n up to the next full vector
// hold -inf.
template <class T, class C>
POTSTILL_FN void read_block(const Side& side, const T* x, int64_t n, C* z, C* chain = nullptr) {
  using V = typename vector_of<C>::type;
  constexpr int W = traits<V>::width;
  widen(x, n, z);
  for (int64_t i = n; i % W; ++i) z[i] = 0;
  if (side.softcap != 0) {
    const V in = lit<V>(side.scale / side.softcap), cap = lit<V>(side.softcap), scale = lit<V>(side.scale);
    for (int64_t i = 0; i < n; i += W) {
      const V t = tanh(load<V>(z + i) * in);
      store(z + i, cap * t);
      if (chain) store(chain + i, scale * (lit<V>(1) - t * t));
    }
  } else if (side.scale != 1 || chain) {
    const V scale = lit<V>(side.scale);
    for (int64_t i = 0; i < n; i += W) {
      if (side.scale != 1) store(z + i, load<V>(z + i) * scale);
      if (chain) store(chain + i, scale);
    }
  }
  for (int64_t i = n; i % W; ++i) z[i] = -std::numeric_limits<C>::infinity();
}

// A running log-sum-exp: blocks of fp32 lanes, total in fp64.
template <class C>
struct LogSumExp {
  double m = -std::numeric_limits<double>::infinity();
  double total = 0;

  // adds exp(z * factor) for the n entries; lanes past n up to a full vector must hold -inf
  POTSTILL_INLINE void add(const C* z, int64_t n, C factor) {
    using V = typename vector_of<C>::type;
    constexpr int W = traits<V>::width;
    V top = lit<V>(-std::numeric_limits<double>::infinity());
    for (int64_t i = 0; i < n; i += W) top = vmax(load<V>(z + i), top);
    const double high = static_cast<C>(highest(top) * factor);  // as the lanes will see it
    if (high > m) {
      total = m == -std::numeric_limits<double>::infinity() ? total : total * std::exp(m - high);
      m = high;
    }
    // with nothing but -inf so far any reference will do; NaN goes through to the total
    const V shift = lit<V>(m == -std::numeric_limits<double>::infinity() ? 0.0 : m), f = lit<V>(factor);
    V acc{};
    for (int64_t i = 0; i < n; i += W) acc += exp(load<V>(z + i) * f - shift);
    total += sum(acc);
  }
  double value() const { return total == 0 ? -std::numeric_limits<double>::infinity() : m + std::log(total); }
};

}  // namespace POTSTILL_ISA
}  // namespace potstill
