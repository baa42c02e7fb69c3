// Parameters and launcher of the CUDA kernel for fusion nodes and separable convolutions; plain
// enough for a host compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "weighted_fusion.h"

namespace edet::cuda {

// One map that a launch computes, with its own folded batch norm.
struct NodeLevel {
  int64_t h, w;
  const float *scale, *shift;  // (c_out)
  void* out;                   // (N, h, w, c_out)
};

// post_activation(scale · pw(dw(pre_activation(Σ aᵢ·resize(edgeᵢ)))) + shift). Either one level
// with up to kMaxEdges edges, or up to kMaxLevels levels with one edge each, of the level's index.
// All pointers are to the device's memory.
struct FusionNodeParams {
  DType dtype;
  bool tf32;  // whether floats may be multiplied as tf32 (from sm_80)
  Activation pre_activation, post_activation;
  int64_t n, c, c_out;
  int levels;
  NodeLevel level[kMaxLevels];
  int edges;
  Edge edge[kMaxEdges];
  EdgeWeights weights;
  const float* dw;  // (9, C)
  const float* pw;  // (⌈c_out/16⌉, C, 16), aligned to 16 bytes
};

// Launches on `stream` of the current device; no output may overlap an input. `pdl`: the
// launch may begin while the one before it, of this function too, still runs (from compute
// capability 9.0).
cudaError_t fusion_node(const FusionNodeParams& params, cudaStream_t stream, bool pdl = false);

}  // namespace edet::cuda
