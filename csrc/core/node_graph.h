// A graph of fusion nodes as every device gets it: all cells of a BiFPN, all layers of heads, or a
// single node; and where the maps between its nodes lie.
#pragma once

#include <vector>

#include "params.h"

namespace edet {

struct InputMap {
  const void* data;
  int64_t h, w;
};

struct NodeGraph {
  bool tf32;  // CUDA: whether floats may be multiplied as tf32 (from sm_80)
  Pool pool;
  bool bytes;  // maps between nodes are of bytes, whatever their dtype
  std::vector<InputMap> inputs;
  std::vector<NodeParams> nodes;  // edges' sources come before their readers
  // For each node, nodes that must be finished first because it overwrites what they read or wrote.
  std::vector<std::vector<int>> after;
};

// Offsets of the nodes' maps in one piece of memory, but for outputs, which have their own; sets
// graph.after. `reuse`: a map may lie where one was that nobody reads any more when the nodes run
// in their order. `bytes`: of the memory, which grows from what it is.
std::vector<int64_t> place_maps(NodeGraph& graph, const std::vector<bool>& is_output, bool reuse,
                                int64_t* bytes);

}  // namespace edet
