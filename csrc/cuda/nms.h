// Parameters and launchers of the CUDA kernels for non-maximum suppression; plain enough for a host
// compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/params.h"

namespace edet::cuda {

// The candidates of a batch while they are sorted and suppressed: n images of at most `most`.
struct Candidates {
  int64_t n, most;
  uint64_t* keys;  // (n, most), in any order; the larger, the better, no two are equal
  int* count;      // (n)
  // sorted, the best first
  float* boxes;     // (n, most, 4)
  float* scores;    // (n, most); gaussian suppression lowers them
  int64_t* labels;  // (n, most)
  int* sources;     // (n, most): index in the arrays that the candidates come from
  int* kept;        // (n, settings.most): positions
};

// Bytes of one piece of memory for candidates, and its parts.
int64_t candidates_bytes(int64_t n, int64_t most, int64_t kept);
Candidates place_candidates(void* memory, int64_t n, int64_t most, int64_t kept);

// Where detections go, (n, K) each; null for what is not wanted.
struct Detections {
  int64_t* indices;
  float* boxes;
  float* scores;
  int64_t* labels;
  int64_t* counts;  // (n)
};

// Suppresses sorted candidates; one launch.
cudaError_t suppress(const Candidates& candidates, const NmsSettings& settings,
                     const Detections& detections, cudaStream_t stream);

// The whole of it: collect, sort, suppress. No step waits for the host. `memory` has nms_bytes().
int64_t nms_bytes(int64_t batch, const NmsParams& params);
cudaError_t nms(int64_t batch, const NmsParams& params, void* memory, cudaStream_t stream);

}  // namespace edet::cuda
