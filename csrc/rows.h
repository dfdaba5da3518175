// The row kernels, templates over the element type; the divergence comes in as a function over one block.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "convert.h"

namespace potstill {
namespace POTSTILL_ISA {

#include "divergences.inc"

// Sums of one block: term + centre * (q - p), and slope. Slopes are written when `slopes` is given.
template <class C>
struct BlockSums {
  double term = 0, slope = 0;
};
template <class C>
using BlockFn = void (*)(const C* lp, const C* lq, int64_t n, const double* params, double centre, C* slopes,
                         BlockSums<C>& sums);

template <class C, class F>
POTSTILL_FN void run_block(const C* lp, const C* lq, int64_t n, double centre, C* slopes, BlockSums<C>& sums, F formula) {
  using V = typename vector_of<C>::type;
  constexpr int W = traits<V>::width;
  const V c = lit<V>(centre);
  V term{}, slope{};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const V a = load<V>(lp + i), b = load<V>(lq + i);
    const two<V> r = formula(a, b);
    term += centre == 0 ? r.a : r.a + c * (exp(b) - exp(a));
    slope += r.b;
    if (slopes) store(slopes + i, r.b);
  }
  sums.term += sum(term);
  sums.slope += sum(slope);
  if (i == n) return;
  C t[W], s[W], a[W], b[W];  // the last lanes: the unused ones repeat the last entry and are not summed
  for (int j = 0; j < W; ++j) a[j] = lp[std::min(i + j, n - 1)], b[j] = lq[std::min(i + j, n - 1)];
  const two<V> r = formula(load<V>(a), load<V>(b));
  store(t, centre == 0 ? r.a : r.a + c * (exp(load<V>(b)) - exp(load<V>(a))));
  store(s, r.b);
  for (int j = 0; i + j < n; ++j) {
    sums.term += t[j];
    sums.slope += s[j];
    if (slopes) slopes[i + j] = s[j];
  }
}

#define POTSTILL_CALL_0(name) name(a, b)
#define POTSTILL_CALL_1(name) name(a, b, lit<V>(params[0]))
#define POTSTILL_CALL_2(name) name(a, b, lit<V>(params[0]), lit<V>(params[1]))
#define POTSTILL_BLOCK(name, count)                                                                               \
  template <class C>                                                                                              \
  void block_##name(const C* lp, const C* lq, int64_t n, [[maybe_unused]] const double* params, double centre,    \
                    C* slopes, BlockSums<C>& sums) {                                                              \
    using V = typename vector_of<C>::type;                                                                        \
    run_block<C>(lp, lq, n, centre, slopes, sums, [&](V a, V b) __attribute__((always_inline)) { return POTSTILL_CALL_##count(name); }); \
  }
POTSTILL_DIVERGENCES(POTSTILL_BLOCK)
POTSTILL_OTHERS(POTSTILL_BLOCK)
#define POTSTILL_ENTRY(name, count) block_##name<C>,
template <class C>
BlockFn<C> block_function(int divergence) {
  static constexpr BlockFn<C> table[] = {POTSTILL_DIVERGENCES(POTSTILL_ENTRY) POTSTILL_OTHERS(POTSTILL_ENTRY)};
  return table[divergence];
}

// One row's cross-entropy: label, its logit and the log-sum-exp at T = 1.
struct Target {
  bool wanted = false;
  int64_t label = -1;
  double lse = 0, value = 0;
};

// A row of the student, read block by block; everything about it that both kernels share.
template <class T, class C>
struct Student {
  const Rows& call;
  const T* x;
  T* grad;
  C coef;
  double inv_t;

  Student(const Rows& call, int64_t row)
      : call(call),
        x(static_cast<const T*>(call.student.data) + row * call.student.stride),
        grad(call.grad ? static_cast<T*>(call.grad) + row * call.grad_stride : nullptr),
        coef(static_cast<const C*>(call.coef)[row]),
        inv_t(1 / call.temperature) {}

  int64_t vocab() const { return call.student.vocab; }

  // A row that does not count is not looked at.
  bool skip(int64_t row) const {
    if (coef != 0) return false;
    static_cast<C*>(call.out)[row] = static_cast<C*>(call.out)[call.rows + row] = 0;
    if (grad) std::memset(static_cast<void*>(grad), 0, call.columns * sizeof(T));
    return true;
  }

  Target target(int64_t row, double lse_at_t) const {
    Target t;
    if (call.ce_weight == 0 || !call.labels) return t;
    t.wanted = true;
    t.label = call.labels[row];
    if (t.label < 0 || t.label >= vocab()) {  // checked at the public edge; a NaN rather than a stray read
      t.label = -1;
      t.lse = t.value = std::numeric_limits<double>::quiet_NaN();
      return t;
    }
    C z[kBlock];
    t.lse = lse_at_t;
    if (call.temperature != 1) {
      LogSumExp<C> s;
      for (int64_t j = 0; j < vocab(); j += kBlock) {
        const int64_t n = std::min(kBlock, vocab() - j);
        read_block<T, C>(call.student, x + j, n, z);
        s.add(z, n, C(1));
      }
      t.lse = s.value();
    }
    read_block<T, C>(call.student, x + t.label, 1, z);
    t.value = t.lse - static_cast<double>(z[0]);
    return t;
  }

  void finish(int64_t row, double divergence, const Target& t) const {
    static_cast<C*>(call.out)[row] = static_cast<C>(divergence);
    static_cast<C*>(call.out)[call.rows + row] = static_cast<C>(t.value);
  }

  // g[0..n) holds d divergence / dz * distill_weight; adds the cross-entropy, the chain to x and coef, and writes.
  POTSTILL_INLINE void write(int64_t j, int64_t n, const C* z, const C* chain, C* g, const Target& t) const {
    using V = typename vector_of<C>::type;
    constexpr int W = traits<V>::width;
    if (t.wanted) {
      const V w = lit<V>(call.ce_weight), lse = lit<V>(t.lse);
      for (int64_t i = 0; i < n; i += W) store(g + i, load<V>(g + i) + w * exp(load<V>(z + i) - lse));
      if (t.label >= j && t.label < j + n) g[t.label - j] -= static_cast<C>(call.ce_weight);
    }
    const V c = lit<V>(coef);
    for (int64_t i = 0; i < n; i += W) store(g + i, load<V>(g + i) * (load<V>(chain + i) * c));
    narrow(g, n, grad + j);
  }

  void write_padding() const {
    std::memset(static_cast<void*>(grad + vocab()), 0, (call.columns - vocab()) * sizeof(T));
  }
};

template <class C>
std::vector<C>& scratch(int64_t n) {
  static thread_local std::vector<C> memory;
  if (static_cast<int64_t>(memory.size()) < n) memory.resize(n);
  return memory;
}

template <class T, class C>
double log_sum_exp(const Side& side, const T* x, double factor) {
  C z[kBlock];
  LogSumExp<C> s;
  for (int64_t j = 0; j < side.vocab; j += kBlock) {
    const int64_t n = std::min(kBlock, side.vocab - j);
    read_block<T, C>(side, x + j, n, z);
    s.add(z, n, static_cast<C>(factor));
  }
  return s.value();
}

// z -> z / T - lse in place
template <class C>
POTSTILL_FN void to_log_probs(C* z, int64_t n, double factor, double lse) {
  using V = typename vector_of<C>::type;
  const V f = lit<V>(factor), l = lit<V>(lse);
  for (int64_t i = 0; i < n; i += traits<V>::width) store(z + i, load<V>(z + i) * f - l);
}

// Three reads of a row, the second and third from cache: log-sum-exps; terms and slopes; gradient.
template <class T, class U, class C>
void dense_row(const DenseRows& call, int64_t row) {
  using V = typename vector_of<C>::type;
  constexpr int W = traits<V>::width;
  const Student<T, C> s(call, row);
  if (s.skip(row)) return;
  const U* y = static_cast<const U*>(call.teacher.data) + row * call.teacher.stride;
  const double lse = log_sum_exp<T, C>(call.student, s.x, s.inv_t);
  const double lse_teacher = log_sum_exp<U, C>(call.teacher, y, s.inv_t);
  const Target target = s.target(row, lse);
  C *slopes = s.grad ? scratch<C>(call.student.vocab + W).data() : nullptr;
  C z[kBlock], lp[kBlock], chain[kBlock], g[kBlock];
  const BlockFn<C> block = block_function<C>(call.divergence);
  BlockSums<C> sums;
  for (int64_t j = 0; j < s.vocab(); j += kBlock) {
    const int64_t n = std::min(kBlock, s.vocab() - j);
    read_block<T, C>(call.student, s.x + j, n, z);
    read_block<U, C>(call.teacher, y + j, n, lp);
    to_log_probs(z, n, s.inv_t, lse);
    to_log_probs(lp, n, s.inv_t, lse_teacher);
    block(lp, z, n, call.params, call.centre, slopes ? slopes + j : nullptr, sums);
  }
  const two<double> result = outer<double>(call.divergence, sums.term, sums.slope, call.params);
  s.finish(row, result.a, target);
  if (!s.grad) return;
  const V total = lit<V>(sums.slope), weight = lit<V>(call.distill_weight * s.inv_t * result.b), f = lit<V>(s.inv_t), l = lit<V>(lse);
  for (int64_t j = 0; j < s.vocab(); j += kBlock) {
    const int64_t n = std::min(kBlock, s.vocab() - j);
    read_block<T, C>(call.student, s.x + j, n, z, chain);
    for (int64_t i = 0; i < n; i += W) {
      const V q = exp(load<V>(z + i) * f - l);
      store(g + i, weight * (load<V>(slopes + j + i) - q * total));
    }
    s.write(j, n, z, chain, g, target);
  }
  s.write_padding();
}

// The K entries of one row in ascending id, as they meet the student's blocks.
template <class C>
struct Entries {
  std::vector<std::pair<int64_t, int32_t>> order;  // (id, place in the row)
  std::vector<C> lp, lq, slopes, weights;          // in `order`, then the rest entry

  void read(const SparseRows& call, int64_t row) {
    order.clear(), lp.clear(), weights.clear();
    for (int64_t i = 0; i < call.k; ++i) {
      const int64_t id = call.ids[row * call.k + i];
      if (id >= 0 && id < call.student.vocab) order.emplace_back(id, static_cast<int32_t>(i));
    }
    std::sort(order.begin(), order.end());
    for (const auto& [id, place] : order) {
      lp.push_back(static_cast<const C*>(call.log_probs)[row * call.k + place]);
      if (call.weights) weights.push_back(static_cast<const C*>(call.weights)[row * call.k + place]);
    }
    lq.resize(order.size());
  }

  // Sums over the entries, each with its weight where there are weights.
  BlockSums<C> sums(const SparseRows& call) {
    const BlockFn<C> block = block_function<C>(call.divergence);
    slopes.assign(lp.size(), 0);
    BlockSums<C> total;
    if (!call.weights) {
      block(lp.data(), lq.data(), lp.size(), call.params, call.centre, slopes.data(), total);
      return total;
    }
    for (size_t i = 0; i < lp.size(); ++i) {
      BlockSums<C> one;
      block(&lp[i], &lq[i], 1, call.params, call.centre, &slopes[i], one);
      slopes[i] *= weights[i];
      total.term += weights[i] * one.term, total.slope += slopes[i];
    }
    return total;
  }
};

// Two reads of a row: log-sum-exp of the entries outside the K (so that the rest has no cancellation); gradient.
template <class T, class C>
void sparse_row(const SparseRows& call, int64_t row) {
  using V = typename vector_of<C>::type;
  constexpr int W = traits<V>::width;
  constexpr double inf = std::numeric_limits<double>::infinity();
  const Student<T, C> s(call, row);
  if (s.skip(row)) return;
  static thread_local Entries<C> e;
  e.read(call, row);
  C z[kBlock], chain[kBlock], g[kBlock];
  LogSumExp<C> outside, inside;
  auto next = e.order.begin();
  for (int64_t j = 0; j < s.vocab(); j += kBlock) {
    const int64_t n = std::min(kBlock, s.vocab() - j);
    read_block<T, C>(call.student, s.x + j, n, z);
    for (; next != e.order.end() && next->first < j + n; ++next) {
      e.lq[next - e.order.begin()] = z[next->first - j];
      z[next->first - j] = static_cast<C>(-inf);
    }
    outside.add(z, n, static_cast<C>(s.inv_t));
  }
  for (C& value : e.lq) value = static_cast<C>(value * s.inv_t);
  for (C value : e.lq) {
    const double high = value;
    if (high > inside.m) inside.total = inside.m == -inf ? 0 : inside.total * std::exp(inside.m - high), inside.m = high;
    inside.total += std::exp(high - (inside.m == -inf ? 0 : inside.m));
  }
  const double lse_in = inside.value(), lse_out = outside.value(), top = std::max(lse_in, lse_out);
  const bool same = !(top > -inf) || top == inf;  // nothing finite, or NaN
  const double lse = same ? lse_in + lse_out : top + std::log(std::exp(lse_in - top) + std::exp(lse_out - top));
  const Target target = s.target(row, lse);
  const double norm = call.tail == Tail::renormalize ? (lse_in == -inf ? 0 : lse_in) : lse;
  for (C& value : e.lq) value = static_cast<C>(value - norm);
  if (call.tail == Tail::bucket) {
    e.lp.push_back(static_cast<const C*>(call.log_rest)[row]);
    e.lq.push_back(static_cast<C>(lse_out - lse));
  }
  const BlockSums<C> sums = e.sums(call);
  const two<double> result = outer<double>(call.divergence, sums.term, sums.slope, call.params);
  s.finish(row, result.a, target);
  if (!s.grad) return;
  // outside the K: z_j moves the rest entry by its share of it, and every entry through the normaliser
  const double weight = call.distill_weight * s.inv_t * result.b;
  const double rest_slope = call.tail == Tail::bucket ? static_cast<double>(e.slopes.back()) : 0.0;
  const bool split = rest_slope != 0 && !(lse - lse_out < 69);  // the share would overflow fp32 as a factor of q
  const double share = rest_slope == 0 || split ? 0.0 : rest_slope * std::exp(lse - lse_out);
  const double outside_factor = call.tail == Tail::renormalize ? 0.0 : weight * (share - sums.slope);
  const V factor = lit<V>(outside_factor), f = lit<V>(s.inv_t), l = lit<V>(lse), lr = lit<V>(lse_out), ws = lit<V>(weight * rest_slope);
  next = e.order.begin();
  for (int64_t j = 0; j < s.vocab(); j += kBlock) {
    const int64_t n = std::min(kBlock, s.vocab() - j);
    read_block<T, C>(call.student, s.x + j, n, z, chain);
    if (outside_factor == 0 && !split) {
      std::fill(g, g + n, C(0));
    } else {
      for (int64_t i = 0; i < n; i += W) store(g + i, factor * exp(load<V>(z + i) * f - l));
    }
    if (split && lse_out > -inf)
      for (int64_t i = 0; i < n; i += W) store(g + i, load<V>(g + i) + ws * exp(load<V>(z + i) * f - lr));
    for (; next != e.order.end() && next->first < j + n; ++next) {
      const int64_t i = next - e.order.begin();
      const double q = std::exp(static_cast<double>(e.lq[i]));
      g[next->first - j] = static_cast<C>(weight * (e.slopes[i] - q * sums.slope));
    }
    s.write(j, n, z, chain, g, target);
  }
  s.write_padding();
}

}  // namespace POTSTILL_ISA
}  // namespace potstill
