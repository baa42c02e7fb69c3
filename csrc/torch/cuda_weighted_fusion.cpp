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
  const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());

  cuda::WeightedFusionParams p{};
  p.dtype = map_dtype(first);
  p.fusion = fusion_of(fusion);
  p.activation = activation_of(activation);
  p.edges = edges;
  p.n = first.size(0), p.c = first.size(1), p.h = size[0], p.w = size[1];
  Tensors maps;  // keeps copies alive until the launch
  for (int e = 0; e < edges; e++) {
    maps.push_back(channels_last(inputs[static_cast<size_t>(e)]));
    const Tensor& map = maps.back();
    p.edge[e] =
        make_edge(map.const_data_ptr(), map.size(2), map.size(3), p.h, p.w, pool_of(pool), -1);
  }
  Tensor weights = first;
  p.per_channel = edge_weights && edge_weights->dim() == 2;
  if (p.fusion != Fusion::sum) {
    STD_TORCH_CHECK(edge_weights, "edge_weights must be given unless fusion is 'sum'");
    weights = float_weight(*edge_weights, p.per_channel ? edges * p.c : edges, "edge_weights");
    p.edge_weights = weights.const_data_ptr<float>();
  }
  Tensor out = empty_map(first, p.c, p.h, p.w);
  p.out = out.mutable_data_ptr();
  check_launch(cuda::weighted_fusion(p, current_stream(first.get_device_index())),
               "weighted_fusion");
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(edet_kernels, CUDA, m) {
  m.impl("weighted_fusion", TORCH_BOX(&weighted_fusion_cuda));
}

}  // namespace edet::torch_ops
