// stem on the CPU.
#include <algorithm>

#include "../cpu/dispatch.h"
#include "../cpu/node_graph.h"
#include "common.h"

namespace edet::torch_ops {

static Tensor stem(const Tensor image, const Tensor weight, const Tensor scale, const Tensor shift,
                   const std::optional<Tensor> mean, const std::optional<Tensor> std,
                   const Ints padding, const Ints size, int64_t activation,
                   const torch::headeronly::ScalarType dtype) {
  Tensors kept;  // contiguous copies, where one was needed
  Tensor out;
  StemParams p = stem_params(
      image, weight, scale, shift, mean, std, padding, size, activation, dtype,
      [&](const Tensor& t, int64_t numel, const char* name) {
        kept.push_back(float_weight(t, numel, name));
        return kept.back().const_data_ptr<float>();
      },
      &out);
  for (int d = 0; d < 4; d++) p.stride[d] = image.stride(d);
  p.image = image.const_data_ptr();
  p.out = out.mutable_data_ptr();

  const cpu::Kernels& kernels = cpu::kernels();
  const cpu::Runtime threads = runtime();
  const int64_t scratch = round_up(kernels.stem_scratch(p), 16);
  const Workspace workspace(4 * scratch * threads.threads);
  const int64_t rows = cpu::band_rows(p.out_h, p.out_w, 4 * threads.threads);
  const int64_t bands = divide_up(p.out_h, rows);
  cpu::Schedule schedule({p.n * bands});
  schedule.run(threads, [&](int64_t, int64_t task, int thread) {
    const int64_t begin = task % bands * rows;
    kernels.stem_rows(p, task / bands, begin, std::min(begin + rows, p.out_h),
                      reinterpret_cast<float*>(workspace.data()) + thread * scratch);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(edet_kernels, CPU, m) { m.impl("stem", TORCH_BOX(&stem)); }

}  // namespace edet::torch_ops
