// The CUDA kernel for a graph of fusion nodes in one launch, all cells of a BiFPN or all layers of
// heads; and the launch of the same graph node by node.
//
// Floors. At batch 1 the maps lie in the second-level cache and the least is latency: the longest
// chain of tiles that need each other, where node launches add a gap for each node. At large
// batches it is the bytes of every node, as in fusion_node.cu.
// Budget: 255 registers, tensor cores.
//
// Blocks claim tiles in the order of core/tile_schedule.h by an atomic counter. A tile's sources
// were claimed before it, by blocks that run: whatever the number of blocks at a time, the first
// tile that is not done can always be done, and nothing waits forever. A block loads a tile's
// weights, waits for the tiles that the tile's halo touches, computes it as fusion_node.cu does,
// and releases its flag. The flags, zero before, are of the call, so that calls may overlap.
#include "bifpn.h"

#include <algorithm>

#include "fused_depthwise.h"
#include "gemm.h"
#include "lateral.h"
#include "narrow_node.h"
#include "node_tile.cuh"

namespace edet::cuda {
namespace {

constexpr int kMostLayers = 16;

// From compute capability `capability` on and for graphs whose maps take `most_bytes` at most, the
// first rule that fits. Measured on an H100 (docs/cuda.md), where pdl is the fastest; before 9.0
// what the gauge predicts (docs/gpu-model.md), of the ways that need no forward progress of other
// blocks.
struct LaunchRule {
  int capability;
  int64_t most_bytes;
  GraphLaunch launch;
};
constexpr LaunchRule kLaunchRules[] = {{90, INT64_MAX, GraphLaunch::pdl},
                                       {0, INT64_MAX, GraphLaunch::nodes}};

// A layer as a block sees it.
struct Layer {
  const float *dw, *pw, *scale, *shift;
  int c, c_out, columns;  // columns: of a slice
  Activation post_activation;
  bool shared, aligned_out;
};

struct Plan {
  TileGraph g;
  void* map[kMostMaps];
  Layer layer[kMostLayers];
  uint8_t node_layer[kMostNodes], node_row[kMostNodes];
  FuseKind node_kind[kMostNodes];
  EdgeWeights weights;
  int weights_pitch;
  Activation pre_activation;
  int chunks;  // of the widest layer's input
  bool resident, aligned_in;
  uint32_t *claimed, *flags;
  Overdue overdue;
};
static_assert(sizeof(Plan) <= 4096, "kernels have 4 KiB of parameters before CUDA 12.1");

// A node of the graph, as its tiles see it.
struct PlanNode {
  const Plan& plan;
  SharedTile tile;

