// sample_rows for one instruction set: inverse transform. One read gives the running sum at the end of every block; the
// blocks that a sorted uniform falls into are visited once more. Uniforms are numbered by (seed, row, draw): SplitMix64
// (Steele, Lea, Flood 2014), a stream a row.
#include <vector>

#include "row_blocks.h"

namespace potstill {
namespace POTSTILL_ISA {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15ull;

static uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

template <class T, class C>
struct SampleRow {
  using V = typename vector_of<C>::type;
  struct Drawn {
    int64_t id, count;
    C z;
  };
  const SampleRows& call;
  std::vector<double> uniforms, ends, references;
  std::vector<Drawn> drawn;

  explicit SampleRow(const SampleRows& call) : call(call), uniforms(call.n) {}

  void run(int64_t row) {
    Blocks<T, C> rows(call.logits, row);
    const double lse = sums(rows);
    drawn.clear();
    if (std::isfinite(lse)) draw(rows, mix(mix(call.seed) ^ (static_cast<uint64_t>(call.first_row + row) * kGolden)));
    std::stable_sort(drawn.begin(), drawn.end(), [](const Drawn& a, const Drawn& b) { return a.count > b.count; });
    const int64_t unique = drawn.size();
    for (int64_t i = 0; i < call.n; ++i) {
      const int64_t place = row * call.n + i;
      call.ids[place] = i < unique ? static_cast<int32_t>(drawn[i].id) : -1;
      call.counts[place] = i < unique ? static_cast<int32_t>(drawn[i].count) : 0;
      static_cast<C*>(call.log_probs)[place] = static_cast<C>(i < unique ? drawn[i].z - lse : kNegInf);
    }
    static_cast<C*>(call.lse)[row] = static_cast<C>(lse);
  }

  // Running sums of exp(z / T) at the end of each block, on one scale; returns the log-sum-exp at T = 1.
  double sums(Blocks<T, C>& rows) {
    ExpSum<C> plain;
    ExpSum<C, true> at_t(1 / call.temperature);
    const bool scaled = call.temperature != 1;
    ends.clear(), references.clear();
    for (int64_t b = 0; b < rows.count(); ++b) {
      const C* z = rows.read(b);
      add_all(plain, z, rows.size(b), rows.ahead(std::min(b + 1, rows.count() - 1)));
      if (scaled) add_all(at_t, z, rows.size(b));
      ends.push_back(scaled ? at_t.total : plain.total);
      references.push_back(scaled ? at_t.reference : plain.reference);
    }
    for (size_t b = 0; b < ends.size(); ++b) ends[b] *= std::exp(references[b] - references.back());
    return plain.value();
  }

  // exp(z / T) on the scale of `ends`, which the sum of a block corrects; exactly 0 for -inf
  void weigh(const C* z, int64_t n, C* weight) {
    const V f = lit<V>(1 / call.temperature), reference = lit<V>(references.back());
    for (int64_t l = 0; l < n; l += traits<V>::width) store(weight + l, exp(load<V>(z + l) * f - reference));
  }

  void draw(Blocks<T, C>& rows, uint64_t stream) {
    for (int64_t i = 0; i < call.n; ++i)
      uniforms[i] = static_cast<double>(mix(stream + static_cast<uint64_t>(i + 1) * kGolden) >> 11) * 0x1p-53 * ends.back();
    std::sort(uniforms.begin(), uniforms.end());
    alignas(64) C weight[kBlock];
    int64_t i = 0;
    for (int64_t b = 0; b < rows.count() && i < call.n; ++b) {
      const bool last = b + 1 == rows.count() || !(ends[b] < ends.back());
      if (!(uniforms[i] < ends[b]) && !last) continue;
      const int64_t n = rows.size(b);
      const C* z = rows.read(b);
      weigh(z, n, weight);
      double total = 0;
      int64_t possible = 0;  // the last entry that can be drawn
      for (int64_t l = 0; l < n; ++l) {
        total += weight[l];
        if (weight[l] > 0) possible = l;
      }
      const double before = b ? ends[b - 1] : 0, scale = (ends[b] - before) / total;
      double reached = 0;
      int64_t l = -1;
      for (; i < call.n && (uniforms[i] < ends[b] || last); ++i) {
        while (l < possible && !(uniforms[i] < before + reached * scale && l >= 0)) reached += weight[++l];
        if (!drawn.empty() && drawn.back().id == b * kBlock + l)
          ++drawn.back().count;
        else
          drawn.push_back({b * kBlock + l, 1, z[l]});
      }
    }
  }
};

template <class T, class C>
static void sample_loop(const SampleRows& call, int64_t begin, int64_t end) {
  SampleRow<T, C> one(call);
  for (int64_t row = begin; row < end; ++row) one.run(row);
}

void sample(const SampleRows& call, int64_t begin, int64_t end) {
  switch (call.logits.dtype) {
    case Dtype::f32: return sample_loop<float, float>(call, begin, end);
    case Dtype::bf16: return sample_loop<bf16, float>(call, begin, end);
    case Dtype::f16: return sample_loop<f16, float>(call, begin, end);
    case Dtype::f64: return sample_loop<double, double>(call, begin, end);
  }
}

}  // namespace POTSTILL_ISA
}  // namespace potstill
