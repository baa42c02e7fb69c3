// From head outputs to detections: top candidates, box decoding, non-maximum suppression.
#pragma once

#include "../core/params.h"
#include "schedule.h"

namespace edet::cpu {

void run_detect(const DetectParams& p, const Runtime& runtime);

}  // namespace edet::cpu
