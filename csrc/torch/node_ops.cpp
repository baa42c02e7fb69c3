// fusion_node, bifpn, separable_conv and head on the CPU.
#include "node_ops.h"

#include "../cpu/node_graph.h"

namespace edet::torch_ops {

namespace {

class CpuNodes {
 public:
  static constexpr int64_t kMostSide = std::numeric_limits<int64_t>::max();
  // The nodes of a level follow each other, so that a map is read while it is still in the cache.
  static constexpr bool kLevelByLevel = true;

  CpuNodes(const char*, const Tensor&) {}

  const void* map(const Tensor& t) {
    kept_.push_back(channels_last(t));
    return kept_.back().const_data_ptr();
  }
  const float* floats(const Tensor& t, int64_t numel, const char* name) {
    kept_.push_back(float_weight(t, numel, name));
    return kept_.back().const_data_ptr<float>();
  }
  void* write(Tensor& t) { return t.mutable_data_ptr(); }
  bool reuses_maps() const { return true; }

  // Bytes of scratch and of the edges' factors.
  int64_t plan(const NodeGraph& graph) {
    int64_t floats = padded(cpu::node_graph_scratch(graph, threads_));
    scratch_ = floats;
    for (const NodeParams& p : graph.nodes) floats += p.fusion.edges * padded(p.fusion.c);
    return 4 * floats;
  }
  char* memory(int64_t bytes) { return workspace_.emplace(bytes).data(); }

  void run(NodeGraph& graph, void* memory) {
    float* const scratch = static_cast<float*>(memory);
    float* factors = scratch + scratch_;
    for (NodeParams& p : graph.nodes) {
      const EdgeWeights& weights = p.fusion.weights;
      fill_coefficients(weights.values, weights.per_channel, p.fusion.edges, p.fusion.c,
                        weights.fusion, factors);
      p.fusion.coefficients = factors;
      factors += p.fusion.edges * padded(p.fusion.c);
    }
    cpu::run_node_graph(graph, threads_, scratch);
  }

 private:
  Tensors kept_;
  const cpu::Runtime threads_ = runtime();
  int64_t scratch_ = 0;  // floats
  std::optional<Workspace> workspace_;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edet_kernels, CPU, m) {
  m.impl("fusion_node", TORCH_BOX(&fusion_node<CpuNodes>));
  m.impl("separable_conv", TORCH_BOX(&separable_conv<CpuNodes>));
  m.impl("bifpn", TORCH_BOX(&bifpn<CpuNodes>));
  m.impl("head", TORCH_BOX(&head<CpuNodes>));
}

}  // namespace edet::torch_ops
