// The row logic of csrc/rows.cu on the host: a block of threads that meet at barriers, one row after another.
#include <algorithm>
#include <array>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda_row_logic.h"
#include "cuda_rows.h"

namespace potstill {
namespace {

constexpr int kThreads = 3;  // not a power of two, so that no lane count is baked in

class Barrier {
 public:
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int generation = generation_;
    if (++waiting_ == kThreads) {
      waiting_ = 0, ++generation_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return generation_ != generation; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  int waiting_ = 0, generation_ = 0;
};

struct Shared {
  Barrier barrier;
  std::array<std::array<float, 3>, kThreads> slots;
  std::vector<uint64_t> memory;
};

struct HostBlock {
  int thread, threads;
  char* memory;
  Shared& shared;

  void sync() const { shared.barrier.wait(); }
  template <class T, class Op>
  T reduce(T x, Op op) const {
    std::memcpy(&shared.slots[thread], &x, sizeof x);
    sync();
    T total;
    std::memcpy(&total, &shared.slots[0], sizeof total);
    for (int i = 1; i < kThreads; ++i) {
      T other;
      std::memcpy(&other, &shared.slots[i], sizeof other);
      total = op(total, other);
    }
    sync();
    return total;
  }
};

template <class Row>
void run(int64_t rows, int64_t memory, Row row) {
  Shared shared;
  shared.memory.resize(memory / 8 + 1);
  const auto work = [&](int thread) {
    HostBlock block{thread, kThreads, reinterpret_cast<char*>(shared.memory.data()), shared};
    for (int64_t i = 0; i < rows; ++i) {
      block.sync();
      if (thread == 0) std::fill(shared.memory.begin(), shared.memory.end(), 0);
      block.sync();
      row(block, i);
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < kThreads; ++i) others.emplace_back(work, i);
  work(0);
  for (std::thread& other : others) other.join();
}

}  // namespace

const char* launch_dense(const DenseRows& call, Dtype grad, uintptr_t) {
  gpu::with_formula(call, [&](auto formula) {
    run(call.rows, 0, [&](HostBlock& block, int64_t row) { gpu::dense_row(block, call, grad, formula, row); });
  });
  return nullptr;
}

const char* launch_sparse(const SparseRows& call, Dtype grad, uintptr_t stream) {
  if (stream) return "sparse_rows was not launched: the host has no streams";
  const int64_t memory = gpu::mask_words(call) * 4 + call.k * 4;
  gpu::with_formula(call, [&](auto formula) {
    run(call.rows, memory, [&](HostBlock& block, int64_t row) { gpu::sparse_row(block, call, grad, formula, row); });
  });
  return nullptr;
}

const int* compiled_architectures(int* count) {
  static const int list[] = {800, 900, 1000};
  *count = 3;
  return list;
}

}  // namespace potstill
