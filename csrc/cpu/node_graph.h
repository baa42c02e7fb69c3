// Runs fusion → depthwise → pointwise nodes that read each other's maps, band by band.
#pragma once

#include <functional>

#include "../core/node_graph.h"
#include "schedule.h"

namespace edet::cpu {

// Floats of scratch that run_node_graph needs; the nodes' data pointers may still be missing.
int64_t node_graph_scratch(const NodeGraph& graph, const Runtime& runtime);

void run_node_graph(const NodeGraph& graph, const Runtime& runtime, float* scratch);

// The same with another way to compute rows [begin, end) of a node's map of an image.
using NodeBody =
    std::function<void(size_t node, int64_t image, int64_t begin, int64_t end, int thread)>;
void run_node_graph(const NodeGraph& graph, const Runtime& runtime, const NodeBody& body);

// Rows of one task of a map (h, w): enough pixels that recomputing the two halo rows is cheap,
// few enough that every thread has work.
int64_t band_rows(int64_t h, int64_t w, int threads);

}  // namespace edet::cpu
