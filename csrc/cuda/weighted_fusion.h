// Parameters and launcher of the CUDA kernel for weighted fusion; plain enough for a host compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/params.h"

namespace edet::cuda {

// Rows and columns of the output at most, so that (row · rows of an input) fits 32 bits; memory
// offsets have 64.
constexpr int64_t kMostSide = 65535;

// activation(Σ aᵢ·resize(edgeᵢ)) as a map (N, h, w, C). All pointers are to the device's memory.
struct WeightedFusionParams {
  DType dtype;
  Fusion fusion;
  Activation activation;
  int edges;
  int64_t n, c, h, w;
  Edge edge[kMaxEdges];
  const float* edge_weights;  // (edges) or (edges, C); not read for Fusion::sum
  bool per_channel;
  void* out;
};

// Launches on `stream` of the current device; `out` may not overlap an input.
cudaError_t weighted_fusion(const WeightedFusionParams& params, cudaStream_t stream);

}  // namespace edet::cuda
