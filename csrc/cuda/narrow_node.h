// Launcher of the CUDA kernel for fusion nodes of few channels and many pixels; plain enough for a
// host compiler.
#pragma once

#include "fusion_node.h"

namespace edet::cuda {

// Whether narrow_node computes a node: 16-bit maps of at most 64 channels, before and after, of a
// kind that kernels are compiled for, and pixels for many blocks.
bool is_narrow_node(const FusionNodeParams& params, int capability);

// As fusion_node, for such a node.
cudaError_t narrow_node(const FusionNodeParams& params, cudaStream_t stream, bool pdl);

}  // namespace edet::cuda
