// Launcher of the CUDA kernel for the first layer; plain enough for a host compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/params.h"

namespace edet::cuda {

// Launches on `stream` of the current device, where all pointers point; with a mean,
// StemParams::inverse_std holds the standard deviations themselves.
cudaError_t stem(const StemParams& params, cudaStream_t stream);

}  // namespace edet::cuda
