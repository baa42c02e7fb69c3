// Cuts an inverted residual block on bytes into tasks and runs them.
#pragma once

#include "../core/int8.h"
#include "schedule.h"

namespace edet::cpu {

// Sets how p is cut for `threads` threads; returns the bytes of workspace that it needs.
int64_t plan_int8_mbconv(Int8MbconvParams& p, int threads);

// Computes a planned block; `workspace` is aligned to 64 bytes.
void run_int8_mbconv(Int8MbconvParams& p, const Runtime& runtime, char* workspace);

}  // namespace edet::cpu
