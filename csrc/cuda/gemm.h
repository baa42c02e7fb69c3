// Parameters and launchers of the CUDA kernel for large products of 16-bit rows; plain enough for a
// host compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/params.h"

namespace edet::cuda {

// Rows that a launch multiplies, with their own folded batch norm.
struct GemmRows {
  const void* input;  // (rows, k), aligned to 16 bytes
  int64_t rows;
  const float *scale, *shift;  // (n)
  void* out;                   // (rows, n)
};

// activation(scale · (gate · rows) W + shift) (+ residual). All pointers are to the device's
// memory.
struct GemmParams {
  DType dtype;    // f16 or bf16
  int64_t k, n;   // k is a multiple of 8
  const void* w;  // (k, n rounded up to 8) of the maps' type, from pack_weights
  Activation activation;
  int levels;
  GemmRows level[kMaxLevels];
  // Of a launch of one level, or null:
  const float* gate;     // (rows / image_rows, k)
  int64_t image_rows;    // of one image
  const void* residual;  // (rows, n)
};

// Weights as `gemm` reads them, of packed ones.
struct GemmWeights {
  const float* packed;  // (⌈n/16⌉, k, 16), aligned to 16 bytes
  int64_t k, n;
  void* to;  // (k, n rounded up to 8) of the maps' type, aligned to 16 bytes
};
inline int64_t gemm_weight_bytes(int64_t k, int64_t n) { return k * round_up(n, 8) * 2; }

// Whether `gemm` can multiply such rows on the current device; image_rows: of one image where they
// are gated, otherwise 0.
bool gemm_can(DType dtype, int64_t k, int64_t image_rows);
// Whether it is also the fastest way: there is work for all multiprocessors, and enough to be worth
// the launch that packs the weights.
bool gemm_pays(DType dtype, int64_t rows, int64_t k, int64_t n, int64_t image_rows);

// Both launch on `stream` of the current device. `pdl`: the launch may begin while the one before
// it still runs (from compute capability 9.0).
constexpr int kMostGemmWeights = 64;
cudaError_t pack_weights(DType dtype, const GemmWeights* weights, int count, cudaStream_t stream,
                         bool pdl = false);
cudaError_t gemm(const GemmParams& params, cudaStream_t stream, bool pdl = false);

}  // namespace edet::cuda
