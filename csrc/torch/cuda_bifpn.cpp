// bifpn, separable_conv and head on CUDA: three ways to describe one graph of nodes.
#include "../cuda/bifpn.h"

#include <cstdlib>
#include <cstring>

#include "cuda_common.h"

namespace edet::torch_ops {

namespace {

// How EDET_CUDA_LAUNCH wants graphs to be launched; none when it is not set.
std::optional<cuda::GraphLaunch> wanted_launch() {
  const char* value = std::getenv("EDET_CUDA_LAUNCH");
  if (!value || !*value || !std::strcmp(value, "auto")) return std::nullopt;
  const char* const names[] = {"nodes", "pdl", "persistent"};
  for (int i = 0; i < 3; i++)
    if (!std::strcmp(value, names[i])) return static_cast<cuda::GraphLaunch>(i);
  STD_TORCH_CHECK(false, "EDET_CUDA_LAUNCH must be auto, nodes, pdl or persistent, got ", value);
}

// How many seconds a block waits for another before the launch fails.
double patience() {
  const char* value = std::getenv("EDET_CUDA_TIMEOUT");
  if (!value || !*value) return 20;
  char* end = nullptr;
  const double seconds = std::strtod(value, &end);
  STD_TORCH_CHECK(!*end && seconds > 0 && seconds <= 1e6,
                  "EDET_CUDA_TIMEOUT must be a number of seconds above 0, got ", value);
  return seconds;
}

// A graph whose nodes are added one by one; what they write lies in one piece of memory.
class GraphCall {
 public:
  GraphCall(const char* op, const Tensors& inputs) : call_(op, first_of(inputs)), like_(inputs[0]) {
    graph_.dtype = map_dtype(like_);
    graph_.tf32 = in_tf32();
    graph_.n = like_.size(0);
    graph_.weights.fusion = Fusion::sum;
    for (const Tensor& x : inputs) {
      STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == graph_.n && x.size(1) == like_.size(1) &&
                          x.scalar_type() == like_.scalar_type(),
                      "inputs must be maps (N, C, H, W) of one batch, channel count and dtype");
      graph_.maps.push_back({x.size(2), x.size(3), const_cast<void*>(call_.map(x))});
    }
    inputs_ = graph_.maps.size();
  }

  CudaCall& call() { return call_; }
  cuda::NodeGraph& graph() { return graph_; }

  // Weights of `rows` rows, all of dw_weight and pw_weight too unless they are shared.
  int add_layer(int64_t c, int64_t c_out, const Tensor& dw, const Tensor& pw, const Tensor& scale,
                const Tensor& shift, int64_t rows, bool shared, Activation activation) {
    const int64_t weights = shared ? 1 : rows;
    graph_.layers.push_back(
        {c, c_out, activation, shared, call_.floats(dw, weights * 9 * c, "dw_weight"),
         call_.floats(pw, weights * padded(c_out) * c, "pw_weight"),
         call_.floats(scale, rows * c_out, "scale"), call_.floats(shift, rows * c_out, "shift")});
    return static_cast<int>(graph_.layers.size()) - 1;
  }

  // The map that a node computes; an output is a tensor that run() returns, at that position.
  int add_node(std::vector<int> sources, int64_t h, int64_t w, int layer, int64_t row,
               bool output) {
    const auto edges = static_cast<int64_t>(sources.size());
    STD_TORCH_CHECK(edges >= 1 && edges <= kMaxEdges, "a node must fuse 1 to ", kMaxEdges,
                    " maps, got ", edges);
    STD_TORCH_CHECK(h > 0 && w > 0 && h <= cuda::kMostSide && w <= cuda::kMostSide,
                    "size must be 1 to ", cuda::kMostSide, " on CUDA, got (", h, ", ", w, ")");
    const auto map = static_cast<int>(graph_.maps.size());
    for (int source : sources) {
      STD_TORCH_CHECK(source >= 0 && source < map, "edges must name inputs or earlier nodes");
      const cuda::GraphMap& from = graph_.maps[static_cast<size_t>(source)];
      make_edge(nullptr, from.h, from.w, h, w, Pool::same, -1);  // for its checks
    }
    graph_.maps.push_back({h, w, nullptr});
    graph_.nodes.push_back({std::move(sources), layer, static_cast<int>(row)});
    is_output_.push_back(output);
    return map;
  }

