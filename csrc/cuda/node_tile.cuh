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

// Tiles of pixels: 8×8, 4×8 or 4×4.
template <class Mma>
constexpr int kTileWidth = Mma::kRows == 16 ? 4 : 8;
template <class Mma>
constexpr int kTileHeight = Mma::kRows / kTileWidth<Mma>;

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
constexpr int kPatchPixels = (kTileHeight<Mma> + 2) * (kTileWidth<Mma> + 2);

// Where a block's shared memory holds what, in bytes: tiles, depthwise weights, factors of the
// edges, scales and shifts, the patch, the product's left operand, its weights. All but one are
// known when it is compiled.
template <class Mma>
struct NodeMemory {
  static constexpr int kFloats = 4 * kChunk<typename Mma::Type>;
  static constexpr int kTiles = 0;  // two, one while the other may still be read
  static constexpr int kDepthwise = kTiles + 2 * 4 * SharedTile::kWords;
  static constexpr int kFactors = kDepthwise + 9 * kFloats;
  static constexpr int kAffine = kFactors + kMaxEdges * kFloats;
  static constexpr int kPatch = kAffine + 2 * 4 * Mma::kColumns;
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

// Factors of a chunk's channels are kept in groups of 4, so that 8 lanes, each in need of V
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

// What a thread brings of the depthwise weights of a chunk, from channel k on, to shared memory:
// read during the product of the chunk before, and stored when it is over.
template <class T>
class DepthwisePart {
 public:
  // `aligned`: 16 bytes may be read at once.
  EDET_DEVICE void load(const float* from, int c, int k, bool aligned) {
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) {
      const int i = opaque(thread().x) + j * kProductThreads;
      if (i < 9 * kFours) v_[j] = read(from + i / kFours * c, c, k + i % kFours * 4, aligned);
    }
  }
  EDET_DEVICE void store_to(Shared<float> dw) const {
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) {
      const int i = opaque(thread().x) + j * kProductThreads;
      if (i >= 9 * kFours) continue;
      store(dw + i * 4, v_[j]);
    }
  }

 private:
  static constexpr int kFours = kChunk<T> / 4, kParts = divide_up(9 * kFours, kProductThreads);

  static EDET_DEVICE Vector<float, 4> read(const float* row, int c, int channel, bool aligned) {
    Vector<float, 4> v{};
    if (aligned && channel < c) return load_constant<float, 4>(row + channel);
    EDET_UNROLL
    for (int i = 0; i < 4; i++)
      if (channel + i < c) v.value[i] = load_constant<float, 1>(row + channel + i).value[0];
    return v;
  }

  Vector<float, 4> v_[kParts];
};

// Scales and shifts of a tile's columns, in the same way.
template <class Mma>
class AffinePart {
 public:
  EDET_DEVICE AffinePart(const float* scale, const float* shift, int n, int columns, int c_out) {
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) {
      const int column = opaque(thread().x) + j * kProductThreads;
      const bool real = column < columns && n + column < c_out;
      scale_[j] = real ? load_constant<float, 1>(scale + n + column).value[0] : 0.0f;
      shift_[j] = real ? load_constant<float, 1>(shift + n + column).value[0] : 0.0f;
    }
  }
  EDET_DEVICE void store_to(Shared<float> affine) const {
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) {
      const int column = opaque(thread().x) + j * kProductThreads;
      if (column >= Mma::kColumns) continue;
      store(affine + column, scale_[j]);
      store(affine + (Mma::kColumns + column), shift_[j]);
    }
  }
  // Of two columns.
  static EDET_DEVICE Affine get(Shared<float> affine, int column) {
    const Vector<float, 2> scale = load<2>(affine + column);
    const Vector<float, 2> shift = load<2>(affine + (Mma::kColumns + column));
    return {{scale.value[0], scale.value[1]}, {shift.value[0], shift.value[1]}};
  }

 private:
  static constexpr int kParts = divide_up(Mma::kColumns, kProductThreads);
  float scale_[kParts], shift_[kParts];
};

