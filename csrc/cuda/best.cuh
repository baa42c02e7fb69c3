// Finding and sorting the best of a list of keys: a block takes them a tile at a time, the best
// first, and only as many tiles as it needs. No result depends on the list's order.
#pragma once

#include "device.cuh"

namespace edet::cuda {

constexpr int kDigit = 11;  // bits by which keys are counted at a time
constexpr int kBins = 1 << kDigit;

// A float as an integer of the same order; the two zeros are equal. Not for NaN.
EDET_DEVICE uint32_t order_of(float x) {
  const uint32_t bits = float_bits(x == 0.0f ? 0.0f : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
EDET_DEVICE float ordered(uint32_t order) {
  return bits_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

// Where, from the largest digit down, a number of keys is reached.
struct Cut {
  int top;          // the largest digit that a key has; 0 without any
  int bin;          // the digit with which it is reached; −1: there are fewer keys
  uint32_t above;   // keys of larger digits, or all
  uint32_t inside;  // keys of this digit
};
// Words of shared memory for find_cut(); a barrier must come before they are used again.
template <int kThreads>
constexpr int kCutWords = kThreads / kWarp + 4;

// Worked out by the whole block, for all its threads; `four`(i) gives the keys of 4 digits from i.
template <int kThreads, class Four>
EDET_DEVICE Cut find_cut(uint32_t wanted, Shared<uint32_t> memory, const Four& four) {
  constexpr int kOwn = kBins / kThreads, kWarps = kThreads / kWarp;
  static_assert(kOwn % 4 == 0, "vectors of digits");
  const int t = thread().x, lane = t % kWarp;
  const Shared<uint32_t> result = memory + kWarps;
  uint32_t own[kOwn], sum = 0;  // from the largest digit down
  EDET_UNROLL
  for (int i = 0; i < kOwn; i += 4) {
    const Vector<uint32_t, 4> v = four(kBins - 4 - t * kOwn - i);
    EDET_UNROLL
    for (int j = 0; j < 4; j++) {
      own[i + j] = v.value[3 - j];
      sum += own[i + j];
    }
  }
  uint32_t until = sum;  // of this thread's digits and those before, in its warp
  EDET_UNROLL
  for (int step = 1; step < kWarp; step *= 2) {
    const uint32_t other = shuffle(until, (lane - step) & (kWarp - 1));
    until += lane >= step ? other : 0;
  }
  if (lane == kWarp - 1) store(memory + t / kWarp, until);
  if (t == 0) {
    store(result, ~0u);
    store(result + 3, 0u);
  }
  sync_threads();
  uint32_t above = until - sum, total = 0;
  EDET_UNROLL
  for (int w = 0; w < kWarps; w++) {
    const uint32_t others = get(memory + w);
    above += w < t / kWarp ? others : 0;
    total += others;
  }
  if (!above && sum) {
    int top = kBins - 1 - t * kOwn;
    EDET_UNROLL
    for (int i = 0; i < kOwn - 1; i++) {
      if (own[i]) break;
      top--;
    }
    store(result + 3, uint32_t(top));
  }
  if (above < wanted && wanted - above <= sum) {
    EDET_UNROLL
    for (int i = 0; i < kOwn; i++) {
      if (above < wanted && wanted - above <= own[i]) {
        store(result, uint32_t(kBins - 1 - t * kOwn - i));
        store(result + 1, above);
        store(result + 2, own[i]);
      }
      above += own[i];
    }
  }
  sync_threads();
  const int bin = int(get(result)), top = int(get(result + 3));
  if (bin < 0) return {top, bin, total, 0};
  return {top, bin, get(result + 1), get(result + 2)};
}

// Keys from `low` on and below `high`, which are counted by as many digits as fit.
struct Range {
  uint64_t low, high;
};
EDET_DEVICE int shift_of(const Range& range) {
  return max(bit_length(range.high - 1 - range.low) - kDigit, 0);
}
EDET_DEVICE bool within(const Range& range, uint64_t key) {
  return key >= range.low && key < range.high;
}
EDET_DEVICE Range range_of(const Range& range, int bin) {
  const int shift = shift_of(range);
  const uint64_t low = range.low + (uint64_t(bin) << shift), high = low + (uint64_t(1) << shift);
  return {low, high < range.high ? high : range.high};
}

// Calls visit(eight keys) until a block has seen all of a list that launches before have written;
// 0 is no key.
constexpr int kKeys = 8;
template <int kThreads, class Visit>
EDET_DEVICE void visit_keys(const uint64_t* keys, int count, const Visit& visit) {
  EDET_LOOP
  for (int base = 2 * int(thread().x); base < count; base += kKeys * kThreads) {
    uint64_t own[kKeys];
    EDET_UNROLL
    for (int j = 0; j < kKeys; j += 2) {  // on their way together
      const int at = base + j * kThreads;
      Vector<uint64_t, 2> v{};
      if (at + 1 < count) {
        v = load_written<uint64_t, 2>(keys + at);
      } else if (at < count) {
        v.value[0] = load_written<uint64_t, 1>(keys + at).value[0];
      }
      own[j] = v.value[0];
      own[j + 1] = v.value[1];
    }
    visit(own);
  }
}

// A key from which on at most `wanted` of the range's keys are, and at least half as many unless
// the range has fewer. `bins`: kBins of shared memory.
template <int kThreads>
EDET_DEVICE uint64_t select(const uint64_t* keys, int count, Range range, int wanted,
                            Shared<uint32_t> bins, Shared<uint32_t> memory) {
  int taken = 0;
  for (;;) {
    EDET_UNROLL
    for (int i = 4 * int(thread().x); i < kBins; i += 4 * kThreads) {
      store(bins + i, Vector<uint32_t, 4>{});
    }
    sync_threads();
    const int shift = shift_of(range);
    visit_keys<kThreads>(keys, count, [&](const uint64_t (&own)[kKeys]) {
      EDET_UNROLL
      for (int j = 0; j < kKeys; j++) {
        if (within(range, own[j])) atomic_add(bins + int((own[j] - range.low) >> shift), 1u);
      }
    });
    sync_threads();
    const Cut cut = find_cut<kThreads>(uint32_t(wanted - taken + 1), memory,
                                       [&](int i) { return load<4>(bins + i); });
    taken += int(cut.above);
    if (cut.bin < 0) return range.low;
    range = range_of(range, cut.bin);
    if (2 * taken >= wanted) return range.high;
  }
}

// Sorts a key of each of the block's threads, the largest first. `memory`: 2·kThreads keys.
template <int kThreads>
EDET_DEVICE uint64_t sort_keys(uint64_t key, Shared<uint64_t> memory) {
  const int t = thread().x;
  int half = 0;  // of the memory: who writes the one may still read the other
  EDET_UNROLL
  for (int size = 2; size <= kThreads; size *= 2) {
    EDET_UNROLL
    for (int stride = size / 2; stride; stride /= 2) {
      uint64_t other;
      if (stride < kWarp) {
        other = shuffle_xor(key, stride);
      } else {
        store(memory + (half + t), key);
        sync_threads();
        other = get(memory + (half + (t ^ stride)));
        half = kThreads - half;
      }
      const bool larger = ((t & stride) == 0) == ((t & size) == 0);
      key = (other > key) == larger ? other : key;
    }
  }
  return key;
}

}  // namespace edet::cuda
