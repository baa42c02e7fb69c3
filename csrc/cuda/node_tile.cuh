// One block's work on a tile of a fusion node: fuse, activate, depthwise 3×3, pointwise 1×1, scale,
// shift and activate; shared by the kernels that launch nodes one by one and all at once.
//
// For each chunk of 128 bytes of channels a block fuses the tile and its halo into shared memory,
// convolves depthwise into the left operand and adds the product with the chunk of weights;
// docs/cuda.md has the picture.
#pragma once

#include "../core/tile_schedule.h"
#include "block_mma.cuh"
#include "fusion.cuh"
#include "fusion_node.h"

namespace edet::cuda {

constexpr int kTileWidth = 8;
template <class Mma>
constexpr int kTileHeight = Mma::kRows / kTileWidth;

// What a block computes at once: pixels from (y0, x0) on, output channels [n, n + columns). It lies
// in shared memory, from where each phase of the computation reads it again: registers are scarce.
// `node` is for the kernel's own use.
struct Tile {
  int node, image, y0, x0, n, columns;
};
class SharedTile {
 public:
  static constexpr int kWords = 8;

  EDET_DEVICE explicit SharedTile(Shared<int> at) : at_(at) {}
  EDET_DEVICE void set(const Tile& tile) const {
    store(at_, tile.node);
    store(at_ + 1, tile.image);
    store(at_ + 2, tile.y0);
    store(at_ + 3, tile.x0);
    store(at_ + 4, tile.n);
    store(at_ + 5, tile.columns);
  }
  EDET_DEVICE int node() const { return get(at_); }
  EDET_DEVICE int image() const { return get(at_ + 1); }
  EDET_DEVICE int y0() const { return get(at_ + 2); }
  EDET_DEVICE int x0() const { return get(at_ + 3); }
  EDET_DEVICE int n() const { return get(at_ + 4); }
  EDET_DEVICE int columns() const { return get(at_ + 5); }

 private:
  Shared<int> at_;
};

template <class Mma>
constexpr int kPatchPixels = (kTileHeight<Mma> + 2) * (kTileWidth + 2);

// Where a block's shared memory holds what, in bytes: tiles, depthwise weights, factors of the
// edges, the patch, the product's left operand, its weights. All but one are known when it is
// compiled.
template <class Mma>
struct NodeMemory {
  static constexpr int kFloats = 4 * kChunk<typename Mma::Type>;
  static constexpr int kTiles = 0;  // two, one while the other may still be read
  static constexpr int kDepthwise = kTiles + 2 * 4 * SharedTile::kWords;
  static constexpr int kFactors = kDepthwise + 9 * kFloats, kPatch = kFactors + kMaxEdges * kFloats;
  static constexpr int kLeft = kPatch + kPatchPixels<Mma> * 128;
  static constexpr int kOperands = kLeft + Mma::kBytesA, kResult = kPatch + Mma::kBytesOut;

  // The result takes the place of the patch and the operands, of the weights too unless they stay.
  EDET_EVERYWHERE static constexpr int weights(bool resident) {
    return resident && kResult > kOperands ? kResult : kOperands;
  }
  EDET_EVERYWHERE static constexpr int bytes(int chunks, bool resident) {
    const int end = weights(resident) + Mma::kBytesW * (resident ? chunks : 1);
    return end > kResult ? end : kResult;
  }
};

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
template <class Mma, class Node>
EDET_DEVICE void fuse_patch(const Node& node, const SharedTile& tile, int k, int depth,
                            Shared<float> factors, Shared<typename Mma::Type> patch) {
  using T = typename Mma::Type;
  constexpr int V = kVector<T>;
  const int c = node.c(), h = node.h(), w = node.w(), edges = node.edges();
  const int image = tile.image(), y0 = tile.y0(), x0 = tile.x0();
  for (int i = thread().x; i < kPatchPixels<Mma> * kVectors; i += kProductThreads) {
    const int vector = i % kVectors, pixel = i / kVectors, channel = k + vector * V;
    if (vector * V >= depth) continue;
    const int y = y0 - 1 + pixel / (kTileWidth + 2);
    const int x = x0 - 1 + pixel % (kTileWidth + 2);
    Vector<T, V> result;
    if (y < 0 || y >= h || x < 0 || x >= w || channel >= c) {
      EDET_UNROLL
      for (int j = 0; j < V; j++) result.value[j] = from_float<T>(0.0f);
    } else {
      float sum[V];
      for (int e = 0; e < edges; e++) {
        const Edge& edge = node.edge(e);
        const T* map = static_cast<const T*>(edge.data) + image * edge.h * edge.w * c + channel;
        const Vector<T, V> v =
            sample<T, V>(edge, uint32_t(h), uint32_t(w), uint32_t(y), uint32_t(x), [&](int64_t at) {
              return load_pixel<true>(map + at * c, c - channel, node.aligned_in());
            });
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
        const float fused = activate(sum[j], node.pre_activation());
        result.value[j] = from_float<T>(channel + j < c ? fused : 0.0f);
      }
    }
    store(patch + (pixel * kChunk<T> + vector * V), result);
  }
}

// Convolves the patch into the product's left operand: a thread computes one vector of channels of
// kTilesM pixels below each other, which share the rows of the patch.
template <class Mma>
EDET_DEVICE void convolve_patch(Shared<typename Mma::Type> patch, Shared<float> dw, int depth,
                                Shared<typename Mma::Type> a) {
  using T = typename Mma::Type;
  constexpr int V = kVector<T>, kDown = Mma::kRows / 32;
  const int vector = thread().x % kVectors, x = thread().x / kVectors % kTileWidth;
  const int y = thread().x / (kVectors * kTileWidth) * kDown;
  if (vector * V >= depth) return;
  float sum[kDown][V] = {};
  // the loads of three columns at once would leave no registers
  EDET_LOOP
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
    for (int j = 0; j < V; j++) result.value[j] = Mma::operand(sum[r][j]);
    store(a + (((y + r) * kTileWidth + x) * Mma::kPitchA + vector * V), result);
  }
}

