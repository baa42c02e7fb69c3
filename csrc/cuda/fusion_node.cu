// The CUDA kernel for a fusion node: fuse, activate, depthwise 3×3, pointwise 1×1, scale, shift and
// activate in one launch; and for separable convolutions on all levels of a pyramid.
//
// Floors. Bytes: each input, the output and the weights once. Operations: 2·pixels·C·(9 + C_out).
// With 16-bit maps of 64 channels that is 37 operations a byte: bandwidth, or at batch 1, where all
// maps lie in the second-level cache, the latency of a launch. From C = 384 the weights, streamed
// once for every tile of 64 pixels, are the most bytes.
// Budget: 255 registers, tensor cores.
//
// A block owns tiles of 8×8 (4×8, 4×4) pixels and a slice of the output channels.
#include "fusion_node.h"

#include "narrow_node.h"
#include "node_tile.cuh"

namespace edet::cuda {
namespace {

// What the launcher adds to the op's parameters.
struct Plan {
  FusionNodeParams p;
  int first_tile[kMaxLevels + 1];
  int columns;    // of a block
  bool resident;  // all weights of the slice stay in shared memory
  bool aligned_in, aligned_out;
  FuseKind kind;  // of all levels
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
  EDET_DEVICE FuseKind kind() const { return plan.kind; }
  EDET_DEVICE const float* dw() const { return plan.p.dw; }
  EDET_DEVICE const float* pw() const { return plan.p.pw; }
  EDET_DEVICE const float* scale() const { return level().scale; }
  EDET_DEVICE const float* shift() const { return level().shift; }
  EDET_DEVICE void* out() const { return level().out; }
  EDET_DEVICE bool aligned_in() const { return plan.aligned_in; }
  EDET_DEVICE bool aligned_out() const { return plan.aligned_out; }
};

// Tiles of 64 pixels need more than 32 KiB of shared memory, half of what Turing has.
template <class Mma>
EDET_KERNEL(kProductThreads, EDET_BLOCKS(Mma::kBlocks, Mma::kRows == 64 ? 1 : Mma::kBlocks))
node(EDET_PARAMS(Plan) plan) {
  const FusionNodeParams& p = plan.p;
  EDET_SHARED(char, memory);
  bool first = true;
  int turn = 0;
  griddep_launch();

  for (int number = block().x; number < plan.first_tile[p.levels]; number += grid_size().x) {
    const SharedTile tile(as<int>(memory + turn * 4 * SharedTile::kWords));
    if (thread().x == 0) {
      int l = 0;
      while (number >= plan.first_tile[l + 1]) l++;
      const int across = divide_up(int(p.level[l].w), kTileWidth<Mma>);
      const int down = divide_up(int(p.level[l].h), kTileHeight<Mma>);
      const int local = number - plan.first_tile[l], n = int(block().y) * plan.columns;
      tile.set({l, local / (across * down), local / across % down * kTileHeight<Mma>,
                local % across * kTileWidth<Mma>, n, min(int(p.c_out) - n, plan.columns)});
    }
    sync_threads();
    compute_tile<Mma>(LevelNode{plan, tile}, tile, memory, first, plan.resident, [&] {
      if (first) griddep_wait();
    });
    first = false;
    turn ^= 1;
  }
}

template <class Mma>
Error launch_node(const FusionNodeParams& p, int64_t slices, const Device& device, Stream stream,
                  bool pdl) {
  Plan plan{};
  plan.p = p;
  plan.columns = static_cast<int>(round_up(divide_up(p.c_out, slices), kPanel));
  slices = divide_up(p.c_out, plan.columns);
  using T = typename Mma::Type;
  plan.aligned_in = p.c % kVector<T> == 0;
  plan.aligned_out = p.c_out % kVector<T> == 0;
  int64_t tiles = 0;
  for (int l = 0; l < p.levels; l++) {
    const NodeLevel& level = p.level[l];
    plan.first_tile[l] = static_cast<int>(tiles);
    tiles += p.n * divide_up(level.h, kTileHeight<Mma>) * divide_up(level.w, kTileWidth<Mma>);
    if (tiles > INT32_MAX) return kInvalidValue;
    plan.aligned_out = plan.aligned_out && is_aligned(level.out);
  }
  plan.first_tile[p.levels] = static_cast<int>(tiles);
  for (int e = 0; e < p.edges * p.levels; e++) {
    plan.aligned_in = plan.aligned_in && is_aligned(p.edge[e].data);
  }
  plan.kind = kind_of_levels(p, plan.aligned_in);
  const int chunks = static_cast<int>(divide_up(p.c, kChunk<T>));
  ProductGrid blocks{};
  const Error error = product_grid<Mma>(
      tiles, slices, device,
      [&](bool resident) { return NodeMemory<Mma>::bytes(chunks, resident); }, &blocks);
  if (error != kSuccess) return error;
  plan.resident = blocks.resident;
  return launch(node<Mma>, blocks.grid, Dim3(kProductThreads), static_cast<size_t>(blocks.bytes),
                stream, plan, pdl);
}

}  // namespace

Error fusion_node(const FusionNodeParams& p, Stream stream, bool pdl) {
  if (p.n * p.c * p.c_out == 0) return kSuccess;
  for (int l = 0; l < p.levels; l++) {
    if (p.level[l].h > kMostSide || p.level[l].w > kMostSide) return kInvalidValue;
  }
  int64_t pixels = 0;
  for (int l = 0; l < p.levels; l++) pixels += p.n * p.level[l].h * p.level[l].w;
  return by_operand(p.dtype, p.tf32, [&](auto operand, const Device& device) {
    using Operand = typename decltype(operand)::Type;
    if (is_narrow_node(p, device.capability)) return narrow_node(p, stream, pdl);
    // a layer much wider than its input, such as a head's prediction: many blocks with few columns
    const bool wide = p.c_out > 2 * std::max<int64_t>(64, p.c);
    const ProductShape shape = wide ? ProductShape{4, divide_up(p.c_out, int64_t(128))}
                                    : product_shape<Operand>(p.c_out, device.shared_bytes);
    // Tiles of 8×8 pixels read 1.56 times their pixels, those of 4×8 1.88 and of 4×4 2.25 times;
    // but a map of few tiles is sooner done by many blocks.
    const int64_t work = pixels * shape.slices;
    const int rows = work >= int64_t(64) * 2 * device.multiprocessors ? 64
                     : work > int64_t(16) * device.multiprocessors    ? 32
                                                                      : 16;
    return by_tiles<Operand>(shape, rows, [&](auto mma) {
      using Mma = typename decltype(mma)::Type;
      return launch_node<Mma>(p, shape.slices, device, stream, pdl);
    });
  });
}

}  // namespace edet::cuda
