// Runs the gradients of nodes that do not read one another: the levels of a head, or one node.
#pragma once

#include <vector>

#include "../core/params.h"
#include "schedule.h"

namespace edet::cpu {

// How a map's rows (of all images) are cut into groups, each with a partial sum of its own. It does
// not depend on the number of threads, and so neither does a sum over the groups, taken in order.
struct RowGroups {
  int64_t rows, count;  // rows of a group; groups
};
RowGroups row_groups(int64_t n, int64_t h, int64_t w);

// Floats of one partial sum of conv_backward and fusion_backward (node_backward.h).
int64_t conv_partial_floats(const NodeBackwardParams& node);
int64_t fusion_partial_floats(const NodeBackwardParams& node);

int64_t backward_graph_scratch(const std::vector<NodeBackwardParams>& nodes,
                               const Runtime& runtime);

// conv_sums[i] and fusion_sums[i] hold node i's partial sums, one per group and at least one; the
// first one of them is the result.
void run_backward_graph(const std::vector<NodeBackwardParams>& nodes,
                        const std::vector<float*>& conv_sums,
                        const std::vector<float*>& fusion_sums, const Runtime& runtime,
                        float* scratch);

}  // namespace edet::cpu
