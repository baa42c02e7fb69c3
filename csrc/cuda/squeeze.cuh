// What kernels that end in pooled sums share: each block's part of squeeze-excite's first layer.
#pragma once

#include "vectors.cuh"

namespace edet::cuda {

// Floats of shared memory that reduce_part needs for a block of so many threads.
EDET_EVERYWHERE constexpr int reduce_floats(int threads) { return threads / kWarp * 4 * kPanel; }

// Reducing is linear: a block multiplies its sums over its pixels, `sums` of so many `channels`
// from `first` on, by their part of the weights, and writes the products' c_reduced sums to `to`.
// All `threads` of the block take part: at least 64, in whole warps.
EDET_DEVICE void reduce_part(const MbconvParams& p, int first, int channels, int threads,
                             Shared<float> sums, Shared<float> part, float* to) {
  constexpr int kTogether = 4;  // panels of weights
  const int t = thread().x, four = t % 4 * 4, reduced = int(p.c_reduced);
  const int end = min(channels, int(p.c_mid) - first);
  for (int panel = 0; panel * kPanel < reduced; panel += kTogether) {
    float x[kTogether][4] = {};
    EDET_LOOP
    for (int row = t / 4; row < end; row += threads / 4) {
      const float sum = get(sums + row);
      Vector<float, 4> v[kTogether];
      EDET_UNROLL
      for (int j = 0; j < kTogether; j++) {
        v[j] = {};
        if ((panel + j) * kPanel < reduced) {
          const int64_t at = (int64_t(panel + j) * p.c_mid + first + row) * kPanel + four;
          v[j] = load_constant<float, 4>(p.reduce + at);
        }
      }
      EDET_UNROLL
      for (int j = 0; j < kTogether; j++) {
        EDET_UNROLL
        for (int i = 0; i < 4; i++) x[j][i] += sum * v[j].value[i];
      }
    }
    EDET_UNROLL
    for (int j = 0; j < kTogether; j++) {
      if ((panel + j) * kPanel >= reduced) break;
      EDET_UNROLL
      for (int i = 0; i < 4; i++) {
        // lanes 4 apart have the same columns
        EDET_UNROLL
        for (int mask = 4; mask < kWarp; mask *= 2) x[j][i] += shuffle_xor(x[j][i], mask);
        if (t % kWarp < 4) store(part + ((t / kWarp * kTogether + j) * kPanel + four + i), x[j][i]);
      }
    }
    sync_threads();
    const int column = panel * kPanel + t;
    if (t < kTogether * kPanel && column < reduced) {
      float total = 0.0f;
      EDET_LOOP
      for (int g = 0; g < threads / kWarp; g++) {
        total += get(part + (g * kTogether * kPanel + t));
      }
      store(to + column, total);
    }
    sync_threads();
  }
}

}  // namespace edet::cuda
