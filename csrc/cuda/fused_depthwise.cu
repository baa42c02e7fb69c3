// The CUDA kernel for the first half of a wide fusion node, or of a wide separable convolution on
// all levels of a pyramid: fuse, activate and convolve depthwise. A product, of lateral.cu or
// gemm.cu, is the other half.
//
// Floors. Bytes: each input and the result once. The result is a map more than a node in one launch
// moves; but of many channels such a launch fuses one chunk after the other, in few blocks.
// Budget: 128 registers.
//
// A block owns a tile of 8×8 (4×8, 4×4) pixels and 128 bytes of their channels.
#include "fused_depthwise.h"

#include "node_tile.cuh"

namespace edet::cuda {
namespace {

// What the launcher adds to the op's parameters.
struct Plan {
  FusionNodeParams p;
  void* out;
  int first_tile[kMaxLevels + 1];
  int64_t first_row[kMaxLevels];  // of `out`
  int chunks;                     // of channels
  bool aligned;                   // 16 bytes of every map may be read at once
  FuseKind kind;                  // of all levels
};

// A level as its tiles see it.
struct WideNode {
  const Plan& plan;
  int level;

  EDET_DEVICE int c() const { return int(plan.p.c); }
  EDET_DEVICE int h() const { return int(plan.p.level[level].h); }
  EDET_DEVICE int w() const { return int(plan.p.level[level].w); }
  EDET_DEVICE int edges() const { return plan.p.edges; }
  EDET_DEVICE const Edge& edge(int e) const { return plan.p.edge[plan.p.levels > 1 ? level : e]; }
  EDET_DEVICE const EdgeWeights& weights() const { return plan.p.weights; }
  EDET_DEVICE Activation pre_activation() const { return plan.p.pre_activation; }
  EDET_DEVICE FuseKind kind() const { return plan.kind; }
  EDET_DEVICE bool aligned_in() const { return plan.aligned; }
};

// Tiles of 64 pixels are for many blocks, of which a multiprocessor holds three: other blocks'
// loads are on their way instead of those of a thread's next pixel, which fuse_known reads ahead
// for products of 64 columns; BlockMma, of which only the tile is used, has 128 then.
template <class Mma>
EDET_KERNEL(kProductThreads, Mma::kRows == 64 ? 3 : 2)
fuse_depthwise(EDET_PARAMS(Plan) plan) {
  using T = typename Mma::Type;
  using At = NodeMemory<Mma>;
  constexpr int V = kVector<T>;
  EDET_SHARED(char, memory);
  griddep_launch();
  const Shared<float> dw = as<float>(memory + At::kDepthwise),
                      factors = as<float>(memory + At::kFactors);
  const Shared<T> patch = as<T>(memory + At::kPatch), a = as<T>(memory + At::kLeft);
  const int all = int(block().x) / plan.chunks, k = int(block().x) % plan.chunks * kChunk<T>;
  int level = 0;
  while (all >= plan.first_tile[level + 1]) level++;
  const WideNode node{plan, level};
  const int c = node.c();
  const int depth = round_up(min(kChunk<T>, c - k), kDepth);
  const SharedTile tile(as<int>(memory + At::kTiles));
  const int number = all - plan.first_tile[level];
  const int across = divide_up(node.w(), kTileWidth<Mma>);
  const int tiles = across * divide_up(node.h(), kTileHeight<Mma>);
  const int image = number / tiles, y0 = number % tiles / across * kTileHeight<Mma>,
            x0 = number % across * kTileWidth<Mma>;
  if (thread().x == 0) tile.set({0, image, y0, x0, 0, 0});
  DepthwisePart<T> dw_part;
  dw_part.load(plan.p.dw, c, k, c % 4 == 0);
  const int t = opaque(thread().x);
  const EdgeFactors part(node.weights(), t < kChunk<T> ? node.edges() : 0, c, min(k + t, c - 1));
  if (t < kChunk<T>) part.template store_to<T>(factors + float_place<T>(t), kChunk<T>);
  dw_part.store_to(dw);
  sync_threads();
  fuse_patch<Mma>(node, tile, k, depth, factors, patch, [] { griddep_wait(); });
  sync_threads();
  convolve_patch<Mma>(patch, dw, depth, a);
  sync_threads();
  T* const out = static_cast<T*>(plan.out) +
                 (plan.first_row[level] + int64_t(image) * node.h() * node.w()) * c + k;
  for (int i = thread().x; i < Mma::kRows * kVectors; i += kProductThreads) {
    const int vector = i % kVectors, row = i / kVectors, left = c - k - vector * V;
    const int y = y0 + row / kTileWidth<Mma>, x = x0 + row % kTileWidth<Mma>;
    if (left <= 0 || y >= node.h() || x >= node.w()) continue;
    T* const to = out + int64_t(y * node.w() + x) * c + vector * V;
    const Vector<T, V> v = load<V>(a + (row * Mma::kPitchA + vector * V));
    if (c % V == 0) {
      store(to, v);
    } else {
      EDET_UNROLL
      for (int j = 0; j < V; j++)
        if (j < left) store(to + j, v.value[j]);
    }
  }
}

template <class Mma>
Error launch_tiles(const FusionNodeParams& p, void* out, Stream stream, bool pdl) {
  using T = typename Mma::Type;
  Plan plan{};
  plan.p = p;
  plan.out = out;
  plan.chunks = static_cast<int>(divide_up(p.c, kChunk<T>));
  plan.aligned = p.c % kVector<T> == 0;
  int64_t tiles = 0, row = 0;
  for (int l = 0; l < p.levels; l++) {
    const NodeLevel& level = p.level[l];
    plan.first_tile[l] = static_cast<int>(tiles);
    plan.first_row[l] = row;
    tiles += p.n * divide_up(level.h, kTileHeight<Mma>) * divide_up(level.w, kTileWidth<Mma>);
    row += p.n * level.h * level.w;
    if (tiles * plan.chunks > INT32_MAX) return kInvalidValue;
  }
  plan.first_tile[p.levels] = static_cast<int>(tiles);
  for (int e = 0; e < p.edges * p.levels; e++) {
    plan.aligned = plan.aligned && is_aligned(p.edge[e].data);
  }
  plan.kind = kind_of_levels(p, plan.aligned);
  const int64_t blocks = tiles * plan.chunks;
  return launch(fuse_depthwise<Mma>, Dim3(static_cast<unsigned>(blocks)), Dim3(kProductThreads),
                static_cast<size_t>(NodeMemory<Mma>::kOperands), stream, plan, pdl);
}

template <class T>
Error launch_type(const FusionNodeParams& p, void* out, const Device& device, Stream stream,
                  bool pdl) {
  // the smallest tiles of which all run at once: their halo costs less than waiting for a few
  const auto all_at_once = [&](int height, int width) {
    int64_t tiles = 0;
    for (int l = 0; l < p.levels; l++) {
      tiles += p.n * divide_up(p.level[l].h, height) * divide_up(p.level[l].w, width);
    }
    return tiles * divide_up(p.c, kChunk<T>) <= 2 * device.multiprocessors;
  };
  if (all_at_once(4, 4)) return launch_tiles<BlockMma<T, 0, 2>>(p, out, stream, pdl);
  if (all_at_once(4, 8)) return launch_tiles<BlockMma<T, 1, 2>>(p, out, stream, pdl);
  return launch_tiles<BlockMma<T, 2, 4>>(p, out, stream, pdl);
}

}  // namespace

Error fused_depthwise(const FusionNodeParams& p, void* out, Stream stream, bool pdl) {
  Device device;
  const Error error = current_device(&device);
  if (error != kSuccess) return error;
  switch (p.dtype) {
    case DType::f32: return launch_type<float>(p, out, device, stream, pdl);
    case DType::f16: return launch_type<f16>(p, out, device, stream, pdl);
    case DType::bf16: return launch_type<bf16>(p, out, device, stream, pdl);
  }
  return kInvalidValue;
}

}  // namespace edet::cuda
