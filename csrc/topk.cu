// Top-k with the log-sum-exp in CUDA: one block of threads a row, the logic in cuda_topk_logic.h.
#include "cuda_block.cuh"
#include "cuda_topk.h"
#include "cuda_topk_logic.h"

namespace potstill {
namespace gpu {

constexpr int kThreads = 512;  // 16,384 columns a round
constexpr int kFewerThreads = 256;  // where there is more to keep in registers: 32 columns of fp32, five sums

template <class T, bool Plain, int Threads>
__global__ void __launch_bounds__(Threads, 2) topk_kernel(const __grid_constant__ TopkPlan plan) {
  using Block = DeviceBlock<Threads>;
  __shared__ uint32_t slots[Block::kSlots];
  extern __shared__ __align__(16) char memory[];
  Block block{static_cast<int>(threadIdx.x), Threads, memory, slots};
  topk_row<T, Plain>(block, plan, static_cast<int64_t>(blockIdx.x));
}

}  // namespace gpu

const char* launch_topk(const TopkRows& call, uintptr_t stream) {
  if (const char* refusal = gpu::topk_refusal(call)) return refusal;
  const gpu::TopkPlan plan = gpu::TopkPlan::of(call, 32);
  const char* error = nullptr;
  gpu::with_topk_kind(plan, [&](auto type, auto plain) {
    constexpr bool kPlain = decltype(plain)::value;
    constexpr int kCount = kPlain && sizeof type == 2 ? gpu::kThreads : gpu::kFewerThreads;
    const auto kernel = gpu::topk_kernel<decltype(type), kPlain, kCount>;
    const int memory = gpu::topk_memory(static_cast<int>(call.k), kCount);
    error = gpu::sentence(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, memory),
                          "topk could not reserve shared memory for its buffer of keys");
    if (error) return;
    kernel<<<static_cast<unsigned>(call.rows), kCount, memory, reinterpret_cast<cudaStream_t>(stream)>>>(plan);
    error = gpu::sentence(cudaGetLastError(), "topk was not launched");
  });
  return error;
}

}  // namespace potstill
