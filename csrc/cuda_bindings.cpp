// potstill._cuda: device addresses, sizes, strides and a stream in; the caller (kernels/cuda.py) has checked and allocated
// everything and keeps it alive until the stream is done. Imports without a driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "cuda_rows.h"
#include "cuda_topk.h"
#include "divergences.inc"

namespace py = pybind11;

namespace potstill {

struct Divergence {
  const char* name;
  int parameters;
};
#define POTSTILL_TABLE_LINE(name, count) {#name, count},
static const std::vector<Divergence> kDivergences = {POTSTILL_DIVERGENCES(POTSTILL_TABLE_LINE)};

// (address, row stride, dtype, vocab, scale, softcap)
using SideArgs = std::tuple<uintptr_t, int64_t, int, int64_t, double, double>;
static Side side(const SideArgs& args) {
  const auto& [address, stride, dtype, vocab, scale, softcap] = args;
  return {reinterpret_cast<const void*>(address), stride, static_cast<Dtype>(dtype), vocab, scale, softcap};
}

// (name, parameters, centre, temperature, distill_weight, ce_weight)
using ObjectiveArgs = std::tuple<std::string, std::vector<double>, double, double, double, double>;
// (address or 0, row stride, dtype)
using GradArgs = std::tuple<uintptr_t, int64_t, int>;

static void fill(Rows& r, int64_t rows, int64_t columns, const SideArgs& student, uintptr_t coef, uintptr_t labels,
                 const ObjectiveArgs& objective, const GradArgs& grad, uintptr_t out) {
  const auto& [name, values, centre, temperature, distill_weight, ce_weight] = objective;
  r.divergence = -1;
  for (size_t i = 0; i < kDivergences.size(); ++i)
    if (name == kDivergences[i].name && static_cast<size_t>(kDivergences[i].parameters) == values.size())
      r.divergence = static_cast<int>(i);
  if (r.divergence < 0)
    throw py::value_error("divergence '" + name + "' is not compiled in with " + std::to_string(values.size()) +
                          " parameters; run python -m potstill.spell > csrc/divergences.inc and rebuild");
  for (size_t i = 0; i < values.size(); ++i) r.params[i] = values[i];
  if (rows > 0x7fffffff) throw py::value_error("one launch takes at most 2147483647 rows, not " + std::to_string(rows));
  r.rows = rows, r.columns = columns, r.student = side(student);
  r.coef = reinterpret_cast<const void*>(coef), r.labels = reinterpret_cast<const int64_t*>(labels);
  r.centre = centre, r.temperature = temperature, r.distill_weight = distill_weight, r.ce_weight = ce_weight;
  r.grad = reinterpret_cast<void*>(std::get<0>(grad)), r.grad_stride = std::get<1>(grad);
  r.out = reinterpret_cast<void*>(out);
}

static void check(const char* error) {
  if (error) throw std::runtime_error(error);
}

static void dense_rows(int64_t rows, int64_t columns, const SideArgs& student, const SideArgs& teacher, uintptr_t coef,
                       uintptr_t labels, const ObjectiveArgs& objective, const GradArgs& grad, uintptr_t out,
                       uintptr_t stream) {
  DenseRows r{};
  fill(r, rows, columns, student, coef, labels, objective, grad, out);
  r.teacher = side(teacher);
  if (rows) check(launch_dense(r, static_cast<Dtype>(std::get<2>(grad)), stream));
}

static void sparse_rows(int64_t rows, int64_t columns, const SideArgs& student, uintptr_t ids, uintptr_t log_probs,
                        uintptr_t log_rest, uintptr_t weights, int64_t k, int tail, uintptr_t coef, uintptr_t labels,
                        const ObjectiveArgs& objective, const GradArgs& grad, uintptr_t out, uintptr_t stream) {
  SparseRows r{};
  fill(r, rows, columns, student, coef, labels, objective, grad, out);
  r.ids = reinterpret_cast<const int64_t*>(ids), r.log_probs = reinterpret_cast<const void*>(log_probs);
  r.log_rest = reinterpret_cast<const void*>(log_rest), r.k = k, r.tail = static_cast<Tail>(tail);
  r.weights = reinterpret_cast<const void*>(weights);
  if (rows) check(launch_sparse(r, static_cast<Dtype>(std::get<2>(grad)), stream));
}

static void topk(int64_t rows, const SideArgs& logits, int64_t k, uintptr_t ids, uintptr_t log_probs, uintptr_t log_rest,
                 uintptr_t lse, uintptr_t tokens, uintptr_t token_log_probs, uintptr_t token_ranks,
                 const std::vector<double>& temperatures, uintptr_t log_rest_at, uintptr_t stream) {
  TopkRows r{};
  r.rows = rows, r.k = k, r.logits = side(logits), r.ids = reinterpret_cast<int32_t*>(ids);
  r.log_probs = reinterpret_cast<void*>(log_probs), r.log_rest = reinterpret_cast<void*>(log_rest);
  r.lse = reinterpret_cast<void*>(lse), r.tokens = reinterpret_cast<const int64_t*>(tokens);
  r.token_log_probs = reinterpret_cast<void*>(token_log_probs), r.token_ranks = reinterpret_cast<int32_t*>(token_ranks);
  r.temperatures = temperatures.data(), r.n_temperatures = static_cast<int64_t>(temperatures.size());
  r.log_rest_at = reinterpret_cast<void*>(log_rest_at);
  if (rows) check(launch_topk(r, stream));
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of potstill over raw addresses; use them through potstill's ops.";
  m.def("dense_rows", &dense_rows);
  m.def("sparse_rows", &sparse_rows);
  m.def("topk", &topk);
  m.def("divergences", [] {
    py::dict found;
    for (const Divergence& d : kDivergences) found[d.name] = d.parameters;
    return found;
  });
  m.def("architectures", [] {
    int count = 0;
    const int* list = compiled_architectures(&count);
    std::vector<std::tuple<int, int>> found;
    for (int i = 0; i < count; ++i) found.emplace_back(list[i] / 100, list[i] / 10 % 10);
    return found;
  });
}

}  // namespace potstill
