// Top-k with the log-sum-exp in one read of a row, for one instruction set.
//
// A running threshold, the k-th best key so far, lets whole vectors pass with one compare; what it stops goes to a buffer
// of keys, order(value) << 32 | ~index, a total order (NaN first, then descending, ties to the lowest index), and the
// buffer is cut to k by nth_element when it fills. Everything that is not in the buffer, or leaves it, is summed as
// exp(value - reference): at the end that sum is the mass of the rest, without a subtraction.
#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

#include "convert.h"

namespace potstill {
namespace POTSTILL_ISA {

__extension__ typedef unsigned __int128 u128;

template <class C>
struct Key;
template <>
struct Key<float> {
  using type = uint64_t;
  static type make(float v, int64_t index) {
    v = v != v ? std::numeric_limits<float>::quiet_NaN() : v + 0.0f;  // one NaN, one zero
    const uint32_t bits = to_bits(v);
    const uint32_t order = v != v ? 0xffffffffu : (bits & 0x80000000u ? ~bits : bits | 0x80000000u);
    return static_cast<type>(order) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(index));
  }
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
  static type make(double v, int64_t index) {
    v = v != v ? std::numeric_limits<double>::quiet_NaN() : v + 0.0;
    uint64_t bits;
    std::memcpy(&bits, &v, 8);
    const uint64_t order = v != v ? ~0ull : (bits >> 63 ? ~bits : bits | 1ull << 63);
    return static_cast<type>(order) << 64 | static_cast<uint64_t>(~static_cast<uint64_t>(index));
  }
  static int64_t index(type key) { return static_cast<int64_t>(~static_cast<uint64_t>(key)); }
  static double value(type key) {
    const uint64_t order = static_cast<uint64_t>(key >> 64);
    if (order == ~0ull) return std::numeric_limits<double>::quiet_NaN();
    const uint64_t bits = order >> 63 ? order & ~(1ull << 63) : ~order;
    double v;
    std::memcpy(&v, &bits, 8);
    return v;
  }
};

POTSTILL_FN bool any(vi mask) {
  int32_t acc = 0;
  for (int i = 0; i < kWidth; ++i) acc |= mask[i];
  return acc != 0;
}
POTSTILL_FN bool any(bool mask) { return mask; }

template <class C>
struct Selector {
  using K = typename Key<C>::type;
  int64_t k;
  std::vector<K> buffer;
  std::vector<C> dropped;
  LogSumExp<C> rest;
  K threshold_key = 0;
  C threshold = -std::numeric_limits<C>::infinity();
  bool full = false;  // the threshold stands for k entries

  void reset(int64_t k_) {
    k = k_, buffer.clear(), rest = {}, full = false;
    threshold_key = 0, threshold = -std::numeric_limits<C>::infinity();
  }

  // z[0..n) of the entries from index j on; takes candidates out of z (leaves -inf) and sums what remains
  void visit(C* z, int64_t j, int64_t n) {
    using V = typename vector_of<C>::type;
    constexpr int W = traits<V>::width;
    const V t = lit<V>(threshold);
    // entries equal to the threshold are of interest only where their index could be lower than the k-th's
    const bool strict = full && j >= Key<C>::index(threshold_key);
    for (int64_t i = 0; i < n; i += W) {
      const V v = load<V>(z + i);
      if (full && !any(strict ? !(v <= t) : !(v < t))) continue;
      for (int64_t l = i; l < std::min<int64_t>(i + W, n); ++l) {
        const K key = Key<C>::make(z[l], j + l);
        if (full && key <= threshold_key) continue;
        buffer.push_back(key);
        z[l] = -std::numeric_limits<C>::infinity();
      }
    }
    rest.add(z, n, C(1));
    if (static_cast<int64_t>(buffer.size()) >= k + kBlock / 2 || (!full && static_cast<int64_t>(buffer.size()) >= k)) cut();
  }

