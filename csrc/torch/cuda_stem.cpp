// stem on CUDA.
#include "../cuda/stem.h"
#include "cuda_common.h"

namespace edet::torch_ops {

static Tensor stem_cuda(const Tensor image, const Tensor weight, const Tensor scale,
                        const Tensor shift, const std::optional<Tensor> mean,
                        const std::optional<Tensor> std, const Ints padding, const Ints size,
                        int64_t activation, const torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(image.dim() == 4 && image.size(1) == 3, "image must be (N, 3, H, W)");
  CudaCall call("stem", image);
  StemParams p{};
  p.is_uint8 = image.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(p.is_uint8 || image.scalar_type() == dtype, "image must be uint8 or of dtype");
  STD_TORCH_CHECK(mean.has_value() == std.has_value(), "mean and std go together");
  const Tensor pixels = call.strided(image);
  for (int d = 0; d < 4; d++) p.stride[d] = pixels.stride(d);
  p.image = pixels.const_data_ptr();
  p.n = image.size(0), p.h = image.size(2), p.w = image.size(3);
  p.c_out = scale.numel();
  p.out_h = size[0], p.out_w = size[1];
  p.pad_top = padding[0], p.pad_left = padding[1];
  STD_TORCH_CHECK(p.pad_top >= 0 && p.pad_top <= 2 && p.pad_left >= 0 && p.pad_left <= 2,
                  "padding must be 0 to 2");
  STD_TORCH_CHECK(p.out_h > 0 && p.out_w > 0 && 2 * (p.out_h - 1) - p.pad_top < p.h &&
                      2 * (p.out_w - 1) - p.pad_left < p.w,
                  "size does not fit the image");
  p.activation = activation_of(activation);
  p.weight = call.floats(weight, padded(p.c_out) * 27, "weight");
  p.scale = call.floats(scale, p.c_out, "scale");
  p.shift = call.floats(shift, p.c_out, "shift");
  if (mean) {
    p.mean = call.floats(*mean, 3, "mean");
    p.inverse_std = call.floats(*std, 3, "std");  // the kernel divides
  }
  const int64_t shape[4] = {p.n, p.c_out, p.out_h, p.out_w};
  Tensor out = torch::stable::empty({shape, 4}, dtype, std::nullopt, image.device(), std::nullopt,
                                    torch::headeronly::MemoryFormat::ChannelsLast);
  p.dtype = map_dtype(out);
  p.out = call.write(out);
  call.check(cuda::stem(p, call.stream()));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(EDET_OPS, EDET_CUDA_KEY, m) { m.impl("stem", TORCH_BOX(&stem_cuda)); }

}  // namespace edet::torch_ops
