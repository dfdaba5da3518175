// token_rows for one instruction set: the log-probabilities of given tokens, the entropy and the log mass of a subset of the
// vocabulary, and their gradient. One read of the row for the log-sum-exp; a second, from cache, for what needs it.
#include <algorithm>
#include <utility>
#include <vector>

#include "row_blocks.h"

namespace potstill {
namespace POTSTILL_ISA {

template <class C>
static double at(const void* values, int64_t row) {
  return values ? static_cast<double>(static_cast<const C*>(values)[row]) : 0.0;
}
template <class C>
static void put(void* values, int64_t row, double value) {
  if (values) static_cast<C*>(values)[row] = static_cast<C>(value);
}

// z -> z where the subset has it, else -inf; whole vectors
template <class C>
static void keep(const C* z, const uint8_t* subset, int64_t n, C* out) {
  using V = typename vector_of<C>::type;
  for (int64_t i = 0; i < n; ++i) out[i] = subset[i] ? z[i] : static_cast<C>(kNegInf);
  for (int64_t i = n; i % traits<V>::width; ++i) out[i] = static_cast<C>(kNegInf);
}

using Given = std::vector<std::pair<int64_t, double>>;

// (token, what comes in for it) of a row's tokens, ascending; and the sum of the second
template <class C>
static double incoming(const TokenRows& call, int64_t row, Given& given) {
  given.clear();
  double total = 0;
  for (int64_t i = row * call.k; i < (row + 1) * call.k; ++i)
    if (call.tokens[i] >= 0) given.emplace_back(call.tokens[i], at<C>(call.d_log_probs, i)), total += given.back().second;
  std::sort(given.begin(), given.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  return total;
}

template <class T, class C>
static void token_row(const TokenRows& call, int64_t row, Given& given) {
  using V = typename vector_of<C>::type;
  constexpr int W = traits<V>::width;
  Blocks<T, C> rows(call.logits, row);
  T* grad = call.grad ? static_cast<T*>(call.grad) + row * call.grad_stride : nullptr;
  const int64_t blocks = rows.count(), k = call.tokens ? call.k : 0;
  const int64_t* tokens = call.tokens + row * k;
  if (call.tokens && std::all_of(tokens, tokens + k, [](int64_t token) { return token < 0; })) {
    for (int64_t i = 0; i < k; ++i) put<C>(call.log_probs, row * k + i, 0);
    for (void* result : {call.entropy, call.log_mass, call.lse}) put<C>(result, row, 0);
    if (grad) std::memset(static_cast<void*>(grad), 0, call.columns * sizeof(T));
    return;
  }
  const double lse = row_lse(rows);
  put<C>(call.lse, row, lse);
  for (int64_t i = 0; i < k; ++i) put<C>(call.log_probs, row * k + i, tokens[i] < 0 ? 0 : rows.one(tokens[i]) - lse);
  const bool want_entropy = call.entropy || (grad && call.d_entropy);
  const bool want_mass = call.subset && (call.log_mass || (grad && call.d_log_mass));
  double entropy = 0, mass = 0;
  alignas(64) C part[kBlock];
  ExpSum<C> inside;
  const V l = lit<V>(lse), far = lit<V>(-1e4);  // 0 * far is 0
  for (int64_t b = 0; b < blocks && (want_entropy || want_mass); ++b) {
    const int64_t n = rows.size(b);
    const C* z = rows.read(b);
    V sums{};
    for (int64_t i = 0; want_entropy && i < n; i += W) {
      const V lp = load<V>(z + i) - l;
      sums -= exp(lp) * vmax(lp, far);
    }
    entropy += sum(sums);
    if (want_mass) keep(z, call.subset + b * kBlock, n, part), add_all(inside, part, n);
  }
  if (want_mass) mass = inside.value() - lse;
  put<C>(call.entropy, row, entropy);
  put<C>(call.log_mass, row, mass);
  if (!grad) return;
  const double g = call.tokens ? incoming<C>(call, row, given) : 0, g_entropy = at<C>(call.d_entropy, row), g_mass = at<C>(call.d_log_mass, row);
  const V constant = lit<V>(-g - g_entropy * entropy - g_mass), ge = lit<V>(g_entropy), gm = lit<V>(g_mass), s = lit<V>(lse + mass);
  alignas(64) C z[kBlock], chain[kBlock], d[kBlock];
  auto next = given.cbegin();
  const auto end = given.cend();
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t j = b * kBlock, n = rows.size(b);
    read_block<T, C>(call.logits, rows.x + j, n, z, chain);
    for (int64_t i = 0; i < n; i += W) {
      const V lp = load<V>(z + i) - l;
      store(d + i, exp(lp) * (constant - ge * vmax(lp, far)));
    }
    if (want_mass && g_mass != 0 && mass > kNegInf) {
      keep(z, call.subset + j, n, part);
      for (int64_t i = 0; i < n; i += W) store(d + i, load<V>(d + i) + gm * exp(load<V>(part + i) - s));
    }
    for (; next != end && next->first < j + n; ++next) d[next->first - j] += static_cast<C>(next->second);
    for (int64_t i = 0; i < n; i += W) store(d + i, load<V>(d + i) * load<V>(chain + i));
    narrow(d, n, grad + j);
  }
  std::memset(static_cast<void*>(grad + call.logits.vocab), 0, (call.columns - call.logits.vocab) * sizeof(T));
}

template <class T, class C>
static void token_loop(const TokenRows& call, int64_t begin, int64_t end) {
  Given given;
  for (int64_t row = begin; row < end; ++row) token_row<T, C>(call, row, given);
}

void tokens(const TokenRows& call, int64_t begin, int64_t end) {
  switch (call.logits.dtype) {
    case Dtype::f32: return token_loop<float, float>(call, begin, end);
    case Dtype::bf16: return token_loop<bf16, float>(call, begin, end);
    case Dtype::f16: return token_loop<f16, float>(call, begin, end);
    case Dtype::f64: return token_loop<double, double>(call, begin, end);
  }
}

}  // namespace POTSTILL_ISA
}  // namespace potstill
