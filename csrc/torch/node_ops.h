// fusion_node, bifpn, separable_conv and head: four ways to describe one graph of nodes, written
// once. A device says how tensors are read, how the graph is run and where its memory comes from.
#pragma once

#include <algorithm>
#include <limits>

#include "../core/node_graph.h"
#include "common.h"

namespace edet::torch_ops {

// What nodes have in common: see NodeParams::layer.
struct NodeLayer {
  int index;
  int64_t c, c_out;
  bool shared;  // dw and pw are the same in every row
  Activation pre_activation, activation;
  const float *dw, *pw, *scale, *shift;
};

// One op's call: a graph whose nodes are added one by one. Maps have ids: inputs come first, then
// nodes in the order in which they were added.
template <class Device>
class NodeCall {
 public:
  NodeCall(const char* op, const Tensors& inputs, Pool pool)
      : like_(checked_maps(inputs)[0]), device_(op, like_) {
    graph_.pool = pool;
    for (const Tensor& x : inputs) {
      graph_.inputs.push_back({device_.map(x), x.size(2), x.size(3)});
      sizes_.push_back({x.size(2), x.size(3)});
    }
  }

  Device& device() { return device_; }

  NodeLayer add_layer(int64_t c, const Tensor& dw, const Tensor& pw, const Tensor& scale,
                      const Tensor& shift, int64_t rows, bool shared, Activation pre_activation,
                      Activation activation) {
    const int64_t c_out = scale.size(-1), weights = shared ? 1 : rows;
    return {layers_++,
            c,
            c_out,
            shared,
            pre_activation,
            activation,
            device_.floats(dw, weights * 9 * c, "dw_weight"),
            device_.floats(pw, weights * padded(c_out) * c, "pw_weight"),
            device_.floats(scale, rows * c_out, "scale"),
            device_.floats(shift, rows * c_out, "shift")};
  }

  // Returns the id of the map that the node computes.
  int64_t add_node(const NodeLayer& layer, int64_t row, const int64_t* sources, int64_t edges,
                   int64_t h, int64_t w, const EdgeWeights& weights) {
    STD_TORCH_CHECK(edges >= 1 && edges <= kMaxEdges, "a node must fuse 1 to ", kMaxEdges,
                    " maps, got ", edges);
    STD_TORCH_CHECK(h <= Device::kMostSide && w <= Device::kMostSide, "size must be at most ",
                    Device::kMostSide, " on CUDA, got (", h, ", ", w, ")");
    NodeParams p{};
    p.fusion.dtype = map_dtype(like_);
    p.fusion.n = like_.size(0), p.fusion.c = layer.c, p.fusion.h = h, p.fusion.w = w;
    p.fusion.edges = static_cast<int>(edges);
    const auto inputs = static_cast<int64_t>(graph_.inputs.size());
    for (int64_t e = 0; e < edges; e++) {
      const int64_t id = sources[e];
      STD_TORCH_CHECK(id >= 0 && id < static_cast<int64_t>(sizes_.size()),
                      "edges must name inputs or earlier nodes");
      const Pair from = sizes_[static_cast<size_t>(id)];
      const void* data = id < inputs ? graph_.inputs[static_cast<size_t>(id)].data : nullptr;
      p.fusion.edge[e] = make_edge(data, from.y, from.x, h, w, graph_.pool,
                                   static_cast<int>(id < inputs ? -1 - id : id - inputs));
    }
    p.fusion.weights = weights;
    p.fusion.activation = layer.pre_activation;
    p.activation = layer.activation;
    const int64_t part = layer.shared ? 0 : row;
    p.c_out = layer.c_out;
    p.dw = layer.dw + part * 9 * layer.c;
    p.pw = layer.pw + part * padded(layer.c_out) * layer.c;
    p.scale = layer.scale + row * layer.c_out;
    p.shift = layer.shift + row * layer.c_out;
    p.layer = layer.index, p.row = static_cast<int>(row);
    graph_.nodes.push_back(p);
    sizes_.push_back({h, w});
    return static_cast<int64_t>(sizes_.size()) - 1;
  }

