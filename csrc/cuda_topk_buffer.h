// Keys in memory that a block of threads shares: the threshold, the cut to the k largest, the sort. See cuda_topk_logic.h.
#pragma once
#include <cfloat>

#include "cuda_numbers.h"

#ifdef __CUDACC__
#define POTSTILL_METHOD __device__ __forceinline__
#define POTSTILL_UNROLL _Pragma("unroll")
#define POTSTILL_BOTH __host__ __device__ inline
#else
#define POTSTILL_METHOD inline
#define POTSTILL_UNROLL
#define POTSTILL_BOTH inline
#endif

namespace potstill {
namespace gpu {

constexpr int kColumns = 32;      // of a thread in one round
constexpr int kGroup = 8;         // of these, columns that are compared at once
constexpr int kTemperatures = 4;  // at most, besides 1
constexpr float kUnit = 1099511627776.0f;  // 2^40: one, in fixed point

// order(value) << 32 | ~column: keys descend as values do, NaN first, then as columns ascend.
using Key = uint64_t;

POTSTILL_FN Key key_of(float v, int column) {
  uint32_t bits;
  v += 0.0f;  // one zero
  memcpy(&bits, &v, 4);
  const uint32_t order = v != v ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<Key>(order) << 32 | ~static_cast<uint32_t>(column);
}
POTSTILL_FN float value_of(Key key) {
  const uint32_t order = static_cast<uint32_t>(key >> 32), bits = order >> 31 ? order & 0x7fffffffu : ~order;
  float v;
  memcpy(&v, &bits, 4);
  return v;
}
POTSTILL_FN uint32_t column_of(Key key) { return ~static_cast<uint32_t>(key); }

// The larger one; NaN where either is.
POTSTILL_FN float larger(float a, float b) {
#ifdef __CUDA_ARCH__
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#else
  return a > b || a != a ? a : b;
#endif
}

// A key that k entries of the row are known to exceed or equal; 0, which none does, has the value NaN.
struct Threshold {
  Key key;
  float value;
  int column;  // entries of this value are above the threshold where their column is less

  POTSTILL_FN Threshold of(Key key) {
    const uint32_t column = column_of(key);
    return {key, value_of(key), static_cast<int>(column < 0x7fffffffu ? column : 0x7fffffffu)};
  }
};

// m = max z, s[t] = sum exp((z - m) / T) for T = 1 and the other temperatures.
template <int N>
struct ExpSum {
  float m, s[N];

  POTSTILL_FN ExpSum none() { return {-FLT_MAX, {}}; }
  POTSTILL_FN ExpSum merged(const ExpSum& a, const ExpSum& b, const float* inv_t) {
    ExpSum c{fmaxf(a.m, b.m), {}};
    POTSTILL_UNROLL
    for (int t = 0; t < N; ++t) {
      const float factor = t ? inv_t[t - 1] : 1.0f;
      c.s[t] = a.s[t] * exp((a.m - c.m) * factor) + b.s[t] * exp((b.m - c.m) * factor);
    }
    return c;
  }
};

struct TopkShared {
  int counters[4];
  int holes, movers, digit, left, inside;
  uint32_t most;  // the largest order that left the buffer
  int groups[16], bins[256];
};

POTSTILL_BOTH int topk_padded(int k) {
  int size = 1;
  while (size < k) size *= 2;
  return size;
}
// Keys there is room for: k, and a group of each thread.
POTSTILL_BOTH int topk_capacity(int k, int threads) {
  const int padded = topk_padded(k), room = k + threads * kGroup;
  return ((padded > room ? padded : room) + 1) & ~1;
}
// Bytes of shared memory.
POTSTILL_BOTH int topk_memory(int k, int threads) {
  return topk_capacity(k, threads) * 8 + static_cast<int>(sizeof(TopkShared)) + k * 4;
}

// What a cut took out: keys[k, end), the largest value among them.
struct Dropped {
  float most;
  int end;
};

template <class Block>
struct Buffer {
  Block& block;
  Key* keys;
  TopkShared* shared;
  uint16_t *holes, *movers;
  int k, capacity, enough;
  int filled = 0;
  Threshold threshold = Threshold::of(0);

  POTSTILL_METHOD Buffer(Block& block, int k) : block(block), k(k), capacity(topk_capacity(k, block.threads)) {
    keys = reinterpret_cast<Key*>(block.memory);
    shared = reinterpret_cast<TopkShared*>(keys + capacity);
    holes = reinterpret_cast<uint16_t*>(shared + 1), movers = holes + k;
    enough = k + (k > 64 ? k : 64);
    if (enough > capacity) enough = capacity;
  }