  // Computes all nodes; the maps of outputs in the order in which they were added.
  Tensors run() {
    const std::optional<cuda::GraphLaunch> wanted = wanted_launch();
    cuda::GraphPlan plan{};
    call_.check(cuda::plan_graph(graph_, wanted ? &*wanted : nullptr, &plan));
    Tensors results;
    Layout layout;
    const int64_t flags = layout.add(plan.workspace);
    const Ints offsets = place_maps(layout, plan.launch != cuda::GraphLaunch::persistent);
    char* const memory = static_cast<char*>(call_.scratch(layout.size()));
    for (size_t i = 0; i < graph_.nodes.size(); i++) {
      cuda::GraphMap& map = graph_.maps[inputs_ + i];
      if (is_output_[i]) {
        results.push_back(empty_map(like_, c_out(i), map.h, map.w));
        map.data = call_.write(results.back());
      } else {
        map.data = memory + offsets[i];
      }
    }
    call_.check(cuda::run_graph(graph_, plan, memory + flags, patience(), call_.stream()));
    return results;
  }

 private:
  static const Tensor& first_of(const Tensors& inputs) {
    STD_TORCH_CHECK(!inputs.empty(), "inputs must be a non-empty list of maps");
    STD_TORCH_CHECK(inputs[0].dim() == 4, "maps must be (N, C, H, W), got ", inputs[0].dim(),
                    " dimensions");
    return inputs[0];
  }

  int64_t c_out(size_t node) const {
    return graph_.layers[static_cast<size_t>(graph_.nodes[node].layer)].c_out;
  }

  // Where the maps that are no outputs lie. Nodes that follow each other may reuse the memory of
  // maps that nobody reads any more.
  Ints place_maps(Layout& layout, bool reuse) const {
    const size_t count = graph_.nodes.size();
    std::vector<size_t> last_read(count, 0);
    for (size_t i = 0; i < count; i++) {
      last_read[i] = std::max(last_read[i], i);
      for (int source : graph_.nodes[i].sources)
        if (static_cast<size_t>(source) >= inputs_)
          last_read[static_cast<size_t>(source) - inputs_] = i;
    }
    struct Part {
      int64_t offset, bytes;
      size_t last_read;
    };
    std::vector<Part> parts;
    Ints offsets(count, 0);
    for (size_t i = 0; i < count; i++) {
      if (is_output_[i]) continue;
      const cuda::GraphMap& map = graph_.maps[inputs_ + i];
      const int64_t bytes =
          graph_.n * map.h * map.w * c_out(i) * static_cast<int64_t>(like_.element_size());
      size_t at = parts.size();
      for (size_t p = 0; reuse && p < parts.size(); p++)
        if (parts[p].bytes == bytes && parts[p].last_read < i) at = p;
      if (at == parts.size()) parts.push_back({layout.add(bytes), bytes, 0});
      parts[at].last_read = last_read[i];
      offsets[i] = parts[at].offset;
    }
    return offsets;
  }

