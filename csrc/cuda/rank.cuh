// Sorting candidates by counting, for each, those that are better: k² comparisons that all of the
// device shares, k being at most some thousands, and no order that depends on the threads'.
#pragma once

#include "device.cuh"
#include "nms.h"

namespace edet::cuda {

// Threads of a block, and those that share out the comparisons of a candidate: neighbours of a
// warp.
constexpr int kRankThreads = 256, kRankShare = 8, kRanked = kRankThreads / kRankShare;
// Keys that are compared at a time, in shared memory, and how many of them a thread brings.
constexpr int kRankLoads = 4, kRankKeys = kRankLoads * kRankThreads;

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
  const int i = block().x * kRanked + thread().x / kRankShare, share = thread().x % kRankShare;
  if (block().x * kRanked >= count) return;  // the whole block
  const uint64_t key = i < count ? load_constant<uint64_t, 1>(c.keys + first + i).value[0] : 0;
  int rank = 0;
  for (int base = 0; base < count; base += kRankKeys) {
    uint64_t keys[kRankLoads];
    EDET_UNROLL
    for (int j = 0; j < kRankLoads; j++) {
      const int at = base + j * kRankThreads + thread().x;
      keys[j] = at < count ? load_constant<uint64_t, 1>(c.keys + first + at).value[0] : 0;
    }
    sync_threads();
    EDET_UNROLL
    for (int j = 0; j < kRankLoads; j++) store(others + j * kRankThreads + thread().x, keys[j]);
    sync_threads();
    const int end = min(kRankKeys, count - base);
    for (int j = share; j < end; j += kRankShare) rank += get(others + j) > key;
  }
  for (int other = 1; other < kRankShare; other *= 2) rank += shuffle_xor(rank, other);
  if (share || i >= count) return;
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
