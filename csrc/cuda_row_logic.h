// One row by one block of threads: what rows.cu runs on a device. Needs a Block, which has
//   thread, threads      this thread's number, and how many there are
//   reduce(x, op)        op over every thread's x (a struct of floats), the same result in all
//   sync()               a barrier
//   memory               bytes shared by the threads, for a sparse row: 4 * mask_words zeroed, then 4 * k
// so that a host build can run the same code (tests/kernels/host_rows.cpp). See potstill/rows.py for the meaning.
//
// Passes over a row: dense 1 max and sum of both sides, 2 terms and slope sum, 3 gradient; sparse 1 max and sum of the
// student, 2 gradient, then the K entries over it. The rest of a bucket row is summed from the columns outside the K,
// which a bit mask of the vocabulary in shared memory marks, so that nothing is subtracted.
#pragma once
#include "cuda_numbers.h"

namespace potstill {
namespace gpu {

// One side of one row, its numbers in fp32.
struct Logits {
  const char* row;
  Dtype dtype;
  int64_t vocab;
  float scale, softcap;

  POTSTILL_FN Logits of(const Side& side, int64_t row) {
    return {static_cast<const char*>(side.data) + row * side.stride * bytes(side.dtype), side.dtype, side.vocab,
            static_cast<float>(side.scale), static_cast<float>(side.softcap)};
  }
};

// Logits of kPack columns from j (-inf from the vocabulary's end on) and, if chain is given, their derivative by the raw ones.
POTSTILL_FN void read(const Logits& side, int64_t j, float* z, float* chain = nullptr) {
  load(side.dtype, side.row, j, side.vocab, z);
  for (int i = 0; i < kPack; ++i) {
    z[i] *= side.scale;
    if (chain) chain[i] = side.scale;
    if (side.softcap != 0) {
      const float t = tanhf(z[i] / side.softcap);
      z[i] = side.softcap * t;
      if (chain) chain[i] = side.scale * (1 - t * t);
    }
    if (j + i >= side.vocab) z[i] = -infinity();
  }
}

POTSTILL_FN float read_one(const Logits& side, int64_t j, float* chain = nullptr) {
  Logits one = side;
  one.row += j * bytes(side.dtype), one.vocab = 1;  // the other columns of the pack are not read
  float z[kPack], c[kPack];
  read(one, 0, z, c);
  if (chain) *chain = c[0];
  return z[0];
}

// m = max z, s = sum exp((z - m) / T), s1 = sum exp(z - m); log-probability = (z - m) / T - log s.
struct LogSum {
  float m, s, s1;

  POTSTILL_FN LogSum none() { return {-infinity(), 0, 0}; }
};

POTSTILL_FN void grow(LogSum& sum, const float* z, int n, float inv_t) {
  float m = sum.m;
  for (int i = 0; i < n; ++i) m = fmaxf(m, z[i]);
  const float base = m == -infinity() ? 0 : m;
  sum.s *= exp((sum.m - base) * inv_t);
  sum.s1 *= exp(sum.m - base);
  for (int i = 0; i < n; ++i) {
    const float e = exp((z[i] - base) * inv_t);
    sum.s += e;
    sum.s1 += inv_t == 1 ? e : exp(z[i] - base);
  }
  sum.m = m;
}

struct Merge {
  float inv_t;