  EDET_DEVICE int node() const { return tile.node(); }
  EDET_DEVICE int row() const { return plan.node_row[node()]; }
  EDET_DEVICE int map() const { return plan.g.inputs + node(); }
  EDET_DEVICE const Layer& layer() const { return plan.layer[plan.node_layer[node()]]; }
  EDET_DEVICE int c() const { return layer().c; }
  EDET_DEVICE int c_out() const { return layer().c_out; }
  EDET_DEVICE int h() const { return plan.g.h[map()]; }
  EDET_DEVICE int w() const { return plan.g.w[map()]; }
  EDET_DEVICE int edges() const {
    return plan.g.first_edge[node() + 1] - plan.g.first_edge[node()];
  }
  EDET_DEVICE Edge edge(int e) const {
    const GraphEdge& from = plan.g.edge[plan.g.first_edge[node()] + e];
    Edge edge;
    edge.data = plan.map[from.source];
    edge.h = plan.g.h[from.source];
    edge.w = plan.g.w[from.source];
    edge.resize = edge.h == h() && edge.w == w()    ? Resize::none
                  : is_pooled(plan.g, node(), from) ? Resize::max_pool
                                                    : Resize::nearest;
    edge.rows = {from.stride_y + 1, from.stride_y, from.before_y};
    edge.columns = {from.stride_x + 1, from.stride_x, from.before_x};
    return edge;
  }
  EDET_DEVICE EdgeWeights weights() const {
    return {plan.weights.fusion, plan.weights.values + row() * plan.weights_pitch,
            plan.weights.per_channel};
  }
  EDET_DEVICE Activation pre_activation() const { return plan.pre_activation; }
  EDET_DEVICE Activation post_activation() const { return layer().post_activation; }
  EDET_DEVICE FuseKind kind() const { return plan.node_kind[node()]; }
  EDET_DEVICE const float* dw() const {
    return layer().dw + (layer().shared ? 0 : row() * 9 * c());
  }
  EDET_DEVICE const float* pw() const {
    const int floats = round_up(c_out(), kPanel) * c();
    return layer().pw + (layer().shared ? 0 : int64_t(row()) * floats);
  }
  EDET_DEVICE const float* scale() const { return layer().scale + row() * c_out(); }
  EDET_DEVICE const float* shift() const { return layer().shift + row() * c_out(); }
  EDET_DEVICE void* out() const { return plan.map[map()]; }
  EDET_DEVICE bool aligned_in() const { return plan.aligned_in; }
  EDET_DEVICE bool aligned_out() const { return layer().aligned_out; }
};

template <class Mma>
EDET_DEVICE GraphTile place_of(const SharedTile& tile) {
  return {tile.node(), tile.image(), tile.y0() / kTileHeight<Mma>, tile.x0() / kTileWidth<Mma>, 0};
}

// Waits, the block's threads side by side, for all tiles that this one reads.
template <class Mma>
EDET_DEVICE void await_sources(const Plan& plan, const SharedTile& shared) {
  const TileGraph& g = plan.g;
  const GraphTile tile = place_of<Mma>(shared);
  const int first = g.first_edge[tile.node];
  for (int e = first; e < g.first_edge[tile.node + 1]; e++) {
    if (g.edge[e].source < g.inputs) continue;
    const TileRange r = tiles_read(g, tile, e);
    const int across = r.column1 - r.column0, count = (r.row1 - r.row0) * across;
    // each edge begins with another warp
    const int begin = (int(thread().x) + kProductThreads - (e - first) * kWarp % kProductThreads) %
                      kProductThreads;
    for (int i = begin; i < count; i += kProductThreads) {
      const int flag = flag_of(g, r.node, r.image, r.row0 + i / across, r.column0 + i % across);
      const int number = flag_of(g, tile.node, tile.image, tile.row, tile.column);
      const Flag wanted{plan.flags + flag, g.slices[r.node], number, tile.node, flag};
      await_flag(wanted, plan.overdue);
    }
  }
  sync_threads();
}

// What a block does for a claimed number, by one of its threads; no node is left after the last.
template <class Mma>
EDET_DEVICE void set_tile(const Plan& plan, int number, const SharedTile& tile) {
  if (number >= plan.g.first_tile[plan.g.nodes]) return tile.set({-1, 0, 0, 0, 0, 0});
  const GraphTile t = tile_at(plan.g, number);
  const Layer& layer = plan.layer[plan.node_layer[t.node]];
  const int n = t.slice * layer.columns;
  tile.set({t.node, t.image, t.row * kTileHeight<Mma>, t.column * kTileWidth<Mma>, n,
            min(layer.c_out - n, layer.columns)});
}

// Tiles of 64 pixels need more than 32 KiB of shared memory, half of what Turing has; with 128
// columns they need more than 128 registers.
template <class Mma>
constexpr int kGraphBlocks = Mma::kRows == 64 && Mma::kColumns == 128 ? 1 : Mma::kBlocks;
template <class Mma>
EDET_KERNEL(kProductThreads, EDET_BLOCKS(kGraphBlocks<Mma>, Mma::kRows == 64 ? 1 : Mma::kBlocks))
bifpn(EDET_PARAMS(Plan) plan) {
  EDET_SHARED(char, memory);
  const auto tile_of = [&](int turn) {
    return SharedTile(as<int>(memory + turn * 4 * SharedTile::kWords));
  };
  if (thread().x == 0) set_tile<Mma>(plan, int(atomic_add(plan.claimed, 1u)), tile_of(0));
  sync_threads();
  int turn = 0, loaded = -1;  // loaded: whose weights are in shared memory

  while (tile_of(turn).node() >= 0) {
    const SharedTile tile = tile_of(turn);
    const PlanNode node{plan, tile};
    int next = 0;
    if (thread().x == 0) next = int(atomic_add(plan.claimed, 1u));  // it comes while weights do
    const int weights =
        (node.layer().shared ? kMostNodes + plan.node_layer[node.node()] : node.node()) << 16 |
        tile.n();
    compute_tile<Mma>(node, tile, memory, weights != loaded, plan.resident, [&] {
      if (thread().x == 0) set_tile<Mma>(plan, next, tile_of(turn ^ 1));
      await_sources<Mma>(plan, tile);
    });
    loaded = weights;
    sync_threads();  // all of the tile is stored
    if (thread().x == 0) {
      const GraphTile done = place_of<Mma>(tile);
      add_release(plan.flags + flag_of(plan.g, done.node, done.image, done.row, done.column), 1u);
    }
    turn ^= 1;
  }
}

// ---- one launch ----

// A layer much wider than its input, such as a head's prediction, is cut into slices: a block as
// wide as that would leave the other layers few registers.
int64_t block_columns(const NodeParams& node) {
  return std::min(node.c_out, std::max<int64_t>(128, node.fusion.c));
}

struct Slices {
  int64_t columns, count;
};
Slices slices_of(const NodeParams& node, int tiles_n) {
  const int64_t least = divide_up(node.c_out, 32 * tiles_n);
  const int64_t columns = round_up(divide_up(node.c_out, least), kPanel);
  return {columns, divide_up(node.c_out, columns)};
}

// Whether one launch can hold the graph; then its tiles.
template <class Operand>
bool cut(const NodeGraph& graph, const Device& device, GraphPlan* plan) {
  int64_t widest = 0, pixels = 0;
  for (const NodeParams& node : graph.nodes) {
    if (node.layer >= kMostLayers || node.row > UINT8_MAX) return false;
    widest = std::max(widest, block_columns(node));
  }
  plan->tiles_n = product_shape<Operand>(widest, device.shared_bytes).tiles_n;
  for (const NodeParams& node : graph.nodes) {
    const FusionParams& fusion = node.fusion;
    pixels =
        std::max(pixels, fusion.n * fusion.h * fusion.w * slices_of(node, plan->tiles_n).count);
  }
  // as for a single node: small tiles where the largest node has few
  plan->tiles_m = plan->tiles_n <= 4 && pixels < int64_t(64) * 2 * device.multiprocessors ? 1 : 2;
  plan->tiles = empty_graph(graph.nodes[0].fusion.n, 32 * plan->tiles_m / kTileColumns);
  for (const InputMap& map : graph.inputs) {
    if (!add_input(plan->tiles, map.h, map.w)) return false;
  }
  for (const NodeParams& node : graph.nodes) {
    const FusionParams& fusion = node.fusion;
    int sources[kMaxEdges];
    for (int e = 0; e < fusion.edges; e++) {
      const int source = fusion.edge[e].source;
      sources[e] = source < 0 ? -1 - source : plan->tiles.inputs + source;
    }
    if (!add_node(plan->tiles, fusion.h, fusion.w, sources, fusion.edges, graph.pool,
                  slices_of(node, plan->tiles_n).count))
      return false;
  }
  plan->workspace = (plan->tiles.first_tile[plan->tiles.nodes] + 4) * int64_t(sizeof(uint32_t));
  return true;
}

template <class Mma>
Error launch_graph(const NodeGraph& graph, const GraphPlan& cut_plan, const Device& device,
                   void* workspace, double seconds, Stream stream) {
  using T = typename Mma::Type;
  Plan plan{};
  plan.g = cut_plan.tiles;
  const int tiles = plan.g.first_tile[plan.g.nodes];
  bool aligned_maps = true;
  void** map = plan.map;
  for (const InputMap& input : graph.inputs) *map++ = const_cast<void*>(input.data);
  for (const NodeParams& node : graph.nodes) *map++ = node.out;
  for (const void* const* m = plan.map; m < map; m++) aligned_maps = aligned_maps && is_aligned(*m);
  plan.aligned_in = aligned_maps;
  plan.weights = graph.nodes[0].fusion.weights;
  plan.pre_activation = graph.nodes[0].fusion.activation;
  for (size_t i = 0; i < graph.nodes.size(); i++) {
    const NodeParams& node = graph.nodes[i];
    const int64_t c = node.fusion.c;
    Layer& layer = plan.layer[node.layer];
    plan.node_layer[i] = static_cast<uint8_t>(node.layer);
    plan.node_row[i] = static_cast<uint8_t>(node.row);
    if (node.row == 0) {
      layer = {node.dw,
               node.pw,
               node.scale,
               node.shift,
               static_cast<int>(c),
               static_cast<int>(node.c_out),
               static_cast<int>(slices_of(node, Mma::kColumns / 32).columns),
               node.activation,
               false,
               aligned_maps && node.c_out % kVector<T> == 0};
    } else {
      layer.shared = node.dw == layer.dw;
    }
    if (node.row == 1 && plan.weights.values)
      plan.weights_pitch = static_cast<int>(node.fusion.weights.values - plan.weights.values);
    plan.aligned_in = plan.aligned_in && c % kVector<T> == 0;
    plan.chunks = std::max(plan.chunks, static_cast<int>(divide_up(c, kChunk<T>)));
  }
  for (size_t i = 0; i < graph.nodes.size(); i++) {  // whose layers are all known
    const FusionParams& fusion = graph.nodes[i].fusion;
    plan.node_kind[i] = fuse_kind(fusion.dtype, plan.aligned_in, fusion.weights, fusion.activation,
                                  fusion.edge, fusion.edges, fusion.c, fusion.h, fusion.w);
  }
  plan.claimed = static_cast<uint32_t*>(workspace);
  plan.flags = plan.claimed + 4;
  plan.overdue.nanoseconds = static_cast<uint64_t>(seconds * 1e9);
  Error error = overdue_report(&plan.overdue.report);
  if (error == kSuccess) {
    error = clear(workspace, static_cast<size_t>(cut_plan.workspace), stream);
  }
  if (error != kSuccess) return error;
  ProductGrid blocks{};
  error = product_grid<Mma>(
      tiles, 1, device,
      [&](bool resident) { return NodeMemory<Mma>::bytes(plan.chunks, resident); }, &blocks);
  if (error != kSuccess) return error;
  plan.resident = blocks.resident;
  return launch(bifpn<Mma>, blocks.grid, Dim3(kProductThreads), static_cast<size_t>(blocks.bytes),
                stream, plan);
}

// ---- a launch for each node ----

// Whether a node can be a level of the launch of the nodes from `first` on: a layer's nodes that
// share its weights and whose only input is a map of their size that none of them computes.
bool is_level(const NodeGraph& graph, size_t first, size_t node) {
  const NodeParams &a = graph.nodes[first], &b = graph.nodes[node];
  const Edge& edge = b.fusion.edge[0];
  return b.layer == a.layer && b.dw == a.dw && b.fusion.edges == 1 && edge.resize == Resize::none &&
         edge.source < static_cast<int>(first);
}

// Nodes that are one launch, or two: a node, or the nodes of a layer of a head.
struct Group {
  size_t begin, end;
  int64_t rows;  // pixels of all its maps

