// The row kernels in CUDA: one block of threads a row, the logic in cuda_row_logic.h, a kernel for each formula.
#include "cuda_block.cuh"
#include "cuda_row_logic.h"
#include "cuda_rows.h"

namespace potstill {
namespace gpu {

constexpr int kThreads = 512;  // 4096 columns at a time
using Block = DeviceBlock<kThreads>;

template <class F>
__global__ void __launch_bounds__(kThreads, 2) dense_rows_kernel(const DenseRows call, const Dtype grad, const F formula) {
  __shared__ uint32_t slots[Block::kSlots];
  Block block{static_cast<int>(threadIdx.x), kThreads, nullptr, slots};
  dense_row(block, call, grad, formula, static_cast<int64_t>(blockIdx.x));
}

template <class F>
__global__ void __launch_bounds__(kThreads, 2) sparse_rows_kernel(const SparseRows call, const Dtype grad, const F formula) {
  __shared__ uint32_t slots[Block::kSlots];
  extern __shared__ __align__(16) char memory[];
  Block block{static_cast<int>(threadIdx.x), kThreads, memory, slots};
  uint32_t* mask = reinterpret_cast<uint32_t*>(memory);
  for (int64_t i = threadIdx.x; i < (call.student.vocab + 127) / 128 * 4; i += kThreads) mask[i] = 0;
  __syncthreads();
  sparse_row(block, call, grad, formula, static_cast<int64_t>(blockIdx.x));
}

}  // namespace gpu

const char* launch_dense(const DenseRows& call, Dtype grad, uintptr_t stream) {
  const char* error = nullptr;
  gpu::with_formula(call, [&](auto formula) {
    const auto s = reinterpret_cast<cudaStream_t>(stream);
    gpu::dense_rows_kernel<<<static_cast<unsigned>(call.rows), gpu::kThreads, 0, s>>>(call, grad, formula);
    error = gpu::sentence(cudaGetLastError(), "dense_rows was not launched");
  });
  return error;
}

const char* launch_sparse(const SparseRows& call, Dtype grad, uintptr_t stream) {
  const int64_t memory = (call.student.vocab + 127) / 128 * 16 + call.k * 4;
  const char* error = nullptr;
  gpu::with_formula(call, [&](auto formula) {
    const auto s = reinterpret_cast<cudaStream_t>(stream);
    const auto kernel = gpu::sparse_rows_kernel<decltype(formula)>;
    if (memory > 40 << 10)
      error = gpu::sentence(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(memory)),
                            "sparse_rows could not reserve shared memory for the vocabulary's bit mask");
    if (error) return;
    kernel<<<static_cast<unsigned>(call.rows), gpu::kThreads, memory, s>>>(call, grad, formula);
    error = gpu::sentence(cudaGetLastError(), "sparse_rows was not launched");
  });
  return error;
}

const int* compiled_architectures(int* count) {
  static const int list[] = {__CUDA_ARCH_LIST__};  // set by nvcc from -gencode: 800,900,1000
  *count = sizeof list / sizeof *list;
  return list;
}

}  // namespace potstill
