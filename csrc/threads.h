// A small pool for loops over rows. Parked between calls, so it never competes with torch's own threads; made on first use
// in each process, so a forked child gets its own.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace potstill {

class Pool {
 public:
  // Runs body(begin, end) over [0, rows) in pieces of `grain` on up to `threads` threads, this one among them.
  void run(int64_t rows, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body) {
    if (threads <= 1 || rows <= grain) return body(0, rows);
    std::lock_guard<std::mutex> one_loop(call_);
    grow(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = &body, rows_ = rows, grain_ = grain, next_ = 0, working_ = threads - 1, allowed_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return working_ == 0; });
    body_ = nullptr;
  }

  // The pool of this process. A forked child's inherited one has no threads and is left behind.
  static Pool& instance() {
    static std::mutex making;
    static Pool* pool = nullptr;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(making);
    if (owner != getpid()) pool = new Pool, owner = getpid();
    return *pool;
  }

 private:
  void grow(int count) {
    while (static_cast<int>(threads_.size()) < count) {
      const int number = static_cast<int>(threads_.size());
      threads_.emplace_back([this, number] { loop(number); });
      threads_.back().detach();
    }
  }

  void work() {
    for (int64_t begin; (begin = next_.fetch_add(grain_)) < rows_;) (*body_)(begin, std::min(begin + grain_, rows_));
  }

  void loop(int number) {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen && number < allowed_; });
        seen = generation_;
      }
      work();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--working_ == 0) done_.notify_one();
    }
  }

  std::mutex call_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  const std::function<void(int64_t, int64_t)>* body_ = nullptr;
  int64_t rows_ = 0, grain_ = 1;
  std::atomic<int64_t> next_{0};
  int working_ = 0, allowed_ = 0;
  uint64_t generation_ = 0;
};

}  // namespace potstill
