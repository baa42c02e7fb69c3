// Launcher of the CUDA kernel for the first layer; plain enough for a host compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/params.h"

namespace edet::cuda {

// Launches on `stream` of the current device, where all pointers point.
cudaError_t stem(const StemParams& params, cudaStream_t stream);

}  // namespace edet::cuda
