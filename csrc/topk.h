// Top-k with the log-sum-exp in one read of a row, for one instruction set.
//
// A threshold, at most the k-th best key of the row, lets 64 entries pass with one branch; what it stops goes to a buffer
// of keys, order(value) << 32 | ~index, a total order (NaN first, then descending, ties to the lowest index), and the
// buffer is cut to k by nth_element when it fills. While the block is in the first-level cache, everything that passed is
// summed as exp(value - reference), and so is what leaves the buffer: at the end that sum is the mass of the rest, without
// a subtraction. The first threshold is the k-th largest of the maxima of disjoint groups of a sample: k entries at least
// are as large. Blocks come in a scattered order, so that a row that ascends does not raise the threshold at every entry.
#pragma once
#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

#include "row_blocks.h"

namespace potstill {
namespace POTSTILL_ISA {

__extension__ typedef unsigned __int128 u128;

template <class C>
struct Key;
template <>
struct Key<float> {
  using type = uint64_t;
  static uint32_t order(float v) {
    v = v + 0.0f;  // one zero
    const uint32_t b = to_bits(v);
    return v != v ? 0xffffffffu : (b & 0x80000000u ? ~b : b | 0x80000000u);
  }
  static type make(float v, int64_t index) {
    return static_cast<type>(order(v)) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(index));
  }
  static type below(float v) { return static_cast<type>(order(v)) << 32; }  // under every key of this value
  static int64_t index(type key) { return static_cast<uint32_t>(~static_cast<uint32_t>(key)); }
  static float value(type key) {
    const uint32_t order = static_cast<uint32_t>(key >> 32);
    if (order == 0xffffffffu) return std::numeric_limits<float>::quiet_NaN();
    return from_bits(order & 0x80000000u ? order & 0x7fffffffu : ~order);
  }
};
template <>
struct Key<double> {
  using type = u128;
  static uint64_t order(double v) {
    v = v + 0.0;
    uint64_t b;
    std::memcpy(&b, &v, 8);
    return v != v ? ~0ull : (b >> 63 ? ~b : b | 1ull << 63);
  }
  static type make(double v, int64_t index) {
    return static_cast<type>(order(v)) << 64 | static_cast<uint64_t>(~static_cast<uint64_t>(index));
  }
  static type below(double v) { return static_cast<type>(order(v)) << 64; }
  static int64_t index(type key) { return static_cast<int64_t>(~static_cast<uint64_t>(key) & 0x7fffffffffffffff); }
  static double value(type key) {
    const uint64_t order = static_cast<uint64_t>(key >> 64);
    if (order == ~0ull) return std::numeric_limits<double>::quiet_NaN();
    const uint64_t b = order >> 63 ? order & ~(1ull << 63) : ~order;
    double v;
    std::memcpy(&v, &b, 8);
    return v;
  }
};

template <class C>
struct Selector {
  using K = typename Key<C>::type;
  using V = typename vector_of<C>::type;
  static constexpr int W = traits<V>::width;
  static constexpr int kGroup = W == 1 ? 16 : 64;  // entries that pass with one branch

  int64_t k = 0, cap = 0, held = 0, n_dropped = 0;
  std::vector<K> buffer;
  std::vector<C> dropped, maxima;
  K threshold_key = 0;
  C threshold = 0;
  int64_t hits = 0;

  void reset(int64_t k_) {
    k = k_, cap = k + std::max<int64_t>(k, 64), held = n_dropped = hits = 0;
    threshold_key = 0, threshold = static_cast<C>(kNegInf);
    buffer.resize(cap + kBlock), dropped.resize(cap + 2 * kBlock);
  }

  void raise(K key) {
    if (key > threshold_key) threshold_key = key, threshold = Key<C>::value(key);
  }

  // Raises the threshold to the k-th largest of group maxima over the full blocks among `blocks`.
  template <class B>
  void sample(B& rows, const int64_t* blocks, int64_t count) {
    int64_t groups = 64;
    while (groups < 2 * k) groups *= 2;
    maxima.assign(std::max(groups, kBlock), static_cast<C>(kNegInf));
    int64_t place = 0;
    for (int64_t b = 0; b < count; ++b) {
      if (rows.size(blocks[b]) < kBlock) continue;
      const Ahead ahead = rows.ahead(blocks[std::min(b + 1, count - 1)]);
      const C* z = rows.read(blocks[b]);
      C* m = maxima.data() + place;
      for (int64_t i = 0; i < kBlock; i += 64) {
        ahead(i, 64);
        for (int64_t l = i; l < i + 64; l += W) store(m + l, vmax(load<V>(z + l), load<V>(m + l)));
      }
      place = (place + kBlock) % static_cast<int64_t>(maxima.size());
    }
    for (int64_t half = kBlock / 2; half >= groups; half /= 2)
      for (int64_t i = 0; i < half; ++i) maxima[i] = std::max(maxima[i], maxima[i + half]);
    std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.begin() + groups, std::greater<C>());
    raise(Key<C>::below(maxima[k - 1]));
  }

