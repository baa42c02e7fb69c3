// Parameters and launcher of the CUDA kernels for an inverted residual block; plain enough for a
// host compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/params.h"

namespace edet::cuda {

// Whether there are kernels for a block's maps: floats, or 16-bit numbers with an even number of
// channels in the middle. Other maps must be made floats.
bool mbconv_takes(const MbconvParams& params);

// What a call needs beside MbconvParams, whose mid, sums and gate then are in the device's memory.
struct MbconvMemory {
  int64_t mid_bytes;     // (n, out_h·out_w, c_mid) of the maps' type
  int64_t sums_bytes;    // (n, blocks of an image, c_reduced) floats; 0 without squeeze-excite
  int64_t gate_bytes;    // (n, c_mid) floats
  int64_t split_bytes;   // of the projection, if its channels are shared out: sums and counters
  int64_t buffer_bytes;  // of maps of 16 bits: the expanded map, and gemm's weights
};
MbconvMemory mbconv_memory(const MbconvParams& params);

// Launches on `stream` of the current device, for maps that mbconv_takes, params.input aligned to
// 16 bytes: expand, through memory or where it is convolved; depthwise and pooled sums; the gates,
// with squeeze-excite; then gate, project and residual. Fields of MbconvParams that cut the CPU's
// work are not read.
cudaError_t mbconv(const MbconvParams& params, void* split, void* buffer, cudaStream_t stream);

}  // namespace edet::cuda
