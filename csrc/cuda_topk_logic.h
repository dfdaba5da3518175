// Top-k with the log-sum-exp of one row by one block of threads: what topk.cu runs on a device, in one read of the row.
// Needs a Block as cuda_row_logic.h does, and of it also
//   kTeam                threads whose loads are adjacent: a warp, or any divisor of `threads`
//   add(at, n)           adds to an int the threads share, and returns what it was
//   raise(at, to)        raises a uint32_t the threads share to at least `to`
//   memory               topk_memory(k, threads) bytes shared by the threads
// so that a host build can run the same code, its threads in any order (tests/kernels/host_topk.cpp).
//
// Each thread takes 32 columns a round, each team 1,024 adjacent ones; the teams' chunks lie scattered over the row, so that
// ascending rows cost what others do. The first round's maxima of 8 columns give a threshold that at least k entries reach.
// An entry above the threshold goes to a buffer as a key, every other one into the running sum of exp(z - m). When the buffer
// has twice k keys or more, a radix select keeps the k largest and raises the threshold; what leaves the buffer is summed in
// fixed point, so that no result depends on the order of the threads. Nothing is subtracted: the sum is the mass of the rest.
#pragma once
#include <numeric>
#include <type_traits>

#include "cuda_topk_buffer.h"

namespace potstill {
namespace gpu {

// A call, and what its rows have in common.
struct TopkPlan {
  TopkRows rows;
  int chunks, step;  // chunks of `team` * 32 columns, and from one to the next in the scattered order
  float inv_t[kTemperatures];

  static TopkPlan of(const TopkRows& rows, int team) {
    const int64_t chunk = int64_t(team) * kColumns, chunks = (rows.logits.vocab + 7 + chunk - 1) / chunk;  // 7: a late start
    TopkPlan plan{rows, static_cast<int>(chunks), static_cast<int>(chunks * 0.618) + 1, {}};
    while (std::gcd(plan.step, plan.chunks) != 1) ++plan.step;
    for (int t = 0; t < rows.n_temperatures; ++t) plan.inv_t[t] = static_cast<float>(1 / rows.temperatures[t]);
    return plan;
  }
  bool plain() const {  // logits as they are, and nothing asked for besides
    return rows.logits.scale == 1 && rows.logits.softcap == 0 && !rows.tokens && !rows.n_temperatures;
  }
};

// Why a call cannot be served, or null.
inline const char* topk_refusal(const TopkRows& rows) {
  if (rows.logits.vocab > 1 << 30) return "topk was not launched: it serves vocabularies up to 2^30";
  if (rows.k < 1 || rows.k > 1024) return "topk was not launched: k is outside 1..1024";
  if (rows.n_temperatures > kTemperatures) return "topk was not launched: it serves 4 temperatures at once";
  if (rows.rows > 0x7fffffff) return "topk was not launched: one launch takes at most 2147483647 rows";
  return nullptr;
}

// visit(T{}, plain) for the type of the logits and whether the plan is plain
template <class Visit>
void with_topk_kind(const TopkPlan& plan, Visit&& visit) {
  const auto typed = [&](auto plain) {
    if (plan.rows.logits.dtype == Dtype::bf16) return visit(bf16{}, plain);
    if (plan.rows.logits.dtype == Dtype::f16) return visit(f16{}, plain);
    visit(float{}, plain);
  };
  plan.plain() ? typed(std::true_type{}) : typed(std::false_type{});
}

// One row as 16-byte packs from an aligned address at or before its start.
template <class T>
struct PackedRow {
  static constexpr int kWide = 16 / sizeof(T), kPacks = kColumns / kWide;
  struct alignas(16) Wide {
    T x[kWide];
  };
  const T* row;
  int vocab, head;  // head: columns by which the first pack begins before the row

  POTSTILL_FN PackedRow of(const Side& side, int64_t i) {
    const T* row = static_cast<const T*>(side.data) + i * side.stride;
    return {row, static_cast<int>(side.vocab), static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T))};
  }

