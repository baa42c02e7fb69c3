// weighted_fusion on CUDA.
#include "../cuda/weighted_fusion.h"
#include "cuda_common.h"

namespace edet::torch_ops {

static Tensor weighted_fusion_cuda(const Tensors inputs, const std::optional<Tensor> edge_weights,
                                   const Ints size, int64_t fusion, int64_t pool,
                                   int64_t activation) {
  const int edges = static_cast<int>(inputs.size());
  STD_TORCH_CHECK(edges >= 1 && edges <= kMaxEdges, "inputs must be 1 to ", kMaxEdges,
                  " maps, got ", edges);
  const Tensor& first = inputs[0];
  STD_TORCH_CHECK(size[0] <= cuda::kMostSide && size[1] <= cuda::kMostSide, "size must be at most ",
                  cuda::kMostSide, " on CUDA, got (", size[0], ", ", size[1], ")");
  CudaCall call("weighted_fusion", first);

  cuda::WeightedFusionParams p{};
  p.dtype = map_dtype(first);
  p.activation = activation_of(activation);
  p.n = first.size(0), p.c = first.size(1), p.h = size[0], p.w = size[1];
  p.edges = edges;
  for (int e = 0; e < edges; e++) {
    const Tensor& map = inputs[static_cast<size_t>(e)];
    p.edge[e] = make_edge(call.map(map), map.size(2), map.size(3), p.h, p.w, pool_of(pool), -1);
  }
  p.weights.fusion = fusion_of(fusion);
  p.weights.per_channel = edge_weights && edge_weights->dim() == 2;
  p.weights.values = fusion_weights(call, edge_weights, p.weights.fusion,
                                    p.weights.per_channel ? edges * p.c : edges);
  Tensor out = empty_map(first, p.c, p.h, p.w);
  p.out = call.write(out);
  call.check(cuda::weighted_fusion(p, call.stream()));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(EDET_OPS, EDET_CUDA_KEY, m) {
  m.impl("weighted_fusion", TORCH_BOX(&weighted_fusion_cuda));
}

}  // namespace edet::torch_ops
