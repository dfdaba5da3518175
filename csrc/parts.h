// The kernels over a part of the vocabulary; potstill/rows_parts.py is the contract. Each reads a part's row block by block.
#pragma once
#include "rows.h"

namespace potstill {
namespace POTSTILL_ISA {

// The row's ids in the part in ascending order, with their places: met as the blocks go by.
inline std::vector<std::pair<int64_t, int32_t>>& ids_of_row(const PartRows& call, int64_t row) {
  static thread_local std::vector<std::pair<int64_t, int32_t>> order;
  order.clear();
  for (int64_t i = 0; i < call.k; ++i) {
    const int64_t id = call.ids[row * call.k + i];
    if (id >= 0 && id < call.student.vocab) order.emplace_back(id, static_cast<int32_t>(i));
  }
  std::sort(order.begin(), order.end());
  return order;
}

template <class T, class C>
void part_lse_row(const PartRows& call, int64_t row) {
  const T* x = static_cast<const T*>(call.student.data) + row * call.student.stride;
  const auto& order = ids_of_row(call, row);
  auto next = order.begin();
  C z[kBlock];
  LogSumExp<C> s;
  for (int64_t j = 0; j < call.student.vocab; j += kBlock) {
    const int64_t n = std::min(kBlock, call.student.vocab - j);
    read_block<T, C>(call.student, x + j, n, z);
    for (; next != order.end() && next->first < j + n; ++next) z[next->first - j] = -std::numeric_limits<C>::infinity();
    s.add(z, n, static_cast<C>(1 / call.temperature));
  }
  call.sums[row] = s.value();
}

// One block of both sides as log-probabilities; z keeps the student's logits where it is given.
template <class T, class U, class C>
POTSTILL_FN void read_both(const PartRows& call, int64_t row, const T* x, const U* y, int64_t n, C* lq, C* lp, C* chain) {
  read_block<T, C>(call.student, x, n, lq, chain);
  read_block<U, C>(call.teacher, y, n, lp);
  to_log_probs(lp, n, 1 / call.temperature, call.lse_t[row]);
}

template <class T, class U, class C>
void dense_sums_row(const PartRows& call, int64_t row) {
  BlockSums<C> sums;
  if (static_cast<const C*>(call.coef)[row] != 0) {
    const T* x = static_cast<const T*>(call.student.data) + row * call.student.stride;
    const U* y = static_cast<const U*>(call.teacher.data) + row * call.teacher.stride;
    const BlockFn<C> block = block_function<C>(call.divergence);
    C lq[kBlock], lp[kBlock];
    for (int64_t j = 0; j < call.student.vocab; j += kBlock) {
      const int64_t n = std::min(kBlock, call.student.vocab - j);
      read_both<T, U, C>(call, row, x + j, y + j, n, lq, lp, nullptr);
      to_log_probs(lq, n, 1 / call.temperature, call.lse_s[row]);
      block(lp, lq, n, call.params, call.centre, nullptr, sums);
    }
  }
  call.sums[row] = sums.term;
  call.sums[call.rows + row] = sums.slope;
}

// Clears the gradient of a row that does not count.
template <class T, class C>
bool part_skip(const PartRows& call, const Student<T, C>& s) {
  if (s.coef != 0) return false;
  std::memset(static_cast<void*>(s.grad), 0, call.columns * sizeof(T));
  return true;
}

inline Target part_target(const PartRows& call, int64_t row) {
  Target t;
  t.wanted = call.ce_weight != 0 && call.labels;
  if (t.wanted) t.label = call.labels[row], t.lse = call.lse_1[row];
  return t;
}

template <class T, class U, class C>
void dense_grad_row(const PartRows& call, int64_t row) {
  using V = typename vector_of<C>::type;
  const Student<T, C> s(call, row);
  if (part_skip(call, s)) return;
  const U* y = static_cast<const U*>(call.teacher.data) + row * call.teacher.stride;
  const Target target = part_target(call, row);
  const BlockFn<C> block = block_function<C>(call.divergence);
  const V total = lit<V>(call.a[row]), weight = lit<V>(call.b[row]);
  C z[kBlock], lq[kBlock], lp[kBlock], chain[kBlock], slopes[kBlock];
  BlockSums<C> unused;
  for (int64_t j = 0; j < s.vocab(); j += kBlock) {
    const int64_t n = std::min(kBlock, s.vocab() - j);
    read_both<T, U, C>(call, row, s.x + j, y + j, n, z, lp, chain);
    std::memcpy(lq, z, sizeof z);
    to_log_probs(lq, n, s.inv_t, call.lse_s[row]);
    block(lp, lq, n, call.params, call.centre, slopes, unused);
    for (int64_t i = 0; i < n; i += traits<V>::width)
      store(slopes + i, weight * (load<V>(slopes + i) - exp(load<V>(lq + i)) * total));
    s.write(j, n, z, chain, slopes, target);
  }
  s.write_padding();
}

template <class T, class C>
void sparse_grad_row(const PartRows& call, int64_t row) {
  using V = typename vector_of<C>::type;
  constexpr int W = traits<V>::width;
  const Student<T, C> s(call, row);
  if (part_skip(call, s)) return;
  const Target target = part_target(call, row);
  const auto& order = ids_of_row(call, row);
  auto next = order.begin();
  const double outside = call.a[row], rest = call.b[row];
  const bool has_rest = rest != 0 && call.lse_t[row] != -std::numeric_limits<double>::infinity();
  const V f = lit<V>(s.inv_t), lse = lit<V>(call.lse_s[row]), lse_rest = lit<V>(call.lse_t[row]), vo = lit<V>(outside),
          vr = lit<V>(rest);
  C z[kBlock], chain[kBlock], g[kBlock];
  for (int64_t j = 0; j < s.vocab(); j += kBlock) {
    const int64_t n = std::min(kBlock, s.vocab() - j);
    read_block<T, C>(call.student, s.x + j, n, z, chain);
    std::fill(g, g + kBlock, C(0));
    if (outside != 0)
      for (int64_t i = 0; i < n; i += W) store(g + i, -vo * exp(load<V>(z + i) * f - lse));
    if (has_rest)
      for (int64_t i = 0; i < n; i += W) store(g + i, load<V>(g + i) + vr * exp(load<V>(z + i) * f - lse_rest));
    for (; next != order.end() && next->first < j + n; ++next)
      g[next->first - j] = static_cast<const C*>(call.entries)[row * call.k + next->second];
    s.write(j, n, z, chain, g, target);
  }
  s.write_padding();
}

}  // namespace POTSTILL_ISA
}  // namespace potstill
