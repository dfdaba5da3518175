// Sums of token log-probabilities over the chunks of an alignment, and their gradient. Values above 0 count 0.
#pragma once
#include <cstdint>

namespace potstill {

// sums[c] = sum of values[n] over starts[c] <= n < ends[c] with chunk[n] == c; added in fp64
template <class C>
void chunk_sums(const C* values, const int32_t* chunk, const int64_t* starts, const int64_t* ends, int64_t count, C* sums) {
  for (int64_t c = 0; c < count; ++c) {
    double total = 0;
    for (int64_t n = starts[c]; n < ends[c]; ++n)
      if (chunk[n] == c && !(values[n] > 0)) total += static_cast<double>(values[n]);  // NaN stays
    sums[c] = static_cast<C>(total);
  }
}

// out[n] = grad[chunk[n]], or 0 where the token is in no chunk or was cut off at 0
template <class C>
void chunk_gradient(const C* grad, const C* values, const int32_t* chunk, int64_t tokens, C* out) {
  for (int64_t n = 0; n < tokens; ++n) out[n] = chunk[n] >= 0 && values[n] <= 0 ? grad[chunk[n]] : C(0);
}

}  // namespace potstill
