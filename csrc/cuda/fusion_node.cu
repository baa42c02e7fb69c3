// The CUDA kernel for a fusion node: fuse, activate, depthwise 3×3, pointwise 1×1, scale, shift and
// activate in one launch; and for separable convolutions on all levels of a pyramid.
//
// Floors. Bytes: each input, the output and the weights once. Operations: 2·pixels·C·(9 + C_out).
// With 16-bit maps of 64 channels that is 37 operations a byte: bandwidth, or at batch 1, where all
// maps lie in the second-level cache, the latency of a launch. From C = 384 the weights, streamed
// once for every tile of 64 pixels, are the most bytes.
// Budget: 255 registers, tensor cores.
//
// A block owns tiles of 8×8 (or 4×8) pixels and a slice of the output channels.
#include "fusion_node.h"

#include <algorithm>

#include "fusion_node.cuh"

namespace edet::cuda {
namespace {

// What the launcher adds to the op's parameters.
struct Plan {
  FusionNodeParams p;
  int first_tile[kMaxLevels + 1];
  int columns;    // of a block
  bool resident;  // all weights of the slice stay in shared memory
  bool aligned_in, aligned_out;
};

// A level of the launch, as its tiles see it.
struct LevelNode {
  const Plan& plan;
  SharedTile tile;