  void cut() {
    using V = typename vector_of<C>::type;
    constexpr int W = traits<V>::width;
    std::nth_element(buffer.begin(), buffer.begin() + (k - 1), buffer.end(), std::greater<K>());
    dropped.clear();
    for (size_t i = k; i < buffer.size(); ++i) dropped.push_back(Key<C>::value(buffer[i]));
    buffer.resize(k);
    threshold_key = buffer[k - 1], threshold = Key<C>::value(threshold_key), full = true;
    const int64_t n = dropped.size();
    while (dropped.size() % W) dropped.push_back(-std::numeric_limits<C>::infinity());
    rest.add(dropped.data(), n, C(1));
  }
};

template <class T, class C>
void topk_row(const TopkRows& call, int64_t row) {
  static thread_local Selector<C> s;
  s.reset(call.k);
  const T* x = static_cast<const T*>(call.logits.data) + row * call.logits.stride;
  const int64_t vocab = call.logits.vocab, blocks = (vocab + kBlock - 1) / kBlock;
  // Blocks in a scattered order: then rows that ascend do not raise the threshold at every entry.
  int64_t step = std::max<int64_t>(1, static_cast<int64_t>(blocks * 0.618));
  while (std::gcd(step, blocks) != 1) ++step;
  C z[kBlock];
  for (int64_t b = 0, at = 0; b < blocks; ++b, at = (at + step) % blocks) {
    const int64_t j = at * kBlock, n = std::min(kBlock, vocab - j);
    read_block<T, C>(call.logits, x + j, n, z);
    s.visit(z, j, n);
  }
  if (static_cast<int64_t>(s.buffer.size()) > call.k) s.cut();
  std::sort(s.buffer.begin(), s.buffer.end(), std::greater<typename Key<C>::type>());
  constexpr double inf = std::numeric_limits<double>::infinity();
  const double best = Key<C>::value(s.buffer[0]);
  double total = 0;
  for (const auto key : s.buffer) total += best == -inf ? 0 : std::exp(Key<C>::value(key) - best);
  const double rest = s.rest.value();
  double lse = best == -inf ? -inf : best + std::log(total + std::exp(rest - best));
  if (best == inf) lse = inf;
  for (int64_t i = 0; i < call.k; ++i) {
    call.ids[row * call.k + i] = static_cast<int32_t>(Key<C>::index(s.buffer[i]));
    static_cast<C*>(call.log_probs)[row * call.k + i] = static_cast<C>(Key<C>::value(s.buffer[i]) - lse);
  }
  static_cast<C*>(call.log_rest)[row] = static_cast<C>(rest - lse);
  static_cast<C*>(call.lse)[row] = static_cast<C>(lse);
}

template <class T, class C>
void topk_loop(const TopkRows& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) topk_row<T, C>(call, row);
}

void topk(const TopkRows& call, int64_t begin, int64_t end) {
  switch (call.logits.dtype) {
    case Dtype::f32: return topk_loop<float, float>(call, begin, end);
    case Dtype::bf16: return topk_loop<bf16, float>(call, begin, end);
    case Dtype::f16: return topk_loop<f16, float>(call, begin, end);
    case Dtype::f64: return topk_loop<double, double>(call, begin, end);
  }
}

void dense(const DenseRows&, int64_t, int64_t);
void sparse(const SparseRows&, int64_t, int64_t);

}  // namespace POTSTILL_ISA

#define POTSTILL_NAME_(isa) #isa
#define POTSTILL_NAME(isa) POTSTILL_NAME_(isa)
#define POTSTILL_JOIN_(a, b) a##b
#define POTSTILL_JOIN(a, b) POTSTILL_JOIN_(a, b)
extern const Kernels POTSTILL_JOIN(kernels_, POTSTILL_ISA);
const Kernels POTSTILL_JOIN(kernels_, POTSTILL_ISA) = {
    POTSTILL_NAME(POTSTILL_ISA), POTSTILL_ISA::dense, POTSTILL_ISA::sparse, POTSTILL_ISA::topk};

}  // namespace potstill
