// The kernels over parts of the vocabulary for one instruction set, by step and element type.
#include "parts.h"

namespace potstill {
namespace POTSTILL_ISA {

template <class F>
void each_row(int64_t begin, int64_t end, F work) {
  for (int64_t row = begin; row < end; ++row) work(row);
}

template <class T, class U, class C>
void part_dense(const PartRows& call, int64_t begin, int64_t end) {
  if (call.step == PartStep::dense_sums) return each_row(begin, end, [&](int64_t row) { dense_sums_row<T, U, C>(call, row); });
  each_row(begin, end, [&](int64_t row) { dense_grad_row<T, U, C>(call, row); });
}

template <class T>
void part_teacher(const PartRows& call, int64_t begin, int64_t end) {
  switch (call.teacher.dtype) {
    case Dtype::f32: return part_dense<T, float, float>(call, begin, end);
    case Dtype::bf16: return part_dense<T, bf16, float>(call, begin, end);
    case Dtype::f16: return part_dense<T, f16, float>(call, begin, end);
    case Dtype::f64: return;  // the bindings pass fp64 teachers to fp64 students only
  }
}

template <class T, class C>
bool part_alone(const PartRows& call, int64_t begin, int64_t end) {
  if (call.step == PartStep::lse)
    each_row(begin, end, [&](int64_t row) { part_lse_row<T, C>(call, row); });
  else if (call.step == PartStep::sparse_grad)
    each_row(begin, end, [&](int64_t row) { sparse_grad_row<T, C>(call, row); });
  else
    return false;
  return true;
}

void part(const PartRows& call, int64_t begin, int64_t end) {
  switch (call.student.dtype) {
    case Dtype::f32: return part_alone<float, float>(call, begin, end) ? void() : part_teacher<float>(call, begin, end);
    case Dtype::bf16: return part_alone<bf16, float>(call, begin, end) ? void() : part_teacher<bf16>(call, begin, end);
    case Dtype::f16: return part_alone<f16, float>(call, begin, end) ? void() : part_teacher<f16>(call, begin, end);
    case Dtype::f64:
      return part_alone<double, double>(call, begin, end) ? void() : part_dense<double, double, double>(call, begin, end);
  }
}

}  // namespace POTSTILL_ISA
}  // namespace potstill
