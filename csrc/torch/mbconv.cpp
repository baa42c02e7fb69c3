// mbconv on the CPU.
#include "../cpu/mbconv_plan.h"

#include "common.h"

namespace edet::torch_ops {

// expand: [] or [packed, scale, shift]; depthwise: [packed, scale, shift];
// squeeze: [] or [reduce, reduce_bias, excite, excite_bias]; project: [packed, scale, shift].
static Tensor mbconv(const Tensor input, const Tensors expand, const Tensors depthwise,
                     const Tensors squeeze, const Tensors project, int64_t stride,
                     const Ints padding, const Ints size, int64_t activation, bool residual) {
  STD_TORCH_CHECK(expand.empty() || expand.size() == 3, "expand must be [] or three tensors");
  STD_TORCH_CHECK(depthwise.size() == 3 && project.size() == 3,
                  "depthwise and project must be three tensors each");
  STD_TORCH_CHECK(squeeze.empty() || squeeze.size() == 4, "squeeze must be [] or four tensors");
  const Tensor map = channels_last(input);
  MbconvParams p{};
  p.dtype = map_dtype(map);
  p.input = map.const_data_ptr();
  p.n = map.size(0), p.c_in = map.size(1), p.h = map.size(2), p.w = map.size(3);
  p.c_mid = depthwise[1].numel();
  p.c_out = project[1].numel();
  STD_TORCH_CHECK(!expand.empty() || p.c_mid == p.c_in, "depthwise must have ", p.c_in,
                  " channels");
  const int64_t taps = depthwise[0].numel() / p.c_mid;
  STD_TORCH_CHECK(taps == 9 || taps == 25, "the depthwise kernel must be 3×3 or 5×5, got ", taps,
                  " taps");
  p.kernel = taps == 9 ? 3 : 5;
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  p.stride = static_cast<int>(stride);
  p.pad_top = padding[0], p.pad_left = padding[1];
  p.out_h = size[0], p.out_w = size[1];
  STD_TORCH_CHECK(
      p.pad_top >= 0 && p.pad_top < p.kernel && p.pad_left >= 0 && p.pad_left < p.kernel,
      "padding must be 0 to ", p.kernel - 1);
  const auto reaches = [&](int64_t out, int64_t pad, int64_t in) {
    const int64_t last = (out - 1) * p.stride - pad;  // first input of the last output
    return out > 0 && last < in && last + p.kernel <= in + p.kernel;
  };
  STD_TORCH_CHECK(reaches(p.out_h, p.pad_top, p.h) && reaches(p.out_w, p.pad_left, p.w),
                  "size does not fit the input");
  p.activation = activation_of(activation);
  p.residual = residual;
  STD_TORCH_CHECK(!residual || (p.c_in == p.c_out && p.h == p.out_h && p.w == p.out_w),
                  "a residual needs an output of the input's shape");

  Tensors kept;  // contiguous copies, where one was needed
  const auto weight = [&](const Tensor& t, int64_t numel, const char* name) {
    kept.push_back(float_weight(t, numel, name));
    return kept.back().const_data_ptr<float>();
  };
  const auto packed = [](int64_t out, int64_t in) { return coefficient_floats(1, out) * in; };
  if (!expand.empty()) {
    p.expand = weight(expand[0], packed(p.c_mid, p.c_in), "expand[0]");
    p.expand_scale = weight(expand[1], p.c_mid, "expand[1]");
    p.expand_shift = weight(expand[2], p.c_mid, "expand[2]");
  }
  p.dw = weight(depthwise[0], taps * p.c_mid, "depthwise[0]");
  p.dw_scale = weight(depthwise[1], p.c_mid, "depthwise[1]");
  p.dw_shift = weight(depthwise[2], p.c_mid, "depthwise[2]");
  if (!squeeze.empty()) {
    p.c_reduced = squeeze[1].numel();
    p.reduce = weight(squeeze[0], packed(p.c_reduced, p.c_mid), "squeeze[0]");
    p.reduce_bias = weight(squeeze[1], p.c_reduced, "squeeze[1]");
    p.excite = weight(squeeze[2], packed(p.c_mid, p.c_reduced), "squeeze[2]");
    p.excite_bias = weight(squeeze[3], p.c_mid, "squeeze[3]");
  }
  p.project = weight(project[0], packed(p.c_out, p.c_mid), "project[0]");
  p.project_scale = weight(project[1], p.c_out, "project[1]");
  p.project_shift = weight(project[2], p.c_out, "project[2]");

  Tensor out = empty_map(map, p.c_out, p.out_h, p.out_w);
  p.out = out.mutable_data_ptr();
  const cpu::Runtime threads = runtime();
  const Workspace workspace(cpu::plan_mbconv(p, threads.threads));
  cpu::run_mbconv(p, threads, workspace.data());
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(edet_kernels, CPU, m) { m.impl("mbconv", TORCH_BOX(&mbconv)); }

}  // namespace edet::torch_ops