  POTSTILL_METHOD void put(int slot, Key key) const {
    if (filled + slot < capacity) keys[filled + slot] = key;
  }

  struct Kept {
    Key prefix, mask;  // the largest `need` keys are those with (key & mask) >= prefix
  };

  // The k largest of keys[0, n), n >= k, by digits of 8 bits. Starts after a barrier, ends past the last look at the keys.
  POTSTILL_METHOD Kept select(int n) const {
    Kept kept{0, 0};
    int need = k;
    for (int shift = 56; shift >= 0; shift -= 8) {
      for (int b = block.thread; b < 256; b += block.threads) shared->bins[b] = 0;
      if (block.thread == 0) shared->holes = shared->movers = 0, shared->most = 0;
      block.sync();
      for (int i = block.thread; i < n; i += block.threads)
        if ((keys[i] & kept.mask) == kept.prefix) block.add(shared->bins + (keys[i] >> shift & 255), 1);
      block.sync();
      for (int g = block.thread; g < 16; g += block.threads) {
        int sum = 0;
        for (int i = 0; i < 16; ++i) sum += shared->bins[g * 16 + (i + g) % 16];  // no two threads at one bank
        shared->groups[g] = sum;
      }
      block.sync();
      for (int b = block.thread; b < 256; b += block.threads) {
        int above = 0;
        for (int g = b / 16 + 1; g < 16; ++g) above += shared->groups[g];
        for (int i = b + 1; i % 16; ++i) above += shared->bins[i];
        const int inside = shared->bins[b];
        if (above < need && need <= above + inside) shared->digit = b, shared->left = need - above, shared->inside = inside;
      }
      block.sync();
      kept.prefix |= static_cast<Key>(shared->digit) << shift;
      kept.mask |= static_cast<Key>(255) << shift;
      need = shared->left;
      if (need == shared->inside) break;
    }
    return kept;
  }

  // Takes as threshold what at least k of keys[0, n) pass, if there are k that are not 0.
  POTSTILL_METHOD void start_at_kth(int n) {
    block.sync();
    if (n < k) return;
    const Key prefix = select(n).prefix;
    // a prefix without a column is above no key that it begins; with one, it is the key itself
    if (prefix) threshold = Threshold::of(static_cast<uint32_t>(prefix) ? prefix - 1 : prefix);
    block.sync();
  }

  // Keeps the k largest in keys[0, k) and raises the threshold to the least of them, or a little less.
  POTSTILL_METHOD Dropped cut() {
    const int end = filled;
    const Kept kept = select(end);
    uint32_t most = 0;
    for (int i = block.thread; i < end; i += block.threads) {
      const Key key = keys[i];
      const bool keep = (key & kept.mask) >= kept.prefix;
      if (!keep && key >> 32 > most) most = static_cast<uint32_t>(key >> 32);
      if (i < k && !keep) holes[block.add(&shared->holes, 1)] = static_cast<uint16_t>(i);
      if (i >= k && keep) movers[block.add(&shared->movers, 1)] = static_cast<uint16_t>(i);
    }
    if (most) block.raise(&shared->most, most);
    block.sync();
    const int swaps = shared->holes;
    for (int i = block.thread; i < swaps; i += block.threads) {
      const Key key = keys[holes[i]];
      keys[holes[i]] = keys[movers[i]], keys[movers[i]] = key;
    }
    const Dropped dropped{value_of(static_cast<Key>(shared->most) << 32), end};
    block.sync();
    filled = k;
    threshold = Threshold::of(kept.prefix);
    return dropped;
  }

  // Sorts keys[0, k), descending.
  POTSTILL_METHOD void sort() const {
    const int size = topk_padded(k);
    for (int i = k + block.thread; i < size; i += block.threads) keys[i] = 0;
    block.sync();
    for (int run = 2; run <= size; run *= 2)
      for (int step = run / 2; step; step /= 2) {
        for (int i = block.thread; i < size / 2; i += block.threads) {
          const int low = i / step * step * 2 + i % step, high = low + step;
          const Key a = keys[low], b = keys[high];
          if ((a < b) == !(low & run)) keys[low] = b, keys[high] = a;
        }
        block.sync();
      }
  }
};

}  // namespace gpu
}  // namespace potstill
