// What the CUDA glue of every op shares: the current stream and the reporting of launch errors.
#pragma once

#include <cuda_runtime_api.h>

#include "common.h"

namespace edet::torch_ops {

// torch's current stream on `device`.
cudaStream_t current_stream(torch::stable::accelerator::DeviceIndex device);

// Raises when a launch failed; `op` is named in the message.
void check_launch(cudaError_t error, const char* op);

}  // namespace edet::torch_ops
