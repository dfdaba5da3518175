// potstill._cpp: addresses, sizes and strides in; the caller (kernels/cpp.py) has checked and allocated everything and
// keeps it alive during the call. The GIL is released while rows are worked on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>

#include "chunks.h"
#include "kernels.h"
#include "threads.h"

namespace py = pybind11;

namespace potstill {

extern const Kernels kernels_base;
#if defined(POTSTILL_HAVE_AVX2)
extern const Kernels kernels_avx2;
#endif
#if defined(POTSTILL_HAVE_AVX512)
extern const Kernels kernels_avx512;
#endif

struct Divergence {
  const char* name;
  int parameters;
};
#include "divergences.inc"
#define POTSTILL_TABLE_LINE(name, count) {#name, count},
static const Divergence kDivergences[] = {POTSTILL_DIVERGENCES(POTSTILL_TABLE_LINE) POTSTILL_OTHERS(POTSTILL_TABLE_LINE){nullptr, 0}};

int find_divergence(const char* name, int* parameters) {
  for (int i = 0; kDivergences[i].name; ++i) {
    if (std::strcmp(kDivergences[i].name, name) == 0) {
      *parameters = kDivergences[i].parameters;
      return i;
    }
  }
  return -1;
}

// The instruction sets compiled in that this processor has, best first.
static std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> found;
#if defined(POTSTILL_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    found.push_back(&kernels_avx512);
#endif
#if defined(POTSTILL_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    found.push_back(&kernels_avx2);
#endif
  found.push_back(&kernels_base);
  return found;
}

static const Kernels*& chosen() {
  static const Kernels* kernels = usable().front();
  return kernels;
}

// (address, row stride, dtype, vocab, scale, softcap)
using SideArgs = std::tuple<uintptr_t, int64_t, int, int64_t, double, double>;
static Side side(const SideArgs& a) {
  return {reinterpret_cast<const void*>(std::get<0>(a)), std::get<1>(a), static_cast<Dtype>(std::get<2>(a)), std::get<3>(a),
          std::get<4>(a), std::get<5>(a)};
}

// (name, parameters, centre, temperature, distill_weight, ce_weight)
using ObjectiveArgs = std::tuple<std::string, std::vector<double>, double, double, double, double>;

static void fill(Rows& r, int64_t rows, int64_t columns, const SideArgs& student, uintptr_t coef, uintptr_t labels,
                 const ObjectiveArgs& o, uintptr_t grad, int64_t grad_stride, uintptr_t out) {
  int parameters = 0;
  const auto& [name, values, centre, temperature, distill_weight, ce_weight] = o;
  r.divergence = find_divergence(name.c_str(), &parameters);
  if (r.divergence < 0 || parameters != static_cast<int>(values.size()))
    throw py::value_error("divergence '" + name + "' is not compiled in with " + std::to_string(values.size()) +
                          " parameters; run python -m potstill.spell > csrc/divergences.inc and rebuild");
  for (size_t i = 0; i < values.size(); ++i) r.params[i] = values[i];
  r.rows = rows, r.columns = columns, r.student = side(student);
  r.coef = reinterpret_cast<const void*>(coef), r.labels = reinterpret_cast<const int64_t*>(labels);
  r.centre = centre, r.temperature = temperature, r.distill_weight = distill_weight, r.ce_weight = ce_weight;
  r.grad = reinterpret_cast<void*>(grad), r.grad_stride = grad_stride, r.out = reinterpret_cast<void*>(out);
}