// Fills the patch: the tile's first pixel is in its second row and column. Outside of the map it is
// zero, which is what the depthwise convolution pads with. This one is for all maps.
template <class Mma, class Node>
EDET_DEVICE void fuse_any(const Node& node, const SharedTile& tile, int k, int depth,
                          Shared<float> factors, Shared<typename Mma::Type> patch) {
  using T = typename Mma::Type;
  constexpr int V = kVector<T>;
  const int c = node.c(), h = node.h(), w = node.w(), edges = node.edges();
  const int image = tile.image(), y0 = tile.y0(), x0 = tile.x0();
  for (int i = thread().x; i < kPatchPixels<Mma> * kVectors; i += kProductThreads) {
    const int vector = i % kVectors, pixel = i / kVectors, channel = k + vector * V;
    if (vector * V >= depth) continue;
    const int y = y0 - 1 + pixel / (kTileWidth<Mma> + 2);
    const int x = x0 - 1 + pixel % (kTileWidth<Mma> + 2);
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
      activate<T>(sum, node.pre_activation());
      EDET_UNROLL
      for (int j = 0; j < V; j++) {
        result.value[j] = from_float<T>(channel + j < c ? sum[j] : 0.0f);
      }
    }
    store(patch + (pixel * kChunk<T> + vector * V), result);
  }
}

// ---- nodes of a kind that is known when the kernel is compiled ----

// Edges of the node's size at most, which come first.
EDET_EVERYWHERE constexpr int same_edges(FuseKind kind) { return kind == FuseKind::up ? 2 : 1; }
// Vectors that a pixel reads of the last edge, if that one is resized.
EDET_EVERYWHERE constexpr int resized_taps(FuseKind kind) {
  return kind == FuseKind::up ? 9 : kind == FuseKind::down ? 1 : 0;
}

// The maps of a tile, at the channels of one thread, in which each pixel has an offset of 32 bits.
template <class T, FuseKind kKind>
class PatchReader {
 public:
  static constexpr int V = kVector<T>, kSame = same_edges(kKind), kTaps = resized_taps(kKind);
  static constexpr int kRows = kTaps == 9 ? 3 : 1;  // of taps, and columns
  // Of one pixel: all loads can be on their way before the first is used.
  struct Item {
    Words same[kSame], tap[kTaps > 0 ? kTaps : 1];
  };

  template <class Node>
  EDET_DEVICE PatchReader(const Node& node, int image, int channel)
      : c_(node.c()), h_(node.h()), w_(node.w()), both_(node.edges() > 2) {
    const int64_t pixels = int64_t(image) * h_ * w_;
    EDET_UNROLL
    for (int e = 0; e < kSame; e++) {
      if (e && !both_) break;
      same_[e] = static_cast<const T*>(node.edge(e).data) + pixels * c_ + channel;
    }
    if constexpr (kTaps > 0) {
      const auto& edge = node.edge(node.edges() - 1);
      const int h = int(edge.h), w = int(edge.w);
      edge_w_ = w, last_y_ = h - 1, last_x_ = w - 1;
      before_y_ = int(edge.rows.before), before_x_ = int(edge.columns.before);
      resized_ = static_cast<const T*>(edge.data) + int64_t(image) * h * w * c_ + channel;
    }
  }

  EDET_DEVICE bool inside(int y, int x) const {
    return uint32_t(y) < uint32_t(h_) && uint32_t(x) < uint32_t(w_);
  }

  // Where a pixel's numbers are; of one outside of the map, those of the nearest one inside.
  struct Place {
    int same, row[kRows], column[kRows];
  };
  EDET_DEVICE Place place(int y, int x) const {
    y = min(max(y, 0), h_ - 1), x = min(max(x, 0), w_ - 1);
    Place p{};
    p.same = (y * w_ + x) * c_;
    if constexpr (kKind == FuseKind::down) {
      p.row[0] = (y / 2 * edge_w_ + x / 2) * c_;
    } else if constexpr (kKind == FuseKind::up) {
      const int top = 2 * y - before_y_, left = 2 * x - before_x_;
      EDET_UNROLL
      for (int i = 0; i < 3; i++) {
        // a tap outside of the map is one of the window's inside: a maximum may count it twice
        p.row[i] = min(max(top + i, 0), last_y_) * edge_w_ * c_;
        p.column[i] = min(max(left + i, 0), last_x_) * c_;
      }
    }
    return p;
  }
  EDET_DEVICE Item load(const Place& p) const {
    Item item;
    EDET_UNROLL
    for (int e = 0; e < kSame; e++) {
      item.same[e] = e == 0 || both_ ? at(same_[e], p.same) : Words{};
    }
    if constexpr (kTaps > 0) {
      EDET_UNROLL
      for (int i = 0; i < kTaps; i++) {
        item.tap[i] = at(resized_, p.row[i / kRows] + p.column[i % kRows]);
      }
    }
    return item;
  }

