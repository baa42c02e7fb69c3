// Parameters and launchers of graphs of fusion nodes on CUDA: all cells of a BiFPN, all layers of
// heads; plain enough for a host compiler.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "../core/tile_schedule.h"
#include "fusion_node.h"

namespace edet::cuda {

// The convolution of nodes: rows of its weights. A layer of a head has a depthwise and a pointwise
// weight for all rows, and a row of scale and shift for each level.
struct NodeLayer {
  int64_t c, c_out;
  Activation post_activation;
  bool shared;  // dw and pw have one row
  const float *dw, *pw, *scale, *shift;
};

struct GraphMap {
  int64_t h, w;
  void* data;  // of a node's map: set after the graph is planned
};

// post_activation(scale · pw(dw(pre_activation(Σ aᵢ·resize(mapᵢ)))) + shift).
struct GraphNode {
  std::vector<int> sources;  // maps: inputs come first, then nodes
  int layer, row;
};

struct NodeGraph {
  DType dtype;
  bool tf32;  // whether floats may be multiplied as tf32 (from sm_80)
  int64_t n;
  Activation pre_activation;
  Pool pool;
  EdgeWeights weights;
  int64_t weights_pitch;  // between the edge weights of a layer's rows
  std::vector<NodeLayer> layers;
  std::vector<GraphMap> maps;  // of inputs, then of nodes
  std::vector<GraphNode> nodes;
  int inputs() const { return static_cast<int>(maps.size() - nodes.size()); }
};

// How a graph is launched. `nodes`: a launch for each node, or for each layer of a head on all
// levels. `pdl`: the same, but each may begin while the one before it runs (programmatic dependent
// launch, from compute capability 9.0). `persistent`: one launch, whose blocks claim tiles and wait
// for flags.
enum class GraphLaunch : int { nodes, pdl, persistent };

struct GraphPlan {
  GraphLaunch launch;
  int tiles_m, tiles_n;  // of `persistent`: the block's product
  int64_t workspace;     // bytes of flags; aligned to 16
  TileGraph tiles;       // of `persistent`
};

// The launch for a graph on the current device: `wanted`, or where it is null what kLaunchRules in
// bifpn.cu say. A graph that one launch cannot hold, and pdl on a device without it, become
// `nodes`.
cudaError_t plan_graph(const NodeGraph& graph, const GraphLaunch* wanted, GraphPlan* plan);

// Launches on `stream`; no map of a node may overlap another. `seconds`: how long a block waits for
// a flag before it reports it and the launch fails.
cudaError_t run_graph(const NodeGraph& graph, const GraphPlan& plan, void* workspace,
                      double seconds, cudaStream_t stream);

// Which flag of this process's launches did not come in time; empty while all did.
std::string overdue_text();

}  // namespace edet::cuda
