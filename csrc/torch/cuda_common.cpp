// The current stream and the reporting of launch errors, without linking libtorch_cuda.
#include "cuda_common.h"

// It lives in libtorch_cuda, which a CPU-only torch does not have: a strong reference would keep
// the library from loading there. It resolves because libtorch.so, in our NEEDED list, brings
// libtorch_cuda in where there is one.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace edet::torch_ops {

cudaStream_t current_stream(torch::stable::accelerator::DeviceIndex device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch was built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error != cudaErrorNoKernelImageForDevice, op,
                  ": the op library holds no code for this GPU; edet_kernels.library.status() says "
                  "what it was built for, EDET_CUDA_ARCHS builds it for another");
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

}  // namespace edet::torch_ops