  // What is left of an item when its window's largest is known.
  struct Edges {
    Words edge[kSame + 1];
  };
  static EDET_DEVICE Edges reduce(const Item& item) {
    Edges edges{};
    EDET_UNROLL
    for (int e = 0; e < kSame; e++) edges.edge[e] = item.same[e];
    Words largest = item.tap[0];
    EDET_UNROLL
    for (int i = 1; i < kTaps; i++) largest = max_nan<T>(largest, item.tap[i]);
    if constexpr (kTaps > 0) edges.edge[kSame] = largest;
    return edges;
  }

  // Σ factor · edge, activated.
  static EDET_DEVICE Words fuse(const Edges& edges, const float (&factor)[kSame + 1]) {
    if constexpr (kKind == FuseKind::one) return edges.edge[0];
    float sum[V] = {}, x[V];
    EDET_UNROLL
    for (int e = 0; e <= kSame; e++) {
      to_floats<T>(edges.edge[e], x);
      EDET_UNROLL
      for (int j = 0; j < V; j++) sum[j] = e ? sum[j] + factor[e] * x[j] : factor[e] * x[j];
    }
    EDET_UNROLL
    for (int j = 0; j < V; j++) sum[j] = swish<T>(sum[j]);
    return to_words<T>(sum);
  }

 private:
  static EDET_DEVICE Words at(const T* map, int offset) {
    return load_written<uint32_t, 4>(words(map + offset));
  }

  int c_, h_, w_;
  bool both_;  // edges of the node's size
  int edge_w_ = 0, last_y_ = 0, last_x_ = 0, before_y_ = 0, before_x_ = 0;
  const T* same_[kSame];
  const T* resized_ = nullptr;
};

// As fuse_patch.
template <class Mma, FuseKind kKind, class Node, class Await>
EDET_DEVICE void fuse_known(const Node& node, const SharedTile& tile, int k, int depth,
                            Shared<float> factors, Shared<typename Mma::Type> patch,
                            const Await& await) {
  using T = typename Mma::Type;
  using Reader = PatchReader<T, kKind>;
  constexpr int V = kVector<T>, kStep = kProductThreads / kVectors;
  constexpr int kItems = divide_up(kPatchPixels<Mma>, kStep);
  // pixels of a thread whose loads are on their way together
  constexpr int kTogether = kKind == FuseKind::up ? 1 : kItems;
  // whether a pixel's loads are on their way while the one before is fused: if sums leave
  // registers, of which bfloat16's conversions take more
  constexpr bool kAhead = !std::is_same_v<T, bf16> && Mma::kRows * Mma::kColumns <= 64 * 64;
  // what follows from the thread alone is not kept from tile to tile: registers are scarce
  const int t = opaque(thread().x), vector = t % kVectors, channel = k + vector * V;
  const bool real = channel < node.c();
  const Reader reader(node, tile.image(), real ? channel : 0);
  const int y0 = tile.y0() - 1, x0 = tile.x0() - 1, first = t / kVectors;
  typename Reader::Place place[kTogether];
  const auto go = [&](int begin) {
    EDET_UNROLL
    for (int i = 0; i < kTogether; i++) {  // the last pixel twice costs less than a branch
      const int pixel = min(first + (begin + i) * kStep, kPatchPixels<Mma> - 1);
      place[i] =
          reader.place(y0 + pixel / (kTileWidth<Mma> + 2), x0 + pixel % (kTileWidth<Mma> + 2));
    }
  };
  typename Reader::Item item[kTogether];
  const auto load_items = [&] {
    EDET_UNROLL
    for (int i = 0; i < kTogether; i++) item[i] = reader.load(place[i]);
  };
  if (kAhead) go(0);
  await();
  if (vector * V >= depth) return;
  if (!kAhead) go(0);
  load_items();
  float factor[Reader::kSame + 1] = {};
  if constexpr (kKind != FuseKind::one) {
    EDET_UNROLL
    for (int e = 0; e <= Reader::kSame; e++) {
      // the last edge's comes last; one that is not there adds nothing
      const int edge = e < Reader::kSame ? e : node.edges() - 1;
      if (e < node.edges() - 1 || e == Reader::kSame) factor[e] = get(factors + edge * kChunk<T>);
    }
  }
  EDET_LOOP
  for (int begin = 0; begin < kItems; begin += kTogether) {
    const int next = begin + kTogether;
    const bool more = next < kItems && first + next * kStep < kPatchPixels<Mma>;  // of the warp
    if (kAhead && more) go(next);
    typename Reader::Edges edges[kTogether];
    EDET_UNROLL
    for (int i = 0; i < kTogether; i++) edges[i] = Reader::reduce(item[i]);
    if (kAhead && more) load_items();
    EDET_UNROLL
    for (int i = 0; i < kTogether; i++) {
      const int pixel = first + (begin + i) * kStep;
      if (pixel < kPatchPixels<Mma>) {
        const int y = y0 + pixel / (kTileWidth<Mma> + 2), x = x0 + pixel % (kTileWidth<Mma> + 2);
        Words result = Reader::fuse(edges[i], factor);
        if (!real || !reader.inside(y, x)) result = Words{};
        store(as<uint32_t>(patch + (pixel * kChunk<T> + vector * V)), result);
      }
    }
    if (!more) break;
    if (!kAhead) {
      go(next);
      load_items();
    }
  }
}