  POTSTILL_METHOD bool has(int j) const { return static_cast<unsigned>(j) < static_cast<unsigned>(vocab); }
  POTSTILL_METHOD Wide load(int j) const {
    Wide pack;
    if (j >= 0 && j + kWide <= vocab) {
#ifdef __CUDA_ARCH__
      const uint4 words = __ldcs(reinterpret_cast<const uint4*>(row + j));
      memcpy(&pack, &words, 16);
#else
      memcpy(&pack, row + j, 16);
#endif
    } else {
      POTSTILL_UNROLL
      for (int i = 0; i < kWide; ++i)
        if (has(j + i)) pack.x[i] = row[j + i];
        else narrow(-infinity(), pack.x[i]);
    }
    return pack;
  }
};

template <bool Plain>
POTSTILL_FN float logit(const Side& side, float x) {
  if (Plain) return x;
  const float z = x * static_cast<float>(side.scale), cap = static_cast<float>(side.softcap);
  return cap != 0 ? cap * tanhf(z / cap) : z;
}

// Whether a group of columns from j on, of which `most` is the largest logit, may hold a key above the threshold.
POTSTILL_FN bool may_pass(const Threshold& t, float most, int j) {
  return !(most < t.value) && !(most == t.value && j >= t.column);
}

template <class T, bool Plain, class Block>
struct TopkRow {
  using Row = PackedRow<T>;
  static constexpr int kSums = Plain ? 1 : 1 + kTemperatures;
  using Sum = ExpSum<kSums>;

  Block& block;
  const TopkPlan& plan;
  const TopkRows& call;
  const Row row;
  Buffer<Block> buffer;
  Sum sum = Sum::none();
  typename Row::Wide packs[Row::kPacks];
  float given = 0;      // the realised token's logit
  int rank = 0;         // how many of this thread's columns are above it
  int start = 0, at = 0;  // this thread's first column in chunk 0; its team's chunk

  POTSTILL_METHOD int column(int chunk, int e) const {  // of a thread's e-th column of a chunk
    return start + chunk * (Block::kTeam * kColumns) + e / Row::kWide * (Block::kTeam * Row::kWide) + e % Row::kWide;
  }
  POTSTILL_METHOD float z(int e) const {
    if (!Plain && !row.has(column(at, e))) return -infinity();  // a softcap or a scale below 0 makes something else of it
    return logit<Plain>(call.logits, widen(packs[e / Row::kWide].x[e % Row::kWide]));
  }
  POTSTILL_METHOD void load() {
    POTSTILL_UNROLL
    for (int p = 0; p < Row::kPacks; ++p) packs[p] = row.load(column(at, p * Row::kWide));
  }

  POTSTILL_METHOD void grow(const float* z, float most) {
    if (most > sum.m) {
      sum.s[0] *= exp(sum.m - most);
      POTSTILL_UNROLL
      for (int t = 1; t < kSums; ++t) sum.s[t] *= exp((sum.m - most) * plan.inv_t[t - 1]);
      sum.m = most;
    }
    float e = 0;
    POTSTILL_UNROLL
    for (int i = 0; i < kGroup; ++i) e += exp(z[i] - sum.m);
    sum.s[0] += e;
    POTSTILL_UNROLL
    for (int t = 1; t < kSums; ++t) {
      if (t > call.n_temperatures) break;
      e = 0;
      POTSTILL_UNROLL
      for (int i = 0; i < kGroup; ++i) e += exp((z[i] - sum.m) * plan.inv_t[t - 1]);
      sum.s[t] += e;
    }
  }

  // The first threshold: at least k groups of this round reach it, if there are as many.
  POTSTILL_METHOD void sample(bool present) {
    POTSTILL_UNROLL
    for (int g = 0; g < kColumns / kGroup; ++g) {
      float v[kGroup], most = -infinity();
      POTSTILL_UNROLL
      for (int i = 0; i < kGroup; ++i) v[i] = z(g * kGroup + i), most = larger(most, v[i]);
      int first = -1;
      POTSTILL_UNROLL
      for (int i = kGroup - 1; i >= 0; --i) {
        const int j = column(at, g * kGroup + i);
        if ((v[i] == most || v[i] != v[i]) && row.has(j)) first = j;
      }
      buffer.keys[block.thread * (kColumns / kGroup) + g] = present && first >= 0 ? key_of(most, first) : 0;
    }
    buffer.start_at_kth(block.threads * (kColumns / kGroup));
  }

