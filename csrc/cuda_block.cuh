// A block of threads on a device: what the row logic (cuda_row_logic.h, cuda_topk_logic.h) asks for, and errors as sentences.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>

namespace potstill {
namespace gpu {

template <int Threads>
struct DeviceBlock {
  static constexpr int kTeam = 32;     // threads whose loads are adjacent
  static constexpr int kWords = 6;     // 32-bit words of the largest thing reduced
  static constexpr int kSlots = (Threads / 32 + 1) * kWords;

  int thread, threads;
  char* memory;
  uint32_t* slots;  // [kSlots] in shared memory

  __device__ void sync() const { __syncthreads(); }
  __device__ int add(int* at, int n) const { return atomicAdd(at, n); }
  __device__ void raise(uint32_t* at, uint32_t to) const { atomicMax(at, to); }

  // op over every thread's x, the same result in all; no barrier is needed before or after
  template <class T, class Op>
  __device__ T reduce(T x, Op op) const {
    constexpr int n = sizeof(T) / sizeof(uint32_t), warps = Threads / 32;
    static_assert(std::is_trivially_copyable_v<T> && n <= kWords);
    for (int offset = 16; offset; offset /= 2) {
      uint32_t words[n];
      memcpy(words, &x, sizeof(T));
      for (int i = 0; i < n; ++i) words[i] = __shfl_down_sync(0xffffffff, words[i], offset);
      T other;
      memcpy(&other, words, sizeof(T));
      x = op(x, other);
    }
    if (thread % 32 == 0) memcpy(slots + thread / 32 * kWords, &x, sizeof(T));
    __syncthreads();
    if (thread == 0) {
      for (int warp = 1; warp < warps; ++warp) {
        T other;
        memcpy(&other, slots + warp * kWords, sizeof(T));
        x = op(x, other);
      }
      memcpy(slots + warps * kWords, &x, sizeof(T));
    }
    __syncthreads();  // the next reduction writes other slots before it reaches its own first barrier
    memcpy(&x, slots + warps * kWords, sizeof(T));
    return x;
  }
};

// The last error's sentence; lives until the thread's next one.
inline const char* sentence(cudaError_t error, const char* what) {
  static thread_local char text[256];
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // or the next launch would be told of this error
  std::snprintf(text, sizeof text, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
  return text;
}

}  // namespace gpu
}  // namespace potstill
