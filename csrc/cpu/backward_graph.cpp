// Groups, tasks and sums of backward_graph.h.
#include "backward_graph.h"

#include <algorithm>
#include <cstring>

#include "dispatch.h"

namespace edet::cpu {

namespace {

constexpr int64_t kGroupPixels = 512;  // so that recomputing two halo rows is cheap
constexpr int64_t kMostGroups = 32;
constexpr int64_t kSumFloats = 4096;  // of one task that adds up partial sums

// Calls f(image, begin, end) for each image's part of rows [begin, end) of all images.
template <class F>
void each_image(int64_t begin, int64_t end, int64_t h, const F& f) {
  while (begin < end) {
    const int64_t image = begin / h, stop = std::min(end, (image + 1) * h);
    f(image, begin - image * h, stop - image * h);
    begin = stop;
  }
}

}  // namespace

RowGroups row_groups(int64_t n, int64_t h, int64_t w) {
  const int64_t rows = std::max(divide_up(kGroupPixels, w), divide_up(n * h, kMostGroups));
  return {rows, divide_up(n * h, rows)};
}

int64_t conv_partial_floats(const NodeBackwardParams& node) {
  const int64_t c = node.node.fusion.c, op = padded(node.node.c_out);
  return op * c + 9 * padded(c) + op;
}

int64_t fusion_partial_floats(const NodeBackwardParams& node) {
  return (node.node.fusion.edges + 1) * padded(node.node.fusion.c);
}

static int64_t thread_scratch(const std::vector<NodeBackwardParams>& nodes) {
  int64_t floats = 0;
  for (const NodeBackwardParams& node : nodes)
    floats = std::max(floats, kernels().node_backward_scratch(node));
  return padded(floats);
}

int64_t backward_graph_scratch(const std::vector<NodeBackwardParams>& nodes,
                               const Runtime& runtime) {
  return thread_scratch(nodes) * runtime.threads;
}

void run_backward_graph(const std::vector<NodeBackwardParams>& nodes,
                        const std::vector<float*>& conv_sums,
                        const std::vector<float*>& fusion_sums, const Runtime& runtime,
                        float* scratch) {
  const Kernels& k = kernels();
  enum class Kind { conv, fusion, resize, sum };
  struct Step {
    Kind kind;
    size_t node;
    int edge;            // of resize
    float* sums;         // of conv, fusion and sum
    int64_t sum_floats;  // of one partial sum
    int64_t after;       // the step whose results this one reads, or −1
  };
  std::vector<Step> steps;
  std::vector<int64_t> tasks;
  std::vector<RowGroups> groups;
  for (const NodeBackwardParams& b : nodes) {
    const FusionParams& f = b.node.fusion;
    groups.push_back(row_groups(f.n, f.h, f.w));
  }
  const auto last = [&] { return static_cast<int64_t>(steps.size()) - 1; };
  std::vector<int64_t> fused(nodes.size());
  for (size_t i = 0; i < nodes.size(); i++)
    if (nodes[i].node.dw) {
      steps.push_back({Kind::conv, i, 0, conv_sums[i], conv_partial_floats(nodes[i]), -1});
      tasks.push_back(groups[i].count);
      fused[i] = last();
    }
  for (size_t i = 0; i < nodes.size(); i++) {
    const int64_t after = nodes[i].node.dw ? fused[i] : -1;
    steps.push_back({Kind::fusion, i, 0, fusion_sums[i], fusion_partial_floats(nodes[i]), after});
    tasks.push_back(groups[i].count);
    fused[i] = last();
    if (after < 0) continue;
    steps.push_back({Kind::sum, i, 0, conv_sums[i], conv_partial_floats(nodes[i]), after});
    tasks.push_back(divide_up(conv_partial_floats(nodes[i]), kSumFloats));
  }
  for (size_t i = 0; i < nodes.size(); i++) {
    const FusionParams& f = nodes[i].node.fusion;
    for (int e = 0; e < f.edges; e++) {
      if (f.edge[e].resize == Resize::none || !nodes[i].input_grad[e]) continue;
      steps.push_back({Kind::resize, i, e, nullptr, 0, fused[i]});
      tasks.push_back(f.n * divide_up(f.edge[e].h, kResizeRows));
    }
    steps.push_back({Kind::sum, i, 0, fusion_sums[i], fusion_partial_floats(nodes[i]), fused[i]});
    tasks.push_back(divide_up(fusion_partial_floats(nodes[i]), kSumFloats));
  }

  const int64_t scratch_floats = thread_scratch(nodes);
  Schedule schedule(tasks);
  const auto ready = [&](int64_t number, int64_t) {
    const int64_t after = steps[static_cast<size_t>(number)].after;
    return after < 0 || schedule.done(after);
  };
  schedule.run(runtime, ready, [&](int64_t number, int64_t task, int thread) {
    const Step& step = steps[static_cast<size_t>(number)];
    const NodeBackwardParams& b = nodes[step.node];
    const FusionParams& f = b.node.fusion;
    const RowGroups& group = groups[step.node];
    float* own = scratch + thread * scratch_floats;
    if (step.kind == Kind::resize) {
      const int64_t bands = divide_up(f.edge[step.edge].h, kResizeRows);
      const int64_t begin = task % bands * kResizeRows;
      const int64_t end = std::min(begin + kResizeRows, f.edge[step.edge].h);
      k.resize_backward(b, step.edge, task / bands, begin, end, own);
    } else if (step.kind == Kind::sum) {
      const int64_t begin = task * kSumFloats, end = std::min(begin + kSumFloats, step.sum_floats);
      if (!group.count)
        std::memset(step.sums + begin, 0, sizeof(float) * static_cast<size_t>(end - begin));
      for (int64_t g = 1; g < group.count; g++)
        for (int64_t i = begin; i < end; i++) step.sums[i] += step.sums[g * step.sum_floats + i];
    } else {
      float* sums = step.sums + task * step.sum_floats;
      std::memset(sums, 0, sizeof(float) * static_cast<size_t>(step.sum_floats));
      const auto run = step.kind == Kind::conv ? k.conv_backward : k.fusion_backward;
      const int64_t begin = task * group.rows, end = std::min(begin + group.rows, f.n * f.h);
      each_image(begin, end, f.h, [&](int64_t image, int64_t from, int64_t to) {
        run(b, image, from, to, sums, own);
      });
    }
  });
}

}  // namespace edet::cpu
