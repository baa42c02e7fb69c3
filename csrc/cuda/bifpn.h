// How a graph of fusion nodes is launched on CUDA; plain enough for a host compiler.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "../core/node_graph.h"
#include "../core/tile_schedule.h"
#include "fusion_node.h"

namespace edet::cuda {

// How a graph is launched. `nodes`: a launch for each node, two for a wide one, or one for each
// layer of a head on all levels. `pdl`: the same, but each may begin while the one before it runs
// (programmatic dependent launch, from compute capability 9.0). `persistent`: one launch, whose
// blocks claim tiles and wait for flags.
enum class GraphLaunch : int { nodes, pdl, persistent };

struct GraphPlan {
  GraphLaunch launch;
  int tiles_m, tiles_n;  // of `persistent`: the block's product
  int64_t workspace;     // bytes of flags, or between the launches of a wide node; aligned to 16
  TileGraph tiles;       // of `persistent`
};

// The launch for a graph on the current device: `wanted`, or where it is null what kLaunchRules in
// bifpn.cu say. A graph that one launch cannot hold, and pdl on a device without it, become
// `nodes`. The graph's memory may still be missing.
cudaError_t plan_graph(const NodeGraph& graph, const GraphLaunch* wanted, GraphPlan* plan);

// Launches on `stream`; no map of a node may overlap another. `seconds`: how long a block waits for
// a flag before it reports it and the launch fails.
cudaError_t run_graph(const NodeGraph& graph, const GraphPlan& plan, void* workspace,
                      double seconds, cudaStream_t stream);

// Which flag of this process's launches did not come in time; empty while all did.
std::string overdue_text();

}  // namespace edet::cuda
