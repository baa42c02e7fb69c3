// Plain-old-data parameters of the ops and their shape rules, shared by every device.
#pragma once

#include <cstdint>

// A function that kernels of every device call.
#ifdef __CUDACC__
#define EDET_EVERYWHERE __host__ __device__
#else
#define EDET_EVERYWHERE
#endif

namespace edet {

// The order of each enumeration is its numbering in the op schemas and in edet_kernels/names.py.
enum class Fusion : int { fast, softmax, unbounded, sum };
enum class Pool : int { same, symmetric };
enum class Activation : int { none, swish, relu, relu6, hard_swish };
enum class NmsMethod : int { hard, gaussian };
enum class DType : int { f32, f16, bf16 };

constexpr float kFastEpsilon = 1e-4f;  // paper section 3.3
constexpr int kMaxEdges = 16;          // inputs of one fusion node
constexpr int kPanel = 16;             // output channels in one panel of a packed pointwise weight

// ⌈n/d⌉, and n rounded up to a multiple; in the wider type of the two.
template <class N, class D>
EDET_EVERYWHERE constexpr auto divide_up(N n, D d) {
  return (n + d - 1) / d;
}
template <class N, class D>
EDET_EVERYWHERE constexpr auto round_up(N n, D multiple) {
  return divide_up(n, multiple) * multiple;
}
constexpr int64_t padded(int64_t channels) { return round_up(channels, kPanel); }

// Output o of a max pool reads inputs [o·stride − before, o·stride − before + kernel) of its axis.
struct Window {
  int64_t kernel, stride, before;
};

// The max pool that shrinks `in` to `out`: stride (in−1)/out + 1 and kernel stride + 1.
constexpr Window pool_window(int64_t in, int64_t out, Pool pool) {
  const int64_t stride = (in - 1) / out + 1;
  const int64_t kernel = stride + 1;
  const int64_t total = (out - 1) * stride + kernel - in;
  const int64_t before = pool == Pool::symmetric ? stride - 1 : (total > 0 ? total / 2 : 0);
  return {kernel, stride, before};
}

// TensorFlow 1's nearest rule: the source of output i is floor(i·in/out).
constexpr int64_t nearest_source(int64_t i, int64_t in, int64_t out) { return i * in / out; }

enum class Resize : int { none, nearest, max_pool };

constexpr Resize resize_kind(int64_t in_h, int64_t in_w, int64_t h, int64_t w) {
  if (in_h == h && in_w == w) return Resize::none;
  return in_h <= h && in_w <= w ? Resize::nearest : Resize::max_pool;
}

// One input of a fusion node: a map (N, h, w, C) and how it is brought to the node's size.
struct Edge {
  const void* data;
  int64_t h, w;
  Resize resize;
  Window rows, columns;  // of a max pool
  int source;            // of a graph: the node that computes the map; −1 − i for input i
};

// Edge weights as they are given: (edges) or (edges, C); null for Fusion::sum.
struct EdgeWeights {
  Fusion fusion;
  const float* values;
  bool per_channel;
};

// Weighted fusion: activation(Σ coefficient · resize(edge)) as a map (N, h, w, C).
struct FusionParams {
  DType dtype;
  int64_t n, c, h, w;
  int edges;
  Edge edge[kMaxEdges];
  EdgeWeights weights;        // CUDA
  const float* coefficients;  // CPU: made of them, (edges, C rounded up to kPanel)
  Activation activation;
  // Of training_node, whose edges are maps with a batch norm to come; null otherwise:
  const float* signs;  // like coefficients: ±1, by which an edge is multiplied before its max pool
  const float* offsets;  // (C rounded up to kPanel), added to the sum
};

// A fusion followed by depthwise 3×3, pointwise 1×1, scale, shift and activation: (N, h, w, c_out).
struct NodeParams {
  FusionParams fusion;
  int64_t c_out;
  const float* dw;     // (9, C)
  const float* pw;     // (⌈c_out/16⌉, C, 16)
  const float* scale;  // (c_out)
  const float* shift;  // (c_out)
  Activation activation;
  void* out;
  // Of a graph. A layer's nodes have channels and activation in common, and their weights follow
  // each other as the layer's rows; or they share dw and pw, as a head's levels do.
  int layer, row;
};

// The gradients of a node, or of a weighted fusion alone (node.dw is null). Floats of every pitch
// are C or c_out rounded up to kPanel. Sums over pixels go to one partial sum per group of rows.
struct NodeBackwardParams {
  NodeParams node;     // as in the forward pass; out is read only where statistics have a gradient
  const void* grad;    // (n, h, w, c_out), or (n, h, w, C) of a fusion alone
  const float* ones;   // (largest pitch)
  const float* zeros;  // (w + 2, pitch): a row outside the image
  const float* dw;     // (9, pitch), node.dw with its taps reversed
  const float* pw;     // packed (C, c_out): scale · node.pw, transposed
  // Of the statistics; null for none: grad + slope·(out − mean) + constant is the gradient of out.
  const float *mean, *slope, *constant;  // (pitch of c_out)
  const float* coefficients;             // (edges, pitch): d fused / d resized input
  float* conv_grad;                      // (n, h, w + 2, pitch): of the depthwise sums, zero padded
  float* fused_grad;                     // (n, h, w, pitch): of the fused map; null: not needed
  void* input_grad[kMaxEdges];           // as the edges' data; null: not needed
};

// One 1×1 convolution with folded batch norm: out = (input · W) · scale + shift.
struct Projection {
  const float* pw;     // (⌈c_out/16⌉, c_in, 16)
  const float* scale;  // (c_out)
  const float* shift;  // (c_out)
  int64_t c_out;
  void* out;  // (pixels, c_out)
};

// An inverted residual block: expand 1×1 → depthwise k×k → squeeze-excite → project 1×1 (+ input).
struct MbconvParams {
  DType dtype;
  bool tf32;          // CUDA: whether floats may be multiplied as tf32
  const void* input;  // (n, h, w, c_in)
  int64_t n, h, w, c_in, c_mid, out_h, out_w;
  const float *expand, *expand_scale, *expand_shift;  // packed (c_mid, c_in); null: c_mid is c_in
  const float *dw, *dw_scale, *dw_shift;              // (k·k, c_mid), (c_mid)
  int kernel, stride;                                 // 3 or 5, 1 or 2
  int64_t pad_top, pad_left;
  Activation activation;              // after the expansion and after the depthwise convolution
  int64_t c_reduced;                  // of squeeze-excite; 0: none
  const float *reduce, *reduce_bias;  // packed (c_reduced, c_mid), swish after it (activation)
  const float *excite, *excite_bias;  // packed (c_mid, c_reduced), sigmoid after it
  const float *project, *project_scale, *project_shift;  // packed (c_out, c_mid)
  int64_t c_out;
  bool residual;  // adds the input
  void* out;      // (n, out_h, out_w, c_out)
  // How the work is cut: tasks of band_rows rows and chunk_panels panels of middle channels.
  int64_t band_rows, bands, chunk_panels, chunks;
  // Memory for one call; c_mid rounded up to kPanel is the pitch.
  float* mid;    // (n, out_h·out_w, pitch): after the depthwise convolution
  float* sums;   // (n, out_h, pitch): of mid over a row's pixels, so that no cut changes a sum
  float* gate;   // (n, pitch)
  float* gated;  // (n, ⌈c_out/16⌉, c_mid, 16): project times gate; null: mid is gated instead
};

// The first layer: normalise, 3×3 stride-2 convolution, batch norm, activation.
struct StemParams {
  DType dtype;  // of out
  const void* image;
  bool is_uint8;            // image elements: uint8, else dtype
  int64_t stride[4];        // of the image's N, C, H, W, in elements
  const float *mean, *std;  // (3): pixels become (x − mean)/std; null: as they are
  int64_t n, h, w, out_h, out_w, pad_top, pad_left;
  const float *weight, *scale,
      *shift;  // packed (c_out, 27), the input index is (row·3 + column)·3 + channel
  int64_t c_out;
  Activation activation;
  void* out;  // (n, out_h, out_w, c_out)
};

// Several projections of one map of `pixels` = N·H·W rows of c_in channels.
struct LateralParams {
  DType dtype;
  const void* input;
  int64_t pixels, c_in;
  int projections;
  Projection projection[kMaxEdges];
};

struct NmsSettings {
  NmsMethod method;
  float iou_threshold, sigma, score_threshold;
  int64_t most;         // K, detections per image
  bool class_agnostic;  // boxes of different labels suppress each other
};

// Non-maximum suppression of a batch; see edet_kernels.nms.
struct NmsParams {
  const float* boxes;     // (batch, n, 4)
  const float* scores;    // (batch, n)
  const int64_t* labels;  // (batch, n)
  int64_t n;
  NmsSettings settings;
  int64_t* indices;    // (batch, K)
  float* kept_scores;  // (batch, K)
  int64_t* counts;     // (batch)
};

constexpr int kMaxLevels = 16;

// From head outputs to detections; see edet_kernels.detect.
struct DetectParams {
  DType dtype;
  int levels;
  const void* classes[kMaxLevels];  // (n, pixels, anchors·classes), logits
  const void* boxes[kMaxLevels];    // (n, pixels, anchors·4), regressions
  int64_t pixels[kMaxLevels];
  int64_t n, cell_anchors, num_classes;
  const float* anchors;  // (Σ pixels·cell_anchors, 4): y1, x1, y2, x2
  const float* limits;   // (n, 2): largest x and y; null: boxes are not clipped
  int64_t candidates;    // that enter suppression
  NmsSettings settings;
  float* out_boxes;     // (n, K, 4): x1, y1, x2, y2
  float* out_scores;    // (n, K)
  int64_t* out_labels;  // (n, K)
  int64_t* out_counts;  // (n)
};

}  // namespace edet
