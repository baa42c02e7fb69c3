// Hard and gaussian non-maximum suppression of one image.
#pragma once

#include <vector>

#include "../core/params.h"

namespace edet::cpu {

struct Candidate {
  const float* box;  // two opposite corners
  float score, area;
  int64_t label, index;  // lower indices go first among equal scores
};

Candidate make_candidate(const float* box, float score, int64_t label, int64_t index);

// Hard suppression a part at a time: adds to `kept`, up to the most, those of the next candidates,
// best first, that none of it suppresses.
void suppress_hard_next(const std::vector<Candidate>& sorted, const NmsSettings& settings,
                        std::vector<Candidate>& kept);

// The kept candidates in the order they were taken, with decayed scores for gaussian.
std::vector<Candidate> suppress(std::vector<Candidate> candidates, const NmsSettings& settings);

// edet_kernels.nms of one image.
void nms_image(const NmsParams& p, int64_t image);

}  // namespace edet::cpu
