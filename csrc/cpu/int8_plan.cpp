// Tasks of an inverted residual block on bytes, which are those of mbconv_plan.cpp.
#include "int8_plan.h"

#include <algorithm>

#include "dispatch.h"

namespace edet::cpu {

namespace {

struct Sizes {
  int64_t mid, sums, gate, gated, gated_rows, scratch;  // bytes; scratch of one thread
};

Sizes sizes(const Int8MbconvParams& p) {
  const int64_t pitch = padded(p.c_mid), op = padded(p.c_out);
  const auto bytes = [](int64_t count) { return round_up(count, 64); };
  const int64_t gated = p.c_reduced ? p.n * op : 0;
  return {bytes(p.n * p.out_h * p.out_w * pitch),
          p.c_reduced ? bytes(4 * p.n * p.out_h * pitch) : 0,
          p.c_reduced ? bytes(4 * p.n * pitch) : 0,
          bytes(gated * round_up(p.c_mid, 4)),
          bytes(4 * 2 * gated),
          bytes(int8_kernels().mbconv_scratch(p))};
}

}  // namespace

int64_t plan_int8_mbconv(Int8MbconvParams& p, int threads) {
  const int64_t panels = divide_up(p.c_mid, kPanel);
  // whole register tiles of 4 panels; the ring of 5 rows takes twice the bytes
  p.chunk_panels = std::min<int64_t>(panels, 4);
  if (panels % 4 && panels % 3 == 0) p.chunk_panels = 3;
  p.chunks = divide_up(panels, p.chunk_panels);
  int64_t bands = divide_up(4 * threads, p.chunks);
  while (bands * p.chunks % threads) bands++;
  p.band_rows = std::max<int64_t>(8, divide_up(p.out_h, bands));
  const int64_t row_bytes = p.w * p.c_in * p.stride;
  if (p.chunks > 1)
    p.band_rows = std::min(p.band_rows, std::max<int64_t>(8, (256 << 10) / row_bytes));
  p.band_rows = std::min(p.band_rows, p.out_h);
  p.bands = divide_up(p.out_h, p.band_rows);
  const Sizes s = sizes(p);
  return s.mid + s.sums + s.gate + s.gated + s.gated_rows + s.scratch * threads;
}

void run_int8_mbconv(Int8MbconvParams& p, const Runtime& runtime, char* workspace) {
  const Sizes s = sizes(p);
  const auto take = [&](int64_t bytes) {
    char* at = workspace;
    workspace += bytes;
    return at;
  };
  p.mid = reinterpret_cast<uint8_t*>(take(s.mid));
  p.sums = reinterpret_cast<int32_t*>(take(s.sums));
  p.gate = reinterpret_cast<float*>(take(s.gate));
  p.gated = reinterpret_cast<int8_t*>(take(s.gated));
  p.gated_rows = reinterpret_cast<float*>(take(s.gated_rows));
  char* const scratch = workspace;

  const Int8Kernels& k = int8_kernels();
  const int64_t area = p.out_h * p.out_w, expand_tasks = p.bands * p.chunks;
  const int64_t panels = p.c_reduced ? padded(p.c_out) / kPanel : 0;
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
    return panels ? done(gate, image, panels) : done(expand, image, expand_tasks);
  };
  schedule.run(runtime, ready, [&](int64_t step, int64_t task, int thread) {
    char* mine = scratch + thread * s.scratch;
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
