// The row kernels for one instruction set, by element type.
#include "rows.h"

namespace potstill {
namespace POTSTILL_ISA {

template <class T, class U, class C>
void dense_loop(const DenseRows& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) dense_row<T, U, C>(call, row);
}

template <class T>
void dense_student(const DenseRows& call, int64_t begin, int64_t end) {
  switch (call.teacher.dtype) {
    case Dtype::f32: return dense_loop<T, float, float>(call, begin, end);
    case Dtype::bf16: return dense_loop<T, bf16, float>(call, begin, end);
    case Dtype::f16: return dense_loop<T, f16, float>(call, begin, end);
    case Dtype::f64: return;  // the bindings pass fp64 teachers to fp64 students only
  }
}

void dense(const DenseRows& call, int64_t begin, int64_t end) {
  switch (call.student.dtype) {
    case Dtype::f32: return dense_student<float>(call, begin, end);
    case Dtype::bf16: return dense_student<bf16>(call, begin, end);
    case Dtype::f16: return dense_student<f16>(call, begin, end);
    case Dtype::f64: return dense_loop<double, double, double>(call, begin, end);
  }
}

template <class T, class C>
void sparse_loop(const SparseRows& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) sparse_row<T, C>(call, row);
}

void sparse(const SparseRows& call, int64_t begin, int64_t end) {
  switch (call.student.dtype) {
    case Dtype::f32: return sparse_loop<float, float>(call, begin, end);
    case Dtype::bf16: return sparse_loop<bf16, float>(call, begin, end);
    case Dtype::f16: return sparse_loop<f16, float>(call, begin, end);
    case Dtype::f64: return sparse_loop<double, double>(call, begin, end);
  }
}

}  // namespace POTSTILL_ISA
}  // namespace potstill
