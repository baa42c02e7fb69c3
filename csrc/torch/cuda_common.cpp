// One call's device, stream, memory and errors, without linking libtorch_cuda; in the emulation,
// what kernels may read and write is what goes through here.
#include "cuda_common.h"

#include <string>

#include "../cuda/bifpn.h"

#ifdef EDET_EMULATION
#include <cstring>

#include "../emulation/emulator.h"
#else
// It lives in libtorch_cuda, which a CPU-only torch does not have: a strong reference would keep
// the library from loading there. It resolves because libtorch.so, in our NEEDED list, brings
// libtorch_cuda in where there is one.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace edet::torch_ops {

using torch::stable::clone;

namespace {

#ifdef EDET_EMULATION
void know(const Tensor& t, bool writable) {
  emulation::know_memory(t.const_data_ptr(), static_cast<size_t>(t.numel()) * t.element_size(),
                         writable);
}
#else
void know(const Tensor&, bool) {}
#endif

thread_local bool tf32 = false;

}  // namespace

bool in_tf32() { return tf32; }
Tf32Scope::Tf32Scope() { tf32 = true; }
Tf32Scope::~Tf32Scope() { tf32 = false; }

CudaCall::CudaCall(const char* op, const Tensor& map) : op_(op), like_(map) {
#ifndef EDET_EMULATION
  const auto device = map.get_device_index();
  guard_ = std::make_shared<torch::stable::accelerator::DeviceGuard>(device);
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch was built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
#endif
}

CudaCall::~CudaCall() {
#ifdef EDET_EMULATION
  emulation::forget_memory();
#endif
}

const void* CudaCall::read(const Tensor& t) {
  STD_TORCH_CHECK(t.get_device_index() == like_.get_device_index() && t.is_cpu() == like_.is_cpu(),
                  op_, ": all tensors must be on one device");
  kept_.push_back(t);
  know(t, false);
  return t.const_data_ptr();
}

Tensor CudaCall::strided(const Tensor& t) {
#ifdef EDET_EMULATION
  const Tensor array = clone(t);
#else
  const Tensor& array = t;
#endif
  read(array);
  return array;
}

const void* CudaCall::map(const Tensor& t) { return read(channels_last(t)); }

const float* CudaCall::floats(const Tensor& t, int64_t numel, const char* name) {
  Tensor weight = float_weight(t, numel, name);
  // kernels read 16 bytes at once; a view may begin anywhere
  if (reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16) weight = clone(weight);
  return static_cast<const float*>(read(weight));
}

void* CudaCall::write(Tensor& t) {
  kept_.push_back(t);
  know(t, true);
  return t.mutable_data_ptr();
}

void* CudaCall::scratch(int64_t bytes) {
  Tensor t = torch::stable::empty({&bytes, 1}, torch::headeronly::ScalarType::Byte, std::nullopt,
                                  like_.device());
#ifdef EDET_EMULATION
  if (!emulation::dry()) std::memset(t.mutable_data_ptr(), 0xff, static_cast<size_t>(bytes));
#endif
  return write(t);
}

void CudaCall::check(cudaError_t error) const {
  STD_TORCH_CHECK(error != cudaErrorNoKernelImageForDevice, op_,
                  ": the op library holds no code for this GPU; edet_kernels.library.status() says "
                  "what it was built for, EDET_CUDA_ARCHS builds it for another");
  const std::string overdue = error == cudaSuccess ? "" : cuda::overdue_text();
  STD_TORCH_CHECK(overdue.empty(), op_, ": an earlier bifpn or head failed: ", overdue,
                  ". This is a bug, or a debugger held the GPU (EDET_CUDA_TIMEOUT sets the seconds "
                  "to wait); every later call of this process fails");
  STD_TORCH_CHECK(error == cudaSuccess, op_, " on a map (", like_.size(0), ", ", like_.size(1),
                  ", ", like_.dim() > 2 ? like_.size(2) : 1, ", ",
                  like_.dim() > 3 ? like_.size(3) : 1, "): ", cudaGetErrorString(error));
}

const float* fusion_weights(CudaCall& call, const std::optional<Tensor>& edge_weights,
                            Fusion fusion, int64_t numel) {
  if (fusion == Fusion::sum) return nullptr;
  STD_TORCH_CHECK(edge_weights, "edge_weights must be given unless fusion is 'sum'");
  return call.floats(*edge_weights, numel, "edge_weights");
}

}  // namespace edet::torch_ops
