// Numbers of the CUDA row kernels: 16-bit types, 16-byte loads and stores, the spelled formulas over float.
// Compiles for the host too, where tests run the rows.
#pragma once
#include <cmath>
#include <cstring>

#include "kernels.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define POTSTILL_FN static __device__ __forceinline__
#else
#define POTSTILL_FN static inline
#endif

namespace potstill {
namespace gpu {

constexpr int kPack = 8;  // columns a thread takes at once: 16 bytes of bf16

template <class V>
struct two {
  V a, b;
};
template <class V>
POTSTILL_FN V lit(double x) {
  return static_cast<V>(x);
}
POTSTILL_FN float infinity() { return HUGE_VALF; }
POTSTILL_FN float where(bool c, float a, float b) { return c ? a : b; }
POTSTILL_FN float abs(float x) { return fabsf(x); }
POTSTILL_FN float expm1(float x) { return expm1f(x); }
POTSTILL_FN float log1p(float x) { return log1pf(x); }
POTSTILL_FN float log(float x) { return logf(x); }
#ifdef __CUDACC__
POTSTILL_FN float exp(float x) { return __expf(x); }  // 2 ulp near 0, |x| / 2 ulp elsewhere
using bf16 = __nv_bfloat16;
using f16 = __half;
POTSTILL_FN float widen(bf16 x) { return __bfloat162float(x); }
POTSTILL_FN float widen(f16 x) { return __half2float(x); }
POTSTILL_FN void narrow(float x, bf16& y) { y = __float2bfloat16_rn(x); }
POTSTILL_FN void narrow(float x, f16& y) { y = __float2half_rn(x); }
POTSTILL_FN void set_bit(uint32_t* mask, int64_t i) { atomicOr(mask + i / 32, 1u << (i % 32)); }
#else
POTSTILL_FN float exp(float x) { return expf(x); }
struct bf16 {
  uint16_t bits;
};
using f16 = _Float16;
POTSTILL_FN float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
POTSTILL_FN float widen(f16 x) { return static_cast<float>(x); }
POTSTILL_FN void narrow(float x, bf16& y) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  y.bits = x == x ? static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
}
POTSTILL_FN void narrow(float x, f16& y) { y = static_cast<f16>(x); }
POTSTILL_FN void set_bit(uint32_t* mask, int64_t i) { __atomic_fetch_or(mask + i / 32, 1u << (i % 32), __ATOMIC_RELAXED); }
#endif
POTSTILL_FN float widen(float x) { return x; }
POTSTILL_FN void narrow(float x, float& y) { y = x; }

#include "divergences.inc"

template <class T>
struct alignas(16) Pack {
  T x[kPack];
};

template <class T>
POTSTILL_FN void load_as(const void* base, int64_t j, int64_t end, float* x) {
  const T* p = static_cast<const T*>(base) + j;
  if (j + kPack <= end && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(p);
    for (int i = 0; i < kPack; ++i) x[i] = widen(pack.x[i]);
  } else {
    for (int i = 0; i < kPack; ++i) x[i] = j + i < end ? widen(p[i]) : 0.0f;
  }
}

template <class T>
POTSTILL_FN void store_as(void* base, int64_t j, int64_t end, const float* x) {
  T* p = static_cast<T*>(base) + j;
  if (j + kPack <= end && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
    Pack<T> pack;
    for (int i = 0; i < kPack; ++i) narrow(x[i], pack.x[i]);
    *reinterpret_cast<Pack<T>*>(p) = pack;
  } else {
    for (int i = 0; i < kPack; ++i)
      if (j + i < end) narrow(x[i], p[i]);
  }
}

POTSTILL_FN void load(Dtype dtype, const void* base, int64_t j, int64_t end, float* x) {
  if (dtype == Dtype::bf16) return load_as<bf16>(base, j, end, x);
  if (dtype == Dtype::f16) return load_as<f16>(base, j, end, x);
  load_as<float>(base, j, end, x);
}

POTSTILL_FN void store(Dtype dtype, void* base, int64_t j, int64_t end, const float* x) {
  if (dtype == Dtype::bf16) return store_as<bf16>(base, j, end, x);
  if (dtype == Dtype::f16) return store_as<f16>(base, j, end, x);
  store_as<float>(base, j, end, x);
}

POTSTILL_FN int64_t bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// A formula with its parameters bound, by its place in the table.
#define POTSTILL_CALL_0(name) name(lp, lq)
#define POTSTILL_CALL_1(name) name(lp, lq, a)
#define POTSTILL_CALL_2(name) name(lp, lq, a, b)
#define POTSTILL_FUNCTOR(name, count)                                                                  \
  struct name##_functor {                                                                              \
    float a, b;                                                                                        \
    POTSTILL_CALL two<float> operator()(float lp, float lq) const { return POTSTILL_CALL_##count(name); } \
  };
#ifdef __CUDACC__
#define POTSTILL_CALL __device__ __forceinline__
#else
#define POTSTILL_CALL inline
#endif
POTSTILL_DIVERGENCES(POTSTILL_FUNCTOR)

// visit(functor) for the call's divergence
template <class Visit>
void with_formula(const Rows& call, Visit&& visit) {
  int index = 0;
  const float a = static_cast<float>(call.params[0]), b = static_cast<float>(call.params[1]);
#define POTSTILL_CASE(name, count) \
  if (call.divergence == index++) return visit(name##_functor{a, b});
  POTSTILL_DIVERGENCES(POTSTILL_CASE)
}

}  // namespace gpu
}  // namespace potstill
