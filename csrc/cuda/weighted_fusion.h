// Parameters and launcher of the CUDA kernel for weighted fusion; plain enough for a host compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/params.h"

namespace edet::cuda {

// Rows and columns of a fusion's output at most, so that (row · rows of an input) fits 32 bits;
// memory offsets have 64.
constexpr int64_t kMostSide = 65535;

// activation(Σ aᵢ·resize(edgeᵢ)) as a map (N, h, w, C). All pointers are to the device's memory.
struct WeightedFusionParams {
  DType dtype;
  Activation activation;
  int64_t n, c, h, w;
  int edges;
  Edge edge[kMaxEdges];
  EdgeWeights weights;
  void* out;
};

// Launches on `stream` of the current device; `out` may not overlap an input.
cudaError_t weighted_fusion(const WeightedFusionParams& params, cudaStream_t stream);

}  // namespace edet::cuda