// Fills the patch by the way that is right for the node, when await() has returned: what does not
// need the maps is done before.
template <class Mma, class Node, class Await>
EDET_DEVICE void fuse_patch(const Node& node, const SharedTile& tile, int k, int depth,
                            Shared<float> factors, Shared<typename Mma::Type> patch,
                            const Await& await) {
  if constexpr (sizeof(typename Mma::Type) == 2) {
    const FuseKind kind = node.kind();
    if (kind == FuseKind::down) {
      return fuse_known<Mma, FuseKind::down>(node, tile, k, depth, factors, patch, await);
    }
    if (kind == FuseKind::up) {
      return fuse_known<Mma, FuseKind::up>(node, tile, k, depth, factors, patch, await);
    }
    if (kind == FuseKind::one) {
      return fuse_known<Mma, FuseKind::one>(node, tile, k, depth, factors, patch, await);
    }
  }
  await();
  fuse_any<Mma>(node, tile, k, depth, factors, patch);
}

// Convolves the patch into the product's left operand. A warp computes a column of the tile, or a
// half of it, each lane one word of channels of all its rows: they share the rows of the patch and
// the weights, and neighbouring lanes' words lie in neighbouring banks.
template <class Mma>
EDET_DEVICE void convolve_patch(Shared<typename Mma::Type> patch, Shared<float> dw, int depth,
                                Shared<typename Mma::Type> a) {
  using T = typename Mma::Type;
  constexpr int V = 4 / int(sizeof(T)), kDown = Mma::kRows / (kProductThreads / kWarp);
  const int t = opaque(thread().x), channel = t % kWarp * V;
  const int x = t / kWarp % kTileWidth<Mma>, y = t / kWarp / kTileWidth<Mma> * kDown;
  if (channel >= depth) return;
  float sum[kDown][V] = {};
  const auto add_column = [&](int dx) {
    Vector<float, V> w[3];
    EDET_UNROLL
    for (int dy = 0; dy < 3; dy++) w[dy] = load<V>(dw + ((dy * 3 + dx) * kChunk<T> + channel));
    EDET_UNROLL
    for (int r = 0; r < kDown + 2; r++) {
      float in[V];
      to_floats(load<V>(patch + (((y + r) * (kTileWidth<Mma> + 2) + x + dx) * kChunk<T> + channel)),
                in);
      EDET_UNROLL
      for (int dy = 0; dy < 3; dy++) {
        const int row = r - dy;
        if (row < 0 || row >= kDown) continue;
        EDET_UNROLL
        for (int j = 0; j < V; j++) sum[row][j] += w[dy].value[j] * in[j];
      }
    }
  };
  if constexpr (kDown > 4) {  // the loads of three columns at once would leave no registers
    EDET_LOOP
    for (int dx = 0; dx < 3; dx++) add_column(dx);
  } else {
    EDET_UNROLL
    for (int dx = 0; dx < 3; dx++) add_column(dx);
  }
  EDET_UNROLL
  for (int row = 0; row < kDown; row++) {
    if constexpr (Mma::kRounds) {
      EDET_UNROLL
      for (int j = 0; j < V; j++) sum[row][j] = Mma::operand(sum[row][j]);
    }
    store(a + (((y + row) * kTileWidth<Mma> + x) * Mma::kPitchA + channel),
          from_floats<T>(sum[row]));
  }
}

