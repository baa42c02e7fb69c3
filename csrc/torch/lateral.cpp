// lateral on the CPU.
#include <algorithm>

#include "../cpu/dispatch.h"
#include "../cpu/node_graph.h"
#include "common.h"

namespace edet::torch_ops {

static Tensors lateral(const Tensor input, const Tensors pw_weights, const Tensors scales,
                       const Tensors shifts, int64_t pooled, int64_t pool) {
  const Tensor map = channels_last(input);
  const int64_t n = map.size(0), h = map.size(2), w = map.size(3);
  LateralParams p{};
  p.dtype = map_dtype(map);
  p.input = map.const_data_ptr();
  p.pixels = n * h * w;
  p.c_in = map.size(1);
  p.projections = static_cast<int>(pw_weights.size());
  STD_TORCH_CHECK(p.projections >= 1 && p.projections <= kMaxEdges, "pw_weights must be 1 to ",
                  kMaxEdges, " projections, got ", p.projections);
  STD_TORCH_CHECK(scales.size() == pw_weights.size() && shifts.size() == pw_weights.size(),
                  "pw_weights, scales and shifts must be lists of one length");
  Tensors weights, results;
  for (size_t i = 0; i < pw_weights.size(); i++) {
    const int64_t c_out = scales[i].numel();
    weights.push_back(float_weight(pw_weights[i], padded(c_out) * p.c_in, "pw_weights"));
    weights.push_back(float_weight(scales[i], c_out, "scales"));
    weights.push_back(float_weight(shifts[i], c_out, "shifts"));
    results.push_back(empty_map(map, c_out, h, w));
    const auto part = [&](size_t k) { return weights[3 * i + k].const_data_ptr<float>(); };
    p.projection[i] = {part(0), part(1), part(2), c_out, results[i].mutable_data_ptr()};
  }

  // Step 0 projects blocks of pixels; each further step pools the map before it.
  struct PoolStep {
    FusionParams params;
    void* out;
    int64_t rows, bands;
  };
  const cpu::Runtime threads = runtime();
  const int64_t c = results.back().size(1), cp = padded(c);
  std::vector<float> ones(static_cast<size_t>(cp), 1.0f);
  std::vector<PoolStep> pools;
  const cpu::PixelBlocks blocks(p.pixels, 1, threads.threads);
  Ints tasks{blocks.count()};
  Tensors chain{results.back()};
  for (int64_t i = 0; i < pooled; i++) {
    const Tensor from = chain.back();
    PoolStep s{};
    s.params.dtype = p.dtype;
    s.params.n = n, s.params.c = c;
    s.params.h = (from.size(2) + 1) / 2, s.params.w = (from.size(3) + 1) / 2;
    s.params.edges = 1;
    s.params.edge[0] = make_edge(from.const_data_ptr(), from.size(2), from.size(3), s.params.h,
                                 s.params.w, pool_of(pool), -1);
    s.params.coefficients = ones.data();
    chain.push_back(empty_map(map, c, s.params.h, s.params.w));
    s.out = chain.back().mutable_data_ptr();
    s.rows = cpu::band_rows(s.params.h, s.params.w, threads.threads);
    s.bands = divide_up(s.params.h, s.rows);
    tasks.push_back(n * s.bands);
    pools.push_back(s);
  }

  const cpu::Kernels& kernels = cpu::kernels();
  const int64_t scratch = std::max(kernels.lateral_scratch(p), w * cp);
  const Workspace workspace(4 * scratch * threads.threads);
  cpu::Schedule schedule(tasks);
  const auto ready = [&](int64_t step, int64_t) { return step == 0 || schedule.done(step - 1); };
  schedule.run(threads, ready, [&](int64_t step, int64_t task, int thread) {
    float* mine = reinterpret_cast<float*>(workspace.data()) + thread * scratch;
    if (step == 0) {
      kernels.lateral_block(p, blocks.begin(task), blocks.end(task), mine);
      return;
    }
    const PoolStep& s = pools[static_cast<size_t>(step) - 1];
    const int64_t begin = task % s.bands * s.rows;
    kernels.fusion_band(s.params, s.out, task / s.bands, begin,
                        std::min(begin + s.rows, s.params.h), mine);
  });
  if (pooled) {
    results.pop_back();
    results.insert(results.end(), chain.begin() + 1, chain.end());
  }
  return results;
}

STABLE_TORCH_LIBRARY_IMPL(edet_kernels, CPU, m) { m.impl("lateral", TORCH_BOX(&lateral)); }

}  // namespace edet::torch_ops
