// Parameters and launchers of the CUDA kernels for non-maximum suppression; plain enough for a host
// compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/params.h"

namespace edet::cuda {

// The candidates of a batch while they are sorted and suppressed: of each of n images a list of at
// most `capacity` keys, an even number, of which the best `most` are candidates.
struct Candidates {
  int64_t n, capacity, most;
  int* count;  // (n): keys of the list; the first part of the memory
  uint64_t*
      keys;  // (n, capacity), in any order; the larger, the better, no two are equal, none is 0
  // sorted, the best first; hard suppression keeps here the boxes that do not fit shared memory
  float* boxes;     // (n, most, 4)
  int64_t* labels;  // (n, most)
  // sorted, for gaussian suppression alone
  float* scores;  // (n, most); suppression lowers them
  int* sources;   // (n, most): index in the arrays that the candidates come from
  int* sorted;    // (n): candidates
};

// Bytes of one piece of memory for candidates, and its parts.
int64_t candidates_bytes(int64_t n, int64_t capacity, int64_t most);
Candidates place_candidates(void* memory, int64_t n, int64_t capacity, int64_t most);

// Where detections go, (n, K) each; null for what is not wanted.
struct Detections {
  int64_t* indices;
  float* boxes;
  float* scores;
  int64_t* labels;
  int64_t* counts;  // (n)
};

// Gaussian suppression of sorted candidates; one launch.
cudaError_t suppress_sorted(const Candidates& candidates, const NmsSettings& settings,
                            const Detections& detections, cudaStream_t stream);

// The whole of it: collect, sort, suppress. No step waits for the host. `memory` has nms_bytes().
int64_t nms_bytes(int64_t batch, const NmsParams& params);
cudaError_t nms(int64_t batch, const NmsParams& params, void* memory, cudaStream_t stream);

}  // namespace edet::cuda
