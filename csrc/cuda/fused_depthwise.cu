// The CUDA kernel for the first half of a wide fusion node, or of a wide separable convolution on
// all levels of a pyramid: fuse, activate and convolve depthwise. A product, of lateral.cu or
// gemm.cu, is the other half.
//
// Floors. Bytes: each input and the result once. The result is a map more than a node in one launch
// moves; but of many channels such a launch fuses one chunk after the other, in few blocks.
// Instructions: to fuse and activate a number takes 11 of a thread, to convolve it 13, of which 9
// are FMA.
// Budget: 128 registers.
//
// 16-bit maps of a kind that is known when the kernel is compiled go down strips (below). Of others
// a block owns a tile of 8×8 (4×8, 4×4) pixels and 128 bytes of their channels.
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
  EDET_DEVICE bool aligned_in() const { return plan.aligned; }
};

// Tiles of 64 pixels are for many blocks, of which a multiprocessor holds three. Of Mma only the
// tile is used.
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
  griddep_wait();
  fuse_any<Mma>(node, tile, k, depth, factors, patch);
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
  const int64_t blocks = tiles * plan.chunks;
  return launch(fuse_depthwise<Mma>, Dim3(static_cast<unsigned>(blocks)), Dim3(kProductThreads),
                static_cast<size_t>(NodeMemory<Mma>::kOperands), stream, plan, pdl);
}

// ---- strips ----

// A block goes down a strip of 14 columns. It fuses two rows of 64 channels of the strip and its
// halo at a time, each thread 16 bytes of a pixel, while the next two are on their way; and
// convolves what it has fused, a thread two columns of two channels, whose last two rows it keeps
// in registers. So a pixel is fused 1.2 times and not 1.6 times, addresses go on by additions, and
// results are stored as they are.
constexpr int kStripRows = 2;  // at a time
constexpr int kStripChannels = 64, kStripVectors = kStripChannels / 8;
constexpr int kStripAcross = kProductThreads / kStripRows / kStripVectors;  // pixels of a row
constexpr int kStripWidth = kStripAcross - 2;                               // without the halo
constexpr int kStripRow = kStripAcross * kStripChannels;  // numbers of a row in shared memory
constexpr int kStripFactors = 16;                         // bytes of shared memory, before the rows
constexpr int kStripBytes = kStripFactors + 2 * kStripRows * kStripRow * 2;

// What the launcher adds to the op's parameters.
struct StripPlan {
  FusionNodeParams p;
  void* out;
  int first_part[kMaxLevels + 1];
  int64_t first_row[kMaxLevels];  // of `out`
  int chunks;                     // of channels
  int rows;                       // of a block's part of a strip, an even number
};

// Reads what a thread fuses: 8 channels of every second pixel of a column.
template <class T, FuseKind kKind>
class ColumnReader {
 public:
  static constexpr int kSame = same_edges(kKind), kTaps = resized_taps(kKind);
  static constexpr int kEdges = kSame + (kTaps > 0 ? 1 : 0);
  // Of one pixel: all loads can be on their way before the first is used.
  struct Item {
    Words same[kSame], tap[kTaps > 0 ? kTaps : 1];
  };

  // `real`: the column and the channel are of the map; y: the first pixel's row.
  EDET_DEVICE ColumnReader(const FusionNodeParams& p, int level, int image, int y, int x,
                           int channel, bool real)
      : y_(y), step_(kStripRows * int(p.level[level].w) * int(p.c)), both_(p.edges > 2) {
    const int c = int(p.c), h = int(p.level[level].h), w = int(p.level[level].w);
    const Edge* const edges = p.edge + (p.levels > 1 ? level : 0);
    h_ = real ? h : 0;
    EDET_UNROLL
    for (int e = 0; e < kSame; e++) {
      same_[e] =
          static_cast<const T*>(edges[e].data) + ((int64_t(image) * h + y) * w + x) * c + channel;
    }
    if constexpr (kTaps > 0) {
      const Edge& edge = edges[p.edges - 1];
      const int64_t pixels = int64_t(image) * edge.h * edge.w;
      pitch_ = int(edge.w) * c;
      resized_ = static_cast<const T*>(edge.data) + pixels * c + channel;
      if constexpr (kKind == FuseKind::down) {
        resized_ += (y + 2) / 2 * int64_t(pitch_) - pitch_ + x / 2 * c;
      } else {
        last_ = int(edge.h) - 1;
        top_ = 2 * y - int(edge.rows.before);
        EDET_UNROLL
        for (int i = 0; i < 3; i++) {
          // a tap outside of the map is one of the window's inside: a maximum may count it twice
          const int left = 2 * x - int(edge.columns.before) + i;
          column_[i] = min(max(left, 0), int(edge.w) - 1) * c;
        }
      }
    }
  }

