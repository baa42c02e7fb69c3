// weighted_fusion on the CPU.
#include <algorithm>

#include "../cpu/dispatch.h"
#include "../cpu/node_graph.h"
#include "common.h"

namespace edet::torch_ops {

static Tensor weighted_fusion(const Tensors inputs, const std::optional<Tensor> edge_weights,
                              const Ints size, int64_t fusion, int64_t pool, int64_t activation) {
  const int edges = static_cast<int>(inputs.size());
  STD_TORCH_CHECK(edges >= 1 && edges <= kMaxEdges, "inputs must be 1 to ", kMaxEdges,
                  " maps, got ", edges);
  const Tensors maps = graph_inputs(inputs);
  const Tensor& first = maps[0];
  const Pair out_size = pair_of(size, "size");
  const int64_t c = first.size(1), cp = padded(c);
  const cpu::Runtime threads = runtime();
  Layout layout;
  const int64_t coefficients = layout.add(4 * edges * padded(c));
  const int64_t scratch = layout.add(4 * out_size.x * cp * threads.threads);
  const Workspace workspace(layout.size());

  FusionParams p{};
  p.dtype = map_dtype(first);
  p.n = first.size(0), p.c = c, p.h = out_size.y, p.w = out_size.x;
  p.edges = edges;
  p.activation = activation_of(activation);
  for (int e = 0; e < edges; e++) {
    const Tensor& map = maps[static_cast<size_t>(e)];
    p.edge[e] =
        make_edge(map.const_data_ptr(), map.size(2), map.size(3), p.h, p.w, pool_of(pool), -1);
  }
  float* factors = reinterpret_cast<float*>(workspace.data() + coefficients);
  Tensor weights = first;
  const bool per_channel = edge_weights && edge_weights->dim() == 2;
  if (edge_weights)
    weights = float_weight(*edge_weights, per_channel ? edges * c : edges, "edge_weights");
  fill_coefficients(edge_weights ? weights.const_data_ptr<float>() : nullptr, per_channel, edges, c,
                    fusion_of(fusion), factors);
  p.coefficients = factors;

  Tensor out = empty_map(first, c, p.h, p.w);
  void* data = out.mutable_data_ptr();
  const int64_t rows = cpu::band_rows(p.h, p.w, threads.threads);
  const int64_t bands = divide_up(p.h, rows);
  cpu::Schedule schedule({p.n * bands});
  const cpu::Kernels& kernels = cpu::kernels();
  schedule.run(threads, [&](int64_t, int64_t task, int thread) {
    const int64_t begin = task % bands * rows;
    kernels.fusion_band(p, data, task / bands, begin, std::min(begin + rows, p.h),
                        reinterpret_cast<float*>(workspace.data() + scratch) + thread * p.w * cp);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(edet_kernels, CPU, m) {
  m.impl("weighted_fusion", TORCH_BOX(&weighted_fusion));
}

}  // namespace edet::torch_ops
