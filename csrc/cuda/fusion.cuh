// What kernels that fuse maps share: factors of the edges, resizing, activations.
#pragma once

#include "vectors.cuh"
#include "weighted_fusion.h"

namespace edet::cuda {

EDET_DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }  // a NaN stays

EDET_DEVICE float clamp(float x, float low, float high) {
  return x < low ? low : x > high ? high : x;
}

constexpr float kLog2E = 1.44269504f;

// 1/(1 + e^−x). For results of type T: approximate where they have 16 bits.
template <class T>
EDET_DEVICE float sigmoid(float x) {
  if constexpr (sizeof(T) == 2) {
    return rcp_approx(1.0f + ex2_approx(x * -kLog2E));
  } else {
    return 1.0f / (1.0f + exp(-x));
  }
}
template <class T>
EDET_DEVICE float swish(float x) {
  if constexpr (sizeof(T) == 2) {
    return x * sigmoid<T>(x);
  } else {
    return x / (1.0f + exp(-x));
  }
}

// The same from x/2, to 16 bits: x/2 + x/2·tanh(x/2), off by 2⁻¹²·|x|.
EDET_DEVICE float half_swish(float half) { return half * tanh_approx(half) + half; }

// Activates numbers that are then rounded to T. One choice for all of them, and few branches: a
// switch would become a table of jumps.
template <class T, int V>
EDET_DEVICE void activate(float (&x)[V], Activation activation) {
  if (activation == Activation::swish) {
    EDET_UNROLL
    for (int i = 0; i < V; i++) x[i] = swish<T>(x[i]);
  } else if (activation == Activation::hard_swish) {
    EDET_UNROLL
    for (int i = 0; i < V; i++) x[i] *= clamp(x[i] + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f);
  } else {
    const float low = activation == Activation::none ? -INFINITY : 0.0f;
    const float high = activation == Activation::relu6 ? 6.0f : INFINITY;
    EDET_UNROLL
    for (int i = 0; i < V; i++) x[i] = clamp(x[i], low, high);
  }
}
template <class T>
EDET_DEVICE float activate(float x, Activation activation) {
  float one[1] = {x};
  activate<T>(one, activation);
  return one[0];
}

// The weights of a node's edges for one of c channels: read at once, long before they are used.
class EdgeFactors {
 public:
  EDET_DEVICE EdgeFactors(const EdgeWeights& weights, int edges, int64_t c, int64_t channel)
      : weights_(weights), edges_(edges), c_(c), channel_(channel) {
    if (weights.fusion == Fusion::sum) return;
    EDET_UNROLL
    for (int e = 0; e < kFirst; e++)
      if (e < edges) first_[e] = weight(e);
  }

  // Writes the factor of each edge to a + edge · pitch. T: of the maps, whose 16 bits need no exact
  // quotient.
  template <class T>
  EDET_DEVICE void store_to(Shared<float> a, int pitch) const {
    const Fusion fusion = weights_.fusion;
    if (fusion == Fusion::sum) {
      for (int e = 0; e < edges_; e++) store(a + e * pitch, 1.0f);
      return;
    }
    if (fusion == Fusion::unbounded) {
      return each([&](int e, float w) { store(a + e * pitch, w); });
    }
    const bool softmax = fusion == Fusion::softmax;
    float largest = first_[0];
    if (softmax) each([&](int, float w) { largest = w > largest ? w : largest; });
    const auto part = [&](float w) {
      if (!softmax) return relu(w);
      if constexpr (sizeof(T) == 2) return ex2_approx((w - largest) * kLog2E);
      return exp(w - largest);
    };
    float total = softmax ? 0.0f : kFastEpsilon;
    each([&](int, float w) { total += part(w); });
    if constexpr (sizeof(T) == 2) {
      const float factor = rcp_approx(total);
      each([&](int e, float w) { store(a + e * pitch, part(w) * factor); });
    } else {
      each([&](int e, float w) { store(a + e * pitch, part(w) / total); });
    }
  }

 private:
  static constexpr int kFirst = 3;  // more edges than that are read when they are used

  EDET_DEVICE float weight(int e) const {
    const int64_t i = weights_.per_channel ? e * c_ + channel_ : e;
    return load_constant<float, 1>(weights_.values + i).value[0];
  }
  template <class Use>
  EDET_DEVICE void each(const Use& use) const {
    EDET_UNROLL
    for (int e = 0; e < kFirst; e++)
      if (e < edges_) use(e, first_[e]);
    for (int e = kFirst; e < edges_; e++) use(e, weight(e));
  }

  const EdgeWeights weights_;
  const int edges_;
  const int64_t c_, channel_;
  float first_[kFirst] = {};
};

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
