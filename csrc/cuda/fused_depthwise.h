// Launcher of the CUDA kernel for the first half of a wide fusion node; plain enough for a host
// compiler.
#pragma once

#include "fusion_node.h"

namespace edet::cuda {

// Writes dw(pre_activation(Σ aᵢ·resize(edgeᵢ))) of all levels, (N, h, w, C) in the maps' type one
// after the other, to `out`, which is aligned to 16 bytes and overlaps no input. `pdl`: as
// fusion_node's.
cudaError_t fused_depthwise(const FusionNodeParams& params, void* out, cudaStream_t stream,
                            bool pdl = false);

}  // namespace edet::cuda