  // Computes all nodes; returns the maps with the ids `outputs`.
  Tensors run(const Ints& outputs) {
    const auto inputs = static_cast<int64_t>(graph_.inputs.size());
    const size_t count = graph_.nodes.size();
    std::vector<bool> is_output(count, false);
    Tensors results;
    for (int64_t id : outputs) {
      const auto node = static_cast<size_t>(id - inputs);
      STD_TORCH_CHECK(id >= inputs && node < count, "outputs must be ids of nodes, got ", id);
      STD_TORCH_CHECK(!is_output[node], "outputs must be different nodes");
      is_output[node] = true;
      NodeParams& p = graph_.nodes[node];
      results.push_back(empty_map(like_, p.c_out, p.fusion.h, p.fusion.w));
      p.out = device_.write(results.back());
    }
    int64_t bytes = round_up(device_.plan(graph_), 64);
    const Ints offsets = place_maps(graph_, is_output, device_.reuses_maps(), &bytes);
    char* const memory = device_.memory(bytes);
    for (size_t i = 0; i < count; i++) {
      NodeParams& p = graph_.nodes[i];
      if (!is_output[i]) p.out = memory + offsets[i];
      for (int e = 0; e < p.fusion.edges; e++) {
        Edge& edge = p.fusion.edge[e];
        if (edge.source >= 0) edge.data = graph_.nodes[static_cast<size_t>(edge.source)].out;
      }
    }
    device_.run(graph_, memory);
    return results;
  }

