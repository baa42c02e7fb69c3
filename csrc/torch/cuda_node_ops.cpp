// fusion_node, bifpn, separable_conv and head on CUDA.
#include "../cuda/bifpn.h"

#include <cstdlib>
#include <cstring>

#include "cuda_common.h"
#include "node_ops.h"

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

class CudaNodes {
 public:
  static constexpr int64_t kMostSide = cuda::kMostSide;
  // A layer's nodes follow each other: they are one launch.
  static constexpr bool kLevelByLevel = false;

  CudaNodes(const char* op, const Tensor& like) : call_(op, like) {}

  const void* map(const Tensor& t) { return call_.map(t); }
  const float* floats(const Tensor& t, int64_t numel, const char* name) {
    return call_.floats(t, numel, name);
  }
  void* write(Tensor& t) { return call_.write(t); }
  bool reuses_maps() const { return plan_.launch != cuda::GraphLaunch::persistent; }

  // Bytes of what the launches need beside the maps. A single node waits for no other.
  int64_t plan(NodeGraph& graph) {
    graph.tf32 = in_tf32();
    const std::optional<cuda::GraphLaunch> wanted =
        graph.nodes.size() == 1 ? cuda::GraphLaunch::nodes : wanted_launch();
    call_.check(cuda::plan_graph(graph, wanted ? &*wanted : nullptr, &plan_));
    return plan_.workspace;
  }
  char* memory(int64_t bytes) { return bytes ? static_cast<char*>(call_.scratch(bytes)) : nullptr; }
  void run(const NodeGraph& graph, void* memory) {
    call_.check(cuda::run_graph(graph, plan_, memory, patience(), call_.stream()));
  }

 private:
  CudaCall call_;
  cuda::GraphPlan plan_{};
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EDET_OPS, EDET_CUDA_KEY, m) {
  m.impl("fusion_node", TORCH_BOX(&fusion_node<CudaNodes>));
  m.impl("bifpn", TORCH_BOX(&bifpn<CudaNodes>));
  m.impl("separable_conv", TORCH_BOX(&separable_conv<CudaNodes>));
  m.impl("head", TORCH_BOX(&head<CudaNodes>));
}

STABLE_TORCH_LIBRARY_IMPL(EDET_TF32_OPS, EDET_CUDA_KEY, m) {
  m.impl("fusion_node", TORCH_BOX(&Tf32<&fusion_node<CudaNodes>>::call));
  m.impl("bifpn", TORCH_BOX(&Tf32<&bifpn<CudaNodes>>::call));
  m.impl("separable_conv", TORCH_BOX(&Tf32<&separable_conv<CudaNodes>>::call));
  m.impl("head", TORCH_BOX(&Tf32<&head<CudaNodes>>::call));
}

}  // namespace edet::torch_ops
