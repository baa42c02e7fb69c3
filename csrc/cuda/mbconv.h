// Parameters and launcher of the CUDA kernels for an inverted residual block; plain enough for a
// host compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/params.h"

namespace edet::cuda {

// What a call needs beside MbconvParams, whose mid, sums and gate then are in the device's memory.
struct MbconvMemory {
  int64_t mid_bytes;      // (n, out_h·out_w, c_mid) of the maps' type
  int64_t sums_bytes;     // (n, tiles, c_mid) floats
  int64_t gate_bytes;     // (n, c_mid) floats; 0 without squeeze-excite
  int64_t counter_bytes;  // (n) ints
};
MbconvMemory mbconv_memory(const MbconvParams& params);

// Two launches on `stream` of the current device: expand, depthwise, pooled sums and, in the last
// block of each image, squeeze-excite; then gate, project and residual. Fields of MbconvParams that
// cut the CPU's work are not read.
cudaError_t mbconv(const MbconvParams& params, int* counters, cudaStream_t stream);

}  // namespace edet::cuda