// Computes one tile. `first`: the weights in shared memory are of another node; `resident`: all
// that the slice needs stay there. await() returns when the inputs may be read, for all threads
// after a barrier of its own; weights, which nothing waits for, are loaded before. A node says what
// it is made of: c(), c_out(), h(), w(), edges(), edge(e), weights(), pre_activation(),
// post_activation(), dw(), pw(), scale(), shift(), out(), aligned_in() and aligned_out(), from the
// kernel's parameters, which cost no registers.
template <class Mma, class Node, class Await>
EDET_DEVICE void compute_tile(const Node& node, const SharedTile& tile, Shared<char> memory,
                              bool first, bool resident, const Await& await) {
  using T = typename Mma::Type;
  using At = NodeMemory<Mma>;
  const Shared<float> dw = as<float>(memory + At::kDepthwise),
                      factors = as<float>(memory + At::kFactors);
  const Shared<T> patch = as<T>(memory + At::kPatch), a = as<T>(memory + At::kLeft);
  const Shared<T> w = as<T>(memory + At::weights(resident));
  const int c = node.c(), chunks = divide_up(c, kChunk<T>);
  const auto load_chunk = [&](int k, Shared<T> to) {
    const int depth = round_up(min(kChunk<T>, c - k), kDepth);
    load_weights<Mma>(node.pw(), c, node.c_out(), k, tile.n(), depth, tile.columns(), to);
  };
  const auto place = [&](int chunk) {
    return w + (resident ? chunk * (Mma::kBytesW / int(sizeof(T))) : 0);
  };
  if (first && resident) {
    for (int chunk = 0; chunk < chunks; chunk++) load_chunk(chunk * kChunk<T>, place(chunk));
  }
  Mma product;
  for (int chunk = 0; chunk < chunks; chunk++) {
    const int k = chunk * kChunk<T>;
    const int depth = round_up(min(kChunk<T>, c - k), kDepth);
    if (first || chunks > 1) {
      EDET_LOOP
      for (int i = thread().x; i < 9 * kChunk<T>; i += kProductThreads) {
        const int tap = i / kChunk<T>, channel = i % kChunk<T>;
        const float value =
            k + channel < c ? load_constant<float, 1>(node.dw() + tap * c + k + channel).value[0]
                            : 0.0f;
        store(dw + (tap * kChunk<T> + float_place<T>(channel)), value);
      }
      if (thread().x < kChunk<T> && (first || node.weights().per_channel)) {
        const int channel = min(k + int(thread().x), c - 1);
        normalise(node.weights(), node.edges(), c, channel, factors + float_place<T>(thread().x),
                  kChunk<T>);
      }
    }
    sync_threads();
    if (!resident) load_chunk(k, w);
    if (chunk == 0) await();
    fuse_patch<Mma>(node, tile, k, depth, factors, patch);
    sync_threads();
    convolve_patch<Mma>(patch, dw, depth, a);
    sync_threads();
    product.mma(a, place(chunk), depth, tile.columns());
  }
  store_product(
      product, patch, node.scale(), node.shift(), tile.n(), tile.columns(), node.c_out(),
      node.aligned_out(),
      [&](float x, int, int) { return from_float<T>(activate(x, node.post_activation())); },
      [&](int row) -> T* {
        const int y = tile.y0() + row / kTileWidth, x = tile.x0() + row % kTileWidth;
        const int h = node.h(), w = node.w();
        if (y >= h || x >= w) return nullptr;
        return static_cast<T*>(node.out()) +
               ((int64_t(tile.image()) * h + y) * w + x) * node.c_out();
      });
}

}  // namespace edet::cuda
