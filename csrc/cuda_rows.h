// What rows.cu offers to cuda_bindings.cpp: launches, and errors as sentences. Addresses are the device's.
#pragma once
#include "kernels.h"

namespace potstill {

// Results, coef, log_probs and log_rest are fp32. `stream` is a cudaStream_t. Returns null, or why nothing was launched.
const char* launch_dense(const DenseRows& call, Dtype grad, uintptr_t stream);
const char* launch_sparse(const SparseRows& call, Dtype grad, uintptr_t stream);

// Compute capabilities (as 800, 900, 1000) whose code is in this build.
const int* compiled_architectures(int* count);

}  // namespace potstill