  const NodeParams& node(const NodeGraph& graph) const { return graph.nodes[begin]; }
};
std::vector<Group> groups_of(const NodeGraph& graph) {
  std::vector<Group> groups;
  for (size_t i = 0; i < graph.nodes.size();) {
    Group group{i, i, 0};
    const bool levels = is_level(graph, i, i);
    for (; group.end < graph.nodes.size(); group.end++) {
      const size_t count = group.end - i;
      if (count > 0 && (!levels || count == kMaxLevels || !is_level(graph, i, group.end))) break;
      const FusionParams& fusion = graph.nodes[group.end].fusion;
      group.rows += fusion.n * fusion.h * fusion.w;
    }
    groups.push_back(group);
    i = group.end;
  }
  return groups;
}

// A node of more channels than kWide, or a layer much wider than its input that has many pixels, is
// two launches: one fuses and convolves depthwise, with a block for each chunk of channels of a
// tile, one multiplies. In one launch a block takes a tile's chunks one after the other, or
// convolves the same pixels for each slice of columns, and its registers and weights leave a
// multiprocessor no second block to hide that. The product is gemm's where that pays, else
// project's, which activates nothing.
constexpr int64_t kWide = 128;
bool by_gemm(const NodeGraph& graph, const Group& group) {
  const NodeParams& node = group.node(graph);
  const bool wide = node.fusion.c > kWide || node.c_out > 4 * node.fusion.c;
  return wide && gemm_pays(node.fusion.dtype, group.rows, node.fusion.c, node.c_out, 0);
}
bool is_wide(const NodeGraph& graph, const Group& group) {
  const NodeParams& node = group.node(graph);
  if (by_gemm(graph, group)) return true;
  return group.end - group.begin == 1 && node.fusion.c > kWide &&
         node.activation == Activation::none;
}

// Memory of a graph's wide groups: what goes from the first launch to the second, and weights as
// gemm reads them.
struct WideMemory {
  int64_t weights = 0, bytes = 0;   // weights: where they begin
  std::vector<GemmWeights> packed;  // `to` is an offset from there
  std::vector<int> of_group;        // whose weights they are; −1 for none
};
WideMemory wide_memory(const NodeGraph& graph, const std::vector<Group>& groups) {
  WideMemory memory;
  int64_t next = 0;
  for (const Group& group : groups) {
    const NodeParams& node = group.node(graph);
    memory.of_group.push_back(-1);
    if (!is_wide(graph, group)) continue;
    const int64_t element = node.fusion.dtype == DType::f32 ? 4 : 2;
    memory.weights =
        std::max(memory.weights, round_up(group.rows * node.fusion.c * element, int64_t(256)));
    if (!by_gemm(graph, group)) continue;
    memory.of_group.back() = static_cast<int>(memory.packed.size());
    memory.packed.push_back({node.pw, node.fusion.c, node.c_out, reinterpret_cast<void*>(next)});
    next += round_up(gemm_weight_bytes(node.fusion.c, node.c_out), int64_t(256));
  }
  memory.bytes = memory.weights + next;
  return memory;
}

// The two launches of a wide group; `between` is memory for what goes from the first to the second,
// `weights` those of gemm, or null.
Error launch_wide(const FusionNodeParams& p, void* between, const void* weights, bool pdl,
                  bool overlaps, Stream stream) {
  const Error error = fused_depthwise(p, between, stream, overlaps);
  if (error != kSuccess) return error;
  if (weights) {
    GemmParams to{};
    to.dtype = p.dtype;
    to.k = p.c, to.n = p.c_out;
    to.w = weights;
    to.activation = p.post_activation;
    to.levels = p.levels;
    const char* from = static_cast<const char*>(between);
    for (int l = 0; l < p.levels; l++) {
      const NodeLevel& level = p.level[l];
      const int64_t rows = p.n * level.h * level.w;
      to.level[l] = {from, rows, level.scale, level.shift, level.out};
      from += rows * p.c * 2;
    }
    return gemm(to, stream, pdl);
  }
  const NodeLevel& level = p.level[0];
  ProjectionParams to{};
  to.dtype = p.dtype;
  to.tf32 = p.tf32;
  to.input = between;
  to.image_rows = level.h * level.w;
  to.rows = p.n * to.image_rows;
  to.c_in = p.c;
  to.projections = 1;
  to.projection[0] = {p.pw, level.scale, level.shift, p.c_out, level.out};
  return project(to, stream, pdl);
}

// What one launch computes.
FusionNodeParams params_of(const NodeGraph& graph, const Group& group) {
  const NodeParams& node = group.node(graph);
  FusionNodeParams p{};
  p.dtype = node.fusion.dtype;
  p.tf32 = graph.tf32;
  p.pre_activation = node.fusion.activation;
  p.post_activation = node.activation;
  p.n = node.fusion.n, p.c = node.fusion.c, p.c_out = node.c_out;
  p.edges = node.fusion.edges;
  p.weights = node.fusion.weights;
  p.dw = node.dw;
  p.pw = node.pw;
  for (size_t member = group.begin; member < group.end; member++) {
    const NodeParams& level = graph.nodes[member];
    for (int e = 0; e < level.fusion.edges; e++) {
      p.edge[p.levels + e] = level.fusion.edge[e];
      p.edge[p.levels + e].source = 0;  // of the graph; nodes alike have parameters alike
    }
    p.level[p.levels++] = {level.fusion.h, level.fusion.w, level.scale, level.shift, level.out};
  }
  return p;
}

Error launch_nodes(const NodeGraph& graph, bool pdl, void* workspace, Stream stream) {
  const std::vector<Group> groups = groups_of(graph);
  WideMemory memory = wide_memory(graph, groups);
  char* const weights = static_cast<char*>(workspace) + memory.weights;
  for (GemmWeights& w : memory.packed) w.to = weights + reinterpret_cast<intptr_t>(w.to);
  for (size_t i = 0; i < memory.packed.size(); i += kMostGemmWeights) {
    const int count =
        static_cast<int>(std::min<size_t>(memory.packed.size() - i, kMostGemmWeights));
    const Error error =
        pack_weights(graph.nodes[0].fusion.dtype, &memory.packed[i], count, stream, pdl && i > 0);
    if (error != kSuccess) return error;
  }
  bool first = memory.packed.empty();  // of the call's launches
  for (size_t i = 0; i < groups.size(); i++) {
    const Group& group = groups[i];
    const FusionNodeParams p = params_of(graph, group);
    const int which = memory.of_group[i];
    const void* const packed = which < 0 ? nullptr : memory.packed[static_cast<size_t>(which)].to;
    const Error error = is_wide(graph, group)
                            ? launch_wide(p, workspace, packed, pdl, pdl && !first, stream)
                            : fusion_node(p, stream, pdl && !first);
    if (error != kSuccess) return error;
    first = false;
  }
  return kSuccess;
}

// Whether launches of nodes would compute one by another kernel than one launch of all: results are
// the same in any case.
bool has_narrow_node(const NodeGraph& graph, const Device& device) {
  const std::vector<Group> groups = groups_of(graph);
  return std::any_of(groups.begin(), groups.end(), [&](const Group& group) {
    return !is_wide(graph, group) && is_narrow_node(params_of(graph, group), device.capability);
  });
}

}  // namespace

Error plan_graph(const NodeGraph& graph, const GraphLaunch* wanted, GraphPlan* plan) {
  const FusionParams& first = graph.nodes[0].fusion;
  return by_operand(first.dtype, graph.tf32, [&](auto operand, const Device& device) {
    if (wanted) {
      plan->launch = *wanted;
    } else {
      int64_t numbers = 0;
      for (const InputMap& map : graph.inputs) numbers += first.n * map.h * map.w * first.c;
      for (const NodeParams& node : graph.nodes)
        numbers += first.n * node.fusion.h * node.fusion.w * node.c_out;
      const int64_t bytes = numbers * (first.dtype == DType::f32 ? 4 : 2);
      for (const LaunchRule& rule : kLaunchRules) {
        plan->launch = rule.launch;
        if (device.capability >= rule.capability && bytes <= rule.most_bytes) break;
      }
    }
    plan->workspace = 0;
    const bool possible = plan->launch == GraphLaunch::pdl ? device.capability >= 90
                          : plan->launch == GraphLaunch::persistent
                              ? !has_narrow_node(graph, device) &&
                                    cut<typename decltype(operand)::Type>(graph, device, plan)
                              : true;
    if (!possible) plan->launch = GraphLaunch::nodes;
    if (plan->launch != GraphLaunch::persistent) {
      plan->workspace = wide_memory(graph, groups_of(graph)).bytes;
    }
    return kSuccess;
  });
}

Error run_graph(const NodeGraph& graph, const GraphPlan& plan, void* workspace, double seconds,
                Stream stream) {
  const FusionParams& first = graph.nodes[0].fusion;
  if (first.n == 0) return kSuccess;
  if (plan.launch != GraphLaunch::persistent) {
    return launch_nodes(graph, plan.launch == GraphLaunch::pdl, workspace, stream);
  }
  return by_operand(first.dtype, graph.tf32, [&](auto operand, const Device& device) {
    using Operand = typename decltype(operand)::Type;
    return by_tiles<Operand>({plan.tiles_n, 1}, 32 * plan.tiles_m, [&](auto mma) -> Error {
      using Mma = typename decltype(mma)::Type;
      if constexpr (Mma::kRows == 16) {
        return kInvalidValue;  // tiles of a schedule have 8 columns
      } else {
        return launch_graph<Mma>(graph, plan, device, workspace, seconds, stream);
      }
    });
  });
}

std::string overdue_text() {
  OverdueReport* r = nullptr;
  if (overdue_report(&r) != kSuccess || !r->reported) return {};
  return "tile " + std::to_string(r->tile) + " of node " + std::to_string(r->node) +
         " waited in vain for flag " + std::to_string(r->flag) + " to become " +
         std::to_string(r->value) + "; it was " + std::to_string(r->found);
}

}  // namespace edet::cuda
