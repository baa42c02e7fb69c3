// Cuts an inverted residual block into tasks and runs them.
#pragma once

#include "../core/params.h"
#include "schedule.h"

namespace edet::cpu {

// Sets how p is cut for `threads` threads; returns the bytes of workspace that run_mbconv needs.
int64_t plan_mbconv(MbconvParams& p, int threads);

// Computes a planned block; `workspace` is aligned to 64 bytes.
void run_mbconv(MbconvParams& p, const Runtime& runtime, char* workspace);

}  // namespace edet::cpu