  // One block, z[0..n) of the entries from index j on: candidates to the buffer, the others to `add(z, n, high, skip)`.
  template <class Add>
  POTSTILL_INLINE void visit(const C* z, int64_t j, int64_t n, Add add) {
    // entries equal to the threshold are of interest only where their index could be lower than the k-th's
    if (j >= Key<C>::index(threshold_key))
      pass(z, j, n, add, [](V v, V t) __attribute__((always_inline)) { return above(v, t); });
    else
      pass(z, j, n, add, [](V v, V t) __attribute__((always_inline)) { return at_least(v, t); });
    if (held >= cap) cut();
  }

  template <class Add, class Stops>
  POTSTILL_INLINE void pass(const C* z, int64_t j, int64_t n, Add add, Stops stops) {
    const V t = lit<V>(threshold), low = lit<V>(kNegInf);
    V top = low;
    const int64_t before = hits;
    int64_t i = 0;
    for (; i + kGroup <= n; i += kGroup) {
      V high[2] = {low, low};
      for (int l = 0; l < kGroup / W; ++l) high[l % 2] = vmax(load<V>(z + i + l * W), high[l % 2]);
      high[0] = vmax(high[0], high[1]);
      if (bits(stops(high[0], t))) high[0] = collect(z, j, i, i + kGroup, t, stops);
      top = vmax(high[0], top);
    }
    if (i < n) top = vmax(collect(z, j, i, n, t, stops), top);
    const C best = static_cast<C>(highest(top));
    const auto none = [](V) __attribute__((always_inline)) { return lanes<V>{}; };
    const auto stopped = [=](V v) __attribute__((always_inline)) { return stops(v, t); };
    if (hits == before ? add(z, n, best, none) : add(z, n, best, stopped)) return;
    for (int64_t l = 0; l < n; ++l)
      if (z[l] != z[l]) hit(z[l], j + l);
    add(z, n, best, [=](V v) __attribute__((always_inline)) { return stops(v, t) | is_nan(v); });
  }

  POTSTILL_INLINE void hit(C value, int64_t index) {
    const K key = Key<C>::make(value, index);
    const bool keep = key > threshold_key;
    buffer[held] = key, dropped[n_dropped] = value;
    held += keep, n_dropped += !keep, ++hits;
  }

  // Entries that the threshold stops, z[begin..end), to the buffer or to what was dropped; the maxima of the others.
  template <class Stops>
  POTSTILL_INLINE V collect(const C* z, int64_t j, int64_t begin, int64_t end, V t, Stops stops) {
    V top = lit<V>(kNegInf);
    uint64_t which = 0;
    for (int64_t i = begin; i < end; i += W) {
      const V v = load<V>(z + i);
      const lanes<V> stopped = stops(v, t);
      top = vmax(without(stopped, v, lit<V>(kNegInf)), top);
      which |= static_cast<uint64_t>(bits(stopped)) << (i - begin);
    }
    if (end - begin < 64) which &= (uint64_t(1) << (end - begin)) - 1;
    for (; which; which &= which - 1) {
      const int64_t at = begin + __builtin_ctzll(which);
      hit(z[at], j + at);
    }
    return top;
  }

  void cut() {
    std::nth_element(buffer.begin(), buffer.begin() + (k - 1), buffer.begin() + held, std::greater<K>());
    for (int64_t i = k; i < held; ++i) dropped[n_dropped++] = Key<C>::value(buffer[i]);
    held = k;
    raise(buffer[k - 1]);
  }

  // Hands over what was dropped since the last call.
  template <class Add>
  void settle(Add add) {
    if (n_dropped == 0) return;
    C best = static_cast<C>(kNegInf);
    for (int64_t i = 0; i < n_dropped; ++i) best = std::max(best, dropped[i]);
    for (int64_t i = n_dropped; i % W; ++i) dropped[i] = static_cast<C>(kNegInf);
    add(dropped.data(), n_dropped, best, [](V) __attribute__((always_inline)) { return lanes<V>{}; });
    n_dropped = 0;
  }
};

}  // namespace POTSTILL_ISA
}  // namespace potstill