 private:
  Tensor like_;
  Device device_;
  NodeGraph graph_{};
  std::vector<Pair> sizes_;  // of maps
  int layers_ = 0;
};

template <class Device>
Tensors graph_of_nodes(const char* op, const Tensors& inputs,
                       const std::optional<Tensor>& edge_weights, const Tensor& dw_weight,
                       const Tensor& pw_weight, const Tensor& scale, const Tensor& shift,
                       const Ints& edges, const Ints& edge_counts, const Ints& sizes,
                       const Ints& outputs, int64_t fusion, int64_t pool, int64_t pre_activation,
                       int64_t activation) {
  NodeCall<Device> call(op, inputs, pool_of(pool));
  const auto count = static_cast<int64_t>(edge_counts.size());
  const int64_t c = inputs[0].size(1);
  STD_TORCH_CHECK(count >= 1, "edge_counts must name at least one node");
  STD_TORCH_CHECK(static_cast<int64_t>(sizes.size()) == 2 * count, "sizes must be (H, W) per node");
  STD_TORCH_CHECK(c == scale.size(-1) || count == 1, "nodes must keep the channel count");
  EdgeWeights weights{fusion_of(fusion), nullptr, edge_weights && edge_weights->dim() == 3};
  const int64_t most = *std::max_element(edge_counts.begin(), edge_counts.end());
  const int64_t pitch = weights.per_channel ? most * c : most;
  if (weights.fusion != Fusion::sum) {
    STD_TORCH_CHECK(edge_weights, "edge_weights must be given unless fusion is 'sum'");
    weights.values = call.device().floats(*edge_weights, count * pitch, "edge_weights");
  }
  const NodeLayer layer = call.add_layer(c, dw_weight, pw_weight, scale, shift, count, false,
                                         activation_of(pre_activation), activation_of(activation));
  int64_t at = 0;
  for (int64_t i = 0; i < count; i++) {
    const auto n = static_cast<size_t>(i);
    STD_TORCH_CHECK(at + edge_counts[n] <= static_cast<int64_t>(edges.size()),
                    "edges must name inputs or earlier nodes");
    call.add_node(layer, i, edges.data() + at, edge_counts[n], sizes[2 * n], sizes[2 * n + 1],
                  weights);
    at += edge_counts[n];
    if (weights.values) weights.values += pitch;
  }
  return call.run(outputs);
}

template <class Device>
Tensors bifpn(const Tensors inputs, const std::optional<Tensor> edge_weights,
              const Tensor dw_weight, const Tensor pw_weight, const Tensor scale,
              const Tensor shift, const Ints edges, const Ints edge_counts, const Ints sizes,
              const Ints outputs, int64_t fusion, int64_t pool, int64_t pre_activation,
              int64_t post_activation) {
  return graph_of_nodes<Device>("bifpn", inputs, edge_weights, dw_weight, pw_weight, scale, shift,
                                edges, edge_counts, sizes, outputs, fusion, pool, pre_activation,
                                post_activation);
}

template <class Device>
Tensor fusion_node(const Tensors inputs, const std::optional<Tensor> edge_weights,
                   const Tensor dw_weight, const Tensor pw_weight, const Tensor scale,
                   const Tensor shift, const Ints size, int64_t fusion, int64_t pool,
                   int64_t pre_activation, int64_t post_activation) {
  Ints edges;
  for (size_t i = 0; i < inputs.size(); i++) edges.push_back(static_cast<int64_t>(i));
  const auto count = static_cast<int64_t>(inputs.size());
  const bool per_channel = edge_weights && edge_weights->dim() == 2;
  return graph_of_nodes<Device>(
      "fusion_node", inputs,
      per_channel ? torch::stable::unsqueeze(*edge_weights, 0) : edge_weights, dw_weight, pw_weight,
      scale, shift, edges, {count}, size, {count}, fusion, pool, pre_activation,
      post_activation)[0];
}

// Layers, each on all levels; `last` follows the last one.
template <class Device>
Tensors layers_on_levels(const char* op, const Tensors& inputs, const Tensors& dw_weights,
                         const Tensors& pw_weights, const Tensors& scales, const Tensors& shifts,
                         Activation activation, Activation last) {
  const size_t count = dw_weights.size(), levels = inputs.size();
  STD_TORCH_CHECK(
      count >= 1 && pw_weights.size() == count && scales.size() == count && shifts.size() == count,
      "dw_weights, pw_weights, scales and shifts must be non-empty lists of one length");
  NodeCall<Device> call(op, inputs, Pool::same);
  std::vector<NodeLayer> layers;
  for (size_t i = 0; i < count; i++)
    layers.push_back(call.add_layer(i ? layers.back().c_out : inputs[0].size(1), dw_weights[i],
                                    pw_weights[i], scales[i], shifts[i],
                                    static_cast<int64_t>(levels), true, Activation::none,
                                    i + 1 < count ? activation : last));
  Ints maps;
  for (size_t l = 0; l < levels; l++) maps.push_back(static_cast<int64_t>(l));
  const auto add = [&](size_t l, size_t i) {
    maps[l] = call.add_node(layers[i], static_cast<int64_t>(l), &maps[l], 1, inputs[l].size(2),
                            inputs[l].size(3), {Fusion::sum, nullptr, false});
  };
  for (size_t k = 0; k < levels * count; k++) {
    if constexpr (Device::kLevelByLevel) {
      add(k / count, k % count);
    } else {
      add(k % levels, k / levels);
    }
  }
  return call.run(maps);
}

template <class Device>
Tensors separable_conv(const Tensors inputs, const Tensor dw_weight, const Tensor pw_weight,
                       const Tensor scale, const Tensor shift, int64_t activation) {
  const Activation last = activation_of(activation);
  return layers_on_levels<Device>("separable_conv", inputs, {dw_weight}, {pw_weight}, {scale},
                                  {shift}, last, last);
}

template <class Device>
Tensors head(const Tensors inputs, const Tensors dw_weights, const Tensors pw_weights,
             const Tensors scales, const Tensors shifts, int64_t activation) {
  return layers_on_levels<Device>("head", inputs, dw_weights, pw_weights, scales, shifts,
                                  activation_of(activation), Activation::none);
}

}  // namespace edet::torch_ops
