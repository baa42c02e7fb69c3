// Launcher of the CUDA kernels for detections from head outputs; plain enough for a host compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/params.h"

namespace edet::cuda {

// Launches on `stream` of the current device, without waiting for it. `memory` has detect_bytes().
int64_t detect_bytes(const DetectParams& params);
cudaError_t detect(const DetectParams& params, void* memory, cudaStream_t stream);

}  // namespace edet::cuda
