// What the instruction-set builds (*_isa.cpp) offer to the bindings. No torch: addresses, sizes, strides in elements.
#pragma once
#include <cstdint>

namespace potstill {

enum class Dtype : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// Raw logits x become z = softcap * tanh(scale * x / softcap), or scale * x where softcap is 0.
struct Side {
  const void* data;
  int64_t stride;  // elements from row to row; columns are dense
  Dtype dtype;
  int64_t vocab;  // columns that are real; the others are padding
  double scale, softcap;
};

// One call's rows; see potstill/rows.py for the meaning. Results and coef are fp64 where the student is, else fp32.
struct Rows {
  int64_t rows, columns;  // columns: the student's physical width
  Side student;
  const void* coef;       // [rows]
  const int64_t* labels;  // [rows] or null
  int divergence;
  double params[2];
  double centre, temperature, distill_weight, ce_weight;
  void* grad;  // [rows, columns] of the student's dtype, may be the student's own memory; or null
  int64_t grad_stride;
  void* out;  // [2, rows]
};

enum class Tail : int { bucket = 0, renormalize = 1, drop = 2, sampled = 3 };

struct DenseRows : Rows {
  Side teacher;
};

struct SparseRows : Rows {
  const int64_t* ids;     // [rows, k], -1 for a missing entry
  const void* log_probs;  // [rows, k], as coef
  const void* log_rest;   // [rows], as coef; null unless tail is bucket
  const void* weights;    // [rows, k], as coef; null unless tail is sampled
  int64_t k;
  Tail tail;
};

// A part of the vocabulary; see potstill/rows_parts.py. `out` is not used; ids and labels count from the part's first column.
enum class PartStep : int { lse = 0, dense_sums = 1, dense_grad = 2, sparse_grad = 3 };

struct PartRows : Rows {
  PartStep step;
  Side teacher;
  const double *lse_s, *lse_t, *lse_1;  // [rows]; lse_t is lse_rest for sparse_grad
  const double *a, *b;                  // [rows]: total and weight, or outside and rest
  const int64_t* ids;                   // [rows, k]
  const void* entries;                  // [rows, k], as coef
  int64_t k;
  double* sums;  // [rows] log-sum-exps, or [2, rows]
};

struct TopkRows {
  int64_t rows, k;
  Side logits;
  int32_t* ids;                           // [rows, k]
  void *log_probs, *log_rest, *lse;       // [rows, k], [rows], [rows]; fp64 for fp64 logits, else fp32
  const int64_t* tokens;                  // [rows] or null; a negative one is missing
  void* token_log_probs;                  // [rows], as lse
  int32_t* token_ranks;                   // [rows]
  const double* temperatures;             // [n_temperatures]
  int64_t n_temperatures;
  void* log_rest_at;                      // [n_temperatures, rows], as lse
};

// What is asked about k given tokens of each row; any result address may be null.
struct TokenRows {
  int64_t rows, columns, k;  // columns: the logits' physical width
  Side logits;
  const int64_t* tokens;   // [rows, k] or null; a negative one counts 0, a row of them is not looked at: all 0, gradient 0
  const uint8_t* subset;   // [vocab], 0 or 1; or null
  void *log_probs, *entropy, *log_mass, *lse;           // [rows, k], else [rows]; fp64 for fp64 logits, else fp32
  const void *d_log_probs, *d_entropy, *d_log_mass;     // as above: what comes in for each result; or null
  void* grad;  // [rows, columns] of the logits' dtype, may be the logits' own memory; or null
  int64_t grad_stride;
};

// n draws a row from softmax(z / temperature), with replacement; see potstill/reference/sample.py for the numbers.
struct SampleRows {
  int64_t rows, n;
  Side logits;
  double temperature;
  uint64_t seed;
  int64_t first_row;         // the number of the first row
  int32_t *ids, *counts;     // [rows, n]
  void *log_probs, *lse;     // [rows, n], [rows]; fp64 for fp64 logits, else fp32
};

// The entry points of one instruction set; each handles rows [begin, end).
struct Kernels {
  const char* name;
  void (*dense)(const DenseRows&, int64_t begin, int64_t end);
  void (*sparse)(const SparseRows&, int64_t begin, int64_t end);
  void (*topk)(const TopkRows&, int64_t begin, int64_t end);
  void (*tokens)(const TokenRows&, int64_t begin, int64_t end);
  void (*sample)(const SampleRows&, int64_t begin, int64_t end);
  void (*part)(const PartRows&, int64_t begin, int64_t end);
};

// Index of a divergence in the compiled table, or -1.
int find_divergence(const char* name, int* parameters);

}  // namespace potstill