// Computes one tile. `first`: the weights in shared memory are of another node; `resident`: all
// that the slice needs stay there. await() returns when the inputs may be read, for all threads
// after a barrier of its own; weights, which nothing waits for, are loaded before. A node says what
// it is made of: c(), c_out(), h(), w(), edges(), edge(e), weights(), pre_activation(),
// post_activation(), kind(), dw(), pw(), scale(), shift(), out(), aligned_in() and aligned_out(),
// from the kernel's parameters, which cost no registers.
template <class Mma, class Node, class Await>
EDET_DEVICE void compute_tile(const Node& node, const SharedTile& tile, Shared<char> memory,
                              bool first, bool resident, const Await& await) {
  using T = typename Mma::Type;
  using At = NodeMemory<Mma>;
  const Shared<float> dw = as<float>(memory + At::kDepthwise),
                      factors = as<float>(memory + At::kFactors),
                      affine = as<float>(memory + At::kAffine);
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
  // What is small is on its way while the weights come, and stored while the maps do.
  const AffinePart<Mma> affine_part(node.scale(), node.shift(), tile.n(), tile.columns(),
                                    node.c_out());
  DepthwisePart<T> dw_part;
  const bool load_dw = first || chunks > 1;
  if (load_dw) dw_part.load(node.dw(), c, 0, node.aligned_in());
  Mma product;
  for (int chunk = 0; chunk < chunks; chunk++) {
    const int k = chunk * kChunk<T>;
    const int depth = round_up(min(kChunk<T>, c - k), kDepth);
    if (load_dw && (first || node.weights().per_channel)) {
      const int t = opaque(thread().x);
      const EdgeFactors part(node.weights(), t < kChunk<T> ? node.edges() : 0, c,
                             min(k + t, c - 1));
      if (first && resident && chunk == 0) {
        for (int i = 0; i < chunks; i++) load_chunk(i * kChunk<T>, place(i));
      }
      if (t < kChunk<T>) part.template store_to<T>(factors + float_place<T>(t), kChunk<T>);
    }
    if (load_dw) dw_part.store_to(dw);  // the chunk before is convolved
    if (chunk == 0) affine_part.store_to(affine);
    sync_threads();
    if (!resident) load_chunk(k, w);
    fuse_patch<Mma>(node, tile, k, depth, factors, patch, [&] {
      if (chunk == 0) await();
    });
    sync_threads();
    convolve_patch<Mma>(patch, dw, depth, a);
    sync_threads();
    if (chunk + 1 < chunks) dw_part.load(node.dw(), c, k + kChunk<T>, node.aligned_in());
    product.mma(a, place(chunk), depth, tile.columns());
  }
  const int h = node.h(), width = node.w(), c_out = node.c_out(), y0 = tile.y0(), x0 = tile.x0();
  T* const out =
      static_cast<T*>(node.out()) + ((int64_t(tile.image()) * h + y0) * width + x0) * c_out;
  const auto store = [&](const auto& change) {
    const auto factors_of = [&](int column) { return AffinePart<Mma>::get(affine, column); };
    store_product(product, patch, factors_of, tile.n(), tile.columns(), c_out, node.aligned_out(),
                  change, AsItIs{}, [&](int row) -> T* {
                    const int y = row / kTileWidth<Mma>, x = row % kTileWidth<Mma>;
                    if (y0 + y >= h || x0 + x >= width) return nullptr;
                    return out + int64_t(y * width + x) * c_out;
                  });
  };
  const Activation activation = node.post_activation();
  if (activation == Activation::none) return store([](float (&)[2], int, int) {});
  store([&](float (&x)[2], int, int) { activate<T>(x, activation); });
}

}  // namespace edet::cuda
