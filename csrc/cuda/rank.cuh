// Sorting candidates by counting, for each, those that are better: k² comparisons that all of the
// device shares, k being at most some thousands, and no order that depends on the threads'.
#pragma once

#include "device.cuh"
#include "nms.h"

namespace edet::cuda {

constexpr int kRankThreads = 256;

// A float as an integer of the same order; the two zeros are equal. Not for NaN.
EDET_DEVICE uint32_t order_of(float x) {
  const uint32_t bits = float_bits(x == 0.0f ? 0.0f : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
EDET_DEVICE float ordered(uint32_t order) {
  return bits_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

// `look`(image, key, box, label, source) gives a candidate's values and returns its score.
template <class Look>
EDET_DEVICE void rank_candidates(const Candidates& c, const Look& look) {
  EDET_SHARED(uint64_t, others);
  const int64_t image = block().y, first = image * c.most;
  const int count = load_constant<int, 1>(c.count + image).value[0];
  const int i = block().x * kRankThreads + thread().x;
  if (block().x * kRankThreads >= count) return;  // the whole block
  const uint64_t key = i < count ? load_constant<uint64_t, 1>(c.keys + first + i).value[0] : 0;
  int rank = 0;
  for (int base = 0; base < count; base += kRankThreads) {
    const int at = base + thread().x;
    sync_threads();
    store(others + thread().x,
          at < count ? load_constant<uint64_t, 1>(c.keys + first + at).value[0] : uint64_t(0));
    sync_threads();
    for (int j = 0; j < kRankThreads; j++) rank += get(others + j) > key;
  }
  if (i >= count) return;
  Vector<float, 4> box;
  int64_t label;
  int source;
  const float score = look(image, key, box, label, source);
  store(c.boxes + 4 * (first + rank), box);
  store(c.scores + first + rank, score);
  store(c.labels + first + rank, label);
  store(c.sources + first + rank, source);
}

}  // namespace edet::cuda
