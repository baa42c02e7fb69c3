// Plain-old-data parameters of the ops that an inverted residual block is made of in training.
#pragma once

#include "params.h"

namespace edet {

// The gradient of a map's statistics, which its batch norm reads: it adds
// slope·(out − mean) + constant to the map's own. Padded to whole panels; null: none.
struct StatisticsGradient {
  const float *mean, *slope, *constant;
};

// Means of a map's channels over all pixels, and the products of their deviations.
struct MomentsParams {
  DType dtype;
  const void* input;  // (pixels, c)
  int64_t pixels, c;
  const float* mean;  // (pitch), from which deviations are taken; null: not known yet
  // Of the backward pass: input_grad = x · matrix + constant, or x · slope + constant.
  const float* matrix;            // packed (c, c); null: a diagonal one
  const float *slope, *constant;  // (pitch); with a matrix, slope is 1
  void* input_grad;
};

// Where a partial sum of the gradients of BlockDepthwiseParams' weights has which; that of expand,
// packed (c, c_in) and over scale, comes first.
struct BlockDepthwiseSums {
  int64_t dw, offset, scale, size;  // (k·k, pitch), (pitch), (pitch): without an expansion
};

// Expand 1×1, batch norm as scale and offset, activation, depthwise k×k, of a block in training.
struct BlockDepthwiseParams {
  DType dtype;
  const void* input;  // (n, h, w, c_in)
  int64_t n, h, w, c_in, c, out_h, out_w;
  const float* expand;          // packed (c, c_in); null: c is c_in
  const float *scale, *offset;  // (pitch of c)
  const float* dw;              // (k·k, pitch of c)
  int kernel, stride;           // 3 or 5, 1 or 2
  int64_t pad_top, pad_left;
  Activation activation;
  int64_t chunk;  // channels that are computed together, a multiple of kPanel
  void* out;      // (n, out_h, out_w, c)
  // Of the backward pass:
  const void* grad;  // as out
  StatisticsGradient statistics;
  const float* expand_back;   // for each chunk, packed (c_in, chunk): scale · expand, transposed
  const float *ones, *zeros;  // (largest pitch)
  BlockDepthwiseSums at;
  void* input_grad;  // as input
};

// Batch norm as scale and offset, activation, gate, project 1×1, of a block in training.
struct BlockProjectParams {
  DType dtype;
  const void* input;  // (n, area, c)
  int64_t n, area, c, c_out;
  const float *scale, *offset;  // (pitch of c)
  Activation activation;
  const float* gate;          // (n, pitch of c), of squeeze-excite; null: none
  const float* project;       // packed (c_out, c)
  const float *ones, *zeros;  // (largest pitch)
  int64_t strip;              // pixels that are computed together
  void* out;                  // (n, area, c_out)
  // Of the backward pass:
  const void* grad;  // as out
  StatisticsGradient statistics;
  const float* project_back;  // packed (c, c_out): project, transposed
  const float* pooled_grad;   // (n, pitch of c): added to the gradient of every activated pixel
  void* input_grad;           // as input
};

}  // namespace edet
