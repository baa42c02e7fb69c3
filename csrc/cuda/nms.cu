// The CUDA kernels for hard and gaussian non-maximum suppression of a batch.
//
// Floors: next to no bytes or operations. Hard: sorting a tile of candidates is 45 steps, 10 of
// them with a barrier; then a group of candidates after the other is two barriers, and each
// candidate is tested against each that was kept. Gaussian: K dependent steps, about two barriers
// each.
// Budget: 128 registers.
#include "nms.h"

#include <algorithm>

#include "suppress.cuh"

namespace edet::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

struct CollectParams {
  NmsParams p;
  SuppressParams to;
};

// Lists the candidates whose score exceeds the threshold.
EDET_KERNEL(kThreads, 4)
collect(EDET_PARAMS(CollectParams) params) {
  const NmsParams& p = params.p;
  griddep_launch();
  const int64_t image = block().y, i = int64_t(block().x) * kThreads + thread().x;
  if (i >= p.n) return;
  const float score = load_constant<float, 1>(p.scores + image * p.n + i).value[0];
  if (!(score > p.settings.score_threshold)) return;  // so for NaN
  const Candidates& c = params.to.c;
  store(c.keys + image * c.capacity + atomic_add(c.count + image, 1),
        uint64_t(order_of(score)) << 32 | uint32_t(~uint32_t(i)));
}

// One block per image: sorts, and keeps detections or writes all candidates.
template <bool kHard>
EDET_KERNEL(kTake, 1)
take_boxes(EDET_PARAMS(CollectParams) params) {
  const NmsParams& p = params.p;
  EDET_SHARED(char, memory);
  griddep_wait();
  take<kHard>(params.to, block().x, Range{1, ~uint64_t(0)}, take_memory(memory),
              [&](int64_t image, uint64_t key, Vector<float, 4>& box, int64_t& label, int& source) {
                source = int(~uint32_t(key));
                const int64_t at = image * p.n + source;
                EDET_UNROLL
                for (int j = 0; j < 4; j++) {
                  box.value[j] = load_constant<float, 1>(p.boxes + 4 * at + j).value[0];
                }
                label = load_constant<int64_t, 1>(p.labels + at).value[0];
                return load_constant<float, 1>(p.scores + at).value[0];
              });
}

EDET_DEVICE Box load_box(const Candidates& c, int64_t i) {
  return {load_constant<float, 4>(c.boxes + 4 * i),
          load_constant<int64_t, 1>(c.labels + i).value[0]};
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
  if (p.out.boxes) store(p.out.boxes + 4 * to, load_constant<float, 4>(p.c.boxes + 4 * from));
}

// One block per image. Each step lowers the scores of what overlaps with the candidate taken last
// and finds the best that is left; the first of equals is the better.
EDET_KERNEL(kThreads, 4)
suppress_gaussian(EDET_PARAMS(SuppressParams) p) {
  EDET_SHARED(float, best_scores);
  const Shared<int> best_places = as<int>(best_scores + kWarps);
  const int64_t image = block().x, first = image * p.c.most;
  const int total = load_constant<int, 1>(p.c.sorted + image).value[0];
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
  finish<kThreads>(p, image, count);
}

int64_t padded(int64_t bytes) { return round_up(bytes, 256); }

}  // namespace

int64_t candidates_bytes(int64_t n, int64_t capacity, int64_t most) {
  return padded(n * 4) + padded(n * capacity * 8) + padded(n * most * 16) + padded(n * most * 8) +
         padded(n * most * 4) + padded(n * most * 4) + padded(n * 4);
}

Candidates place_candidates(void* memory, int64_t n, int64_t capacity, int64_t most) {
  auto* at = static_cast<char*>(memory);
  const auto part = [&](int64_t bytes) {
    char* const begin = at;
    at += padded(bytes);
    return begin;
  };
  Candidates c{};
  c.n = n, c.capacity = capacity, c.most = most;
  c.count = reinterpret_cast<int*>(part(n * 4));
  c.keys = reinterpret_cast<uint64_t*>(part(n * capacity * 8));
  c.boxes = reinterpret_cast<float*>(part(n * most * 16));
  c.labels = reinterpret_cast<int64_t*>(part(n * most * 8));
  c.scores = reinterpret_cast<float*>(part(n * most * 4));
  c.sources = reinterpret_cast<int*>(part(n * most * 4));
  c.sorted = reinterpret_cast<int*>(part(n * 4));
  return c;
}

Error suppress_sorted(const Candidates& candidates, const NmsSettings& settings,
                      const Detections& detections, Stream stream) {
  const SuppressParams p{candidates, settings, detections};
  return launch(suppress_gaussian, Dim3(static_cast<unsigned>(candidates.n)), Dim3(kThreads),
                kWarps * (sizeof(float) + sizeof(int)), stream, p);
}

int64_t nms_bytes(int64_t batch, const NmsParams& p) {
  return candidates_bytes(batch, round_up(p.n, 2), p.n);
}

Error nms(int64_t batch, const NmsParams& p, void* memory, Stream stream) {
  if (batch == 0) return kSuccess;
  if (batch > 65535 || p.n >= INT32_MAX) return kInvalidValue;
  const Candidates c = place_candidates(memory, batch, round_up(p.n, 2), p.n);
  const Detections out{p.indices, nullptr, p.kept_scores, nullptr, p.counts};
  const CollectParams params{p, {c, p.settings, out}};
  Device device{};
  Error error = current_device(&device);
  if (error == kSuccess) {
    error = clear(c.count, sizeof(int) * static_cast<size_t>(batch), stream);
  }
  if (error == kSuccess && p.n) {
    const Dim3 grid(static_cast<unsigned>(divide_up(p.n, kThreads)), static_cast<unsigned>(batch));
    error = launch(collect, grid, Dim3(kThreads), 0, stream, params);
  }
  if (error != kSuccess) return error;
  const bool hard = p.settings.method == NmsMethod::hard;
  error = launch(hard ? take_boxes<true> : take_boxes<false>, Dim3(static_cast<unsigned>(batch)),
                 Dim3(kTake), kTakeBytes, stream, params, p.n && device.capability >= 90);
  if (error != kSuccess || hard) return error;
  return suppress_sorted(c, p.settings, out, stream);
}

}  // namespace edet::cuda
