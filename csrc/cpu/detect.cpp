// Top candidates by threads that share a rising threshold; decoding and suppression per image.
#include "detect.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "dispatch.h"
#include "nms.h"

namespace edet::cpu {

namespace {

struct Logit {
  float value;
  int64_t index;  // (anchor, class), the anchors in the order of DetectParams::anchors
};

struct Before {  // a type, not a function, so that the algorithms inline it
  bool operator()(const Logit& a, const Logit& b) const {
    return a.value > b.value || (a.value == b.value && a.index < b.index);
  }
};
constexpr Before before;

// Keeps the `most` best, in any order; returns the worst of them.
float keep_best(std::vector<Logit>& logits, size_t most) {
  std::nth_element(logits.begin(), logits.begin() + static_cast<std::ptrdiff_t>(most) - 1,
                   logits.end(), before);
  logits.resize(most);
  return logits.back().value;
}

// A part of one level's logits that one task scans.
struct Part {
  int level;
  int64_t begin, end;  // elements of the level
  int64_t index;       // of its first element among all levels
};

constexpr int64_t kPart = 1 << 19;  // elements: 2 MiB of floats, enough to hide a task's start
constexpr int64_t kBlock = 4096;    // elements scanned with one threshold

size_t bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

float element(DType dtype, const void* data, int64_t i) {
  float value = 0;
  int32_t index;
  const auto* at = static_cast<const char*>(data) + static_cast<size_t>(i) * bytes(dtype);
  if (!kernels().scan(dtype, at, 1, -std::numeric_limits<float>::infinity(), &index, &value))
    return std::numeric_limits<float>::quiet_NaN();
  return value;
}

// Adds the part's candidates to what the thread has `found` in the image: logits that reach
// `threshold`, which rises to what `most` of those found reach.
void scan_part(const DetectParams& p, const Part& part, int64_t image, size_t most,
               std::atomic<float>& threshold, std::vector<Logit>& found) {
  const Kernels& k = kernels();
  const int64_t level = p.pixels[part.level] * p.cell_anchors * p.num_classes;
  const auto* data = static_cast<const char*>(p.classes[part.level]) +
                     static_cast<size_t>(image * level) * bytes(p.dtype);
  int32_t index[kBlock];
  float value[kBlock];
  for (int64_t i = part.begin; i < part.end; i += kBlock) {
    const int64_t n = std::min(kBlock, part.end - i);
    const int64_t count = k.scan(p.dtype, data + static_cast<size_t>(i) * bytes(p.dtype), n,
                                 threshold.load(std::memory_order_relaxed), index, value);
    for (int64_t j = 0; j < count; j++)
      found.push_back({value[j], part.index + (i - part.begin) + index[j]});
    if (found.size() >= 2 * most) {
      const float worst = keep_best(found, most);
      float known = threshold.load(std::memory_order_relaxed);
      while (worst > known && !threshold.compare_exchange_weak(known, worst)) {
      }
    }
  }
}

// The box of an anchor in corners x1, y1, x2, y2 (facts: no variance scaling, centre form).
void decode(const DetectParams& p, int64_t image, int64_t anchor, float* box) {
  int64_t local = anchor;
  int level = 0;
  while (local >= p.pixels[level] * p.cell_anchors) local -= p.pixels[level++] * p.cell_anchors;
  const int64_t base = (image * p.pixels[level] * p.cell_anchors + local) * 4;
  float t[4];
  for (int i = 0; i < 4; i++) t[i] = element(p.dtype, p.boxes[level], base + i);
  const float* a = p.anchors + anchor * 4;
  for (int axis = 0; axis < 2; axis++) {  // y, then x
    const float low = a[axis], high = a[axis + 2], size = high - low;
    const float centre = t[axis] * size + (low + high) / 2;
    const float half = std::exp(t[axis + 2]) * size / 2;
    float first = centre - half, last = centre + half;
    if (p.limits) {
      const float limit = p.limits[image * 2 + (1 - axis)];
      const auto clip = [limit](float v) { return v < 0 ? 0 : v > limit ? limit : v; };
      first = clip(first), last = clip(last);
    }
    box[1 - axis] = first;
    box[3 - axis] = last;
  }
}

// Hard suppression usually has all its detections after a few of these.
constexpr size_t kBatch = 512;

void finish_image(const DetectParams& p, int64_t image, std::vector<Logit>& logits, size_t most) {
  if (logits.size() > most) keep_best(logits, most);
  const bool hard = p.settings.method == NmsMethod::hard;
  std::vector<float> boxes(4 * logits.size());
  std::vector<Candidate> kept;
  for (size_t first = 0; first < logits.size();) {
    // best first, and no further than needed
    const auto from = logits.begin() + static_cast<std::ptrdiff_t>(first);
    const size_t count = hard ? std::min(kBatch, logits.size() - first) : logits.size();
    const auto to = from + static_cast<std::ptrdiff_t>(count);
    if (to != logits.end()) std::nth_element(from, to - 1, logits.end(), before);
    std::sort(from, to, before);
    std::vector<Candidate> candidates;
    candidates.reserve(count);
    for (size_t i = first; i < first + count; i++) {
      const float score = 1.0f / (1.0f + std::exp(-logits[i].value));
      if (!(score > p.settings.score_threshold)) continue;
      const int64_t anchor = logits[i].index / p.num_classes;
      float* box = &boxes[4 * i];
      decode(p, image, anchor, box);
      candidates.push_back(
          make_candidate(box, score, logits[i].index % p.num_classes, static_cast<int64_t>(i)));
    }
    if (hard)
      suppress_hard_next(candidates, p.settings, kept);
    else
      kept = suppress(std::move(candidates), p.settings);
    if (static_cast<int64_t>(kept.size()) == p.settings.most) break;
    first += count;
  }
  p.out_counts[image] = static_cast<int64_t>(kept.size());
  for (int64_t i = 0; i < p.settings.most; i++) {
    const bool real = i < p.out_counts[image];
    const int64_t at = image * p.settings.most + i;
    for (int k = 0; k < 4; k++)
      p.out_boxes[4 * at + k] = real ? kept[static_cast<size_t>(i)].box[k] : 0.0f;
    p.out_scores[at] = real ? kept[static_cast<size_t>(i)].score : 0.0f;
    p.out_labels[at] = real ? kept[static_cast<size_t>(i)].label : -1;
  }
}

// A guess at what the `most` best logits of an image reach, from a sample of about kSample: the
// value that three times as many should reach, so that it is rarely too high.
constexpr int64_t kSample = 1 << 15, kSampleRun = 4;

float guess_threshold(const DetectParams& p, int64_t image, int64_t total, size_t most) {
  const float none = -std::numeric_limits<float>::infinity();
  if (total < 16 * static_cast<int64_t>(most)) return none;
  std::vector<float> sample;
  const int64_t step = std::max<int64_t>(total / kSample, 1) * kSampleRun;
  for (int l = 0; l < p.levels; l++) {
    const int64_t size = p.pixels[l] * p.cell_anchors * p.num_classes;
    const auto* data =
        static_cast<const char*>(p.classes[l]) + static_cast<size_t>(image * size) * bytes(p.dtype);
    int32_t index[kSampleRun];
    float value[kSampleRun];
    for (int64_t i = 0; i + kSampleRun <= size; i += step) {
      const auto* at = data + static_cast<size_t>(i) * bytes(p.dtype);
      const int64_t n = kernels().scan(p.dtype, at, kSampleRun, none, index, value);
      sample.insert(sample.end(), value, value + n);  // all but NaN
    }
  }
  const size_t rank = 3 * most * sample.size() / static_cast<size_t>(total);
  if (rank >= sample.size()) return none;
  const auto nth = sample.begin() + static_cast<std::ptrdiff_t>(rank);
  std::nth_element(sample.begin(), nth, sample.end(), std::greater<float>());
  return *nth;
}

}  // namespace

void run_detect(const DetectParams& p, const Runtime& runtime) {
  std::vector<Part> parts;
  int64_t first = 0;
  for (int l = 0; l < p.levels; l++) {
    const int64_t size = p.pixels[l] * p.cell_anchors * p.num_classes;
    for (int64_t i = 0; i < size; i += kPart)
      parts.push_back({l, i, std::min(i + kPart, size), first + i});
    first += size;
  }
  const auto count = static_cast<int64_t>(parts.size());
  const auto most = static_cast<size_t>(p.candidates);
  std::vector<std::vector<Logit>> found(static_cast<size_t>(p.n * runtime.threads));
  std::vector<std::atomic<float>> thresholds(static_cast<size_t>(p.n));

  enum Step { guess, scan, finish };
  Schedule schedule({p.n, p.n * count, p.n});
  const auto ready = [&](int64_t step, int64_t task) {
    return step == guess || (step == scan ? schedule.done(guess, task / count, task / count + 1)
                                          : schedule.done(scan, task * count, (task + 1) * count));
  };
  schedule.run(runtime, ready, [&](int64_t step, int64_t task, int thread) {
    if (step == guess) {
      thresholds[static_cast<size_t>(task)] = guess_threshold(p, task, first, most);
      return;
    }
    if (step == scan) {
      const int64_t image = task / count;
      scan_part(p, parts[static_cast<size_t>(task % count)], image, most,
                thresholds[static_cast<size_t>(image)],
                found[static_cast<size_t>(thread * p.n + image)]);
      return;
    }
    std::vector<Logit> all;
    for (int t = 0; t < runtime.threads; t++) {
      const std::vector<Logit>& part = found[static_cast<size_t>(t * p.n + task)];
      all.insert(all.end(), part.begin(), part.end());
    }
    if (all.size() < std::min(most, static_cast<size_t>(first))) {  // the guess was too high
      std::atomic<float> lowest{-std::numeric_limits<float>::infinity()};
      all.clear();
      for (const Part& part : parts) scan_part(p, part, task, most, lowest, all);
    }
    finish_image(p, task, all, most);
  });
}

}  // namespace edet::cpu
