// Parameters and launcher of the CUDA kernel for fusion nodes and separable convolutions; plain
// enough for a host compiler.
#pragma once

#include <cuda_runtime_api.h>

#include "weighted_fusion.h"

namespace edet::cuda {

// One map that a launch computes, with its own folded batch norm.
struct NodeLevel {
  int64_t h, w;
  const float *scale, *shift;  // (c_out)
  void* out;                   // (N, h, w, c_out)
};

// What a node fuses, as its kernel is compiled for it: 16-bit maps that may be read 16 bytes at a
// time, with one factor for all channels.
enum class FuseKind : uint8_t {
  any,   // whatever the parameters say
  one,   // a map of the node's size as it is, with no factor and no activation
  down,  // swish(a₀·map + a₁·map of half the size, enlarged)
  up,    // swish(a₀·map [+ a₁·map] + a₂·map of twice the size, max-pooled 3×3)
};

// The kind of a node of c channels; an enlarged row is then read from half its number, and each
// window of a pool has a pixel of its map.
inline FuseKind fuse_kind(DType dtype, bool aligned, const EdgeWeights& weights,
                          Activation activation, const Edge* edge, int edges, int64_t c, int64_t h,
                          int64_t w) {
  if (dtype == DType::f32 || !aligned || weights.per_channel) return FuseKind::any;
  const auto fits = [&](int64_t rows, int64_t columns) {  // offsets of an image have 32 bits
    return rows * columns * c <= INT32_MAX;
  };
  if (!fits(h, w)) return FuseKind::any;
  const auto is = [&](int e, Resize resize) {
    const Edge& x = edge[e];
    if (x.resize != resize || !fits(x.h, x.w)) return false;
    if (resize == Resize::nearest) return x.h == (h + 1) / 2 && x.w == (w + 1) / 2;
    const auto halves = [](const Window& window, int64_t in, int64_t out) {
      return window.kernel == 3 && window.stride == 2 && in >= 2 * out - 1;
    };
    return resize == Resize::none || (halves(x.rows, x.h, h) && halves(x.columns, x.w, w));
  };
  if (!is(0, Resize::none)) return FuseKind::any;
  if (edges == 1) {
    const bool plain = activation == Activation::none && weights.fusion == Fusion::sum;
    return plain ? FuseKind::one : FuseKind::any;
  }
  if (activation != Activation::swish || edges > 3) return FuseKind::any;
  if (edges == 2 && is(1, Resize::nearest)) return FuseKind::down;
  const bool up = is(edges - 1, Resize::max_pool) && (edges == 2 || is(1, Resize::none));
  return up ? FuseKind::up : FuseKind::any;
}

// post_activation(scale · pw(dw(pre_activation(Σ aᵢ·resize(edgeᵢ)))) + shift). Either one level
// with up to kMaxEdges edges, or up to kMaxLevels levels with one edge each, of the level's index.
// All pointers are to the device's memory.
struct FusionNodeParams {
  DType dtype;
  bool tf32;  // whether floats may be multiplied as tf32 (from sm_80)
  Activation pre_activation, post_activation;
  int64_t n, c, c_out;
  int levels;
  NodeLevel level[kMaxLevels];
  int edges;
  Edge edge[kMaxEdges];
  EdgeWeights weights;
  const float* dw;  // (9, C)
  const float* pw;  // (⌈c_out/16⌉, C, 16), aligned to 16 bytes
};

// The kind of all levels of a launch.
inline FuseKind kind_of_levels(const FusionNodeParams& p, bool aligned) {
  const auto kind = [&](int level, int edges) {
    return fuse_kind(p.dtype, aligned, p.weights, p.pre_activation, p.edge + level, edges, p.c,
                     p.level[level].h, p.level[level].w);
  };
  const FuseKind first = kind(0, p.edges);
  for (int l = 1; l < p.levels; l++)
    if (kind(l, 1) != first) return FuseKind::any;
  return first;
}

// Launches on `stream` of the current device; no output may overlap an input. `pdl`: the
// launch may begin while the one before it, of this function too, still runs (from compute
// capability 9.0).
cudaError_t fusion_node(const FusionNodeParams& params, cudaStream_t stream, bool pdl = false);

}  // namespace edet::cuda
