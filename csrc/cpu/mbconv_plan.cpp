// Tasks of an inverted residual block: (band, chunk) of the expansion, squeeze-excite of an image,
// panels of its gated weights, blocks of pixels of the projection.
#include "mbconv_plan.h"

#include <algorithm>

#include "dispatch.h"

namespace edet::cpu {

namespace {

// Whether an image has more pixels than output channels, so that gating the weights is less work.
bool gates_weights(const MbconvParams& p) {
  return p.c_reduced && padded(p.c_out) < p.out_h * p.out_w;
}

struct Sizes {
  int64_t mid, sums, gate, gated, scratch;  // bytes; scratch of one thread
};

Sizes sizes(const MbconvParams& p) {
  const int64_t pitch = padded(p.c_mid);
  const auto bytes = [](int64_t floats) { return round_up(4 * floats, 64); };
  return {bytes(p.n * p.out_h * p.out_w * pitch), bytes(p.n * p.out_h * pitch), bytes(p.n * pitch),
          gates_weights(p) ? bytes(p.n * padded(p.c_out) * p.c_mid) : 0,
          bytes(kernels().mbconv_scratch(p))};
}

}  // namespace

int64_t plan_mbconv(MbconvParams& p, int threads) {
  const int64_t panels = divide_up(p.c_mid, kPanel);
  // The rolling rows of a chunk should fit in half of a 1 MiB L2; whole register tiles of 4 or 3
  // panels run fastest.
  p.chunk_panels = panels % 4 == 0 ? 4 : panels % 3 == 0 ? 3 : std::min<int64_t>(panels, 4);
  p.chunks = divide_up(panels, p.chunk_panels);
  // Bands: at least four tasks for each thread and the same number for all; the expansion of the
  // halo, kernel − stride rows of each band, is computed twice.
  int64_t bands = divide_up(4 * threads, p.chunks);
  while (bands * p.chunks % threads) bands++;
  p.band_rows = std::max<int64_t>(8, divide_up(p.out_h, bands));
  // A band's input is read once per chunk: keep it in L2.
  const int64_t row_bytes = 4 * p.w * p.c_in * p.stride;
  if (p.chunks > 1)
    p.band_rows = std::min(p.band_rows, std::max<int64_t>(8, (512 << 10) / row_bytes));
  p.band_rows = std::min(p.band_rows, p.out_h);
  p.bands = divide_up(p.out_h, p.band_rows);
  const Sizes s = sizes(p);
  return s.mid + s.sums + s.gate + s.gated + s.scratch * threads;
}

void run_mbconv(MbconvParams& p, const Runtime& runtime, char* workspace) {
  const Sizes s = sizes(p);
  p.mid = reinterpret_cast<float*>(workspace);
  p.sums = reinterpret_cast<float*>(workspace + s.mid);
  p.gate = reinterpret_cast<float*>(workspace + s.mid + s.sums);
  char* scratch = workspace + s.mid + s.sums + s.gate;
  p.gated = gates_weights(p) ? reinterpret_cast<float*>(scratch) : nullptr;
  scratch += s.gated;

  const Kernels& k = kernels();
  const int64_t area = p.out_h * p.out_w;
  const int64_t expand_tasks = p.bands * p.chunks;
  const int64_t panels = p.gated ? padded(p.c_out) / kPanel : 0;
  const PixelBlocks blocks(area, p.n, runtime.threads);
  enum Step { expand, squeeze, gate, project };
  Schedule schedule(
      {p.n * expand_tasks, p.c_reduced ? p.n : 0, p.n * panels, p.n * blocks.count()});
  const auto ready = [&](int64_t step, int64_t task) {
    const auto done = [&](Step before, int64_t image, int64_t tasks) {
      return schedule.done(before, image * tasks, (image + 1) * tasks);
    };
    switch (step) {
      case expand: return true;
      case squeeze: return done(expand, task, expand_tasks);
      case gate: return done(squeeze, task / panels, 1);
    }
    const int64_t image = task / blocks.count();
    return p.gated       ? done(gate, image, panels)
           : p.c_reduced ? done(squeeze, image, 1)
                         : done(expand, image, expand_tasks);
  };
  schedule.run(runtime, ready, [&](int64_t step, int64_t task, int thread) {
    auto* mine = reinterpret_cast<float*>(scratch + thread * s.scratch);
    if (step == expand) {
      const int64_t part = task % expand_tasks;
      k.mbconv_expand(p, task / expand_tasks, part / p.chunks, part % p.chunks, mine);
    } else if (step == squeeze) {
      k.mbconv_squeeze(p, task, mine);
    } else if (step == gate) {
      k.mbconv_gate(p, task / panels, task % panels);
    } else {
      const int64_t image = task / blocks.count(), block = task % blocks.count();
      k.mbconv_project(p, image, blocks.begin(block), blocks.end(block), mine);
    }
  });
}

}  // namespace edet::cpu
