// stem on the CPU.
#include <algorithm>

#include "../cpu/dispatch.h"
#include "../cpu/node_graph.h"
#include "common.h"

namespace edet::torch_ops {

static Tensor stem(const Tensor image, const Tensor weight, const Tensor scale, const Tensor shift,
                   const std::optional<Tensor> mean, const std::optional<Tensor> std,
                   const Ints padding, const Ints size, int64_t activation,
                   const torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(image.dim() == 4 && image.size(1) == 3, "image must be (N, 3, H, W)");
  StemParams p{};
  p.is_uint8 = image.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(p.is_uint8 || image.scalar_type() == dtype, "image must be uint8 or of dtype");
  STD_TORCH_CHECK(mean.has_value() == std.has_value(), "mean and std go together");
  for (int d = 0; d < 4; d++) p.stride[d] = image.stride(d);
  p.image = image.const_data_ptr();
  p.n = image.size(0), p.h = image.size(2), p.w = image.size(3);
  p.c_out = scale.numel();
  const Pair out_size = pair_of(size, "size"), pad = pair_of(padding, "padding");
  p.out_h = out_size.y, p.out_w = out_size.x;
  p.pad_top = pad.y, p.pad_left = pad.x;
  STD_TORCH_CHECK(p.pad_top >= 0 && p.pad_top <= 2 && p.pad_left >= 0 && p.pad_left <= 2,
                  "padding must be 0 to 2");
  STD_TORCH_CHECK(p.out_h > 0 && p.out_w > 0 && 2 * (p.out_h - 1) - p.pad_top < p.h &&
                      2 * (p.out_w - 1) - p.pad_left < p.w,
                  "size does not fit the image");
  p.activation = activation_of(activation);
  const Tensor w = float_weight(weight, padded(p.c_out) * 27, "weight");
  const Tensor a = float_weight(scale, p.c_out, "scale"), b = float_weight(shift, p.c_out, "shift");
  p.weight = w.const_data_ptr<float>();
  p.scale = a.const_data_ptr<float>();
  p.shift = b.const_data_ptr<float>();
  Tensor m = a;
  float inverse_std[3];
  if (mean) {
    m = float_weight(*mean, 3, "mean");
    const Tensor s = float_weight(*std, 3, "std");
    for (int c = 0; c < 3; c++) inverse_std[c] = 1.0f / s.const_data_ptr<float>()[c];
    p.mean = m.const_data_ptr<float>();
    p.inverse_std = inverse_std;
  }
  const int64_t shape[4] = {p.n, p.c_out, p.out_h, p.out_w};
  Tensor out = torch::stable::empty({shape, 4}, dtype, std::nullopt, image.device(), std::nullopt,
                                    torch::headeronly::MemoryFormat::ChannelsLast);
  p.dtype = map_dtype(out);
  p.out = out.mutable_data_ptr();

  const cpu::Kernels& kernels = cpu::kernels();
  const cpu::Runtime threads = runtime();
  const int64_t scratch = (kernels.stem_scratch(p) + 15) / 16 * 16;
  const Workspace workspace(4 * scratch * threads.threads);
  const int64_t rows = cpu::band_rows(p.out_h, p.out_w, 4 * threads.threads);
  const int64_t bands = (p.out_h + rows - 1) / rows;
  cpu::Schedule schedule({p.n * bands});
  schedule.run(threads, [&](int64_t, int64_t task, int thread) {
    const int64_t begin = task % bands * rows;
    kernels.stem_rows(p, task / bands, begin, std::min(begin + rows, p.out_h),
                      reinterpret_cast<float*>(workspace.data()) + thread * scratch);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(edet_kernels, CPU, m) { m.impl("stem", TORCH_BOX(&stem)); }

}  // namespace edet::torch_ops
