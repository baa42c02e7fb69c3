// The kernels of a block in training, of one instruction set, as a table of functions.
#pragma once

#include "../core/block_params.h"

namespace edet::cpu {

struct BlockKernels {
  int64_t (*moments_scratch)(const MomentsParams&);  // floats of scratch per thread, as the others
  void (*moments_sums)(const MomentsParams&, int64_t begin, int64_t end, float* sums,
                       float* scratch);
  void (*moments_products)(const MomentsParams&, int64_t begin, int64_t end, float* products,
                           float* scratch);
  void (*moments_backward)(const MomentsParams&, int64_t begin, int64_t end, float* scratch);
  int64_t (*depthwise_scratch)(const BlockDepthwiseParams&);
  void (*depthwise)(const BlockDepthwiseParams&, int64_t image, int64_t y_begin, int64_t y_end,
                    int64_t chunk, float* moments, float* scratch);
  void (*depthwise_backward)(const BlockDepthwiseParams&, int64_t image, int64_t y_begin,
                             int64_t y_end, float* partial, float* scratch);
  int64_t (*project_scratch)(const BlockProjectParams&);
  void (*pool)(const BlockProjectParams&, int64_t image, int64_t begin, int64_t end, float* sums,
               float* scratch);
  void (*project)(const BlockProjectParams&, int64_t image, int64_t begin, int64_t end,
                  float* moments, float* scratch);
  void (*project_backward)(const BlockProjectParams&, int64_t image, int64_t begin, int64_t end,
                           float* weights, float* gate_grad, float* scratch);
  void (*project_finish)(const BlockProjectParams&, int64_t image, int64_t begin, int64_t end,
                         float* sums, float* scratch);
};

// Those of the instruction set that dispatch.h's kernels() has chosen.
const BlockKernels& block_kernels();

}  // namespace edet::cpu
