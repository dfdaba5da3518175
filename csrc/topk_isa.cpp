// topk_rows for one instruction set, and the table of its entry points.
#include "topk.h"

namespace potstill {
namespace POTSTILL_ISA {

constexpr int64_t kSample = 16;  // blocks: 64 KB of fp32, which stay in the second-level cache until they are visited
constexpr int64_t kPause = 4;    // blocks between two samples

// log(exp(a) + exp(b)) with NaN and infinities as the arguments say
static double log_add(double a, double b) {
  const double top = std::max(a, b);
  if (a != a || b != b || top == kNegInf) return a + b;
  if (top == -kNegInf) return top;
  return top + std::log(std::exp(a - top) + std::exp(b - top));
}

template <class C>
static double log_sum(const C* z, int64_t n, double factor) {  // z descends
  const double best = z[0];
  if (!(best > kNegInf) || best == -kNegInf) return best * factor;
  Sum total;
  for (int64_t i = 0; i < n; ++i) total.add(std::exp((static_cast<double>(z[i]) - best) * factor));
  return best * factor + std::log(total.value());
}

template <class T, class C>
struct TopkRow {
  using V = typename vector_of<C>::type;
  const TopkRows& call;
  Selector<C> select;
  ExpSum<C> rest;
  std::vector<ExpSum<C, true>> rest_at;
  std::vector<int64_t> order;
  std::vector<C> values;

  explicit TopkRow(const TopkRows& call) : call(call), values(call.k) {
    for (int64_t i = 0; i < call.n_temperatures; ++i) rest_at.emplace_back(1 / call.temperatures[i]);
    const int64_t blocks = (call.logits.vocab + kBlock - 1) / kBlock;
    int64_t step = std::max<int64_t>(1, static_cast<int64_t>(blocks * 0.618));
    while (std::gcd(step, blocks) != 1) ++step;
    for (int64_t b = 0, at = 0; b < blocks; ++b, at = (at + step) % blocks) order.push_back(at);
  }

  void run(int64_t row) {
    Blocks<T, C> rows(call.logits, row);
    select.reset(call.k), rest.reset();
    for (auto& sum : rest_at) sum.reset();
    Ahead ahead;
    const auto add = [&](const C* z, int64_t n, C high, auto skip) __attribute__((always_inline)) {
      if (!rest.add(z, n, high, skip, ahead)) return false;
      for (auto& sum : rest_at) sum.add(z, n, high, skip);
      return true;
    };
    const int64_t blocks = order.size(), token = call.tokens ? call.tokens[row] : -1;
    const C given = token >= 0 ? rows.one(token) : C(0);
    int64_t rank = 0, hits = 0, sampled = -kPause;
    for (int64_t b = 0; b < blocks; ++b) {
      // a first threshold, and another one where the last was left far behind
      if (blocks > 1 && (b == 0 || (select.hits - hits > kBlock / 2 && b >= sampled + kPause)))
        select.sample(rows, order.data() + b, std::min(kSample, blocks - b)), sampled = b;
      hits = select.hits;
      const int64_t n = rows.size(order[b]);
      const C* z = rows.read(order[b]);
      if (token >= 0) rank += count_above(z, n, given);
      ahead = rows.ahead(order[std::min(b + 1, blocks - 1)]);
      select.visit(z, order[b] * kBlock, n, add);
      ahead = {};
      select.settle(add);
    }
    if (select.held > call.k) select.cut(), select.settle(add);
    write(row);
    if (call.tokens) {
      const double lse = static_cast<double>(lse_);
      static_cast<C*>(call.token_log_probs)[row] = static_cast<C>(token < 0 ? kNegInf : given - lse);
      call.token_ranks[row] = static_cast<int32_t>(token < 0 ? -1 : rank);
    }
  }

  void write(int64_t row) {
    const int64_t k = call.k;
    const auto first = select.buffer.begin();
    std::sort(first, first + k, std::greater<typename Key<C>::type>());
    for (int64_t i = 0; i < k; ++i) {
      values[i] = Key<C>::value(select.buffer[i]);
      call.ids[row * k + i] = static_cast<int32_t>(Key<C>::index(select.buffer[i]));
    }
    const double outside = rest.value();
    lse_ = log_add(log_sum(values.data(), k, 1), outside);
    C* log_probs = static_cast<C*>(call.log_probs) + row * k;
    for (int64_t i = 0; i < k; ++i) log_probs[i] = static_cast<C>(values[i] - lse_);
    static_cast<C*>(call.log_rest)[row] = static_cast<C>(outside - lse_);
    static_cast<C*>(call.lse)[row] = static_cast<C>(lse_);
    for (int64_t i = 0; i < call.n_temperatures; ++i) {
      const double at = rest_at[i].value(), all = log_add(log_sum(values.data(), k, rest_at[i].f), at);
      static_cast<C*>(call.log_rest_at)[i * call.rows + row] = static_cast<C>(at - all);
    }
  }

  // How many of z[0..n) are above `given`; lanes past n hold -inf.
  static int32_t count_above(const C* z, int64_t n, C given) {
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += z[i] > given;
    return count;
  }

  double lse_ = 0;
};

template <class T, class C>
static void topk_loop(const TopkRows& call, int64_t begin, int64_t end) {
  TopkRow<T, C> one(call);
  for (int64_t row = begin; row < end; ++row) one.run(row);
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
void tokens(const TokenRows&, int64_t, int64_t);
void sample(const SampleRows&, int64_t, int64_t);
void part(const PartRows&, int64_t, int64_t);

}  // namespace POTSTILL_ISA

#define POTSTILL_NAME_(isa) #isa
#define POTSTILL_NAME(isa) POTSTILL_NAME_(isa)
#define POTSTILL_JOIN_(a, b) a##b
#define POTSTILL_JOIN(a, b) POTSTILL_JOIN_(a, b)
extern const Kernels POTSTILL_JOIN(kernels_, POTSTILL_ISA);
const Kernels POTSTILL_JOIN(kernels_, POTSTILL_ISA) = {
    POTSTILL_NAME(POTSTILL_ISA), POTSTILL_ISA::dense,  POTSTILL_ISA::sparse,
    POTSTILL_ISA::topk,          POTSTILL_ISA::tokens, POTSTILL_ISA::sample,
    POTSTILL_ISA::part};

}  // namespace potstill
