// token_rows for one instruction set: the log-probability of a given token, the entropy and the log mass of a subset of the
// vocabulary, and their gradient. One read of the row for the log-sum-exp; a second, from cache, for what needs it.
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

template <class T, class C>
static void token_row(const TokenRows& call, int64_t row) {
  using V = typename vector_of<C>::type;
  constexpr int W = traits<V>::width;
  Blocks<T, C> rows(call.logits, row);
  T* grad = call.grad ? static_cast<T*>(call.grad) + row * call.grad_stride : nullptr;
  const int64_t token = call.tokens ? call.tokens[row] : -1, blocks = rows.count();
  if (call.tokens && token < 0) {
    for (void* result : {call.log_probs, call.entropy, call.log_mass, call.lse}) put<C>(result, row, 0);
    if (grad) std::memset(static_cast<void*>(grad), 0, call.columns * sizeof(T));
    return;
  }
  const double lse = row_lse(rows);
  put<C>(call.lse, row, lse);
  if (token >= 0) put<C>(call.log_probs, row, rows.one(token) - lse);
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
  const double g = at<C>(call.d_log_probs, row), g_entropy = at<C>(call.d_entropy, row), g_mass = at<C>(call.d_log_mass, row);
  const V constant = lit<V>(-g - g_entropy * entropy - g_mass), ge = lit<V>(g_entropy), gm = lit<V>(g_mass), s = lit<V>(lse + mass);
  alignas(64) C z[kBlock], chain[kBlock], d[kBlock];
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
    if (token >= j && token < j + n) d[token - j] += static_cast<C>(g);
    for (int64_t i = 0; i < n; i += W) store(d + i, load<V>(d + i) * load<V>(chain + i));
    narrow(d, n, grad + j);
  }
  std::memset(static_cast<void*>(grad + call.logits.vocab), 0, (call.columns - call.logits.vocab) * sizeof(T));
}

template <class T, class C>
static void token_loop(const TokenRows& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) token_row<T, C>(call, row);
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