  CudaCall call_;
  Tensor like_;
  cuda::NodeGraph graph_{};
  size_t inputs_ = 0;
  std::vector<bool> is_output_;
};

Tensors bifpn_cuda(const Tensors inputs, const std::optional<Tensor> edge_weights,
                   const Tensor dw_weight, const Tensor pw_weight, const Tensor scale,
                   const Tensor shift, const Ints edges, const Ints edge_counts, const Ints sizes,
                   const Ints outputs, int64_t fusion, int64_t pool, int64_t pre_activation,
                   int64_t post_activation) {
  GraphCall graph("bifpn", inputs);
  const auto count = static_cast<int64_t>(edge_counts.size()), c = inputs[0].size(1);
  const auto first = static_cast<int64_t>(inputs.size());
  STD_TORCH_CHECK(static_cast<int64_t>(sizes.size()) == 2 * count, "sizes must be (H, W) per node");
  STD_TORCH_CHECK(c == scale.size(-1), "nodes must keep the channel count");
  std::vector<bool> is_output(static_cast<size_t>(count), false);
  for (int64_t o : outputs) {
    STD_TORCH_CHECK(o >= first && o < first + count, "outputs must be ids of nodes, got ", o);
    STD_TORCH_CHECK(!is_output[static_cast<size_t>(o - first)], "outputs must be different nodes");
    is_output[static_cast<size_t>(o - first)] = true;
  }
  cuda::NodeGraph& g = graph.graph();
  g.pool = pool_of(pool);
  g.pre_activation = activation_of(pre_activation);
  g.weights.fusion = fusion_of(fusion);
  if (edge_weights) {
    g.weights.per_channel = edge_weights->dim() == 3;
    g.weights_pitch = edge_weights->size(1) * (g.weights.per_channel ? c : 1);
  }
  g.weights.values =
      fusion_weights(graph.call(), edge_weights, g.weights.fusion, count * g.weights_pitch);
  const int layer = graph.add_layer(c, c, dw_weight, pw_weight, scale, shift, count, false,
                                    activation_of(post_activation));
  size_t at = 0;
  for (int64_t i = 0; i < count; i++) {
    const auto n = static_cast<size_t>(i);
    std::vector<int> sources;
    for (int64_t e = 0; e < edge_counts[n]; e++, at++) {
      STD_TORCH_CHECK(at < edges.size(), "edges must name inputs or earlier nodes");
      sources.push_back(static_cast<int>(edges[at]));
    }
    STD_TORCH_CHECK(!edge_weights || edge_counts[n] <= edge_weights->size(1),
                    "edge_weights must have a weight for each edge");
    graph.add_node(sources, sizes[2 * n], sizes[2 * n + 1], layer, i, is_output[n]);
  }
  const Tensors computed = graph.run();
  Tensors results;
  for (int64_t o : outputs) {
    const auto before = std::count(is_output.begin(), is_output.begin() + (o - first), true);
    results.push_back(computed[static_cast<size_t>(before)]);
  }
  return results;
}

// Layers of a head, each on all levels; `last` follows the last one.
Tensors layers_cuda(const char* op, const Tensors& inputs, const Tensors& dw_weights,
                    const Tensors& pw_weights, const Tensors& scales, const Tensors& shifts,
                    Activation activation, Activation last) {
  const size_t count = dw_weights.size(), levels = inputs.size();
  STD_TORCH_CHECK(
      count >= 1 && pw_weights.size() == count && scales.size() == count && shifts.size() == count,
      "dw_weights, pw_weights, scales and shifts must be non-empty lists of one length");
  GraphCall graph(op, inputs);
  std::vector<int> maps;
  for (size_t l = 0; l < levels; l++) maps.push_back(static_cast<int>(l));
  int64_t c = inputs[0].size(1);
  for (size_t i = 0; i < count; i++) {
    const bool is_last = i + 1 == count;
    const int64_t c_out = scales[i].size(-1);
    const int layer =
        graph.add_layer(c, c_out, dw_weights[i], pw_weights[i], scales[i], shifts[i],
                        static_cast<int64_t>(levels), true, is_last ? last : activation);
    for (size_t l = 0; l < levels; l++)
      maps[l] = graph.add_node({maps[l]}, inputs[l].size(2), inputs[l].size(3), layer,
                               static_cast<int64_t>(l), is_last);
    c = c_out;
  }
  return graph.run();
}

Tensors separable_conv_cuda(const Tensors inputs, const Tensor dw_weight, const Tensor pw_weight,
                            const Tensor scale, const Tensor shift, int64_t activation) {
  const Activation last = activation_of(activation);
  return layers_cuda("separable_conv", inputs, {dw_weight}, {pw_weight}, {scale}, {shift}, last,
                     last);
}

Tensors head_cuda(const Tensors inputs, const Tensors dw_weights, const Tensors pw_weights,
                  const Tensors scales, const Tensors shifts, int64_t activation) {
  return layers_cuda("head", inputs, dw_weights, pw_weights, scales, shifts,
                     activation_of(activation), Activation::none);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EDET_OPS, EDET_CUDA_KEY, m) {
  m.impl("bifpn", TORCH_BOX(&bifpn_cuda));
  m.impl("separable_conv", TORCH_BOX(&separable_conv_cuda));
  m.impl("head", TORCH_BOX(&head_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(EDET_TF32_OPS, EDET_CUDA_KEY, m) {
  m.impl("bifpn", TORCH_BOX(&Tf32<&bifpn_cuda>::call));
  m.impl("separable_conv", TORCH_BOX(&Tf32<&separable_conv_cuda>::call));
  m.impl("head", TORCH_BOX(&Tf32<&head_cuda>::call));
}

}  // namespace edet::torch_ops