template <class Call>
static void loop(const Call& call, void (*kernel)(const Call&, int64_t, int64_t), int threads) {
  py::gil_scoped_release release;
  Pool::instance().run(call.rows, 1, threads, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

static void dense_rows(int64_t rows, int64_t columns, const SideArgs& student, const SideArgs& teacher, uintptr_t coef,
                       uintptr_t labels, const ObjectiveArgs& objective, uintptr_t grad, int64_t grad_stride, uintptr_t out,
                       int threads) {
  DenseRows r{};
  fill(r, rows, columns, student, coef, labels, objective, grad, grad_stride, out);
  r.teacher = side(teacher);
  if ((r.student.dtype == Dtype::f64) != (r.teacher.dtype == Dtype::f64))
    throw py::value_error("fp64 logits go with fp64 logits only");
  loop(r, chosen()->dense, threads);
}

static void sparse_rows(int64_t rows, int64_t columns, const SideArgs& student, uintptr_t ids, uintptr_t log_probs,
                        uintptr_t log_rest, uintptr_t weights, int64_t k, int tail, uintptr_t coef, uintptr_t labels,
                        const ObjectiveArgs& objective, uintptr_t grad, int64_t grad_stride, uintptr_t out, int threads) {
  SparseRows r{};
  fill(r, rows, columns, student, coef, labels, objective, grad, grad_stride, out);
  r.ids = reinterpret_cast<const int64_t*>(ids), r.log_probs = reinterpret_cast<const void*>(log_probs);
  r.log_rest = reinterpret_cast<const void*>(log_rest), r.k = k, r.tail = static_cast<Tail>(tail);
  r.weights = reinterpret_cast<const void*>(weights);
  loop(r, chosen()->sparse, threads);
}

// (lse_s, lse_t or lse_rest, lse_1, total or outside, weight or rest): addresses of [rows] fp64
using StatArgs = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

static void part(int step, int64_t rows, int64_t columns, const SideArgs& student, const SideArgs& teacher, uintptr_t ids,
                 uintptr_t entries, int64_t k, const StatArgs& stats, uintptr_t coef, uintptr_t labels,
                 const ObjectiveArgs& objective, uintptr_t grad, int64_t grad_stride, uintptr_t sums, int threads) {
  PartRows r{};
  fill(r, rows, columns, student, coef, labels, objective, grad, grad_stride, 0);
  const auto number = [](uintptr_t x) { return reinterpret_cast<const double*>(x); };
  r.step = static_cast<PartStep>(step), r.teacher = side(teacher);
  if (r.teacher.data && (r.student.dtype == Dtype::f64) != (r.teacher.dtype == Dtype::f64))
    throw py::value_error("fp64 logits go with fp64 logits only");
  r.lse_s = number(std::get<0>(stats)), r.lse_t = number(std::get<1>(stats)), r.lse_1 = number(std::get<2>(stats));
  r.a = number(std::get<3>(stats)), r.b = number(std::get<4>(stats));
  r.ids = reinterpret_cast<const int64_t*>(ids), r.entries = reinterpret_cast<const void*>(entries), r.k = k;
  r.sums = reinterpret_cast<double*>(sums);
  loop(r, chosen()->part, threads);
}

static void topk(int64_t rows, const SideArgs& logits, int64_t k, uintptr_t ids, uintptr_t log_probs, uintptr_t log_rest,
                 uintptr_t lse, uintptr_t tokens, uintptr_t token_log_probs, uintptr_t token_ranks,
                 const std::vector<double>& temperatures, uintptr_t log_rest_at, int threads) {
  TopkRows r{};
  r.rows = rows, r.k = k, r.logits = side(logits);
  r.ids = reinterpret_cast<int32_t*>(ids), r.log_probs = reinterpret_cast<void*>(log_probs);
  r.log_rest = reinterpret_cast<void*>(log_rest), r.lse = reinterpret_cast<void*>(lse);
  r.tokens = reinterpret_cast<const int64_t*>(tokens), r.token_log_probs = reinterpret_cast<void*>(token_log_probs);
  r.token_ranks = reinterpret_cast<int32_t*>(token_ranks), r.log_rest_at = reinterpret_cast<void*>(log_rest_at);
  r.temperatures = temperatures.data(), r.n_temperatures = temperatures.size();
  loop(r, chosen()->topk, threads);
}

// results: log_probs, entropy, log_mass, lse; incoming: what comes in for the first three
static void token_rows(int64_t rows, int64_t columns, const SideArgs& logits, uintptr_t tokens, int64_t k, uintptr_t subset,
                       const std::array<uintptr_t, 4>& results, const std::array<uintptr_t, 3>& incoming, uintptr_t grad,
                       int64_t grad_stride, int threads) {
  TokenRows r{};
  r.rows = rows, r.columns = columns, r.k = k, r.logits = side(logits);
  r.tokens = reinterpret_cast<const int64_t*>(tokens), r.subset = reinterpret_cast<const uint8_t*>(subset);
  r.log_probs = reinterpret_cast<void*>(results[0]), r.entropy = reinterpret_cast<void*>(results[1]);
  r.log_mass = reinterpret_cast<void*>(results[2]), r.lse = reinterpret_cast<void*>(results[3]);
  r.d_log_probs = reinterpret_cast<const void*>(incoming[0]), r.d_entropy = reinterpret_cast<const void*>(incoming[1]);
  r.d_log_mass = reinterpret_cast<const void*>(incoming[2]);
  r.grad = reinterpret_cast<void*>(grad), r.grad_stride = grad_stride;
  loop(r, chosen()->tokens, threads);
}

static void sample_rows(int64_t rows, const SideArgs& logits, int64_t n, double temperature, uint64_t seed,
                        int64_t first_row, uintptr_t ids, uintptr_t counts, uintptr_t log_probs, uintptr_t lse, int threads) {
  SampleRows r{};
  r.rows = rows, r.n = n, r.logits = side(logits), r.temperature = temperature, r.seed = seed, r.first_row = first_row;
  r.ids = reinterpret_cast<int32_t*>(ids), r.counts = reinterpret_cast<int32_t*>(counts);
  r.log_probs = reinterpret_cast<void*>(log_probs), r.lse = reinterpret_cast<void*>(lse);
  loop(r, chosen()->sample, threads);
}

template <class F>
static void typed(bool wide, F&& run) {
  py::gil_scoped_release release;
  wide ? run(static_cast<double*>(nullptr)) : run(static_cast<float*>(nullptr));
}

static void sum_chunks(bool wide, uintptr_t values, uintptr_t chunk, uintptr_t starts, uintptr_t ends, int64_t count, uintptr_t sums) {
  const auto longs = [](uintptr_t x) { return reinterpret_cast<const int64_t*>(x); };
  typed(wide, [&](auto* kind) {
    using C = std::remove_pointer_t<decltype(kind)>;
    chunk_sums(reinterpret_cast<const C*>(values), reinterpret_cast<const int32_t*>(chunk), longs(starts), longs(ends), count,
               reinterpret_cast<C*>(sums));
  });
}

static void gradient_of_chunks(bool wide, uintptr_t grad, uintptr_t values, uintptr_t chunk, int64_t tokens, uintptr_t out) {
  typed(wide, [&](auto* kind) {
    using C = std::remove_pointer_t<decltype(kind)>;
    chunk_gradient(reinterpret_cast<const C*>(grad), reinterpret_cast<const C*>(values), reinterpret_cast<const int32_t*>(chunk),
                   tokens, reinterpret_cast<C*>(out));
  });
}

PYBIND11_MODULE(_cpp, m) {
  m.doc() = "CPU kernels of potstill over raw addresses; use them through potstill's ops.";
  m.def("dense_rows", &dense_rows);
  m.def("sparse_rows", &sparse_rows);
  m.def("topk", &topk);
  m.def("token_rows", &token_rows);
  m.def("sample_rows", &sample_rows);
  m.def("part", &part);
  m.def("chunk_sums", &sum_chunks);
  m.def("chunk_gradient", &gradient_of_chunks);
  m.def("divergences", [] {
    py::dict found;
    for (int i = 0; kDivergences[i].name; ++i) found[kDivergences[i].name] = kDivergences[i].parameters;
    return found;
  });
  m.def("compiled_isas", [] {
    std::vector<std::string> names{"base"};
#if defined(POTSTILL_HAVE_AVX2)
    names.insert(names.begin(), "avx2");
#endif
#if defined(POTSTILL_HAVE_AVX512)
    names.insert(names.begin(), "avx512");
#endif
    return names;
  });
  m.def("usable_isas", [] {
    std::vector<std::string> names;
    for (const Kernels* k : usable()) names.push_back(k->name);
    return names;
  });
  m.def("isa", [] { return std::string(chosen()->name); });
  m.def("use_isa", [](const std::string& name) {
    for (const Kernels* k : usable()) {
      if (name == k->name) {
        chosen() = k;
        return;
      }
    }
    throw py::value_error("instruction set '" + name + "' is not usable here; see usable_isas()");
  });
}

}  // namespace potstill
