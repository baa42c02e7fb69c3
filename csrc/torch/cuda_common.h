// What the CUDA glue of every op shares: one call's device, stream, memory and errors.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <utility>

#include "common.h"

// The dispatch key of the CUDA kernels; emulated ones take the CPU's tensors.
#ifdef EDET_EMULATION
#define EDET_CUDA_KEY CPU
#else
#define EDET_CUDA_KEY CUDA
#endif

namespace edet::torch_ops {

// One op's call: its device is the current one meanwhile, and what its kernels read and write is
// kept until they are launched (after that torch's allocator keeps memory in the stream's order).
class CudaCall {
 public:
  // `op` is named in errors; `map` is on the call's device.
  CudaCall(const char* op, const Tensor& map);
  ~CudaCall();
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;

  cudaStream_t stream() const { return stream_; }

  // A map for kernels to read, in channels_last memory.
  const void* map(const Tensor& t);
  // A contiguous tensor to read.
  const void* read(const Tensor& t);
  // A tensor to read by its strides: itself, or in the emulation, which knows memory by arrays
  // without gaps, a copy of its contents.
  Tensor strided(const Tensor& t);
  // A weight of `numel` floats to read; an error names it.
  const float* floats(const Tensor& t, int64_t numel, const char* name);
  // A tensor for kernels to write.
  void* write(Tensor& t);
  // Memory for this call alone.
  void* scratch(int64_t bytes);

  // Raises when a launch failed.
  void check(cudaError_t error) const;

 private:
  const char* op_;
  Tensor like_;
  std::shared_ptr<void> guard_;
  cudaStream_t stream_ = nullptr;
  Tensors kept_;
};

// Whether this thread is in an op that multiplies floats as tf32.
bool in_tf32();

// Counts as in_tf32() while it lives.
class Tf32Scope {
 public:
  Tf32Scope();
  ~Tf32Scope();
  Tf32Scope(const Tf32Scope&) = delete;
  Tf32Scope& operator=(const Tf32Scope&) = delete;
};

// call is `op`, an op's function, in a Tf32Scope: the kernel of the same op in EDET_TF32_OPS.
template <auto op>
struct Tf32;
template <class Result, class... Arguments, Result (*op)(Arguments...)>
struct Tf32<op> {
  static Result call(Arguments... arguments) {
    const Tf32Scope scope;
    return op(std::move(arguments)...);
  }
};

// Factors of the fusion node's edges are computed by the kernels, from these.
const float* fusion_weights(CudaCall& call, const std::optional<Tensor>& edge_weights,
                            Fusion fusion, int64_t numel);

}  // namespace edet::torch_ops
