// Tasks of an inverted residual block: (band, chunk) of the expansion, squeeze-excite of an image,
// blocks of pixels of the projection.
#include "mbconv_plan.h"

#include <algorithm>

#include "dispatch.h"

namespace edet::cpu {

namespace {

int64_t divide_up(int64_t n, int64_t d) { return (n + d - 1) / d; }
int64_t round_up(int64_t n, int64_t m) { return divide_up(n, m) * m; }

struct Sizes {
  int64_t mid, sums, gate, scratch;  // bytes; scratch of one thread
};

Sizes sizes(const MbconvParams& p) {
  const int64_t pitch = round_up(p.c_mid, kPanel);
  const auto bytes = [](int64_t floats) { return round_up(4 * floats, 64); };
  return {bytes(p.n * p.out_h * p.out_w * pitch), bytes(p.n * p.bands * pitch), bytes(p.n * pitch),
          bytes(kernels().mbconv_scratch(p))};
}

}  // namespace

int64_t plan_mbconv(MbconvParams& p, int threads) {
  const int64_t panels = divide_up(p.c_mid, kPanel);
  // The rolling rows of a chunk should fit in half of a 1 MiB L2; whole register tiles of 4 or 3
  // panels run fastest.
  p.chunk_panels = panels % 4 == 0 ? 4 : panels % 3 == 0 ? 3 : std::min<int64_t>(panels, 4);
  p.chunks = divide_up(panels, p.chunk_panels);
  // Bands: enough tasks for many threads, at least 8 rows so that the halo is cheap. The pooled
  // sums are added band by band, so the cut must not depend on the number of threads or of images.
  const int64_t wanted = divide_up(32, p.chunks);
  p.band_rows = std::min(p.out_h, std::max<int64_t>(8, divide_up(p.out_h, wanted)));
  // A band's input is read once per chunk: keep it in L2.
  const int64_t row_bytes = 4 * p.w * p.c_in * p.stride;
  p.band_rows = std::min(p.band_rows, std::max<int64_t>(8, (512 << 10) / row_bytes));
  p.bands = divide_up(p.out_h, p.band_rows);
  const Sizes s = sizes(p);
  return s.mid + s.sums + s.gate + s.scratch * threads;
}

void run_mbconv(MbconvParams& p, const Runtime& runtime, char* workspace) {
  const Sizes s = sizes(p);
  p.mid = reinterpret_cast<float*>(workspace);
  p.sums = reinterpret_cast<float*>(workspace + s.mid);
  p.gate = reinterpret_cast<float*>(workspace + s.mid + s.sums);
  char* scratch = workspace + s.mid + s.sums + s.gate;

  const Kernels& k = kernels();
  const int64_t area = p.out_h * p.out_w;
  const int64_t expand_tasks = p.bands * p.chunks;
  const int64_t blocks = divide_up(area, kLateralPixels);
  Schedule schedule({p.n * expand_tasks, p.c_reduced ? p.n : 0, p.n * blocks});
  schedule.run(runtime, [&](int64_t step, int64_t task, int thread) {
    auto* mine = reinterpret_cast<float*>(scratch + thread * s.scratch);
    if (step == 0) {
      const int64_t part = task % expand_tasks;
      k.mbconv_expand(p, task / expand_tasks, part / p.chunks, part % p.chunks, mine);
    } else if (step == 1) {
      schedule.wait(0, task * expand_tasks, (task + 1) * expand_tasks);
      k.mbconv_squeeze(p, task, mine);
    } else {
      const int64_t image = task / blocks, begin = task % blocks * kLateralPixels;
      if (p.c_reduced)
        schedule.wait(1, image, image + 1);
      else
        schedule.wait(0, image * expand_tasks, (image + 1) * expand_tasks);
      k.mbconv_project(p, image, begin, std::min(begin + kLateralPixels, area), mine);
    }
  });
}

}  // namespace edet::cpu
