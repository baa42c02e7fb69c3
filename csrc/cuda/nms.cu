// The CUDA kernels for hard and gaussian non-maximum suppression of a batch.
//
// Floors: next to no bytes or operations; the time is that of at most K dependent steps, one for
// each detection of an image, about two barriers each.
// Budget: 64 registers.
#include "nms.h"

#include <algorithm>

#include "rank.cuh"

namespace edet::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

struct CollectParams {
  NmsParams p;
  Candidates c;
};

// Lists the candidates whose score exceeds the threshold.
EDET_KERNEL(kThreads, 4)
collect(EDET_PARAMS(CollectParams) params) {
  const NmsParams& p = params.p;
  const int64_t image = block().y, i = int64_t(block().x) * kThreads + thread().x;
  if (i >= p.n) return;
  const float score = load_constant<float, 1>(p.scores + image * p.n + i).value[0];
  if (!(score > p.settings.score_threshold)) return;  // so for NaN
  const int at = atomic_add(params.c.count + image, 1);
  store(params.c.keys + image * p.n + at, uint64_t(order_of(score)) << 32 | uint32_t(~uint32_t(i)));
}

EDET_KERNEL(kRankThreads, 4)
rank(EDET_PARAMS(CollectParams) params) {
  const NmsParams& p = params.p;
  rank_candidates(params.c, [&](int64_t image, uint64_t key, Vector<float, 4>& box, int64_t& label,
                                int& source) {
    source = int(~uint32_t(key));
    const int64_t at = image * p.n + source;
    EDET_UNROLL
    for (int j = 0; j < 4; j++)
      box.value[j] = load_constant<float, 1>(p.boxes + 4 * at + j).value[0];
    label = load_constant<int64_t, 1>(p.labels + at).value[0];
    return load_constant<float, 1>(p.scores + at).value[0];
  });
}

struct SuppressParams {
  Candidates c;
  NmsSettings settings;
  Detections out;
};

struct Box {
  Vector<float, 4> at;  // x1, y1, x2, y2
  float area;
  int64_t label;
};

EDET_DEVICE Box load_box(const Candidates& c, int64_t i) {
  Box box;
  box.at = load_constant<float, 4>(c.boxes + 4 * i);
  box.area = (box.at.value[2] - box.at.value[0]) * (box.at.value[3] - box.at.value[1]);
  box.label = load_constant<int64_t, 1>(c.labels + i).value[0];
  return box;
}

// Whether one of two overlapping boxes may suppress the other.
EDET_DEVICE bool compete(const Box& a, const Box& b, const NmsSettings& settings) {
  return settings.class_agnostic || a.label == b.label;
}

EDET_DEVICE float iou(const Box& a, const Box& b) {
  const auto overlap = [&](int axis) {
    const float low = a.at.value[axis] > b.at.value[axis] ? a.at.value[axis] : b.at.value[axis];
    const float high =
        a.at.value[axis + 2] < b.at.value[axis + 2] ? a.at.value[axis + 2] : b.at.value[axis + 2];
    return high - low < 0.0f ? 0.0f : high - low;
  };
  const float intersection = overlap(0) * overlap(1);
  const float together = a.area + b.area - intersection;
  return together > 0.0f ? intersection / together : 0.0f;
}

// Writes detection `number` of an image, its candidate at position i.
EDET_DEVICE void write(const SuppressParams& p, int64_t image, int64_t number, int i, float score) {
  const int64_t from = image * p.c.most + i, to = image * p.settings.most + number;
  store(p.out.scores + to, score);
  if (p.out.indices) {
    store(p.out.indices + to, int64_t(load_constant<int, 1>(p.c.sources + from).value[0]));
  }
  if (p.out.labels) {
    store(p.out.labels + to, load_constant<int64_t, 1>(p.c.labels + from).value[0]);
  }
  if (p.out.boxes) {
    EDET_UNROLL
    for (int j = 0; j < 4; j++) {
      store(p.out.boxes + 4 * to + j, load_constant<float, 1>(p.c.boxes + 4 * from + j).value[0]);
    }
  }
}

// Fills an image's rows after its detections, and writes their number.
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

// One block per image. Candidates come in order, a block's threads at a time: each is tested
// against what was kept before, then the best that is left is kept and tested against the others,
// until none is left.
EDET_KERNEL(kThreads, 4)
suppress_hard(EDET_PARAMS(SuppressParams) p) {
  EDET_SHARED(uint32_t, votes);
  const int64_t image = block().x, first = image * p.c.most;
  const int total = load_constant<int, 1>(p.c.count + image).value[0];
  const int t = thread().x;
  int* const kept = p.c.kept + image * p.settings.most;
  int64_t count = 0;
  for (int base = 0; base < total && count < p.settings.most; base += kThreads) {
    const int i = base + t;
    Box mine{};
    bool alive = false;
    float score = 0.0f;
    if (i < total) {
      mine = load_box(p.c, first + i);
      score = load_constant<float, 1>(p.c.scores + first + i).value[0];
      alive = score > p.settings.score_threshold;
    }
    for (int64_t k = 0; k < count && alive; k++) {
      const Box other = load_box(p.c, first + load_shared_by_blocks(kept + k));
      alive = !(compete(other, mine, p.settings) && iou(other, mine) > p.settings.iou_threshold);
    }
    while (count < p.settings.most) {
      const uint32_t vote = ballot(alive);
      if (t % kWarp == 0) store(votes + t / kWarp, vote);
      sync_threads();
      int best = -1;
      for (int w = kWarps - 1; w >= 0; w--) {
        const uint32_t others = get(votes + w);
        if (others) best = w * kWarp + first_set(others);
      }
      sync_threads();
      if (best < 0) break;
      if (t == best) {
        alive = false;
        store(kept + count, i);
        write(p, image, count, i, score);
      }
      count++;
      if (alive) {
        const Box other = load_box(p.c, first + base + best);
        alive = !(compete(other, mine, p.settings) && iou(other, mine) > p.settings.iou_threshold);
      }
    }
    global_fence();
    sync_threads();  // what was kept is seen by all
  }
  finish(p, image, count);
}

