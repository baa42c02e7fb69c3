// stem on CUDA.
#include "../cuda/stem.h"
#include "cuda_common.h"

namespace edet::torch_ops {

static Tensor stem_cuda(const Tensor image, const Tensor weight, const Tensor scale,
                        const Tensor shift, const std::optional<Tensor> mean,
                        const std::optional<Tensor> std, const Ints padding, const Ints size,
                        int64_t activation, const torch::headeronly::ScalarType dtype) {
  CudaCall call("stem", image);
  Tensor out;
  StemParams p = stem_params(
      image, weight, scale, shift, mean, std, padding, size, activation, dtype,
      [&](const Tensor& t, int64_t numel, const char* name) { return call.floats(t, numel, name); },
      &out);
  const Tensor pixels = call.strided(image);
  for (int d = 0; d < 4; d++) p.stride[d] = pixels.stride(d);
  p.image = pixels.const_data_ptr();
  p.out = call.write(out);
  call.check(cuda::stem(p, call.stream()));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(EDET_OPS, EDET_CUDA_KEY, m) { m.impl("stem", TORCH_BOX(&stem_cuda)); }

}  // namespace edet::torch_ops
