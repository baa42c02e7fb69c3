// fusion_node, bifpn, separable_conv and head on CUDA: one launch per node or layer.
#include "../cuda/fusion_node.h"
#include "cuda_common.h"

namespace edet::torch_ops {

namespace {

cuda::FusionNodeParams node_params(CudaCall& call, const Tensor& like, int64_t c, int64_t c_out,
                                   const Tensor& dw_weight, const Tensor& pw_weight) {
  cuda::FusionNodeParams p{};
  p.dtype = map_dtype(like);
  p.tf32 = in_tf32();
  p.n = like.size(0), p.c = c, p.c_out = c_out;
  p.dw = call.floats(dw_weight, 9 * c, "dw_weight");
  p.pw = call.floats(pw_weight, padded(c_out) * c, "pw_weight");
  p.weights.fusion = Fusion::sum;
  return p;
}

void check_size(int64_t h, int64_t w) {
  STD_TORCH_CHECK(h <= cuda::kMostSide && w <= cuda::kMostSide, "size must be at most ",
                  cuda::kMostSide, " on CUDA, got (", h, ", ", w, ")");
}

Tensor fusion_node_cuda(const Tensors inputs, const std::optional<Tensor> edge_weights,
                        const Tensor dw_weight, const Tensor pw_weight, const Tensor scale,
                        const Tensor shift, const Ints size, int64_t fusion, int64_t pool,
                        int64_t pre_activation, int64_t post_activation) {
  const int edges = static_cast<int>(inputs.size());
  STD_TORCH_CHECK(edges >= 1 && edges <= kMaxEdges, "a node must fuse 1 to ", kMaxEdges,
                  " maps, got ", edges);
  const Tensor& first = inputs[0];
  const int64_t c = first.size(1), c_out = scale.numel();
  check_size(size[0], size[1]);
  CudaCall call("fusion_node", first);
  cuda::FusionNodeParams p = node_params(call, first, c, c_out, dw_weight, pw_weight);
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

Tensors separable_conv_cuda(const Tensors inputs, const Tensor dw_weight, const Tensor pw_weight,
                            const Tensor scale, const Tensor shift, int64_t activation) {
  const auto levels = static_cast<int64_t>(inputs.size());
  STD_TORCH_CHECK(levels >= 1 && levels <= kMaxLevels, "inputs must be 1 to ", kMaxLevels,
                  " maps, got ", levels);
  const Tensor& first = inputs[0];
  const int64_t c = first.size(1), c_out = scale.size(-1);
  CudaCall call("separable_conv", first);
  cuda::FusionNodeParams p = node_params(call, first, c, c_out, dw_weight, pw_weight);
  p.post_activation = activation_of(activation);
  p.edges = 1;
  p.levels = static_cast<int>(levels);
  const float* scales = call.floats(scale, levels * c_out, "scale");
  const float* shifts = call.floats(shift, levels * c_out, "shift");
  Tensors results;
  for (int64_t l = 0; l < levels; l++) {
    const Tensor& map = inputs[static_cast<size_t>(l)];
    const int64_t h = map.size(2), w = map.size(3);
    check_size(h, w);
    STD_TORCH_CHECK(map.size(0) == p.n && map.size(1) == c && map_dtype(map) == p.dtype,
                    "inputs must be maps (N, C, H, W) of one batch, channel count and dtype");
    results.push_back(empty_map(map, c_out, h, w));
    p.edge[l] = make_edge(call.map(map), h, w, h, w, Pool::same, -1);
    p.level[l] = {h, w, scales + l * c_out, shifts + l * c_out, call.write(results.back())};
  }
  call.check(cuda::fusion_node(p, call.stream()));
  return results;
}

// A node's part of weights that are stacked over nodes.
Tensor part(const Tensor& stacked, int64_t i) { return torch::stable::select(stacked, 0, i); }

Tensors bifpn_cuda(const Tensors inputs, const std::optional<Tensor> edge_weights,
                   const Tensor dw_weight, const Tensor pw_weight, const Tensor scale,
                   const Tensor shift, const Ints edges, const Ints edge_counts, const Ints sizes,
                   const Ints outputs, int64_t fusion, int64_t pool, int64_t pre_activation,
                   int64_t post_activation) {
  STD_TORCH_CHECK(sizes.size() == 2 * edge_counts.size(), "sizes must be (H, W) per node");
  Tensors maps = inputs;
  size_t at = 0;
  for (size_t i = 0; i < edge_counts.size(); i++) {
    const auto node = static_cast<int64_t>(i);
    Tensors fused;
    for (int64_t e = 0; e < edge_counts[i]; e++, at++) {
      STD_TORCH_CHECK(
          at < edges.size() && edges[at] >= 0 && edges[at] < static_cast<int64_t>(maps.size()),
          "edges must name inputs or earlier nodes");
      fused.push_back(maps[static_cast<size_t>(edges[at])]);
    }
    std::optional<Tensor> weights;
    if (edge_weights) {
      Tensor row = part(*edge_weights, node);
      weights = torch::stable::narrow(row, 0, 0, edge_counts[i]);
    }
    maps.push_back(fusion_node_cuda(fused, weights, part(dw_weight, node), part(pw_weight, node),
                                    part(scale, node), part(shift, node),
                                    {sizes[2 * i], sizes[2 * i + 1]}, fusion, pool, pre_activation,
                                    post_activation));
  }
  Tensors results;
  for (int64_t o : outputs) {
    STD_TORCH_CHECK(
        o >= static_cast<int64_t>(inputs.size()) && o < static_cast<int64_t>(maps.size()),
        "outputs must be ids of nodes, got ", o);
    results.push_back(maps[static_cast<size_t>(o)]);
  }
  return results;
}

Tensors head_cuda(const Tensors inputs, const Tensors dw_weights, const Tensors pw_weights,
                  const Tensors scales, const Tensors shifts, int64_t activation) {
  const size_t layers = dw_weights.size();
  STD_TORCH_CHECK(
      layers >= 1 && pw_weights.size() == layers && scales.size() == layers &&
          shifts.size() == layers,
      "dw_weights, pw_weights, scales and shifts must be non-empty lists of one length");
  Tensors maps = inputs;
  for (size_t i = 0; i < layers; i++) {
    maps =
        separable_conv_cuda(maps, dw_weights[i], pw_weights[i], scales[i], shifts[i],
                            i + 1 < layers ? activation : static_cast<int64_t>(Activation::none));
  }
  return maps;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EDET_OPS, EDET_CUDA_KEY, m) {
  m.impl("fusion_node", TORCH_BOX(&fusion_node_cuda));
  m.impl("separable_conv", TORCH_BOX(&separable_conv_cuda));
  m.impl("bifpn", TORCH_BOX(&bifpn_cuda));
  m.impl("head", TORCH_BOX(&head_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(EDET_TF32_OPS, EDET_CUDA_KEY, m) {
  m.impl("fusion_node", TORCH_BOX(&Tf32<&fusion_node_cuda>::call));
  m.impl("separable_conv", TORCH_BOX(&Tf32<&separable_conv_cuda>::call));
  m.impl("bifpn", TORCH_BOX(&Tf32<&bifpn_cuda>::call));
  m.impl("head", TORCH_BOX(&Tf32<&head_cuda>::call));
}

}  // namespace edet::torch_ops
