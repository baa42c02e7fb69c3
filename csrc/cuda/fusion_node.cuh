// One block's work on a tile of a fusion node: fuse, activate, depthwise 3×3, pointwise 1×1, scale,
// shift and activate; shared by the kernels that launch nodes one by one and all at once.
//
// For each chunk of 128 bytes of channels a block fuses the tile and its halo into shared memory,
// convolves depthwise into the left operand and adds the product with the chunk of weights;
// docs/cuda.md has the picture.
#pragma once

#include "fusion.cuh"
#include "fusion_node.h"
#include "product.cuh"

namespace edet::cuda {

constexpr int kTileWidth = 8;
template <class P>
constexpr int kTileHeight = P::kRows / kTileWidth;

// A node as its tiles see it.
struct Node {
  int c, c_out, h, w, edges;
  Activation pre_activation, post_activation;
  EdgeWeights weights;
  const float *dw, *pw, *scale, *shift;
  void* out;
  bool aligned_in, aligned_out;
};

// What a block computes at once: pixels from (y0, x0) on, output channels [n, n + columns).
struct Tile {
  int64_t image;
  int y0, x0, n, columns;
};

// Where a block's shared memory holds what, in bytes.
struct Memory {
  int a, w, dw, factors, bytes;
};
template <class P>
constexpr int kPatchPixels = (kTileHeight<P> + 2) * (kTileWidth + 2);
template <class P>
constexpr EDET_DEVICE Memory memory_of(int edges, int chunks, bool resident) {
  const int patch = kPatchPixels<P> * 128;
  const int operands = patch + P::kBytesA;
  Memory m{};
  m.a = patch;
  // the result takes the place of the operands, of the weights too unless they stay
  m.w = resident && P::kBytesOut > operands ? P::kBytesOut : operands;
  m.dw = m.w + P::kBytesW * (resident ? chunks : 1);
  if (m.dw < P::kBytesOut) m.dw = P::kBytesOut;
  m.factors = m.dw + 9 * 4 * kChunk<typename P::Type>;
  m.bytes = m.factors + edges * 4 * kChunk<typename P::Type>;
  return m;
}

// Per-channel floats of a chunk are kept in groups of 4, so that 8 lanes, each in need of V
// neighbours, read 16 bytes from different banks.
template <class T>
EDET_DEVICE int float_place(int channel) {
  constexpr int V = kVector<T>;
  return channel % V / 4 * (kChunk<T> / (V / 4)) + channel / V * 4 + channel % 4;
}
template <class T>
EDET_DEVICE Vector<float, 4> load_floats(Shared<float> floats, int vector, int group) {
  return load<4>(floats + (group * (kChunk<T> / (kVector<T> / 4)) + vector * 4));
}

// Fills the patch: the tile's first pixel is in its second row and column. Outside of the
// map it is zero, which is what the depthwise convolution pads with.
template <class P, class EdgeOf>
EDET_DEVICE void fuse_patch(const Node& p, const EdgeOf& edge_of, const Tile& tile, int k,
                            int depth, Shared<float> factors, Shared<typename P::Type> patch) {
  using T = typename P::Type;
  constexpr int V = kVector<T>;
  for (int i = thread().x; i < kPatchPixels<P> * kVectors; i += kProductThreads) {
    const int vector = i % kVectors, pixel = i / kVectors, channel = k + vector * V;
    if (vector * V >= depth) continue;
    const int y = tile.y0 - 1 + pixel / (kTileWidth + 2);
    const int x = tile.x0 - 1 + pixel % (kTileWidth + 2);
    Vector<T, V> result;
    if (y < 0 || y >= p.h || x < 0 || x >= p.w || channel >= p.c) {
      EDET_UNROLL
      for (int j = 0; j < V; j++) result.value[j] = from_float<T>(0.0f);
    } else {
      float sum[V];
      for (int e = 0; e < p.edges; e++) {
        const Edge& edge = edge_of(e);
        const T* map =
            static_cast<const T*>(edge.data) + tile.image * edge.h * edge.w * p.c + channel;
        const Vector<T, V> v = sample<T, V>(
            edge, uint32_t(p.h), uint32_t(p.w), uint32_t(y), uint32_t(x),
            [&](int64_t at) { return load_pixel(map + at * p.c, p.c - channel, p.aligned_in); });
        EDET_UNROLL
        for (int group = 0; group < V / 4; group++) {
          const Vector<float, 4> a = load_floats<T>(factors + e * kChunk<T>, vector, group);
          EDET_UNROLL
          for (int j = 0; j < 4; j++) {
            const float term = a.value[j] * to_float(v.value[group * 4 + j]);
            sum[group * 4 + j] = e ? sum[group * 4 + j] + term : term;
          }
        }
      }
      EDET_UNROLL
      for (int j = 0; j < V; j++) {
        const float fused = activate(sum[j], p.pre_activation);
        result.value[j] = from_float<T>(channel + j < p.c ? fused : 0.0f);
      }
    }
    store(patch + (pixel * kChunk<T> + vector * V), result);
  }
}

// Convolves the patch into the product's left operand: a thread computes one vector of channels of
// kTilesM pixels below each other, which share the rows of the patch.
template <class P>
EDET_DEVICE void convolve_patch(Shared<typename P::Type> patch, Shared<float> dw, int depth,
                                Shared<typename P::Type> a) {
  using T = typename P::Type;
  constexpr int V = kVector<T>, kDown = P::kRows / 32;
  const int vector = thread().x % kVectors, x = thread().x / kVectors % kTileWidth;
  const int y = thread().x / (kVectors * kTileWidth) * kDown;
  if (vector * V >= depth) return;
  float sum[kDown][V] = {};
  EDET_UNROLL
  for (int dx = 0; dx < 3; dx++) {
    Vector<T, V> column[kDown + 2];
    EDET_UNROLL
    for (int r = 0; r < kDown + 2; r++) {
      const int pixel = (y + r) * (kTileWidth + 2) + x + dx;
      column[r] = load<V>(patch + (pixel * kChunk<T> + vector * V));
    }
    EDET_UNROLL
    for (int dy = 0; dy < 3; dy++) {
      EDET_UNROLL
      for (int group = 0; group < V / 4; group++) {
        const Vector<float, 4> w = load_floats<T>(dw + (dy * 3 + dx) * kChunk<T>, vector, group);
        EDET_UNROLL
        for (int r = 0; r < kDown; r++) {
          EDET_UNROLL
          for (int j = 0; j < 4; j++) {
            sum[r][group * 4 + j] += w.value[j] * to_float(column[r + dy].value[group * 4 + j]);
          }
        }
      }
    }
  }
  EDET_UNROLL
  for (int r = 0; r < kDown; r++) {
    Vector<T, V> result;
    EDET_UNROLL
    for (int j = 0; j < V; j++) result.value[j] = from_float<T>(sum[r][j]);
    store(a + (((y + r) * kTileWidth + x) * P::kPitchA + vector * V), result);
  }
}

// Computes one tile. `first`: the weights in shared memory are of another node; `resident`: all
// that the slice needs stay there. edge_of(e) is an edge with its map.
template <class P, class EdgeOf>
EDET_DEVICE void compute_tile(const Node& p, const EdgeOf& edge_of, const Tile& tile,
                              Shared<char> memory, const Memory& at, bool first, bool resident) {
  using T = typename P::Type;
  const Shared<T> patch = as<T>(memory), a = as<T>(memory + at.a), w = as<T>(memory + at.w);
  const Shared<float> dw = as<float>(memory + at.dw), factors = as<float>(memory + at.factors);
  const int c = p.c, chunks = (c + kChunk<T> - 1) / kChunk<T>;
  P product;
  for (int chunk = 0; chunk < chunks; chunk++) {
    const int k = chunk * kChunk<T>;
    const int depth = round_up(min(kChunk<T>, c - k), kDepth);
    const Shared<T> weights = w + (resident ? chunk * (P::kBytesW / int(sizeof(T))) : 0);
    if (first || chunks > 1) {
      for (int i = thread().x; i < 9 * kChunk<T>; i += kProductThreads) {
        const int tap = i / kChunk<T>, channel = i % kChunk<T>;
        const float value =
            k + channel < c ? load_constant<float, 1>(p.dw + tap * c + k + channel).value[0] : 0.0f;
        store(dw + (tap * kChunk<T> + float_place<T>(channel)), value);
      }
      if (thread().x < kChunk<T> && (first || p.weights.per_channel)) {
        const int channel = min(k + int(thread().x), c - 1);
        normalise(p.weights, p.edges, c, channel, factors + float_place<T>(thread().x), kChunk<T>);
      }
    }
    block_barrier();
    if (first || !resident) {
      load_weights<P>(p.pw, c, p.c_out, k, tile.n, depth, tile.columns, weights);
    }
    fuse_patch<P>(p, edge_of, tile, k, depth, factors, patch);
    block_barrier();
    convolve_patch<P>(patch, dw, depth, a);
    block_barrier();
    product.step(a, weights, depth, tile.columns);
  }
  store_product(
      product, patch, p.scale, p.shift, tile.n, tile.columns, p.c_out, p.aligned_out,
      [&](float x, int, int) { return from_float<T>(activate(x, p.post_activation)); },
      [&](int row) -> T* {
        const int y = tile.y0 + row / kTileWidth, x = tile.x0 + row % kTileWidth;
        if (y >= p.h || x >= p.w) return nullptr;
        return static_cast<T*>(p.out) + ((tile.image * p.h + y) * p.w + x) * p.c_out;
      });
}

}  // namespace edet::cuda