  // Whether the pixel is of the map.
  EDET_DEVICE bool inside() const { return uint32_t(y_) < uint32_t(h_); }
  EDET_DEVICE void load(Item& item) const {
    if (!inside()) return;
    EDET_UNROLL
    for (int e = 0; e < kSame; e++) {
      if (e == 0 || both_) item.same[e] = at(same_[e]);
    }
    if constexpr (kKind == FuseKind::down) item.tap[0] = at(resized_);
    if constexpr (kKind == FuseKind::up) {
      EDET_UNROLL
      for (int i = 0; i < 3; i++) {
        const T* const row = resized_ + int64_t(min(max(top_ + i, 0), last_)) * pitch_;
        EDET_UNROLL
        for (int j = 0; j < 3; j++) item.tap[3 * i + j] = at(row + column_[j]);
      }
    }
  }
  // Goes two rows on.
  EDET_DEVICE void advance() {
    y_ += kStripRows;
    EDET_UNROLL
    for (int e = 0; e < kSame; e++) same_[e] += step_;
    if constexpr (kKind == FuseKind::down) resized_ += pitch_;
    if constexpr (kKind == FuseKind::up) top_ += 2 * kStripRows;
  }

  // Σ factor · edge, activated.
  static EDET_DEVICE Words fuse(const Item& item, const float (&factor)[kEdges]) {
    if constexpr (kKind == FuseKind::one) return item.same[0];
    Words largest = item.tap[0];
    EDET_UNROLL
    for (int i = 1; i < kTaps; i++) largest = max_nan<T>(largest, item.tap[i]);
    float sum[8] = {}, x[8];
    EDET_UNROLL
    for (int e = 0; e < kEdges; e++) {
      to_floats<T>(e < kSame ? item.same[e] : largest, x);
      EDET_UNROLL
      for (int j = 0; j < 8; j++) sum[j] = e ? sum[j] + factor[e] * x[j] : factor[e] * x[j];
    }
    EDET_UNROLL
    for (int j = 0; j < 8; j++) sum[j] = swish<T>(sum[j]);
    return to_words<T>(sum);
  }

 private:
  static EDET_DEVICE Words at(const T* p) { return load_written<uint32_t, 4>(words(p)); }

  int y_, h_;
  const int step_;
  const bool both_;  // edges of the node's size
  const T* same_[kSame];
  const T* resized_ = nullptr;
  int pitch_ = 0, last_ = 0, top_ = 0, column_[3] = {};
};

// kKind: a FuseKind that is known.
template <class T, int kKind>
EDET_KERNEL(kProductThreads, FuseKind(kKind) == FuseKind::up ? 2 : 3)
fuse_depthwise_strips(EDET_PARAMS(StripPlan) plan) {
  using Reader = ColumnReader<T, FuseKind(kKind)>;
  const FusionNodeParams& p = plan.p;
  EDET_SHARED(char, memory);
  griddep_launch();
  const Shared<float> factors = as<float>(memory);
  const Shared<T> fused = as<T>(memory + kStripFactors);
  const int part = int(block().x) / plan.chunks, k = int(block().x) % plan.chunks * kStripChannels;
  int l = 0;
  while (part >= plan.first_part[l + 1]) l++;
  const int c = int(p.c), h = int(p.level[l].h), w = int(p.level[l].w);
  const int across = divide_up(w, kStripWidth), down = divide_up(h, plan.rows);
  const int local = part - plan.first_part[l], image = local / (across * down);
  const int y0 = local / across % down * plan.rows, x0 = local % across * kStripWidth;
  const int rows = min(plan.rows, h - y0), t = thread().x;

  // what the thread convolves
  constexpr int kWords = kStripChannels / 2;
  const int pair = t / kWords * 2, x = x0 + pair, channel = k + t % kWords * 2;
  const bool real_channel = channel < c, right = x + 1 < w;  // right: its second column is real
  const int stored = pair < kStripWidth && x < w && real_channel ? rows : 0;
  Vector<float, 2> weight[9];
  EDET_UNROLL
  for (int i = 0; i < 9; i++) {
    weight[i] = load_constant<float, 2>(p.dw + i * c + (real_channel ? channel : 0));
  }
  // without a column of its own, the last: a branch would part what is fused from what is convolved
  const Shared<T> from = fused + (min(pair, kStripWidth - 2) * kStripChannels + t % kWords * 2);
  T* to = static_cast<T*>(plan.out) +
          (plan.first_row[l] + (int64_t(image) * h + y0 - kStripRows) * w + x) * c + channel;

  // what it fuses
  const int vector = t % kStripVectors, pixel = t / kStripVectors % kStripAcross;
  const int row = t / (kStripVectors * kStripAcross), column = x0 - 1 + pixel;
  const bool real = uint32_t(column) < uint32_t(w) && k + vector * 8 < c;  // of the map
  Reader reader(p, l, image, y0 - 1 + row, column, k + vector * 8, real);
  const Shared<T> fuses = fused + (row * kStripRow + (pixel)*kStripChannels + vector * 8);

  if (t == 0) EdgeFactors(p.weights, p.edges, c, 0).template store_to<T>(factors, 1);
  sync_threads();
  float factor[Reader::kEdges] = {};
  EDET_UNROLL
  for (int e = 0; e < Reader::kEdges; e++) {
    // the last edge's comes last; one that is not there adds nothing
    const int edge = e < Reader::kSame ? e : p.edges - 1;
    if (e + 1 == Reader::kEdges || e < p.edges - 1) factor[e] = get(factors + edge);
  }
  griddep_wait();
  typename Reader::Item item{};
  reader.load(item);

  using Window = float[kStripRows][4][2];  // rows, columns, channels
  const auto step = [&](int number, const Window& above, Window& now) {
    const int turn = number % 2 * (kStripRows * kStripRow);
    const Words result = Reader::fuse(item, factor);
    store(as<uint32_t>(fuses + turn), reader.inside() ? result : Words{});
    reader.advance();
    reader.load(item);
    sync_threads();
    EDET_UNROLL
    for (int r = 0; r < kStripRows; r++) {
      EDET_UNROLL
      for (int i = 0; i < 4; i++) {
        const uint32_t two = get(as<uint32_t>(from + (turn + r * kStripRow + (i)*kStripChannels)));
        unpack<T>(two, now[r][i][0], now[r][i][1]);
      }
    }
    EDET_UNROLL
    for (int r = 0; r < kStripRows; r++) {
      const bool done = uint32_t((number - 1) * kStripRows + r) < uint32_t(stored);
      EDET_UNROLL
      for (int i = 0; i < 2; i++) {
        float sum[2] = {};
        EDET_UNROLL
        for (int dx = 0; dx < 3; dx++) {
          EDET_UNROLL
          for (int dy = 0; dy < 3; dy++) {
            const float* const in = r + dy < 2 ? above[r + dy][i + dx] : now[r + dy - 2][i + dx];
            EDET_UNROLL
            for (int j = 0; j < 2; j++) sum[j] += weight[dy * 3 + dx].value[j] * in[j];
          }
        }
        if (done && (i == 0 || right)) {
          store(reinterpret_cast<uint32_t*>(to + i * c), pack<T>(sum[0], sum[1]));
        }
      }
      to += w * c;
    }
  };
  const int steps = divide_up(rows, kStripRows) + 1;
  Window first = {}, second;
  EDET_LOOP
  for (int number = 0;;) {
    step(number, first, second);
    if (++number == steps) break;
    step(number, second, first);
    if (++number == steps) break;
  }
}