  // Looks at this round's columns; those not yet above the threshold are summed. Returns the others, a bit for each.
  POTSTILL_METHOD uint32_t visit(int* counter) {
    uint32_t pending = 0;
    POTSTILL_UNROLL
    for (int g = 0; g < kColumns / kGroup; ++g) {
      float v[kGroup], most = -infinity();
      POTSTILL_UNROLL
      for (int i = 0; i < kGroup; ++i) v[i] = z(g * kGroup + i), most = larger(most, v[i]);
      if (!Plain && call.tokens) {
        POTSTILL_UNROLL
        for (int i = 0; i < kGroup; ++i) rank += v[i] > given;  // an absent column is -inf
      }
      if (may_pass(buffer.threshold, most, column(at, g * kGroup))) {
        most = -infinity();
        POTSTILL_UNROLL
        for (int i = 0; i < kGroup; ++i) {
          const int j = column(at, g * kGroup + i);
          const Key key = key_of(v[i], j);
          if (key > buffer.threshold.key && row.has(j)) {
            pending |= 1u << (g * kGroup + i);
            buffer.put(block.add(counter, 1), key);
            v[i] = -infinity();
          }
          most = larger(most, v[i]);
        }
      }
      grow(v, most);
    }
    return pending;
  }

  POTSTILL_METHOD void cut() {
    const Dropped dropped = buffer.cut();
    const float base = dropped.most == -infinity() ? 0 : dropped.most;
    Sum other = Sum::none();
    other.m = dropped.most;
    if (dropped.most < infinity()) {
      POTSTILL_UNROLL
      for (int t = 0; t < kSums; ++t) {
        if (t && t > call.n_temperatures) break;
        const float inv_t = t ? plan.inv_t[t - 1] : 1.0f;
        uint64_t total = 0;  // of terms from 0 to 1: one of them is 1
        for (int i = call.k + block.thread; i < dropped.end; i += block.threads)
          total += static_cast<uint64_t>(exp((value_of(buffer.keys[i]) - base) * inv_t) * kUnit);
        total = block.reduce(total, [](uint64_t a, uint64_t b) { return a + b; });
        other.s[t] = static_cast<float>(total) / kUnit;
      }
    } else {
      for (int t = 0; t < kSums; ++t) other.s[t] = NAN;  // infinities outside the k, or a NaN
    }
    if (block.thread == 0 && !(other.s[0] == 0)) sum = merged(sum, other);
    block.sync();  // the keys were read
  }

  POTSTILL_METHOD Sum merged(const Sum& a, const Sum& b) const { return Sum::merged(a, b, plan.inv_t); }

  // The round's hits did not fit: a group at a time, the buffer cut before each.
  POTSTILL_METHOD void crowd(uint32_t pending, int chunk) {
    int* counter = buffer.shared->counters + 3;
    for (int g = 0; g < kColumns / kGroup; ++g) {
      if (buffer.filled > call.k) cut();
      if (block.thread == 0) *counter = 0;
      block.sync();
      for (int i = 0; i < kGroup; ++i) {
        const int e = g * kGroup + i;
        if (!(pending >> e & 1)) continue;
        const int j = column(chunk, e);
        float v[kGroup] = {logit<Plain>(call.logits, widen(row.row[j]))};
        const Key key = key_of(v[0], j);
        if (key > buffer.threshold.key) {
          buffer.put(block.add(counter, 1), key);
        } else {
          for (int l = 1; l < kGroup; ++l) v[l] = -infinity();
          grow(v, v[0]);
        }
      }
      block.sync();
      buffer.filled += *counter;
      block.sync();
    }
  }

