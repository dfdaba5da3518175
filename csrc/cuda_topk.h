// What topk.cu offers to cuda_bindings.cpp. Addresses are the device's; see cuda_rows.h.
#pragma once
#include "kernels.h"

namespace potstill {

// Results are fp32; temperatures, at most 4, lie on the host. Returns null, or why nothing was launched.
const char* launch_topk(const TopkRows& call, uintptr_t stream);

}  // namespace potstill
