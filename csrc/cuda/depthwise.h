// Launcher of the CUDA kernel for a block's depthwise convolution, of a map that is expanded
// already; plain enough for a host compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/params.h"

namespace edet::cuda {

// The most rows of c_reduced sums that depthwise() writes to params.sums for an image, on any GPU.
int64_t depthwise_most_parts(const MbconvParams& params);

// Convolves so many `images` of `input` (n, h, w, c_mid), 16-bit numbers of an even number of
// channels, aligned to four bytes, cut as for all of params.n; scales, shifts and activates:
// params.mid (n, out_h, out_w, c_mid). With squeeze-excite, the pooled sums times the reducing
// weights go to params.sums as (n, *parts, c_reduced): their sums over an image's parts are what
// `reduce` makes of its sums. `pdl`: the launch may begin while the one before it, which writes the
// input, still runs (from compute capability 9.0).
cudaError_t depthwise(const MbconvParams& params, const void* input, int64_t images,
                      cudaStream_t stream, int* parts, bool pdl = false);

}  // namespace edet::cuda