  POTSTILL_METHOD void run(int64_t i) {
    const int team = block.thread / Block::kTeam, teams = block.threads / Block::kTeam;
    const int rounds = (plan.chunks + teams - 1) / teams;
    const int advance = static_cast<int>(static_cast<int64_t>(teams) * plan.step % plan.chunks);
    start = block.thread % Block::kTeam * Row::kWide - row.head;
    at = static_cast<int>(static_cast<int64_t>(team) * plan.step % plan.chunks);
    const int64_t token = !Plain && call.tokens ? call.tokens[i] : -1;
    const bool known = token >= 0 && token < row.vocab;
    given = known ? logit<Plain>(call.logits, widen(row.row[token])) : infinity();
    if (block.thread == 0)
      for (int c = 0; c < 4; ++c) buffer.shared->counters[c] = 0;
    if (team < plan.chunks) load();
    sample(team < plan.chunks);
    for (int round = 0; round < rounds; ++round) {
      int* counters = buffer.shared->counters;
      if (block.thread == 0) counters[(round + 1) % 3] = 0;
      const int chunk = at;
      const uint32_t pending = round * teams + team < plan.chunks ? visit(counters + round % 3) : 0;
      at += advance;
      if (at >= plan.chunks) at -= plan.chunks;
      if ((round + 1) * teams + team < plan.chunks) load();  // on its way while the round ends
      block.sync();
      const int found = counters[round % 3];
      if (buffer.filled + found <= buffer.capacity) buffer.filled += found;
      else crowd(pending, chunk);
      if (buffer.filled >= buffer.enough) cut();
    }
    if (buffer.filled > call.k) cut();
    buffer.sort();
    write(i, known, token);
  }

  POTSTILL_METHOD void write(int64_t i, bool known, int64_t token) {
    const int k = static_cast<int>(call.k);
    const auto plus = [](float a, float b) { return a + b; };
    const float best = value_of(buffer.keys[0]), base = best == -infinity() ? 0 : best;
    sum = block.reduce(sum, [this](const Sum& a, const Sum& b) { return merged(a, b); });
    if (!Plain) rank = block.reduce(rank, [](int a, int b) { return a + b; });
    float log_total = 0;
    POTSTILL_UNROLL
    for (int t = 0; t < kSums; ++t) {
      if (t && t > call.n_temperatures) break;
      const float inv_t = t ? plan.inv_t[t - 1] : 1.0f;
      float top = 0;
      for (int e = block.thread; e < k; e += block.threads) top += exp((value_of(buffer.keys[e]) - base) * inv_t);
      top = block.reduce(top, plus);
      // an infinity among the k outweighs every other entry; with nothing but -inf nothing is defined
      const bool finite = best < infinity() && best > -infinity(), none = sum.s[t] == 0;
      const float log_all = finite ? logf(top + (none ? 0 : sum.s[t] * exp((sum.m - best) * inv_t))) : 0;
      const float rest = none ? (best > -infinity() ? -infinity() : NAN) : (sum.m - best) * inv_t + (logf(sum.s[t]) - log_all);
      float* out = static_cast<float*>(t ? call.log_rest_at : call.log_rest) + (t ? (t - 1) * call.rows : 0) + i;
      if (block.thread == 0) *out = best != best ? best : rest;
      if (!t) log_total = log_all;
    }
    for (int e = block.thread; e < k; e += block.threads) {
      const Key key = buffer.keys[e];
      call.ids[i * k + e] = column_of(key);
      static_cast<float*>(call.log_probs)[i * k + e] = best != best ? best : (value_of(key) - best) - log_total;
    }
    if (block.thread) return;
    static_cast<float*>(call.lse)[i] = best + log_total;
    if (Plain || !call.tokens) return;
    // checked at the public edge; an id past the vocabulary is NaN, never a stray read
    const float missing = token < 0 ? -infinity() : NAN;
    static_cast<float*>(call.token_log_probs)[i] = known ? (best != best ? best : (given - best) - log_total) : missing;
    call.token_ranks[i] = known ? rank : -1;
  }
};

template <class T, bool Plain, class Block>
POTSTILL_FN void topk_row(Block& block, const TopkPlan& plan, int64_t i) {
  const int k = static_cast<int>(plan.rows.k);
  TopkRow<T, Plain, Block> row{block, plan, plan.rows, PackedRow<T>::of(plan.rows.logits, i), Buffer<Block>(block, k)};
  row.run(i);
}

}  // namespace gpu
}  // namespace potstill
