// mbconv on CUDA.
#include "../cuda/mbconv.h"
#include "cuda_common.h"

namespace edet::torch_ops {

// The lists are those of the CPU's glue, mbconv.cpp.
static Tensor mbconv_cuda(const Tensor input, const Tensors expand, const Tensors depthwise,
                          const Tensors squeeze, const Tensors project, int64_t stride,
                          const Ints padding, const Ints size, int64_t activation, bool residual) {
  CudaCall call("mbconv", input);
  MbconvParams p =
      mbconv_params(input, expand, depthwise, squeeze, project, stride, padding, size, activation,
                    residual, [&](const Tensor& t, int64_t numel, const char* name) {
                      return call.floats(t, numel, name);
                    });
  p.tf32 = in_tf32();
  Tensor map = channels_last(input);
  if (!cuda::mbconv_takes(p)) {
    map = torch::stable::to(map, torch::headeronly::ScalarType::Float);
    p.dtype = DType::f32;
  } else if (reinterpret_cast<uintptr_t>(map.const_data_ptr()) % 16) {
    map = torch::stable::clone(map);  // kernels read 16 bytes at once; a view may begin anywhere
  }
  p.input = call.map(map);
  Tensor out = empty_map(map, p.c_out, p.out_h, p.out_w);
  p.out = call.write(out);
  const cuda::MbconvMemory memory = cuda::mbconv_memory(p);
  p.mid = static_cast<float*>(call.scratch(memory.mid_bytes));
  p.sums = static_cast<float*>(call.scratch(memory.sums_bytes));
  p.gate = static_cast<float*>(call.scratch(memory.gate_bytes));
  void* const split = memory.split_bytes ? call.scratch(memory.split_bytes) : nullptr;
  void* const buffer = memory.buffer_bytes ? call.scratch(memory.buffer_bytes) : nullptr;
  call.check(cuda::mbconv(p, split, buffer, call.stream()));
  if (map.scalar_type() == input.scalar_type()) return out;
  return torch::stable::to(out, input.scalar_type());
}

STABLE_TORCH_LIBRARY_IMPL(EDET_OPS, EDET_CUDA_KEY, m) { m.impl("mbconv", TORCH_BOX(&mbconv_cuda)); }

STABLE_TORCH_LIBRARY_IMPL(EDET_TF32_OPS, EDET_CUDA_KEY, m) {
  m.impl("mbconv", TORCH_BOX(&Tf32<&mbconv_cuda>::call));
}

}  // namespace edet::torch_ops
