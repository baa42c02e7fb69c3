// Hard and gaussian non-maximum suppression of one image.
#include "nms.h"

#include <algorithm>
#include <cmath>

namespace edet::cpu {

namespace {

struct Better {  // a type, not a function, so that the algorithms inline it
  bool operator()(const Candidate& a, const Candidate& b) const {
    return a.score > b.score || (a.score == b.score && a.index < b.index);
  }
};
constexpr Better better;

float iou(const Candidate& a, const Candidate& b) {
  const float w = std::min(a.box[2], b.box[2]) - std::max(a.box[0], b.box[0]);
  const float h = std::min(a.box[3], b.box[3]) - std::max(a.box[1], b.box[1]);
  const float intersection = (w < 0 ? 0 : w) * (h < 0 ? 0 : h);
  const float together = a.area + b.area - intersection;
  return together > 0 ? intersection / together : 0;
}

// Whether one of two overlapping candidates may suppress the other.
bool compete(const Candidate& a, const Candidate& b, const NmsSettings& s) {
  return s.class_agnostic || a.label == b.label;
}

std::vector<Candidate> suppress_hard(std::vector<Candidate>& left, const NmsSettings& s) {
  if (!std::is_sorted(left.begin(), left.end(), better))
    std::sort(left.begin(), left.end(), better);
  std::vector<Candidate> kept;
  suppress_hard_next(left, s, kept);
  return kept;
}

std::vector<Candidate> suppress_gaussian(std::vector<Candidate>& left, const NmsSettings& s) {
  std::vector<Candidate> kept;
  while (static_cast<int64_t>(kept.size()) < s.most && !left.empty()) {
    const auto best = std::min_element(left.begin(), left.end(), better);
    const Candidate taken = *best;
    *best = left.back();
    left.pop_back();
    kept.push_back(taken);
    for (size_t i = 0; i < left.size();) {
      Candidate& c = left[i];
      if (compete(c, taken, s)) {
        const float overlap = iou(taken, c);
        if (overlap > 0) c.score *= std::exp(-(overlap * overlap) / s.sigma);
        if (!(c.score > s.score_threshold)) {
          c = left.back();
          left.pop_back();
          continue;
        }
      }
      i++;
    }
  }
  return kept;
}

}  // namespace

Candidate make_candidate(const float* box, float score, int64_t label, int64_t index) {
  return {box, score, (box[2] - box[0]) * (box[3] - box[1]), label, index};
}

void suppress_hard_next(const std::vector<Candidate>& sorted, const NmsSettings& s,
                        std::vector<Candidate>& kept) {
  for (const Candidate& c : sorted) {
    if (static_cast<int64_t>(kept.size()) == s.most) break;
    const bool suppressed = std::any_of(kept.begin(), kept.end(), [&](const Candidate& k) {
      return compete(k, c, s) && iou(k, c) > s.iou_threshold;
    });
    if (!suppressed) kept.push_back(c);
  }
}

std::vector<Candidate> suppress(std::vector<Candidate> candidates, const NmsSettings& settings) {
  return settings.method == NmsMethod::hard ? suppress_hard(candidates, settings)
                                            : suppress_gaussian(candidates, settings);
}

void nms_image(const NmsParams& p, int64_t image) {
  std::vector<Candidate> candidates;
  candidates.reserve(static_cast<size_t>(p.n));
  for (int64_t i = 0; i < p.n; i++) {
    const int64_t at = image * p.n + i;
    if (p.scores[at] > p.settings.score_threshold)  // false for NaN
      candidates.push_back(make_candidate(p.boxes + 4 * at, p.scores[at], p.labels[at], i));
  }
  const std::vector<Candidate> kept = suppress(std::move(candidates), p.settings);
  const auto count = static_cast<int64_t>(kept.size());
  int64_t* indices = p.indices + image * p.settings.most;
  float* scores = p.kept_scores + image * p.settings.most;
  for (int64_t i = 0; i < p.settings.most; i++) {
    const bool real = i < count;
    indices[i] = real ? kept[static_cast<size_t>(i)].index : -1;
    scores[i] = real ? kept[static_cast<size_t>(i)].score : 0.0f;
  }
  p.counts[image] = count;
}

}  // namespace edet::cpu