template <class T, int kKind>
Error launch_strips(const FusionNodeParams& p, void* out, const Device& device, Stream stream,
                    bool pdl) {
  StripPlan plan{};
  plan.p = p;
  plan.out = out;
  plan.chunks = static_cast<int>(divide_up(p.c, kStripChannels));
  const auto parts = [&](int l, int rows) {
    return p.n * divide_up(p.level[l].h, rows) * divide_up(p.level[l].w, kStripWidth);
  };
  // A multiprocessor takes twice as long for three blocks at once, of which it holds no more, as
  // for one; to begin and to end takes as long as three times two rows.
  int64_t least = INT64_MAX;
  for (int rows = kStripRows; rows <= 64; rows += kStripRows) {
    int64_t blocks = 0;
    for (int l = 0; l < p.levels; l++) blocks += parts(l, rows) * plan.chunks;
    const int64_t each = divide_up(blocks, device.multiprocessors);
    const int64_t cost = (each + divide_up(each, 3)) * (rows / kStripRows + 3);
    if (blocks <= INT32_MAX && cost < least) least = cost, plan.rows = rows;
  }
  if (plan.rows == 0) return kInvalidValue;
  int64_t all = 0, row = 0;
  for (int l = 0; l < p.levels; l++) {
    plan.first_part[l] = static_cast<int>(all);
    plan.first_row[l] = row;
    all += parts(l, plan.rows);
    row += p.n * p.level[l].h * p.level[l].w;
  }
  plan.first_part[p.levels] = static_cast<int>(all);
  return launch(fuse_depthwise_strips<T, kKind>, Dim3(static_cast<unsigned>(all * plan.chunks)),
                Dim3(kProductThreads), size_t(kStripBytes), stream, plan, pdl);
}

template <class T>
Error launch_type(const FusionNodeParams& p, void* out, const Device& device, Stream stream,
                  bool pdl) {
  if constexpr (sizeof(T) == 2) {
    bool aligned = p.c % kVector<T> == 0;
    for (int e = 0; e < p.edges * p.levels; e++) aligned = aligned && is_aligned(p.edge[e].data);
    for (int l = 0; l < p.levels; l++) {  // what a thread goes on by has 32 bits
      aligned = aligned && p.level[l].w * p.c <= INT32_MAX / kStripRows;
    }
    switch (kind_of_levels(p, aligned)) {
      case FuseKind::one: return launch_strips<T, 1>(p, out, device, stream, pdl);
      case FuseKind::down: return launch_strips<T, 2>(p, out, device, stream, pdl);
      case FuseKind::up: return launch_strips<T, 3>(p, out, device, stream, pdl);
      case FuseKind::any: break;
    }
  }
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
