// The CUDA kernel for a fusion node: fuse, activate, depthwise 3×3, pointwise 1×1, scale, shift and
// activate in one launch; and for separable convolutions on all levels of a pyramid.
//
// Floors. Bytes: each input, the output and the weights once. Operations: 2·pixels·C·(9 + C_out).
// With 16-bit maps of 64 channels that is 37 operations a byte: bandwidth, or at batch 1, where all
// maps lie in the second-level cache, the latency of a launch. From C = 384 the weights, streamed
// once for every tile of 64 pixels, are the most bytes.
// Budget: 255 registers, tensor cores.
//
// A block owns tiles of 8×8 (or 4×8) pixels and a slice of the output channels. For each chunk of
// 128 bytes of channels it fuses the tile and its halo into shared memory, convolves depthwise into
// the left operand and adds the product with the chunk of weights; docs/cuda.md has the picture.
#include "fusion_node.h"

#include "fusion.cuh"
#include "product.cuh"

namespace edet::cuda {
namespace {

constexpr int kTileWidth = 8;

// What the launcher adds to the op's parameters.
struct Plan {
  FusionNodeParams p;
  int first_tile[kMaxLevels + 1];
  int columns;    // of a block
  bool resident;  // all weights of the slice stay in shared memory
  bool aligned_in, aligned_out;
};

// Where a block's shared memory holds what, in bytes.
struct Memory {
  int a, w, dw, factors, bytes;
};
template <class P>
constexpr int kPatchPixels = (P::kRows / kTileWidth + 2) * (kTileWidth + 2);
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

// Fills the patch: pixel (y, x) of the level at (0, 0) is its second row and column. Outside of the
// map it is zero, which is what the depthwise convolution pads with.
template <class P>
EDET_DEVICE void fuse_patch(const Plan& plan, const NodeLevel& level, int first_edge, int image,
                            int y0, int x0, int k, int depth, Shared<float> factors,
                            Shared<typename P::Type> patch) {
  using T = typename P::Type;
  constexpr int V = kVector<T>;
  const FusionNodeParams& p = plan.p;
  for (int i = thread().x; i < kPatchPixels<P> * kVectors; i += kProductThreads) {
    const int vector = i % kVectors, pixel = i / kVectors, channel = k + vector * V;
    if (vector * V >= depth) continue;
    const int y = y0 - 1 + pixel / (kTileWidth + 2), x = x0 - 1 + pixel % (kTileWidth + 2);
    Vector<T, V> result;
    if (y < 0 || y >= level.h || x < 0 || x >= level.w || channel >= p.c) {
      EDET_UNROLL
      for (int j = 0; j < V; j++) result.value[j] = from_float<T>(0.0f);
    } else {
      float sum[V];
      for (int e = 0; e < p.edges; e++) {
        const Edge& edge = p.edge[first_edge + e];
        const T* map =
            static_cast<const T*>(edge.data) + int64_t(image) * edge.h * edge.w * p.c + channel;
        const Vector<T, V> v = sample<T, V>(
            edge, uint32_t(level.h), uint32_t(level.w), uint32_t(y), uint32_t(x),
            [&](int64_t at) { return load_pixel(map + at * p.c, p.c - channel, plan.aligned_in); });
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
    for (int j = 0; j < V; j++) result.value[j] = P::operand(sum[r][j]);
    store(a + (((y + r) * kTileWidth + x) * P::kPitchA + vector * V), result);
  }
}

// Tiles of 64 pixels need more than 32 KiB of shared memory, half of what Turing has.
template <class P>
EDET_KERNEL(kProductThreads, EDET_BLOCKS(P::kBlocks, P::kRows == 64 ? 1 : P::kBlocks))
node(EDET_PARAMS(Plan) plan) {
  using T = typename P::Type;
  const FusionNodeParams& p = plan.p;
  const int c = int(p.c), chunks = (c + kChunk<T> - 1) / kChunk<T>;
  EDET_SHARED(char, memory);
  const Memory at = memory_of<P>(p.edges, chunks, plan.resident);
  const Shared<T> patch = as<T>(memory), a = as<T>(memory + at.a), w = as<T>(memory + at.w);
  const Shared<float> dw = as<float>(memory + at.dw), factors = as<float>(memory + at.factors);
  const int n = int(block().y) * plan.columns;
  const int columns = int(p.c_out - n < plan.columns ? p.c_out - n : plan.columns);
  const int tiles = plan.first_tile[p.levels];
  bool first = true;

  for (int tile = block().x; tile < tiles; tile += grid_size().x) {
    int l = 0;
    while (tile >= plan.first_tile[l + 1]) l++;
    const NodeLevel& level = p.level[l];
    const int h = int(level.h), width = int(level.w);
    constexpr int kTileHeight = P::kRows / kTileWidth;
    const int across = (width + kTileWidth - 1) / kTileWidth;
    const int down = (h + kTileHeight - 1) / kTileHeight;
    const int local = tile - plan.first_tile[l];
    const int image = local / (across * down);
    const int y0 = local / across % down * kTileHeight, x0 = local % across * kTileWidth;

    P product;
    for (int chunk = 0; chunk < chunks; chunk++) {
      const int k = chunk * kChunk<T>;
      const int depth = round_up(min(kChunk<T>, c - k), kDepth);
      const Shared<T> weights = w + (plan.resident ? chunk * (P::kBytesW / int(sizeof(T))) : 0);
      if (first || chunks > 1) {
        EDET_LOOP
        for (int i = thread().x; i < 9 * kChunk<T>; i += kProductThreads) {
          const int tap = i / kChunk<T>, channel = i % kChunk<T>;
          const float value = k + channel < c
                                  ? load_constant<float, 1>(p.dw + tap * c + k + channel).value[0]
                                  : 0.0f;
          store(dw + (tap * kChunk<T> + float_place<T>(channel)), value);
        }
        if (thread().x < kChunk<T> && (first || p.weights.per_channel)) {
          const int channel = min(k + int(thread().x), c - 1);
          normalise(p.weights, p.edges, c, channel, factors + float_place<T>(thread().x),
                    kChunk<T>);
        }
      }
      block_barrier();
      if (first || !plan.resident) {
        load_weights<P>(p.pw, c, p.c_out, k, n, depth, columns, weights);
      }
      fuse_patch<P>(plan, level, p.levels > 1 ? l : 0, image, y0, x0, k, depth, factors, patch);
      block_barrier();
      convolve_patch<P>(patch, dw, depth, a);
      block_barrier();
      product.step(a, weights, depth, columns);
    }
    first = false;
    store_product(
        product, patch, level.scale, level.shift, n, columns, p.c_out, plan.aligned_out,
        [&](float x, int, int) { return from_float<T>(activate(x, p.post_activation)); },
        [&](int row) -> T* {
          const int y = y0 + row / kTileWidth, x = x0 + row % kTileWidth;
          if (y >= h || x >= width) return nullptr;
          return static_cast<T*>(level.out) + ((int64_t(image) * h + y) * width + x) * p.c_out;
        });
  }
}

template <class P>
Error launch_node(const FusionNodeParams& p, int64_t slices, const Device& device, Stream stream) {
  using T = typename P::Type;
  constexpr int kTileHeight = P::kRows / kTileWidth;
  Plan plan{};
  plan.p = p;
  plan.columns =
      static_cast<int>((((p.c_out + slices - 1) / slices) + kPanel - 1) / kPanel * kPanel);
  slices = (p.c_out + plan.columns - 1) / plan.columns;
  plan.aligned_in = p.c % kVector<T> == 0;
  plan.aligned_out = p.c_out % kVector<T> == 0;
  int64_t tiles = 0;
  for (int l = 0; l < p.levels; l++) {
    const NodeLevel& level = p.level[l];
    plan.first_tile[l] = static_cast<int>(tiles);
    tiles += p.n * ((level.h + kTileHeight - 1) / kTileHeight) *
             ((level.w + kTileWidth - 1) / kTileWidth);
    if (tiles > INT32_MAX) return kInvalidValue;
    plan.aligned_out = plan.aligned_out && is_aligned(level.out);
  }
  plan.first_tile[p.levels] = static_cast<int>(tiles);
  for (int e = 0; e < p.edges * p.levels; e++) {
    plan.aligned_in = plan.aligned_in && is_aligned(p.edge[e].data);
  }
  const int chunks = static_cast<int>((p.c + kChunk<T> - 1) / kChunk<T>);
  ProductGrid blocks{};
  const Error error = product_grid<P>(
      tiles, slices, device,
      [&](bool resident) { return memory_of<P>(p.edges, chunks, resident).bytes; }, &blocks);
  if (error != kSuccess) return error;
  plan.resident = blocks.resident;
  return launch(node<P>, blocks.grid, Dim3(kProductThreads), blocks.bytes, stream, plan);
}

}  // namespace

Error fusion_node(const FusionNodeParams& p, Stream stream) {
  if (p.n * p.c * p.c_out == 0) return kSuccess;
  for (int l = 0; l < p.levels; l++) {
    if (p.level[l].h > kMostSide || p.level[l].w > kMostSide) return kInvalidValue;
  }
  int64_t pixels = 0;
  for (int l = 0; l < p.levels; l++) pixels += p.n * p.level[l].h * p.level[l].w;
  return by_operand(p.dtype, p.tf32, [&](auto operand, const Device& device) {
    using Operand = typename decltype(operand)::Type;
    const ProductShape shape = product_shape<Operand>(p.c_out, device.shared_bytes);
    // Tiles of 8×8 pixels read 1.56 times their pixels, those of 4×8 1.88 times; but a map of few
    // tiles is sooner done by many blocks.
    const bool few = pixels * shape.slices < int64_t(64) * 2 * device.multiprocessors;
    return by_tiles<Operand>(shape, few, [&](auto product) {
      return launch_node<typename decltype(product)::Type>(p, shape.slices, device, stream);
    });
  });
}

}  // namespace edet::cuda