  EDET_DEVICE const NodeLevel& level() const { return plan.p.level[tile.node()]; }
  EDET_DEVICE int c() const { return int(plan.p.c); }
  EDET_DEVICE int c_out() const { return int(plan.p.c_out); }
  EDET_DEVICE int h() const { return int(level().h); }
  EDET_DEVICE int w() const { return int(level().w); }
  EDET_DEVICE int edges() const { return plan.p.edges; }
  EDET_DEVICE const Edge& edge(int e) const {
    return plan.p.edge[plan.p.levels > 1 ? tile.node() : e];
  }
  EDET_DEVICE const EdgeWeights& weights() const { return plan.p.weights; }
  EDET_DEVICE Activation pre_activation() const { return plan.p.pre_activation; }
  EDET_DEVICE Activation post_activation() const { return plan.p.post_activation; }
  EDET_DEVICE const float* dw() const { return plan.p.dw; }
  EDET_DEVICE const float* pw() const { return plan.p.pw; }
  EDET_DEVICE const float* scale() const { return level().scale; }
  EDET_DEVICE const float* shift() const { return level().shift; }
  EDET_DEVICE void* out() const { return level().out; }
  EDET_DEVICE bool aligned_in() const { return plan.aligned_in; }
  EDET_DEVICE bool aligned_out() const { return plan.aligned_out; }
};

// Tiles of 64 pixels need more than 32 KiB of shared memory, half of what Turing has.
template <class P>
EDET_KERNEL(kProductThreads, EDET_BLOCKS(P::kBlocks, P::kRows == 64 ? 1 : P::kBlocks))
node(EDET_PARAMS(Plan) plan) {
  const FusionNodeParams& p = plan.p;
  EDET_SHARED(char, memory);
  bool first = true;
  int turn = 0;
  allow_next_launch();

  for (int number = block().x; number < plan.first_tile[p.levels]; number += grid_size().x) {
    const SharedTile tile(as<int>(memory + turn * 4 * SharedTile::kWords));
    if (thread().x == 0) {
      int l = 0;
      while (number >= plan.first_tile[l + 1]) l++;
      const int across = int(p.level[l].w + kTileWidth - 1) / kTileWidth;
      const int down = int(p.level[l].h + kTileHeight<P> - 1) / kTileHeight<P>;
      const int local = number - plan.first_tile[l], n = int(block().y) * plan.columns;
      tile.set({l, local / (across * down), local / across % down * kTileHeight<P>,
                local % across * kTileWidth, n, min(int(p.c_out) - n, plan.columns)});
    }
    block_barrier();
    compute_tile<P>(LevelNode{plan, tile}, tile, memory, first, plan.resident, [&] {
      if (first) await_earlier_launches();
    });
    first = false;
    turn ^= 1;
  }
}

template <class P>
Error launch_node(const FusionNodeParams& p, int64_t slices, const Device& device, Stream stream,
                  bool overtakes) {
  Plan plan{};
  plan.p = p;
  plan.columns =
      static_cast<int>((((p.c_out + slices - 1) / slices) + kPanel - 1) / kPanel * kPanel);
  slices = (p.c_out + plan.columns - 1) / plan.columns;
  constexpr int kAlign = kVector<typename P::Type>;
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  plan.aligned_in = p.c % kAlign == 0;
  plan.aligned_out = p.c_out % kAlign == 0;
  int64_t tiles = 0;
  for (int l = 0; l < p.levels; l++) {
    const NodeLevel& level = p.level[l];
    plan.first_tile[l] = static_cast<int>(tiles);
    tiles += p.n * ((level.h + kTileHeight<P> - 1) / kTileHeight<P>)*((level.w + kTileWidth - 1) /
                                                                      kTileWidth);
    if (tiles > INT32_MAX) return kInvalidValue;
    plan.aligned_out = plan.aligned_out && aligned(level.out);
  }
  plan.first_tile[p.levels] = static_cast<int>(tiles);
  for (int e = 0; e < p.edges * p.levels; e++) {
    plan.aligned_in = plan.aligned_in && aligned(p.edge[e].data);
  }
  const int chunks =
      static_cast<int>((p.c + kChunk<typename P::Type> - 1) / kChunk<typename P::Type>);
  // Weights that fit stay for all tiles of a block: they are read once per multiprocessor.
  plan.resident = NodeMemory<P>::bytes(chunks, true) <= device.shared_bytes;
  const int bytes = NodeMemory<P>::bytes(chunks, plan.resident);
  if (bytes > device.shared_bytes) return kInvalidValue;
  const int64_t held = std::max(1, std::min(P::kBlocks, device.shared_bytes / bytes));
  const int64_t blocks =
      std::min(tiles, std::max<int64_t>(1, device.multiprocessors * held / slices));
  const Dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(slices));
  return launch(node<P>, grid, Dim3(kProductThreads), static_cast<size_t>(bytes), stream, plan,
                overtakes);
}

// Tiles of 8×8 pixels read 1.56 times their pixels, those of 4×8 1.88 times; but a narrow map of
// few tiles is sooner done by many blocks (a wide one streams its weights for every tile).
template <class T, int kTilesN>
Error launch_columns(const FusionNodeParams& p, int64_t slices, const Device& device, Stream stream,
                     bool overtakes) {
  if constexpr (kTilesN <= 4) {
    int64_t pixels = 0;
    for (int l = 0; l < p.levels; l++) pixels += p.n * p.level[l].h * p.level[l].w;
    if (pixels * slices < int64_t(64) * 2 * device.multiprocessors) {
      return launch_node<Product<T, 1, kTilesN>>(p, slices, device, stream, overtakes);
    }
  }
  return launch_node<Product<T, 2, kTilesN>>(p, slices, device, stream, overtakes);
}

template <class T>
Error launch_type(const FusionNodeParams& p, Stream stream, bool overtakes) {
  Device device;
  const Error error = current_device(&device);
  if (error != kSuccess) return error;
  const ProductShape shape = product_shape(sizeof(T) == 2, p.c_out, device.shared_bytes);
  switch (shape.tiles_n) {
    case 2: return launch_columns<T, 2>(p, shape.slices, device, stream, overtakes);
    case 4: return launch_columns<T, 4>(p, shape.slices, device, stream, overtakes);
  }
  if constexpr (sizeof(T) == 2) {
    if (shape.tiles_n == 8) return launch_columns<T, 8>(p, shape.slices, device, stream, overtakes);
    return launch_columns<T, 12>(p, shape.slices, device, stream, overtakes);
  }
  return kInvalidValue;
}

}  // namespace

Error fusion_node(const FusionNodeParams& p, Stream stream, bool overtakes) {
  if (p.n * p.c * p.c_out == 0) return kSuccess;
  for (int l = 0; l < p.levels; l++) {
    if (p.level[l].h > kMostSide || p.level[l].w > kMostSide) return kInvalidValue;
  }
  switch (p.dtype) {
    case DType::f32: return launch_type<float>(p, stream, overtakes);
    case DType::f16: return launch_type<f16>(p, stream, overtakes);
    case DType::bf16: return launch_type<bf16>(p, stream, overtakes);
  }
  return kInvalidValue;
}

}  // namespace edet::cuda