// One block per image. Each step lowers the scores of what overlaps with the candidate taken last
// and finds the best that is left; the first of equals is the better.
EDET_KERNEL(kThreads, 4)
suppress_gaussian(EDET_PARAMS(SuppressParams) p) {
  EDET_SHARED(float, best_scores);
  const Shared<int> best_places = as<int>(best_scores + kWarps);
  const int64_t image = block().x, first = image * p.c.most;
  const int total = load_constant<int, 1>(p.c.count + image).value[0];
  const int t = thread().x;
  int64_t count = 0;
  int taken = -1;
  Box last{};
  while (count < p.settings.most) {
    float best = -INFINITY;
    int place = -1;
    for (int i = t; i < total; i += kThreads) {
      float score = load_shared_by_blocks(p.c.scores + first + i);
      if (!(score > p.settings.score_threshold)) continue;
      if (i == taken) {
        store(p.c.scores + first + i, -INFINITY);
        continue;
      }
      if (taken >= 0) {
        const Box mine = load_box(p.c, first + i);
        if (compete(mine, last, p.settings)) {
          const float overlap = iou(last, mine);
          score *= exp(-(overlap * overlap) / p.settings.sigma);
          const bool alive = score > p.settings.score_threshold;
          store(p.c.scores + first + i, alive ? score : -INFINITY);
          if (!alive) continue;
        }
      }
      if (place < 0 || score > best) best = score, place = i;
    }
    const auto better = [](float a, int i, float b, int j) {
      return j < 0 || (i >= 0 && (a > b || (a == b && i < j)));
    };
    for (int mask = kWarp / 2; mask; mask /= 2) {
      const float other = shuffle_xor(best, mask);
      const int where = shuffle_xor(place, mask);
      if (!better(best, place, other, where)) best = other, place = where;
    }
    if (t % kWarp == 0) {
      store(best_scores + t / kWarp, best);
      store(best_places + t / kWarp, place);
    }
    sync_threads();
    best = get(best_scores);
    place = get(best_places);
    for (int w = 1; w < kWarps; w++) {
      const float other = get(best_scores + w);
      const int where = get(best_places + w);
      if (!better(best, place, other, where)) best = other, place = where;
    }
    sync_threads();
    if (place < 0) break;
    taken = place;
    last = load_box(p.c, first + taken);
    if (t == 0) write(p, image, count, taken, best);
    count++;
  }
  finish(p, image, count);
}

}  // namespace

namespace {
int64_t padded(int64_t bytes) { return round_up(bytes, 256); }
}  // namespace

int64_t candidates_bytes(int64_t n, int64_t most, int64_t kept) {
  return padded(n * most * 8) + padded(n * 4) + padded(n * most * 16) + padded(n * most * 4) +
         padded(n * most * 8) + padded(n * most * 4) + padded(n * kept * 4);
}

Candidates place_candidates(void* memory, int64_t n, int64_t most, int64_t kept) {
  auto* at = static_cast<char*>(memory);
  const auto part = [&](int64_t bytes) {
    char* const begin = at;
    at += padded(bytes);
    return begin;
  };
  Candidates c{};
  c.n = n, c.most = most;
  c.keys = reinterpret_cast<uint64_t*>(part(n * most * 8));
  c.count = reinterpret_cast<int*>(part(n * 4));
  c.boxes = reinterpret_cast<float*>(part(n * most * 16));
  c.scores = reinterpret_cast<float*>(part(n * most * 4));
  c.labels = reinterpret_cast<int64_t*>(part(n * most * 8));
  c.sources = reinterpret_cast<int*>(part(n * most * 4));
  c.kept = reinterpret_cast<int*>(part(n * kept * 4));
  return c;
}

Error suppress(const Candidates& candidates, const NmsSettings& settings,
               const Detections& detections, Stream stream) {
  const SuppressParams p{candidates, settings, detections};
  const Dim3 grid(static_cast<unsigned>(candidates.n));
  return launch(settings.method == NmsMethod::hard ? suppress_hard : suppress_gaussian, grid,
                Dim3(kThreads), kWarps * (sizeof(float) + sizeof(int)), stream, p);
}

int64_t nms_bytes(int64_t batch, const NmsParams& p) {
  return candidates_bytes(batch, p.n, p.settings.most);
}

Error nms(int64_t batch, const NmsParams& p, void* memory, Stream stream) {
  if (batch == 0) return kSuccess;
  if (batch > 65535 || p.n > INT32_MAX) return kInvalidValue;
  const CollectParams params{p, place_candidates(memory, batch, p.n, p.settings.most)};
  Error error = clear(params.c.count, sizeof(int) * static_cast<size_t>(batch), stream);
  const auto blocks = [&](int64_t boxes) {
    return Dim3(static_cast<unsigned>(divide_up(p.n, boxes)), static_cast<unsigned>(batch));
  };
  if (error == kSuccess && p.n)
    error = launch(collect, blocks(kThreads), Dim3(kThreads), 0, stream, params);
  if (error == kSuccess && p.n)
    error = launch(rank, blocks(kRanked), Dim3(kRankThreads), kRankKeys * sizeof(uint64_t), stream,
                   params);
  if (error != kSuccess) return error;
  return suppress(params.c, p.settings, {p.indices, nullptr, p.kept_scores, nullptr, p.counts},
                  stream);
}

}  // namespace edet::cuda
