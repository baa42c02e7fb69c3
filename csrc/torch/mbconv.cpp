// mbconv on the CPU.
#include "../cpu/mbconv_plan.h"

#include "common.h"

namespace edet::torch_ops {

static Tensor mbconv(const Tensor input, const Tensors expand, const Tensors depthwise,
                     const Tensors squeeze, const Tensors project, int64_t stride,
                     const Ints padding, const Ints size, int64_t activation, bool residual) {
  Tensors kept;  // contiguous copies, where one was needed
  MbconvParams p =
      mbconv_params(input, expand, depthwise, squeeze, project, stride, padding, size, activation,
                    residual, [&](const Tensor& t, int64_t numel, const char* name) {
                      kept.push_back(float_weight(t, numel, name));
                      return kept.back().const_data_ptr<float>();
                    });
  const Tensor map = channels_last(input);
  p.input = map.const_data_ptr();

  Tensor out = empty_map(map, p.c_out, p.out_h, p.out_w);
  p.out = out.mutable_data_ptr();
  const cpu::Runtime threads = runtime();
  const Workspace workspace(cpu::plan_mbconv(p, threads.threads));
  cpu::run_mbconv(p, threads, workspace.data());
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(edet_kernels, CPU, m) { m.impl("mbconv", TORCH_BOX(&mbconv)); }

}  // namespace edet::torch_ops
