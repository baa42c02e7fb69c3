// Plain-old-data parameters of the ops on maps of bytes; edet_kernels/int8_reference.py defines
// them.
#pragma once

#include "params.h"

namespace edet {

// Rows of a requantisation, one value per channel: float(sum)·scale + shift, then bounds (low,
// high) or, behind swish and hard_swish, a factor and a zero point.
constexpr int kRequantiseRows = 4;

// An inverted residual block on bytes: expand 1×1 → depthwise → squeeze-excite → project (+ input).
struct Int8MbconvParams {
  const uint8_t* input;  // (n, h, w, c_in)
  int64_t n, h, w, c_in, c_mid, c_out, out_h, out_w;
  const int8_t* expand;      // (⌈c_mid/16⌉, ⌈c_in/4⌉, 16, 4); null: c_mid is c_in
  const float* expand_rows;  // (4, c_mid)
  const int8_t* dw;          // (k, c_mid, 4 or 8)
  const float* dw_rows;      // (4, c_mid)
  const uint8_t* pad;  // (c_mid): what lies around the map that the depthwise convolution reads
  int kernel, stride;
  int64_t pad_top, pad_left;
  Activation activation;
  int64_t c_reduced;                       // of squeeze-excite; 0: none
  const int16_t *reduce, *excite;          // (c_reduced, c_mid), (c_mid, c_reduced)
  const float *reduce_rows, *excite_rows;  // (2, c_reduced), (2, c_mid): scale and shift
  const float* zeros;                      // (c_mid): zero points behind the depthwise convolution
  const int8_t* project;                   // packed, without squeeze-excite
  const float* plain_project;              // (⌈c_out/16⌉, c_mid, 16), with it: to be gated
  const float* project_rows;               // (2, c_out)
  float residual;                          // factor of the input in the sum; 0: not added
  uint8_t* out;                            // (n, out_h, out_w, c_out)
  int64_t band_rows, bands, chunk_panels, chunks;
  // Memory for one call; c_mid rounded up to kPanel is the pitch.
  uint8_t* mid;       // (n, out_h·out_w, pitch)
  int32_t* sums;      // (n, out_h, pitch)
  float* gate;        // (n, pitch)
  int8_t* gated;      // (n, ⌈c_out/16⌉, ⌈c_mid/4⌉, 16, 4)
  float* gated_rows;  // (n, 2, c_out rounded up to kPanel)
};

// A fusion → depthwise 3×3 → pointwise 1×1 node on bytes. `node` holds its geometry, its edges and
// where its map lies.
struct Int8NodeParams {
  NodeParams node;
  const float* fuse;      // (edges + 3, c): factors, shift, inverse, zero; or (1, c): zero alone
  bool fused;             // else the one input's bytes are read as they are
  const int8_t* dw;       // (3, c, 4)
  const float* mid;       // (2, c)
  const int8_t* pw;       // (⌈c_out/16⌉, ⌈c/4⌉, 16, 4)
  const float* out_rows;  // (4, c_out), or (2, c_out) where the result is a map of floats
  bool float_out;
};

// A block of pixels times a packed weight: bytes to bytes.
struct Int8Projection {
  const uint8_t* input;
  int64_t c_in, c_out;
  const int8_t* pw;
  const float* rows;  // (2, c_out)
  uint8_t* out;
};

}  // namespace edet
