// Parameters and launcher of the CUDA kernel for 1×1 projections, lateral's and the last layer of
// mbconv; plain enough for a host compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/params.h"

namespace edet::cuda {

// For each projection, activation(scale · W(gate · input) + shift) (+ residual), (rows, c_out). All
// pointers are to the device's memory; packed weights are aligned to 16 bytes.
struct ProjectionParams {
  DType dtype;
  bool tf32;          // whether floats may be multiplied as tf32 (from sm_80)
  const void* input;  // (rows, c_in), rows being pixels
  int64_t rows, c_in;
  int projections;
  Projection projection[kMaxEdges];
  Activation activation;
  const float* gate;     // (rows / image_rows, c_in), or null
  int64_t image_rows;    // of one image
  const void* residual;  // like the output of the only projection, or null
  // For a projection whose blocks are too few: memory of its own, or null.
  float* partial;
  int* counters;  // zeros when it begins
};

// What a projection of few blocks and many channels needs to share out its channels among blocks;
// nothing for another.
struct SplitMemory {
  int64_t partial_bytes;
  int counters;
};
SplitMemory split_memory(const ProjectionParams& params);

// Launches on `stream` of the current device; no output may overlap the input. `pdl`: the launch
// may begin while the one before it, which writes the input and the gates and nothing else that is
// read, still runs (from compute capability 9.0).
cudaError_t project(const ProjectionParams& params, cudaStream_t stream, bool pdl = false);

}  // namespace edet::cuda
