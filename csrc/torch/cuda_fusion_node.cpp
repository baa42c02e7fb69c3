// fusion_node on CUDA.
#include "../cuda/fusion_node.h"
#include "cuda_common.h"

namespace edet::torch_ops {

namespace {

Tensor fusion_node_cuda(const Tensors inputs, const std::optional<Tensor> edge_weights,
                        const Tensor dw_weight, const Tensor pw_weight, const Tensor scale,
                        const Tensor shift, const Ints size, int64_t fusion, int64_t pool,
                        int64_t pre_activation, int64_t post_activation) {
  const int edges = static_cast<int>(inputs.size());
  STD_TORCH_CHECK(edges >= 1 && edges <= kMaxEdges, "a node must fuse 1 to ", kMaxEdges,
                  " maps, got ", edges);
  const Tensor& first = inputs[0];
  const int64_t c = first.size(1), c_out = scale.numel();
  STD_TORCH_CHECK(size[0] <= cuda::kMostSide && size[1] <= cuda::kMostSide, "size must be at most ",
                  cuda::kMostSide, " on CUDA, got (", size[0], ", ", size[1], ")");
  CudaCall call("fusion_node", first);
  cuda::FusionNodeParams p{};
  p.dtype = map_dtype(first);
  p.tf32 = in_tf32();
  p.n = first.size(0), p.c = c, p.c_out = c_out;
  p.dw = call.floats(dw_weight, 9 * c, "dw_weight");
  p.pw = call.floats(pw_weight, padded(c_out) * c, "pw_weight");
  p.pre_activation = activation_of(pre_activation);
  p.post_activation = activation_of(post_activation);
  p.edges = edges;
  for (int e = 0; e < edges; e++) {
    const Tensor& map = inputs[static_cast<size_t>(e)];
    p.edge[e] =
        make_edge(call.map(map), map.size(2), map.size(3), size[0], size[1], pool_of(pool), -1);
  }
  p.weights.fusion = fusion_of(fusion);
  p.weights.per_channel = edge_weights && edge_weights->dim() == 2;
  p.weights.values = fusion_weights(call, edge_weights, p.weights.fusion,
                                    p.weights.per_channel ? edges * c : edges);
  Tensor out = empty_map(first, c_out, size[0], size[1]);
  p.levels = 1;
  p.level[0] = {size[0], size[1], call.floats(scale, c_out, "scale"),
                call.floats(shift, c_out, "shift"), call.write(out)};
  call.check(cuda::fusion_node(p, call.stream()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EDET_OPS, EDET_CUDA_KEY, m) {
  m.impl("fusion_node", TORCH_BOX(&fusion_node_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(EDET_TF32_OPS, EDET_CUDA_KEY, m) {
  m.impl("fusion_node", TORCH_BOX(&Tf32<&fusion_node_cuda>::call));
}

}  // namespace edet::torch_ops
