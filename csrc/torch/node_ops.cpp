// fusion_node, bifpn, separable_conv and head on the CPU: four ways to describe one graph of nodes.
#include <algorithm>

#include "../cpu/node_graph.h"
#include "common.h"

namespace edet::torch_ops {

namespace {

// Weights of one node or stacked over nodes: pointers to node i's part.
struct NodeWeights {
  Tensor dw, pw, scale, shift;
  int64_t c, c_out;

  NodeWeights(const Tensor& dw_weight, const Tensor& pw_weight, const Tensor& scales,
              const Tensor& shifts, int64_t nodes, int64_t rows, int64_t channels, int64_t out)
      : dw(float_weight(dw_weight, nodes * 9 * channels, "dw_weight")),
        pw(float_weight(pw_weight, nodes * padded(out) * channels, "pw_weight")),
        scale(float_weight(scales, rows * out, "scale")),
        shift(float_weight(shifts, rows * out, "shift")),
        c(channels),
        c_out(out) {}

  void set(NodeParams& p, int64_t node, int64_t row) const {
    p.c_out = c_out;
    p.dw = dw.const_data_ptr<float>() + node * 9 * c;
    p.pw = pw.const_data_ptr<float>() + node * padded(c_out) * c;
    p.scale = scale.const_data_ptr<float>() + row * c_out;
    p.shift = shift.const_data_ptr<float>() + row * c_out;
  }
};

void set_fusion(NodeParams& p, const Tensor& like, int64_t h, int64_t w, int edges) {
  STD_TORCH_CHECK(edges >= 1 && edges <= kMaxEdges, "a node must fuse 1 to ", kMaxEdges,
                  " maps, got ", edges);
  p.fusion.dtype = map_dtype(like);
  p.fusion.n = like.size(0);
  p.fusion.c = like.size(1);
  p.fusion.h = h;
  p.fusion.w = w;
  p.fusion.edges = edges;
}

Tensors bifpn(const Tensors inputs, const std::optional<Tensor> edge_weights,
              const Tensor dw_weight, const Tensor pw_weight, const Tensor scale,
              const Tensor shift, const Ints edges, const Ints edge_counts, const Ints sizes,
              const Ints outputs, int64_t fusion, int64_t pool, int64_t pre_activation,
              int64_t post_activation) {
  const Tensors maps = graph_inputs(inputs);
  const int64_t c = maps[0].size(1), c_out = scale.size(-1);
  const auto first = static_cast<int64_t>(maps.size());
  const auto count = static_cast<int64_t>(edge_counts.size());
  STD_TORCH_CHECK(count >= 1, "edge_counts must name at least one node");
  STD_TORCH_CHECK(static_cast<int64_t>(sizes.size()) == 2 * count, "sizes must be (H, W) per node");
  STD_TORCH_CHECK(c == c_out || count == 1, "nodes must keep the channel count");
  const NodeWeights weights(dw_weight, pw_weight, scale, shift, count, count, c, c_out);

  cpu::NodeGraph graph;
  graph.nodes.resize(static_cast<size_t>(count));
  graph.after.resize(static_cast<size_t>(count));
  const cpu::Runtime threads = runtime();
  const int64_t element = static_cast<int64_t>(maps[0].element_size());

  // Reading order: for each node the last node that reads it, for the reuse of buffers.
  Ints last_read(static_cast<size_t>(count), -1);
  std::vector<std::vector<int>> readers(static_cast<size_t>(count));
  size_t at = 0;
  for (int64_t i = 0; i < count; i++)
    for (int64_t e = 0; e < edge_counts[static_cast<size_t>(i)]; e++) {
      STD_TORCH_CHECK(at < edges.size() && edges[at] >= 0 && edges[at] < first + i,
                      "edges must name inputs or earlier nodes");
      const int64_t source = edges[at++] - first;
      if (source < 0) continue;
      last_read[static_cast<size_t>(source)] = i;
      readers[static_cast<size_t>(source)].push_back(static_cast<int>(i));
    }

  // Outputs are tensors; the other nodes share buffers, the longest free one first.
  struct Buffer {
    int64_t offset, bytes;
    int owner;  // the node that wrote it last
  };
  Layout layout;
  std::vector<Tensor> results(static_cast<size_t>(count), maps[0]);
  std::vector<bool> is_output(static_cast<size_t>(count), false);
  for (int64_t o : outputs) {
    STD_TORCH_CHECK(o >= first && o < first + count, "outputs must be ids of nodes, got ", o);
    STD_TORCH_CHECK(!is_output[static_cast<size_t>(o - first)], "outputs must be different nodes");
    is_output[static_cast<size_t>(o - first)] = true;
  }
  std::vector<Buffer> in_use, released;
  Ints offset(static_cast<size_t>(count), -1);
  for (int64_t i = 0; i < count; i++) {
    const auto n = static_cast<size_t>(i);
    const int64_t h = sizes[2 * n], w = sizes[2 * n + 1];
    if (is_output[n]) {
      results[n] = empty_map(maps[0], c_out, h, w);
    } else {
      const int64_t bytes = maps[0].size(0) * h * w * c_out * element;
      const auto fits = std::find_if(released.begin(), released.end(),
                                     [&](const Buffer& b) { return b.bytes == bytes; });
      Buffer buffer{0, bytes, static_cast<int>(i)};
      if (fits != released.end()) {
        buffer.offset = fits->offset;
        graph.after[n] = readers[static_cast<size_t>(fits->owner)];
        graph.after[n].push_back(fits->owner);
        released.erase(fits);
      } else {
        buffer.offset = layout.add(bytes);
      }
      offset[n] = buffer.offset;
      in_use.push_back(buffer);
    }
    for (size_t b = 0; b < in_use.size();) {
      if (std::max<int64_t>(last_read[static_cast<size_t>(in_use[b].owner)], in_use[b].owner) <=
          i) {
        released.push_back(in_use[b]);
        in_use.erase(in_use.begin() + static_cast<std::ptrdiff_t>(b));
      } else {
        b++;
      }
    }
  }

  const int64_t most = *std::max_element(edge_counts.begin(), edge_counts.end());
  const int64_t node_coefficients = static_cast<int>(most) * padded(c);
  const int64_t coefficients = layout.add(4 * count * node_coefficients);
  const bool per_channel = edge_weights && edge_weights->dim() == 3;
  Tensor factors = maps[0];
  if (edge_weights)
    factors = float_weight(*edge_weights, count * most * (per_channel ? c : 1), "edge_weights");

  at = 0;
  for (int64_t i = 0; i < count; i++) {
    const auto n = static_cast<size_t>(i);
    NodeParams& p = graph.nodes[n];
    set_fusion(p, maps[0], sizes[2 * n], sizes[2 * n + 1], static_cast<int>(edge_counts[n]));
    p.fusion.activation = activation_of(pre_activation);
    p.activation = activation_of(post_activation);
    weights.set(p, i, i);
    for (int e = 0; e < p.fusion.edges; e++) {
      const int64_t id = edges[at++], source = id - first;
      const auto s = static_cast<size_t>(source < 0 ? id : source);
      const int64_t h = source < 0 ? maps[s].size(2) : sizes[2 * s];
      const int64_t w = source < 0 ? maps[s].size(3) : sizes[2 * s + 1];
      const void* data = source < 0 ? maps[s].const_data_ptr() : nullptr;
      p.fusion.edge[e] = make_edge(data, h, w, p.fusion.h, p.fusion.w, pool_of(pool),
                                   static_cast<int>(source < 0 ? -1 : source));
    }
  }

  const int64_t scratch = layout.add(4 * cpu::node_graph_scratch(graph, threads));
  const Workspace workspace(layout.size());
  for (int64_t i = 0; i < count; i++) {
    const auto n = static_cast<size_t>(i);
    NodeParams& p = graph.nodes[n];
    p.out = is_output[n] ? results[n].mutable_data_ptr() : workspace.data() + offset[n];
    for (int e = 0; e < p.fusion.edges; e++)
      if (p.fusion.edge[e].source >= 0)
        p.fusion.edge[e].data = graph.nodes[static_cast<size_t>(p.fusion.edge[e].source)].out;
    auto* a = reinterpret_cast<float*>(workspace.data() + coefficients) + i * node_coefficients;
    const int64_t row = per_channel ? most * c : most;
    fill_coefficients(edge_weights ? factors.const_data_ptr<float>() + i * row : nullptr,
                      per_channel, p.fusion.edges, c, fusion_of(fusion), a);
    p.fusion.coefficients = a;
  }
  cpu::run_node_graph(graph, threads, reinterpret_cast<float*>(workspace.data() + scratch));

  Tensors returned;
  for (int64_t o : outputs) returned.push_back(results[static_cast<size_t>(o - first)]);
  return returned;
}

Tensor fusion_node(const Tensors inputs, const std::optional<Tensor> edge_weights,
                   const Tensor dw_weight, const Tensor pw_weight, const Tensor scale,
                   const Tensor shift, const Ints size, int64_t fusion, int64_t pool,
                   int64_t pre_activation, int64_t post_activation) {
  Ints edges;
  for (size_t i = 0; i < inputs.size(); i++) edges.push_back(static_cast<int64_t>(i));
  const auto count = static_cast<int64_t>(inputs.size());
  const bool per_channel = edge_weights && edge_weights->dim() == 2;
  return bifpn(inputs, per_channel ? torch::stable::unsqueeze(*edge_weights, 0) : edge_weights,
               dw_weight, pw_weight, scale, shift, edges, {count}, size, {count}, fusion, pool,
               pre_activation, post_activation)[0];
}

Tensors head(const Tensors inputs, const Tensors dw_weights, const Tensors pw_weights,
             const Tensors scales, const Tensors shifts, int64_t activation) {
  const Tensors maps = graph_inputs(inputs);
  const size_t levels = maps.size(), layers = dw_weights.size();
  STD_TORCH_CHECK(
      layers >= 1 && pw_weights.size() == layers && scales.size() == layers &&
          shifts.size() == layers,
      "dw_weights, pw_weights, scales and shifts must be non-empty lists of one length");
  std::vector<NodeWeights> weights;
  int64_t c = maps[0].size(1), widest = c;
  for (size_t i = 0; i < layers; i++) {
    const int64_t c_out = scales[i].size(-1);
    weights.emplace_back(dw_weights[i], pw_weights[i], scales[i], shifts[i], 1,
                         static_cast<int64_t>(levels), c, c_out);
    c = c_out;
    widest = std::max(widest, c);
  }

  // A level's layers write to two buffers in turn; the nodes of a level follow each other, so that
  // a map is read while it is still in the cache.
  const int64_t element = static_cast<int64_t>(maps[0].element_size());
  cpu::NodeGraph graph;
  Layout layout;
  std::vector<float> ones(static_cast<size_t>(padded(widest)), 1.0f);
  Ints offset;
  Tensors results;
  for (size_t l = 0; l < levels; l++) {
    const Tensor& map = maps[l];
    const int64_t h = map.size(2), w = map.size(3);
    const int64_t buffer[2] = {layout.add(layers > 1 ? map.size(0) * h * w * widest * element : 0),
                               layout.add(layers > 2 ? map.size(0) * h * w * widest * element : 0)};
    for (size_t i = 0; i < layers; i++) {
      const int node = static_cast<int>(graph.nodes.size());
      NodeParams p{};
      set_fusion(p, map, h, w, 1);
      p.fusion.c = weights[i].c;
      p.fusion.edge[0] = make_edge(map.const_data_ptr(), h, w, h, w, Pool::same, i ? node - 1 : -1);
      p.fusion.coefficients = ones.data();
      p.fusion.activation = Activation::none;
      p.activation = i + 1 < layers ? activation_of(activation) : Activation::none;
      weights[i].set(p, 0, static_cast<int64_t>(l));
      graph.nodes.push_back(p);
      const bool reuses = i >= 2 && i + 1 < layers;
      graph.after.push_back(reuses ? std::vector<int>{node - 1} : std::vector<int>{});
      offset.push_back(buffer[i % 2]);
    }
    results.push_back(empty_map(map, c, h, w));
  }
  const cpu::Runtime threads = runtime();
  const int64_t scratch = layout.add(4 * cpu::node_graph_scratch(graph, threads));
  const Workspace workspace(layout.size());
  for (size_t n = 0; n < graph.nodes.size(); n++) {
    NodeParams& p = graph.nodes[n];
    const bool last = n % layers == layers - 1;
    p.out = last ? results[n / layers].mutable_data_ptr() : workspace.data() + offset[n];
    if (p.fusion.edge[0].source >= 0) p.fusion.edge[0].data = graph.nodes[n - 1].out;
  }
  cpu::run_node_graph(graph, threads, reinterpret_cast<float*>(workspace.data() + scratch));
  return results;
}

Tensors separable_conv(const Tensors inputs, const Tensor dw_weight, const Tensor pw_weight,
                       const Tensor scale, const Tensor shift, int64_t activation) {
  const Tensors maps = graph_inputs(inputs);
  const int64_t c = maps[0].size(1), c_out = scale.size(-1);
  const auto levels = static_cast<int64_t>(maps.size());
  const NodeWeights weights(dw_weight, pw_weight, scale, shift, 1, levels, c, c_out);
  cpu::NodeGraph graph;
  std::vector<float> ones(static_cast<size_t>(padded(c)), 1.0f);
  Tensors results;
  for (int64_t l = 0; l < levels; l++) {
    const Tensor& map = maps[static_cast<size_t>(l)];
    NodeParams p{};
    set_fusion(p, map, map.size(2), map.size(3), 1);
    p.fusion.edge[0] = make_edge(map.const_data_ptr(), p.fusion.h, p.fusion.w, p.fusion.h,
                                 p.fusion.w, Pool::same, -1);
    p.fusion.coefficients = ones.data();
    p.fusion.activation = Activation::none;
    p.activation = activation_of(activation);
    weights.set(p, 0, l);
    results.push_back(empty_map(map, c_out, p.fusion.h, p.fusion.w));
    p.out = results.back().mutable_data_ptr();
    graph.nodes.push_back(p);
  }
  graph.after.resize(graph.nodes.size());
  const cpu::Runtime threads = runtime();
  const Workspace workspace(4 * cpu::node_graph_scratch(graph, threads));
  cpu::run_node_graph(graph, threads, reinterpret_cast<float*>(workspace.data()));
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edet_kernels, CPU, m) {
  m.impl("fusion_node", TORCH_BOX(&fusion_node));
  m.impl("separable_conv", TORCH_BOX(&separable_conv));
  m.impl("bifpn", TORCH_BOX(&bifpn));
  m.impl("head", TORCH_BOX(&head));
}

}  // namespace edet::torch_ops
