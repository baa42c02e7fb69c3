// What kernels that fuse maps share: factors of the edges, resizing, activations.
#pragma once

#include "device.cuh"
#include "weighted_fusion.h"

namespace edet::cuda {

EDET_DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }  // a NaN stays

EDET_DEVICE float clamp(float x, float low, float high) {
  return x < low ? low : x > high ? high : x;
}

EDET_DEVICE float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::swish: return x / (1.0f + exp(-x));
    case Activation::relu: return relu(x);
    case Activation::relu6: return clamp(x, 0.0f, 6.0f);
    case Activation::hard_swish: return x * (clamp(x + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f));
    case Activation::none: break;
  }
  return x;
}

// Writes the factor of every edge for one of c channels to a + edge · pitch.
EDET_DEVICE void normalise(const EdgeWeights& weights, int edges, int64_t c, int64_t channel,
                           Shared<float> a, int pitch) {
  if (weights.fusion == Fusion::sum) {
    for (int e = 0; e < edges; e++) store(a + e * pitch, 1.0f);
    return;
  }
  const auto weight = [&](int e) {
    const int64_t i = weights.per_channel ? e * c + channel : e;
    return load_constant<float, 1>(weights.values + i).value[0];
  };
  if (weights.fusion == Fusion::unbounded) {
    for (int e = 0; e < edges; e++) store(a + e * pitch, weight(e));
    return;
  }
  const bool softmax = weights.fusion == Fusion::softmax;
  float largest = weight(0);
  for (int e = 1; e < edges; e++) largest = weight(e) > largest ? weight(e) : largest;
  const auto part = [&](int e) { return softmax ? exp(weight(e) - largest) : relu(weight(e)); };
  float total = softmax ? 0.0f : kFastEpsilon;
  for (int e = 0; e < edges; e++) total += part(e);
  for (int e = 0; e < edges; e++) store(a + e * pitch, part(e) / total);
}

// V channels of one edge, resized to pixel (y, x) of a map of (h, w); `read`(pixel) gives them at a
// pixel of the edge's image.
template <class T, int V, class Read>
EDET_DEVICE Vector<T, V> sample(const Edge& edge, uint32_t h, uint32_t w, uint32_t y, uint32_t x,
                                const Read& read) {
  if (edge.resize != Resize::max_pool) {
    if (edge.resize == Resize::nearest) {
      y = y * uint32_t(edge.h) / h;
      x = x * uint32_t(edge.w) / w;
    }
    return read(int64_t(y) * edge.w + x);
  }
  const int top = int(y * edge.rows.stride - edge.rows.before);
  const int left = int(x * edge.columns.stride - edge.columns.before);
  const int bottom = min(top + int(edge.rows.kernel), int(edge.h));
  const int right = min(left + int(edge.columns.kernel), int(edge.w));
  Vector<T, V> largest;
  EDET_UNROLL
  for (int i = 0; i < V; i++) largest.value[i] = from_float<T>(-INFINITY);
  for (int r = max(top, 0); r < bottom; r++) {
    for (int k = max(left, 0); k < right; k++) {
      const Vector<T, V> v = read(int64_t(r) * edge.w + k);
      EDET_UNROLL
      for (int i = 0; i < V; i++) {
        const float next = to_float(v.value[i]);
        if (next > to_float(largest.value[i]) || next != next) largest.value[i] = v.value[i];
      }
    }
  }
  return largest;
}

}  // namespace edet::cuda
