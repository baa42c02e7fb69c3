// Tasks, dependencies and order of node_graph.h.
#include "node_graph.h"

#include <algorithm>

#include "dispatch.h"

namespace edet::cpu {

namespace {

// Rows of an edge's map that output rows [begin, end) of its node read, the halo included.
void rows_read(const Edge& edge, int64_t h, int64_t& begin, int64_t& end) {
  begin = std::max<int64_t>(begin - 1, 0);
  end = std::min(end + 1, h);
  if (edge.resize == Resize::max_pool) {
    begin = std::max<int64_t>(begin * edge.rows.stride - edge.rows.before, 0);
    end = (end - 1) * edge.rows.stride - edge.rows.before + edge.rows.kernel;
  } else if (edge.resize == Resize::nearest) {
    begin = nearest_source(begin, edge.h, h);
    end = nearest_source(end - 1, edge.h, h) + 1;
  }
  begin = std::min(begin, edge.h - 1);
  end = std::min(end, edge.h);
}

}  // namespace

int64_t band_rows(int64_t h, int64_t w, int threads) {
  threads = std::max(threads, 1);
  const int64_t least = std::max<int64_t>(4, divide_up(128, w));
  int64_t bands = std::min<int64_t>(2 * threads, divide_up(h, least));
  if (bands > threads) bands -= bands % threads;
  return divide_up(h, bands);
}

static int64_t thread_scratch(const NodeGraph& graph) {
  int64_t floats = 0;
  for (const NodeParams& node : graph.nodes)
    floats = std::max(floats, kernels().node_scratch(node));
  return padded(floats);
}

int64_t node_graph_scratch(const NodeGraph& graph, const Runtime& runtime) {
  return thread_scratch(graph) * runtime.threads;
}

void run_node_graph(const NodeGraph& graph, const Runtime& runtime, float* scratch) {
  const Kernels& k = kernels();
  const int64_t scratch_floats = thread_scratch(graph);
  run_node_graph(graph, runtime,
                 [&](size_t i, int64_t image, int64_t begin, int64_t end, int thread) {
                   k.separable_node(graph.nodes[i], image, begin, end,
                                    scratch + thread * scratch_floats, nullptr);
                 });
}

void run_node_graph(const NodeGraph& graph, const Runtime& runtime, const NodeBody& body) {
  std::vector<int64_t> bands, rows, tasks;
  for (const NodeParams& node : graph.nodes) {
    rows.push_back(band_rows(node.fusion.h, node.fusion.w, runtime.threads));
    bands.push_back(divide_up(node.fusion.h, rows.back()));
    tasks.push_back(node.fusion.n * bands.back());
  }
  Schedule schedule(tasks);
  struct Band {
    int64_t image, begin, end;
  };
  const auto band = [&](size_t node, int64_t task) {
    const int64_t begin = task % bands[node] * rows[node];
    return Band{task / bands[node], begin,
                std::min(begin + rows[node], graph.nodes[node].fusion.h)};
  };
  const auto ready = [&](int64_t step, int64_t task) {
    const auto i = static_cast<size_t>(step);
    const FusionParams& fusion = graph.nodes[i].fusion;
    for (int other : graph.after[i])
      if (!schedule.done(other)) return false;
    const Band b = band(i, task);
    for (int e = 0; e < fusion.edges; e++) {
      const Edge& edge = fusion.edge[e];
      if (edge.source < 0) continue;
      const auto s = static_cast<size_t>(edge.source);
      int64_t first = b.begin, last = b.end;
      rows_read(edge, fusion.h, first, last);
      if (!schedule.done(edge.source, b.image * bands[s] + first / rows[s],
                         b.image * bands[s] + divide_up(last, rows[s])))
        return false;
    }
    return true;
  };
  schedule.run(runtime, ready, [&](int64_t step, int64_t task, int thread) {
    const auto i = static_cast<size_t>(step);
    const Band b = band(i, task);
    body(i, b.image, b.begin, b.end, thread);
  });
}

}  // namespace edet::cpu
