// lateral on CUDA: one launch for the projections and one for each pooled map.
#include "../cuda/lateral.h"
#include "../cuda/weighted_fusion.h"
#include "cuda_common.h"

namespace edet::torch_ops {

static Tensors lateral_cuda(const Tensor input, const Tensors pw_weights, const Tensors scales,
                            const Tensors shifts, int64_t pooled, int64_t pool) {
  const size_t count = pw_weights.size();
  STD_TORCH_CHECK(count >= 1 && count <= kMaxEdges, "pw_weights must be 1 to ", kMaxEdges,
                  " projections, got ", count);
  STD_TORCH_CHECK(scales.size() == count && shifts.size() == count,
                  "pw_weights, scales and shifts must be lists of one length");
  const int64_t h = input.size(2), w = input.size(3);
  CudaCall call("lateral", input);
  cuda::ProjectionParams p{};
  p.dtype = map_dtype(input);
  p.tf32 = in_tf32();
  p.input = call.map(input);
  p.rows = input.size(0) * h * w;
  p.c_in = input.size(1);
  p.projections = static_cast<int>(count);
  Tensors results;
  for (size_t i = 0; i < count; i++) {
    const int64_t c_out = scales[i].numel();
    results.push_back(empty_map(input, c_out, h, w));
    p.projection[i] = {call.floats(pw_weights[i], padded(c_out) * p.c_in, "pw_weights"),
                       call.floats(scales[i], c_out, "scales"),
                       call.floats(shifts[i], c_out, "shifts"), c_out, call.write(results[i])};
  }
  call.check(cuda::project(p, call.stream()));
  if (!pooled) return results;

  Tensor from = results.back();
  results.pop_back();
  for (int64_t i = 0; i < pooled; i++) {
    cuda::WeightedFusionParams pooling{};
    pooling.dtype = p.dtype;
    pooling.n = from.size(0), pooling.c = from.size(1);
    pooling.h = (from.size(2) + 1) / 2, pooling.w = (from.size(3) + 1) / 2;
    pooling.edges = 1;
    pooling.edge[0] = make_edge(from.const_data_ptr(), from.size(2), from.size(3), pooling.h,
                                pooling.w, pool_of(pool), -1);
    pooling.weights.fusion = Fusion::sum;
    from = empty_map(input, pooling.c, pooling.h, pooling.w);
    pooling.out = call.write(from);
    call.check(cuda::weighted_fusion(pooling, call.stream()));
    results.push_back(from);
  }
  return results;
}

STABLE_TORCH_LIBRARY_IMPL(EDET_OPS, EDET_CUDA_KEY, m) {
  m.impl("lateral", TORCH_BOX(&lateral_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(EDET_TF32_OPS, EDET_CUDA_KEY, m) {
  m.impl("lateral", TORCH_BOX(&Tf32<&lateral_cuda>::call));
}

}  // namespace edet::torch_ops
