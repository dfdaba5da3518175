// A row, block by block, for the kernels that read it once; and its log-sum-exp.
#pragma once
#include <algorithm>
#include <type_traits>

#include "topk_simd.h"

namespace potstill {
namespace POTSTILL_ISA {

// A row's blocks in the computing type: the row's own memory where it is that already, else `room`.
template <class T, class C>
struct Blocks {
  const Side& side;
  const T* x;
  const bool as_it_is;
  alignas(64) C room[kBlock];

  Blocks(const Side& side, int64_t row)
      : side(side),
        x(static_cast<const T*>(side.data) + row * side.stride),
        as_it_is(std::is_same<T, C>::value && side.scale == 1 && side.softcap == 0) {}

  int64_t count() const { return (side.vocab + kBlock - 1) / kBlock; }
  int64_t size(int64_t block) const { return std::min(kBlock, side.vocab - block * kBlock); }
  POTSTILL_INLINE const C* read(int64_t block) {
    const T* from = x + block * kBlock;
    if (size(block) < kBlock)
      read_block<T, C>(side, from, size(block), room);
    else if (as_it_is)
      return reinterpret_cast<const C*>(from);
    else
      read_block<T, C>(side, from, kBlock, room);
    return room;
  }
  Ahead ahead(int64_t block) const { return {reinterpret_cast<const char*>(x + block * kBlock), sizeof(T)}; }
  C one(int64_t j) {
    C z[traits<typename vector_of<C>::type>::width];
    read_block<T, C>(side, x + j, 1, z);
    return z[0];
  }
};

// The entries' largest, -inf where there is none; NaN does not count.
template <class C>
POTSTILL_FN C largest(const C* z, int64_t n) {
  using V = typename vector_of<C>::type;
  constexpr int W = traits<V>::width;
  V high[4] = {lit<V>(kNegInf), lit<V>(kNegInf), lit<V>(kNegInf), lit<V>(kNegInf)};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int u = 0; u < 4; ++u) high[u] = vmax(load<V>(z + i + u * W), high[u]);
  for (; i < n; i += W) high[0] = vmax(load<V>(z + i), high[0]);
  return static_cast<C>(highest(vmax(vmax(high[0], high[1]), vmax(high[2], high[3]))));
}

// Adds a whole block to the sum; NaN makes it NaN.
template <class C, bool Scaled>
POTSTILL_FN void add_all(ExpSum<C, Scaled>& sum, const C* z, int64_t n, Ahead ahead = {}) {
  using V = typename vector_of<C>::type;
  const auto none = [](V) __attribute__((always_inline)) { return lanes<V>{}; };
  if (!sum.add(z, n, largest(z, n), none, ahead)) sum.total = std::numeric_limits<double>::quiet_NaN();
}

template <class T, class C>
double row_lse(Blocks<T, C>& rows) {
  ExpSum<C> sum;
  for (int64_t b = 0; b < rows.count(); ++b)
    add_all(sum, rows.read(b), rows.size(b), rows.ahead(std::min(b + 1, rows.count() - 1)));
  return sum.value();
}

}  // namespace POTSTILL_ISA
}  // namespace potstill