  POTSTILL_FN LogSum merged(const LogSum& a, const LogSum& b, float inv_t) {
    const float m = fmaxf(a.m, b.m), base = m == -infinity() ? 0 : m;
    return {m, a.s * exp((a.m - base) * inv_t) + b.s * exp((b.m - base) * inv_t),
            a.s1 * exp(a.m - base) + b.s1 * exp(b.m - base)};
  }
};

struct Sums {
  float term, slope;
};

// The cross-entropy at T = 1 and the gradient's last steps.
struct Target {
  bool wanted;
  int64_t label;
  float m, log_s1, weight;
};

POTSTILL_FN Target target_of(const Rows& call, int64_t row, const LogSum& sum) {
  const bool wanted = call.ce_weight != 0 && call.labels;
  return {wanted, wanted ? call.labels[row] : -1, sum.m, logf(sum.s1), static_cast<float>(call.ce_weight)};
}

POTSTILL_FN float cross_entropy(const Target& t, const Logits& student) {
  if (!t.wanted) return 0;
  if (t.label < 0 || t.label >= student.vocab) return NAN;  // checked at the public edge; no stray read
  return t.log_s1 - (read_one(student, t.label) - t.m);
}

POTSTILL_FN float finished(const Target& t, float dz, float z, int64_t j, float chain, float coef) {
  if (t.wanted) dz += t.weight * (exp(z - t.m - t.log_s1) - (j == t.label ? 1.0f : 0.0f));
  return coef * dz * chain;
}

// A row whose coef is 0 is not looked at: results 0, gradient 0.
template <class Block>
POTSTILL_FN bool skip(const Block& block, const Rows& call, int64_t row, void* grad, Dtype grad_dtype) {
  if (static_cast<const float*>(call.coef)[row] != 0) return false;
  float* out = static_cast<float*>(call.out);
  if (block.thread == 0) out[row] = out[call.rows + row] = 0;
  const float zero[kPack] = {};
  if (grad)
    for (int64_t j = int64_t(block.thread) * kPack; j < call.columns; j += int64_t(block.threads) * kPack)
      store(grad_dtype, grad, j, call.columns, zero);
  return true;
}

POTSTILL_FN void* grad_row(const Rows& call, int64_t row, Dtype dtype) {
  return call.grad ? static_cast<char*>(call.grad) + row * call.grad_stride * bytes(dtype) : nullptr;
}

struct Add {
  POTSTILL_FN Sums added(const Sums& a, const Sums& b) { return {a.term + b.term, a.slope + b.slope}; }
};

template <class Block, class F>
POTSTILL_FN void dense_row(Block& block, const DenseRows& call, Dtype grad_dtype, const F& formula, int64_t row) {
  void* grad = grad_row(call, row, grad_dtype);
  if (skip(block, call, row, grad, grad_dtype)) return;
  const Logits student = Logits::of(call.student, row), teacher = Logits::of(call.teacher, row);
  const float inv_t = static_cast<float>(1 / call.temperature), centre = static_cast<float>(call.centre);
  const int64_t first = int64_t(block.thread) * kPack, step = int64_t(block.threads) * kPack;
  const auto merge = [inv_t](const LogSum& a, const LogSum& b) { return Merge::merged(a, b, inv_t); };

  LogSum sq = LogSum::none(), sp = LogSum::none();
  float zq[kPack], zp[kPack], chain[kPack];
  for (int64_t j = first; j < student.vocab; j += step) {
    read(student, j, zq);
    read(teacher, j, zp);
    grow(sq, zq, kPack, inv_t);
    grow(sp, zp, kPack, inv_t);
  }
  sq = block.reduce(sq, merge);
  sp = block.reduce(sp, merge);
  const float log_sq = logf(sq.s), log_sp = logf(sp.s);

  Sums sums{0, 0};
  for (int64_t j = first; j < student.vocab; j += step) {
    read(student, j, zq);
    read(teacher, j, zp);
    for (int i = 0; i < kPack && j + i < student.vocab; ++i) {
      const float lq = (zq[i] - sq.m) * inv_t - log_sq, lp = (zp[i] - sp.m) * inv_t - log_sp;
      const two<float> r = formula(lp, lq);
      sums.term += r.a + centre * (exp(lq) - exp(lp));
      sums.slope += r.b;
    }
  }
  const Target target = target_of(call, row, sq);
  const float ce = cross_entropy(target, student);
  sums = block.reduce(sums, [](const Sums& a, const Sums& b) { return Add::added(a, b); });
  const two<float> result = outer<float>(call.divergence, sums.term, sums.slope, call.params);
  if (block.thread == 0) {
    static_cast<float*>(call.out)[row] = result.a;
    static_cast<float*>(call.out)[call.rows + row] = ce;
  }
  if (!grad) return;
  // `grad` may be the student: each thread reads its columns, then writes them
  const float coef = static_cast<const float*>(call.coef)[row];
  const float weight = static_cast<float>(call.distill_weight) * inv_t * result.b;
  for (int64_t j = first; j < call.columns; j += step) {
    read(student, j, zq, chain);
    read(teacher, j, zp);
    for (int i = 0; i < kPack; ++i) {
      const float lq = (zq[i] - sq.m) * inv_t - log_sq, lp = (zp[i] - sp.m) * inv_t - log_sp;
      const float dz = weight * (formula(lp, lq).b - exp(lq) * sums.slope);
      zq[i] = j + i < student.vocab ? finished(target, dz, zq[i], j + i, chain[i], coef) : 0.0f;
    }
    store(grad_dtype, grad, j, call.columns, zq);
  }
}

// 32-bit words of a sparse row's mask, a bit for each column; 16-byte blocks of them.
POTSTILL_FN int64_t mask_words(const SparseRows& call) { return (call.student.vocab + 127) / 128 * 4; }

template <class Block, class F>
POTSTILL_FN void sparse_row(Block& block, const SparseRows& call, Dtype grad_dtype, const F& formula, int64_t row) {
  void* grad = grad_row(call, row, grad_dtype);
  if (skip(block, call, row, grad, grad_dtype)) return;
  const Logits student = Logits::of(call.student, row);
  const float inv_t = static_cast<float>(1 / call.temperature), centre = static_cast<float>(call.centre);
  const bool bucket = call.tail == Tail::bucket, inner = call.tail == Tail::renormalize;
  const int64_t first = int64_t(block.thread) * kPack, step = int64_t(block.threads) * kPack;
  const int64_t* ids = call.ids + row * call.k;
  const float* log_probs = static_cast<const float*>(call.log_probs) + row * call.k;
  const float* entry_weights = call.weights ? static_cast<const float*>(call.weights) + row * call.k : nullptr;
  const auto merge = [inv_t](const LogSum& a, const LogSum& b) { return Merge::merged(a, b, inv_t); };
  uint32_t* mask = reinterpret_cast<uint32_t*>(block.memory);
  float* entry_grad = reinterpret_cast<float*>(mask + mask_words(call));

  LogSum members = LogSum::none(), others = LogSum::none();
  for (int64_t i = block.thread; i < call.k; i += block.threads) {
    if (ids[i] < 0) continue;
    float z = NAN;  // an id past the vocabulary: refused at the public edge, never a stray read
    if (ids[i] < student.vocab) {
      z = read_one(student, ids[i]);
      if (bucket) set_bit(mask, ids[i]);
    }
    grow(members, &z, 1, inv_t);
  }
  members = block.reduce(members, merge);  // and the mask is whole
  if (!inner || call.ce_weight != 0) {
    float z[kPack];
    for (int64_t j = first; j < student.vocab; j += step) {
      read(student, j, z);
      const uint32_t marked = bucket ? mask[j / 32] >> (j % 32) & 0xff : 0;
      for (int i = 0; i < kPack; ++i) z[i] = marked >> i & 1 ? -infinity() : z[i];
      grow(others, z, kPack, inv_t);
    }
    others = block.reduce(others, merge);
  }
  const LogSum all = bucket ? Merge::merged(others, members, inv_t) : others;
  const LogSum norm = inner ? members : all;
  const float log_s = logf(norm.s), lq_rest = (others.m - all.m) * inv_t + (logf(others.s) - logf(all.s));

  Sums sums{0, 0};
  for (int64_t i = block.thread; i < call.k; i += block.threads) {
    if (ids[i] < 0) continue;
    const float z = ids[i] < student.vocab ? read_one(student, ids[i]) : NAN;
    const float lp = log_probs[i], lq = (z - norm.m) * inv_t - log_s;
    const two<float> r = formula(lp, lq);
    const float w = entry_weights ? entry_weights[i] : 1;
    sums.term += w * (r.a + centre * (exp(lq) - exp(lp)));
    sums.slope += w * r.b;
  }
  float rest_slope = 0;
  if (bucket) {
    const float lp = static_cast<const float*>(call.log_rest)[row];
    const two<float> r = formula(lp, lq_rest);
    rest_slope = r.b;
    if (block.thread == 0) sums.term += r.a + centre * (exp(lq_rest) - exp(lp)), sums.slope += r.b;
  }
  const Target target = target_of(call, row, all);
  const float ce = cross_entropy(target, student);
  sums = block.reduce(sums, [](const Sums& a, const Sums& b) { return Add::added(a, b); });
  const two<float> result = outer<float>(call.divergence, sums.term, sums.slope, call.params);
  if (block.thread == 0) {
    static_cast<float*>(call.out)[row] = result.a;
    static_cast<float*>(call.out)[call.rows + row] = ce;
  }
  if (!grad) return;
  const float coef = static_cast<const float*>(call.coef)[row];
  const float weight = static_cast<float>(call.distill_weight) * inv_t * result.b;
  for (int64_t i = block.thread; i < call.k; i += block.threads) {
    if (ids[i] < 0 || ids[i] >= student.vocab) continue;
    float chain;
    const float z = read_one(student, ids[i], &chain), lq = (z - norm.m) * inv_t - log_s;
    const float w = entry_weights ? entry_weights[i] : 1;
    const float dz = weight * (w * formula(log_probs[i], lq).b - exp(lq) * sums.slope);
    entry_grad[i] = finished(target, dz, z, ids[i], chain, coef);
  }
  block.sync();  // the entries were read before the row is written over
  const float log_all = logf(all.s);
  for (int64_t j = first; j < call.columns; j += step) {
    float z[kPack], chain[kPack];
    if (!inner || target.wanted) read(student, j, z, chain);
    for (int i = 0; i < kPack; ++i) {
      float dz = 0;
      if (!inner) {
        const float lq = (z[i] - all.m) * inv_t - log_all;
        dz = -exp(lq) * sums.slope;
        if (bucket) dz += rest_slope * (lq == -infinity() ? 0 : exp(lq - lq_rest));
        dz *= weight;
      }
      const bool inside = j + i < student.vocab && (!inner || target.wanted);
      z[i] = inside ? finished(target, dz, z[i], j + i, chain[i], coef) : 0.0f;
    }
    store(grad_dtype, grad, j, call.columns, z);
  }
  block.sync();  // the entries go over what the loop wrote
  for (int64_t i = block.thread; i < call.k; i += block.threads) {
    if (ids[i] < 0 || ids[i] >= student.vocab) continue;
    const float one[kPack] = {entry_grad[i]};
    store(grad_dtype, static_cast<char*>(grad) + ids[i] * bytes(grad_dtype), 0, 1, one);
  }
}

}  // namespace gpu
}  // namespace potstill
