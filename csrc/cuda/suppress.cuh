// From a list of keys to detections: one block of an image sorts a tile of candidates, decodes
// them, and suppresses; tiles after it are looked at only where detections are still wanted.
//
// A group of candidates is tested against what was kept before, a warp for each candidate, and
// against each other, which makes a mask of bits for each; whom a mask leaves is then found by all
// of a warp together, in as many rounds as candidates suppress each other in a chain.
#pragma once

#include "best.cuh"
#include "nms.h"

namespace edet::cuda {

constexpr int kTake = 512;  // threads of a block, and candidates of a tile
constexpr int kTakeWarps = kTake / kWarp;
constexpr int kGroup = 64, kMasks = kGroup / kWarp;
constexpr int kNear = 512;  // kept candidates that lie in shared memory, later ones do not

struct SuppressParams {
  Candidates c;
  NmsSettings settings;
  Detections out;
};

struct Box {
  Vector<float, 4> at;  // x1, y1, x2, y2
  int64_t label;
};

// Whether one of two overlapping boxes may suppress the other.
EDET_DEVICE bool compete(const Box& a, const Box& b, const NmsSettings& settings) {
  return settings.class_agnostic || a.label == b.label;
}

EDET_DEVICE float intersection_of(const Box& a, const Box& b) {
  const auto overlap = [&](int axis) {
    const float low = a.at.value[axis] > b.at.value[axis] ? a.at.value[axis] : b.at.value[axis];
    const float high =
        a.at.value[axis + 2] < b.at.value[axis + 2] ? a.at.value[axis + 2] : b.at.value[axis + 2];
    return high - low < 0.0f ? 0.0f : high - low;
  };
  return overlap(0) * overlap(1);
}
EDET_DEVICE float area_of(const Box& a) {
  return (a.at.value[2] - a.at.value[0]) * (a.at.value[3] - a.at.value[1]);
}
EDET_DEVICE float iou(const Box& a, const Box& b) {
  const float intersection = intersection_of(a, b);
  const float together = area_of(a) + area_of(b) - intersection;
  return together > 0.0f ? intersection / together : 0.0f;
}
// Whether a kept box suppresses a later one; most have nothing in common, and are not divided.
EDET_DEVICE bool suppresses(const Box& a, const Box& b, const NmsSettings& settings) {
  if (!compete(a, b, settings)) return false;
  if (!(intersection_of(a, b) > 0.0f) && settings.iou_threshold >= 0.0f) return false;
  return iou(a, b) > settings.iou_threshold;
}

// Shared memory of a block: its tile, a group's masks, what was kept, and what sorting needs.
struct TakeMemory {
  Shared<float> boxes, kept_boxes;  // four each
  Shared<int64_t> labels, kept_labels;
  Shared<uint64_t> keys;  // 2·kTake
  Shared<float> scores;
  Shared<int> sources, alive, number;
  Shared<uint32_t> bins, masks, words;
};
constexpr int kTakeBytes = kTake * (16 + 8 + 16 + 4 + 4) + kNear * (16 + 8) + kBins * 4 +
                           kGroup * (4 + 4 * kMasks) + (kCutWords<kTake> + 1) * 4;

EDET_DEVICE TakeMemory take_memory(Shared<char> memory) {
  TakeMemory m;
  m.boxes = as<float>(memory);
  m.kept_boxes = m.boxes + 4 * kTake;
  m.bins = as<uint32_t>(m.kept_boxes + 4 * kNear);
  m.labels = as<int64_t>(m.bins + kBins);
  m.kept_labels = m.labels + kTake;
  m.keys = as<uint64_t>(m.kept_labels + kNear);
  m.scores = as<float>(m.keys + 2 * kTake);
  m.sources = as<int>(m.scores + kTake);
  m.alive = m.sources + kTake;
  m.masks = as<uint32_t>(m.alive + kGroup);
  m.words = m.masks + kGroup * kMasks;
  m.number = as<int>(m.words + kCutWords<kTake>);
  return m;
}

// Fills an image's rows after its detections, and writes their number.
template <int kThreads>
EDET_DEVICE void finish(const SuppressParams& p, int64_t image, int64_t count) {
  for (int64_t i = count + thread().x; i < p.settings.most; i += kThreads) {
    const int64_t to = image * p.settings.most + i;
    store(p.out.scores + to, 0.0f);
    if (p.out.indices) store(p.out.indices + to, int64_t(-1));
    if (p.out.labels) store(p.out.labels + to, int64_t(-1));
    if (p.out.boxes) {
      for (int j = 0; j < 4; j++) store(p.out.boxes + 4 * to + j, 0.0f);
    }
  }
  if (thread().x == 0) store(p.out.counts + image, count);
}

EDET_DEVICE Box box_of_tile(const TakeMemory& m, int i) {
  return {load<4>(m.boxes + 4 * i), get(m.labels + i)};
}
EDET_DEVICE Box kept_box(const SuppressParams& p, const TakeMemory& m, int64_t image, int k) {
  if (k < kNear) return {load<4>(m.kept_boxes + 4 * k), get(m.kept_labels + k)};
  const int64_t at = image * p.c.most + k;
  Box box;
  EDET_UNROLL
  for (int j = 0; j < 4; j++) box.at.value[j] = load_shared_by_blocks(p.c.boxes + 4 * at + j);
  box.label = load_shared_by_blocks(p.c.labels + at);
  return box;
}

// Keeps candidate i of the tile as detection `number`.
EDET_DEVICE void keep(const SuppressParams& p, const TakeMemory& m, int64_t image, int number,
                      int i) {
  const Box box = box_of_tile(m, i);
  const int64_t to = image * p.settings.most + number;
  store(p.out.scores + to, get(m.scores + i));
  if (p.out.indices) store(p.out.indices + to, int64_t(get(m.sources + i)));
  if (p.out.labels) store(p.out.labels + to, box.label);
  if (p.out.boxes) store(p.out.boxes + 4 * to, box.at);
  if (number < kNear) {
    store(m.kept_boxes + 4 * number, box.at);
    store(m.kept_labels + number, box.label);
  } else {
    const int64_t at = image * p.c.most + number;
    store(p.c.boxes + 4 * at, box.at);
    store(p.c.labels + at, box.label);
  }
}

// Keeps those of a group that are alive and that no kept one of the group suppresses, after `kept`
// others: worked out by each of the warps that have a word of its masks.
EDET_DEVICE void keep_group(const SuppressParams& p, const TakeMemory& m, int64_t image, int first,
                            int kept) {
  const int warp = int(thread().x) / kWarp, lane = int(thread().x) % kWarp;
  uint32_t chosen[kMasks];
  EDET_UNROLL
  for (int word = 0; word < kMasks; word++) {
    const int row = word * kWarp + lane;
    bool left = get(m.alive + row);
    uint32_t before = 0;
    if (left) {
      before = get(m.masks + (row * kMasks + word));
      EDET_UNROLL
      for (int w = 0; w < word; w++) {
        if (get(m.masks + (row * kMasks + w)) & chosen[w]) left = false;
      }
    }
    // who is kept has nobody before it that is, or may yet be
    uint32_t open = ballot(left), keeps = 0;
    while (open) {
      keeps |= ballot((open >> lane & 1) && !(before & (open | keeps)));
      open = ballot(((open & ~keeps) >> lane & 1) && !(before & keeps));
    }
    chosen[word] = keeps;
  }
  int number = kept;
  EDET_UNROLL
  for (int word = 0; word < kMasks; word++) {
    const uint32_t bits = chosen[word];
    if (warp == word && (bits >> lane & 1)) {
      const int own = number + count_set(bits & ((1u << lane) - 1));
      if (own < p.settings.most) keep(p, m, image, own, first + warp * kWarp + lane);
    }
    number += count_set(bits);
  }
  if (thread().x == 0) store(m.number, number);
}

// Keeps those of a tile's `found` candidates that nothing suppresses; returns how many were kept
// of all tiles.
EDET_DEVICE int suppress_tile(const SuppressParams& p, const TakeMemory& m, int64_t image,
                              int found, int kept) {
  const int t = thread().x, warp = t / kWarp, lane = t % kWarp;
  const int most = int(p.settings.most);
  EDET_LOOP
  for (int first = 0; first < found && kept < most; first += kGroup) {
    const int rows = min(kGroup, found - first);
    // a warp's candidates, tested together
    constexpr int kRows = kGroup / kTakeWarps;
    Box mine[kRows];
    bool alive[kRows], any = false;
    EDET_UNROLL
    for (int r = 0; r < kRows; r++) {
      const int row = r * kTakeWarps + warp;  // of other tiles' where there are no more
      mine[r] = box_of_tile(m, first + row);
      alive[r] = row < rows && get(m.scores + (first + row)) > p.settings.score_threshold;
      any = any || alive[r];
    }
    for (int base = 0; base < kept && any; base += kWarp) {
      const int k = base + lane;
      Box other{};
      if (k < kept) other = kept_box(p, m, image, k);
      any = false;
      EDET_UNROLL
      for (int r = 0; r < kRows; r++) {
        const bool hit = k < kept && suppresses(other, mine[r], p.settings);
        alive[r] = ballot(hit) == 0 && alive[r];
        any = any || alive[r];
      }
    }
    for (int word = 0; word < kMasks && any; word++) {
      const int column = word * kWarp + lane;
      const Box other = box_of_tile(m, first + column);
      EDET_UNROLL
      for (int r = 0; r < kRows; r++) {
        const int row = r * kTakeWarps + warp;
        const bool hit = column < row && alive[r] && suppresses(other, mine[r], p.settings);
        const uint32_t mask = ballot(hit);
        if (lane == 0) store(m.masks + (row * kMasks + word), mask);
      }
    }
    if (lane == 0) {
      EDET_UNROLL
      for (int r = 0; r < kRows; r++) store(m.alive + (r * kTakeWarps + warp), int(alive[r]));
    }
    sync_threads();
    if (warp < kMasks) keep_group(p, m, image, first, kept);
    sync_threads();
    kept = min(get(m.number), most);
  }
  return kept;
}

// Takes an image's candidates, those of its keys in the range, the best first, and writes its
// detections (kHard), or all candidates, sorted. `look`(image, key, box, label, source) gives a
// candidate's values and returns its score.
template <bool kHard, class Look>
EDET_DEVICE void take(const SuppressParams& p, int64_t image, Range range, const TakeMemory& m,
                      const Look& look) {
  const int t = thread().x;
  const uint64_t* const keys = p.c.keys + image * p.c.capacity;
  const int count = load_written<int, 1>(p.c.count + image).value[0];
  const int all = min(count, int(p.c.most));
  const Shared<int> listed = m.number;
  int taken = 0, kept = 0;
  EDET_LOOP
  while (taken < all) {
    const int wanted = min(kTake, all - taken);
    const uint64_t low = count - taken <= wanted
                             ? range.low
                             : select<kTake>(keys, count, range, wanted, m.bins, m.words);
    if (t == 0) store(listed, 0);
    sync_threads();
    visit_keys<kTake>(keys, count, [&](const uint64_t (&own)[kKeys]) {
      int fit = 0;
      EDET_UNROLL
      for (int j = 0; j < kKeys; j++) fit += within({low, range.high}, own[j]);
      int at = fit ? atomic_add(listed, fit) : 0;
      EDET_UNROLL
      for (int j = 0; j < kKeys; j++) {
        if (within({low, range.high}, own[j])) store(m.keys + at++, own[j]);
      }
    });
    sync_threads();
    const int found = get(listed);
    uint64_t key = t < found ? get(m.keys + t) : 0;
    sync_threads();
    key = sort_keys<kTake>(key, m.keys);
    Box box{};
    float score = 0.0f;
    int source = 0;
    if (t < found) score = look(image, key, box.at, box.label, source);
    if constexpr (kHard) {
      store(m.boxes + 4 * t, box.at);
      store(m.labels + t, box.label);
      store(m.scores + t, score);
      store(m.sources + t, source);
      sync_threads();
      kept = suppress_tile(p, m, image, found, kept);
      if (kept == p.settings.most) break;
      if (!(get(m.scores + (found - 1)) > p.settings.score_threshold)) break;
    } else if (t < found) {
      const int64_t at = image * p.c.most + taken + t;
      store(p.c.boxes + 4 * at, box.at);
      store(p.c.scores + at, score);
      store(p.c.labels + at, box.label);
      store(p.c.sources + at, source);
    }
    taken += found;
    range.high = low;
    sync_threads();
  }
  if constexpr (kHard) {
    finish<kTake>(p, image, kept);
  } else {
    if (t == 0) store(p.c.sorted + image, all);
  }
}

}  // namespace edet::cuda
