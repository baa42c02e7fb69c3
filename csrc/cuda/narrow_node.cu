// The CUDA kernel for a fusion node, or a separable convolution on all levels of a pyramid, of at
// most 64 channels and many pixels: as fusion_node.cu, for 16-bit maps only.
//
// Floors. Bytes: as fusion_node.cu. Instructions: tensor cores multiply by the edges' factors, by
// the depthwise and by the pointwise weights; a pixel of an enlarged edge takes a warp 42.
// Budget: 128 registers, tensor cores.
//
// A block has tiles of 16×16 (8×16) pixels in turns and all output channels; its weights stay. Its
// warps fuse a tile and its halo into shared memory, 18×18 pixels, and meet; then each warp
// convolves two rows (one) of 16 pixels depthwise, multiplies them by the pointwise weights and
// stores them, and they never leave its registers. Where there is room, the next tile comes to
// another place, so that warps meet once a tile.
#include "narrow_node.h"

#include <algorithm>

#include "block_mma.cuh"
#include "fusion.cuh"

namespace edet::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kChannels = 64;  // of a pixel, in 8 vectors
// Fewer pixels are sooner done by more and smaller tiles.
constexpr int64_t kLeastPixels = 8192;
constexpr int kWidth = 16, kAcross = kWidth + 2;  // of a tile, of a patch
// Rows of a tile, and pixels of a patch, of warps with so many rows.
template <int kRows>
constexpr int kHeight = kRows * kWarps;
template <int kRows>
constexpr int kPixels = kAcross * (kHeight<kRows> + 2);
// A row of a patch or of the weights is padded by 16 bytes: 8 neighbours begin in other banks.
constexpr int kPitch = kChannels + 8;
constexpr int kGroup = 8, kGroups = kChannels / kGroup;  // channels of a product's right operand
constexpr int kTaps = 12;                                // words, of which 9 are used

// Shared memory, in bytes: depthwise weights, scales and shifts, pointwise weights, patches.
constexpr int kAffine = kChannels * kTaps * 4;
constexpr int kWeights = kAffine + 2 * kChannels * 4;
constexpr int kPatches = kWeights + kChannels * kPitch * 2;
template <int kRows>
constexpr int kPatchBytes = kPixels<kRows> * kPitch * 2;

// Divides numbers below 2³¹ by one that the launcher knows: a product and a shift.
struct Divisor {
  uint32_t multiplier;
  int shift;

  static Divisor by(uint32_t divisor) {
    int bits = 0;
    while (uint64_t(1) << bits < divisor) bits++;
    return {uint32_t(((uint64_t(1) << (31 + bits)) + divisor - 1) / divisor), 31 + bits};
  }
  EDET_DEVICE int quotient(int number) const {
    return int(uint64_t(uint32_t(number)) * multiplier >> shift);
  }
};

// A map that a level reads.
struct Source {
  const void* data;
  int h, w;
};
// What the kernel needs of one map that it computes.
struct Level {
  Source source[3];  // of its size; another one of its size; resized
  int h, w, first_tile, across, down;
  int before_y, before_x;  // rows and columns that a pool begins outside of the map
  Divisor by_across, by_down;
  const float *scale, *shift;
  void* out;
};
struct Plan {
  Level level[kMaxLevels];
  int levels, tiles, c, c_out, edges;
  int patches;  // that shared memory has room for
  EdgeWeights weights;
  Activation post_activation;
  const float *dw, *pw;
};

// Where a block is.
struct Place {
  int level, image, y0, x0;
};
template <FuseKind kKind, int kRows>
EDET_DEVICE Place place_of(const Plan& plan, int number) {
  int l = 0;  // only single maps have more than one level
  if (kKind == FuseKind::one) {
    while (l + 1 < plan.levels && number >= plan.level[l + 1].first_tile) l++;
  }
  const Level& level = plan.level[l];
  const int local = number - level.first_tile, row = level.by_across.quotient(local);
  const int image = level.by_down.quotient(row);
  return {l, image, (row - image * level.down) * kHeight<kRows>,
          (local - row * level.across) * kWidth};
}

EDET_DEVICE uint32_t lane_of_warp() { return uint32_t(opaque(thread().x)) % kWarp; }
// A diagonal matrix, as the right operand of a product, has one number of a pair in a lane, or
// none.
EDET_DEVICE uint32_t diagonal_mask() {
  const uint32_t lane = lane_of_warp();
  return lane % 4 != lane / 8 ? 0u : lane / 4 % 2 ? 0xffff0000u : 0xffffu;
}

// ---- fusing ----

// Reads vectors of channels of pixels of a patch. A thread has one vector of every 32nd pixel: 8
// neighbouring lanes read a pixel's 128 bytes, a warp 4 pixels.
template <class T, FuseKind kKind, int kRows>
class PixelReader {
  static constexpr int kCount = kPixels<kRows>;
  static constexpr int kSame = kKind == FuseKind::up ? 2 : 1;  // edges of the map's size

 public:
  static constexpr int kPixelsAtOnce = kThreads / 8;
  static constexpr int kItems = divide_up(kCount, kPixelsAtOnce);
  static constexpr int kEdges = kKind == FuseKind::one ? 1 : kSame + 1;

  EDET_DEVICE PixelReader(const Plan& plan, const Place& at)
      : level_(plan.level[at.level]), y0_(at.y0 - 1), x0_(at.x0 - 1), both_(plan.edges > 2) {
    const int channel = int(uint32_t(opaque(thread().x)) % 8) * 8;
    real_ = channel < plan.c;
    bytes_ = uint32_t(plan.c) * sizeof(T);
    const uint32_t first = real_ ? uint32_t(channel) * sizeof(T) : 0u;
    EDET_UNROLL
    for (int e = 0; e < kEdges; e++) {
      const Source& source = level_.source[e == kSame ? 2 : e];
      const uint64_t pixels = uint64_t(uint32_t(at.image)) * uint32_t(source.h * source.w);
      map_[e] = opaque(static_cast<const char*>(source.data) + pixels * bytes_ + first);
    }
  }

  // Whether this thread's warp has a pixel of a number.
  static EDET_DEVICE bool has(int item) {
    static_assert(kCount % (kWarp / 8) == 0, "all lanes of a warp agree");
    const int left = kCount - item * kPixelsAtOnce;
    return left >= kPixelsAtOnce || (left > 0 && uint32_t(opaque(thread().x)) / 8 < uint32_t(left));
  }
  static EDET_DEVICE uint32_t pixel(int item) {
    return uint32_t(opaque(thread().x)) / 8 + uint32_t(item * kPixelsAtOnce);
  }

  // The vectors of a pixel's edges, of what is not there zeros: which is what a patch has outside
  // of the map, as swish(0) = 0. All lanes of a pixel agree.
  EDET_DEVICE void read(int item, Words (&edge)[kEdges]) const {
    const uint32_t y = uint32_t(y0_) + pixel(item) / kAcross;
    const uint32_t x = uint32_t(x0_) + pixel(item) % kAcross;
    const bool inside = y < uint32_t(level_.h) && x < uint32_t(level_.w) && real_;
    EDET_UNROLL
    for (int e = 0; e < kSame; e++) {
      edge[e] = at(map_[e], y * uint32_t(level_.w) + x, inside && (e == 0 || both_));
    }
    if constexpr (kKind == FuseKind::down) {
      edge[1] = at(map_[1], y / 2 * uint32_t(level_.source[2].w) + x / 2, inside);
    } else if constexpr (kKind == FuseKind::up) {
      // a tap outside of the map is one of the window's inside: a maximum may count it twice
      const int right = level_.source[2].w - 1, bottom = level_.source[2].h - 1;
      const char* column[3];
      EDET_UNROLL
      for (int i = 0; i < 3; i++) {
        const int k = min(max(int(2 * x) - level_.before_x + i, 0), right);
        column[i] = map_[2] + uint64_t(uint32_t(k)) * bytes_;
      }
      Words tap[9];
      EDET_UNROLL
      for (int i = 0; i < 9; i++) {
        const int k = min(max(int(2 * y) - level_.before_y + i / 3, 0), bottom);
        tap[i] = at(column[i % 3], uint32_t(k) * uint32_t(right + 1), inside);
      }
      edge[2] = tap[0];
      EDET_UNROLL
      for (int i = 1; i < 9; i++) edge[2] = max_nan<T>(edge[2], tap[i]);
    }
  }

 private:
  EDET_DEVICE Words at(const char* map, uint32_t pixel, bool real) const {
    const char* const from = map + uint64_t(pixel) * bytes_;
    return load_written_if<uint32_t, 4>(real, reinterpret_cast<const uint32_t*>(from));
  }

  const Level& level_;
  const int y0_, x0_;
  const bool both_;  // two edges of the map's size
  bool real_;        // whether there is such a channel
  uint32_t bytes_;   // of a pixel
  const char* map_[kEdges];
};

// swish(Σ factor · edge) of a vector. The sum is a product of tensor cores, of the thread's pairs
// of channels with a diagonal matrix of the factor: exact terms, added in fp32.
template <class T, int kEdges>
class VectorFuser {
 public:
  // Of the factors of all edges, the last of which is the last edge's.
  EDET_DEVICE VectorFuser(Shared<float> factors, int edges) {
    const uint32_t mask = diagonal_mask();
    EDET_UNROLL
    for (int e = 0; e < kEdges; e++) {
      const bool last = e == kEdges - 1;
      const float factor = last            ? get(factors + (edges - 1))
                           : e < edges - 1 ? get(factors + e)
                                           : 0.0f;
      half_[e] = pack<T>(0.5f * factor, 0.5f * factor) & mask;
    }
  }
  EDET_DEVICE Words fuse(const Words (&edge)[kEdges]) const {
    float sum[2][4] = {};
    EDET_UNROLL
    for (int e = 0; e < kEdges; e++) {
      EDET_UNROLL
      for (int i = 0; i < 2; i++) {
        mma_m16n8k8<T>(sum[i], edge[e].value[2 * i], edge[e].value[2 * i + 1], half_[e]);
      }
    }
    return swished(sum);
  }
  // The same without a matrix: of an infinity or NaN a product with its zeros is NaN.
  EDET_DEVICE Words fuse_any(const Words (&edge)[kEdges]) const {
    float sum[2][4] = {};
    EDET_UNROLL
    for (int e = 0; e < kEdges; e++) {
      const uint32_t pair = shuffle(half_[e], 0);  // lane 0 has the first number of a pair
      float factor[2], x[8];
      unpack<T>(pair, factor[0], factor[1]);
      to_floats<T>(edge[e], x);
      EDET_UNROLL
      for (int i = 0; i < 8; i++) sum[i / 4][i % 4] += factor[0] * x[i];
    }
    return swished(sum);
  }

 private:
  static EDET_DEVICE Words swished(const float (&sum)[2][4]) {
    float x[8];
    EDET_UNROLL
    for (int i = 0; i < 8; i++) x[i] = half_swish(sum[i / 4][i % 4]);
    return to_words<T>(x);
  }

  uint32_t half_[kEdges];  // factors, as half_swish wants them
};

EDET_DEVICE bool is_nan_pair(float a, float b) { return a != a || b != b; }
template <class T>
EDET_DEVICE bool has_nan(uint32_t pair) {
  float x[2];
  unpack<T>(pair, x[0], x[1]);
  return is_nan_pair(x[0], x[1]);
}

template <class T, FuseKind kKind, int kRows, class Fuser>
EDET_DEVICE void fuse_patch(const Plan& plan, const Place& at, const Fuser& fuser,
                            Shared<T> patch) {
  using Reader = PixelReader<T, kKind, kRows>;
  // pixels whose loads are on their way together
  constexpr int kTogether = kKind == FuseKind::up ? 1 : kRows == 1 ? 6 : 4;
  const Reader reader(plan, at);
  const Shared<uint32_t> to =
      as<uint32_t>(patch) + int(Reader::pixel(0) * (kPitch / 2) + uint32_t(thread().x) % 8 * 4);
  uint32_t largest = 0;
  const auto put = [&](int item, const Words& v) {
    store(to + item * Reader::kPixelsAtOnce * (kPitch / 2), v);
  };
  const auto fuse_from = [&](int first) {
    Words edge[kTogether][Reader::kEdges];
    EDET_UNROLL
    for (int i = 0; i < kTogether; i++) {
      if (Reader::has(first + i)) reader.read(first + i, edge[i]);
    }
    EDET_UNROLL
    for (int i = 0; i < kTogether; i++) {
      if (!Reader::has(first + i)) break;
      if constexpr (kKind == FuseKind::one) {
        put(first + i, edge[i][0]);
      } else {
        const Words v = fuser.fuse(edge[i]);
        EDET_UNROLL
        for (int j = 0; j < 4; j++) largest = max_nan<T>(largest, v.value[j]);
        put(first + i, v);
      }
    }
  };
  if constexpr (kKind == FuseKind::up) {
    EDET_LOOP
    for (int first = 0; first < Reader::kItems; first++) fuse_from(first);
  } else {
    EDET_UNROLL
    for (int first = 0; first < Reader::kItems; first += kTogether) fuse_from(first);
  }
  if constexpr (kKind != FuseKind::one) {
    if (ballot(has_nan<T>(largest)) == 0) return;
    EDET_LOOP
    for (int item = 0; item < Reader::kItems; item++) {
      if (!Reader::has(item)) break;
      Words edge[Reader::kEdges];
      reader.read(item, edge);
      put(item, fuser.fuse_any(edge));
    }
  }
}

// ---- convolving, multiplying, storing ----

// The depthwise convolution of a row of 16 pixels, of 8 channels: sums in the order of a product's
// results. A step multiplies the channels at two taps by two diagonal matrices of their weights, so
// that a sum has the terms of its own channel, and zeros: exact terms, added in fp32.
template <class T>
class RowConvolution {
 public:
  EDET_DEVICE RowConvolution(Shared<T> patch, Shared<uint32_t> taps) {
    const uint32_t lane = lane_of_warp(), row = uint32_t(opaque(thread().x)) / kWarp;
    const uint32_t second = lane / 16, at = row * kAcross + lane % 16;
    // a lane points at one of 16 pixels, at one of two taps
    down_ = patch + int((at + second * kAcross) * kPitch);
    right_ = patch + int((at + 2 * kAcross + second) * kPitch);
    corner_ = patch + int((at + 2 * kAcross + 2) * kPitch);
    active_ = diagonal_mask() != 0;
    taps_ = taps + int(lane / 4 * kTaps);
  }
  // The weights of a group of channels, as right operands.
  struct Taps {
    uint32_t w[9];
  };
  EDET_DEVICE Taps load_taps(int group) const {
    const Shared<uint32_t> from = taps_ + group * kGroup * kTaps;
    Taps taps{};
    if (!active_) return taps;
    EDET_UNROLL
    for (int i = 0; i < 8; i += 4) {
      const Words four = load<4>(from + i);
      EDET_UNROLL
      for (int j = 0; j < 4; j++) taps.w[i + j] = four.value[j];
    }
    taps.w[8] = get(from + 8);
    return taps;
  }
  // Of one of the warp's rows.
  EDET_DEVICE void convolve_row(int row, int group, const Taps& taps, float (&sum)[4]) const {
    EDET_UNROLL
    for (int i = 0; i < 4; i++) sum[i] = 0.0f;
    EDET_UNROLL
    for (int step = 0; step < 5; step++) {  // taps (0, x) and (1, x); (2, 0) and (2, 1); (2, 2)
      const int tap = step < 3 ? step : step == 3 ? 6 : 8;
      const Shared<T> from = step < 3 ? down_ + step * kPitch : step == 3 ? right_ : corner_;
      uint32_t pixels[4];
      ldmatrix_x4(from + (row * kApart + group * kGroup), pixels);
      mma_m16n8k16<T>(sum, pixels, taps.w[tap], step == 4 ? 0u : taps.w[step < 3 ? tap + 3 : 7]);
    }
  }
  // The same without a matrix: of an infinity or NaN a product with its zeros is NaN.
  static EDET_DEVICE void convolve_any(int row, int group, Shared<T> patch, Shared<uint32_t> taps,
                                       float (&sum)[4]) {
    EDET_UNROLL
    for (int i = 0; i < 4; i++) sum[i] = 0.0f;
    const uint32_t lane = lane_of_warp(), first = uint32_t(opaque(thread().x)) / kWarp;
    const int channel = group * kGroup + int(lane % 4 * 2);
    patch = patch + (row * kApart + int((first * kAcross + lane / 4) * kPitch) + channel);
    EDET_LOOP
    for (int tap = 0; tap < 9; tap++) {
      float w[2], none;
      unpack<T>(get(taps + (channel * kTaps + tap)), w[0], none);
      unpack<T>(get(taps + ((channel + 1) * kTaps + tap)), none, w[1]);
      EDET_UNROLL
      for (int half = 0; half < 2; half++) {
        const int pixel = half * 8 + tap / 3 * kAcross + tap % 3;
        float x[2];
        unpack<T>(get(as<uint32_t>(patch + pixel * kPitch)), x[0], x[1]);
        EDET_UNROLL
        for (int j = 0; j < 2; j++) sum[2 * half + j] += w[j] * x[j];
      }
    }
  }

 private:
  static constexpr int kApart = kWarps * kAcross * kPitch;  // a warp's rows

  Shared<T> down_, right_, corner_;
  Shared<uint32_t> taps_;
  bool active_;  // whether the lane has a number of a diagonal
};

// What a warp's products are stored as: a lane has 16 neighbouring channels of two pixels.
constexpr int kColumns = kChannels / 8;  // tiles of 8 columns of a product
// Where a column of the weights lies, so that a lane's sums are neighbours.
EDET_DEVICE int place_of_column(int column) {
  return column % 16 / 2 * 8 + column / 16 * 2 + column % 2;
}

template <class T>
EDET_DEVICE void store_row(const Plan& plan, const Place& at, int row, Shared<float> affine,
                           const float (&sum)[kColumns][4]) {
  const Level& level = plan.level[at.level];
  const uint32_t lane = lane_of_warp();
  const int first = int(lane % 4 * 16);
  const int y = at.y0 + row * kWarps + int(uint32_t(opaque(thread().x)) / kWarp),
            x = at.x0 + int(lane / 4);
  const uint32_t bytes = uint32_t(plan.c_out) * sizeof(T);
  char* const to = static_cast<char*>(level.out) +
                   (uint64_t(uint32_t(at.image) * uint64_t(uint32_t(level.h))) + uint32_t(y)) *
                       (uint32_t(level.w) * uint64_t(bytes)) +
                   uint64_t(uint32_t(x)) * bytes + uint32_t(first) * sizeof(T);
  const auto store_some = [&](uint32_t* at, const Words& v, int left) {
    if (plan.c_out % 8 == 0) return store(at, v);
    EDET_UNROLL
    for (int i = 0; i < 2; i++) {
      if (i * 4 >= left) break;
      store(at + 2 * i, Vector<uint32_t, 2>{{v.value[2 * i], v.value[2 * i + 1]}});
    }
  };
  const auto put = [&](const auto& change) {
    EDET_UNROLL
    for (int eight = 0; eight < 2; eight++) {
      Words v[2];
      EDET_UNROLL
      for (int i = 0; i < 2; i++) {
        const int column = first + eight * 8 + i * 4;
        const Vector<float, 4> scale = load<4>(affine + column);
        const Vector<float, 4> shift = load<4>(affine + (kChannels + column));
        EDET_UNROLL
        for (int half = 0; half < 2; half++) {
          float result[4];
          EDET_UNROLL
          for (int j = 0; j < 4; j++) {
            result[j] =
                scale.value[j] * sum[eight * 4 + i * 2 + j / 2][2 * half + j % 2] + shift.value[j];
          }
          change(result);
          v[half].value[2 * i] = pack<T>(result[0], result[1]);
          v[half].value[2 * i + 1] = pack<T>(result[2], result[3]);
        }
      }
      const int left = plan.c_out - first - eight * 8;
      if (y >= level.h || left <= 0) continue;
      if (x < level.w) store_some(reinterpret_cast<uint32_t*>(to) + eight * 4, v[0], left);
      if (x + 8 < level.w) {
        store_some(reinterpret_cast<uint32_t*>(to + 8 * bytes) + eight * 4, v[1], left);
      }
    }
  };
  const Activation activation = plan.post_activation;
  if (activation == Activation::none) return put([](float (&)[4]) {});
  put([&](float (&x)[4]) { activate<T>(x, activation); });
}

template <class T, int kRows, class Where>
EDET_DEVICE void compute_rows(const Plan& plan, const Where& where, Shared<T> patch,
                              Shared<uint32_t> taps, Shared<T> weights, Shared<float> affine) {
  const RowConvolution<T> convolution(patch, taps);
  const uint32_t lane = lane_of_warp();
  const Shared<T> right = weights + int(lane % 16 * kPitch + lane / 16 * 8);
  float sum[kRows][kColumns][4];
  const auto clear = [&] {
    EDET_UNROLL
    for (int row = 0; row < kRows; row++) {
      EDET_UNROLL
      for (int n = 0; n < kColumns; n++) {
        EDET_UNROLL
        for (int i = 0; i < 4; i++) sum[row][n][i] = 0.0f;
      }
    }
  };
  // Of 16 channels; convolve(group) gives a function that convolves a row.
  const auto add_product = [&](int group, const auto& convolve) {
    uint32_t left[kRows][4];
    EDET_UNROLL
    for (int i = 0; i < 2; i++) {
      const auto convolve_row = convolve(group + i);
      EDET_UNROLL
      for (int row = 0; row < kRows; row++) {
        float x[4];
        convolve_row(row, x);
        left[row][2 * i] = pack<T>(x[0], x[1]), left[row][2 * i + 1] = pack<T>(x[2], x[3]);
      }
    }
    EDET_UNROLL
    for (int n = 0; n < kColumns; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(right + (group * kGroup * kPitch + n * 8), b);
      EDET_UNROLL
      for (int row = 0; row < kRows; row++) {
        warp_mma<T>(sum[row][n], left[row], b[0], b[1]);
        warp_mma<T>(sum[row][n + 1], left[row], b[2], b[3]);
      }
    }
  };
  clear();
  EDET_LOOP
  for (int k = 0; k < kGroups; k += 2) {
    add_product(k, [&](int group) {
      const auto of_group = convolution.load_taps(group);
      return [&convolution, group, of_group](int row, float (&x)[4]) {
        convolution.convolve_row(row, group, of_group, x);
      };
    });
  }
  bool is_nan = false;  // of a pixel's channel: then of all its sums
  EDET_UNROLL
  for (int row = 0; row < kRows; row++) {
    is_nan = is_nan || is_nan_pair(sum[row][0][0], sum[row][0][2]);
  }
  if (ballot(is_nan)) {
    clear();
    EDET_LOOP
    for (int k = 0; k < kGroups; k += 2) {
      add_product(k, [&](int group) {
        return [group, patch, taps](int row, float (&x)[4]) {
          RowConvolution<T>::convolve_any(row, group, patch, taps, x);
        };
      });
    }
  }
  const Place at = where();
  EDET_UNROLL
  for (int row = 0; row < kRows; row++) store_row<T>(plan, at, row, affine, sum[row]);
}

// ---- a block ----

// Brings the weights to shared memory; zeros past them.
template <class T>
EDET_DEVICE void load_narrow_weights(const Plan& plan, Shared<uint32_t> taps, Shared<T> weights) {
  const int t = int(thread().x), c = plan.c;
  constexpr int kFours = kChannels * kChannels / 4 / kThreads;
  const int columns = round_up(plan.c_out, kPanel), column = t % 16 * 4;
  Vector<float, 4> v[kFours];
  EDET_UNROLL
  for (int i = 0; i < kFours; i++) {
    const int row = t / 16 + i * (kThreads / 16);
    v[i] = {};
    if (row < c && column < columns) {
      const int at = (column / kPanel * c + row) * kPanel + column % kPanel;
      v[i] = load_constant<float, 4>(plan.pw + at);
    }
  }
  constexpr int kParts = divide_up(9 * kChannels, kThreads);
  float tap[kParts];
  EDET_UNROLL
  for (int i = 0; i < kParts; i++) {
    const int number = t + i * kThreads, channel = number % kChannels;
    tap[i] = number < 9 * kChannels && channel < c
                 ? load_constant<float, 1>(plan.dw + number / kChannels * c + channel).value[0]
                 : 0.0f;
  }
  EDET_UNROLL
  for (int i = 0; i < kFours; i++) {
    const Shared<T> row = weights + (t / 16 + i * (kThreads / 16)) * kPitch;
    const float (&x)[4] = v[i].value;
    store(as<uint32_t>(row + place_of_column(column)), pack<T>(x[0], x[1]));
    store(as<uint32_t>(row + place_of_column(column + 2)), pack<T>(x[2], x[3]));
  }
  EDET_UNROLL
  for (int i = 0; i < kParts; i++) {
    const int number = t + i * kThreads, channel = number % kChannels;
    if (number >= 9 * kChannels) break;
    // where a diagonal matrix has it: the other number of its pair is zero
    store(taps + (channel * kTaps + number / kChannels),
          channel % 2 ? pack<T>(0.0f, tap[i]) : pack<T>(tap[i], 0.0f));
  }
}

// The same of a level's scales and shifts.
EDET_DEVICE void load_affine(const Plan& plan, int level, Shared<float> affine) {
  const int t = int(thread().x), column = t % kChannels;
  if (t >= 2 * kChannels) return;
  const float* const from = t < kChannels ? plan.level[level].scale : plan.level[level].shift;
  store(affine + t, column < plan.c_out ? load_constant<float, 1>(from + column).value[0] : 0.0f);
}

template <class T, FuseKind kKind, int kRows>
EDET_KERNEL(kThreads, 2)
narrow_node(EDET_PARAMS(Plan) plan) {
  EDET_SHARED(char, memory);
  const Shared<uint32_t> taps = as<uint32_t>(memory);
  const Shared<float> affine = as<float>(memory + kAffine);
  const Shared<T> weights = as<T>(memory + kWeights), patches = as<T>(memory + kPatches);
  griddep_launch();
  load_narrow_weights<T>(plan, taps, weights);
  load_affine(plan, 0, affine);
  // factors are read before a patch comes in their place
  const Shared<float> factors = as<float>(patches + (plan.patches - 1) * (kPatchBytes<kRows> / 2));
  if (kKind != FuseKind::one && thread().x == 0) {
    EdgeFactors(plan.weights, plan.edges, plan.c, 0).template store_to<T>(factors, 1);
  }
  sync_threads();
  constexpr int kEdges = PixelReader<T, kKind, kRows>::kEdges;
  const VectorFuser<T, kEdges> fuser(factors, plan.edges);
  if (plan.patches == 1) sync_threads();
  griddep_wait();
  int turn = 0, level = 0;
  for (int number = block().x; number < plan.tiles; number += int(grid_size().x)) {
    const Place at = place_of<kKind, kRows>(plan, number);
    const Shared<T> patch = patches + turn * (kPatchBytes<kRows> / 2);
    fuse_patch<T, kKind, kRows>(plan, at, fuser, patch);
    if (kKind == FuseKind::one && at.level != level) {
      sync_threads();  // all have stored the level before
      level = at.level;
      load_affine(plan, level, affine);
    }
    sync_threads();
    // where the tile is would otherwise take registers meanwhile
    const auto where = [&] { return place_of<kKind, kRows>(plan, opaque(number)); };
    compute_rows<T, kRows>(plan, where, patch, taps, weights, affine);
    if (plan.patches == 1) {
      sync_threads();
    } else {
      turn ^= 1;
    }
  }
}

// Blocks of a multiprocessor that its shared memory has room for, two at most.
template <int kRows>
int held(const Device& device, int patches) {
  const int bytes = kPatches + patches * kPatchBytes<kRows> + kReserved;
  return std::min(2, device.multiprocessor_bytes / bytes);
}

template <class T, FuseKind kKind, int kRows>
Error launch_rows(const FusionNodeParams& p, const Device& device, Stream stream, bool pdl) {
  Plan plan{};
  plan.levels = p.levels, plan.edges = p.edges;
  plan.c = static_cast<int>(p.c), plan.c_out = static_cast<int>(p.c_out);
  plan.weights = p.weights, plan.post_activation = p.post_activation;
  plan.dw = p.dw, plan.pw = p.pw;
  int64_t tiles = 0;
  for (int l = 0; l < p.levels; l++) {
    Level& level = plan.level[l];
    level.h = static_cast<int>(p.level[l].h), level.w = static_cast<int>(p.level[l].w);
    level.scale = p.level[l].scale, level.shift = p.level[l].shift, level.out = p.level[l].out;
    level.first_tile = static_cast<int>(tiles);
    level.across = divide_up(level.w, kWidth), level.down = divide_up(level.h, kHeight<kRows>);
    level.by_across = Divisor::by(static_cast<uint32_t>(level.across));
    level.by_down = Divisor::by(static_cast<uint32_t>(level.down));
    tiles += p.n * level.across * level.down;
    if (tiles > INT32_MAX) return kInvalidValue;
    const Edge* const edge = p.edge + l;
    const auto source = [](const Edge& e) {
      return Source{e.data, static_cast<int>(e.h), static_cast<int>(e.w)};
    };
    level.source[0] = source(edge[0]);
    if (kKind == FuseKind::one) continue;
    level.source[1] = source(edge[p.edges > 2 ? 1 : 0]);
    level.source[2] = source(edge[p.edges - 1]);
    level.before_y = static_cast<int>(edge[p.edges - 1].rows.before);
    level.before_x = static_cast<int>(edge[p.edges - 1].columns.before);
  }
  plan.tiles = static_cast<int>(tiles);
  const int most = held<kRows>(device, 1);
  plan.patches = held<kRows>(device, 2) == most ? 2 : 1;
  const int bytes = kPatches + plan.patches * kPatchBytes<kRows>;
  const int64_t room = int64_t(device.multiprocessors) * std::max(1, most);
  const int64_t blocks = std::min(tiles, room);
  return launch(narrow_node<T, kKind, kRows>, Dim3(static_cast<unsigned>(blocks)), Dim3(kThreads),
                static_cast<size_t>(bytes), stream, plan, pdl);
}

template <class T, FuseKind kKind>
Error launch_kind(const FusionNodeParams& p, const Device& device, Stream stream, bool pdl) {
  // warps with two rows read weights half as often, and tiles have less of a halo
  int64_t tiles = 0;
  for (int l = 0; l < p.levels; l++) {
    const NodeLevel& level = p.level[l];
    tiles += p.n * divide_up(level.h, int64_t(kHeight<2>)) * divide_up(level.w, int64_t(kWidth));
  }
  if constexpr (kKind != FuseKind::up) {  // which the bytes of its pooled map bound
    if (tiles >= device.multiprocessors && held<2>(device, 1) == 2) {
      return launch_rows<T, kKind, 2>(p, device, stream, pdl);
    }
  }
  return launch_rows<T, kKind, 1>(p, device, stream, pdl);
}

template <class T>
Error launch_type(const FusionNodeParams& p, const Device& device, Stream stream, bool pdl) {
  switch (kind_of_levels(p, true)) {
    case FuseKind::one: return launch_kind<T, FuseKind::one>(p, device, stream, pdl);
    case FuseKind::down: return launch_kind<T, FuseKind::down>(p, device, stream, pdl);
    case FuseKind::up: return launch_kind<T, FuseKind::up>(p, device, stream, pdl);
    case FuseKind::any: break;
  }
  return kInvalidValue;
}

}  // namespace

bool is_narrow_node(const FusionNodeParams& p, int capability) {
  if (p.dtype == DType::f32 || capability < 80) return false;
  if (p.c > kChannels || p.c_out > kChannels || p.c % 8 || p.c_out % 4) return false;
  int64_t pixels = 0;
  for (int l = 0; l < p.levels; l++) {
    pixels += p.n * p.level[l].h * p.level[l].w;
    if (!is_aligned(p.level[l].out)) return false;
  }
  if (pixels < kLeastPixels) return false;
  for (int e = 0; e < p.edges * p.levels; e++) {
    if (!is_aligned(p.edge[e].data)) return false;
  }
  return kind_of_levels(p, true) != FuseKind::any;
}

Error narrow_node(const FusionNodeParams& p, Stream stream, bool pdl) {
  Device device;
  const Error error = current_device(&device);
  if (error != kSuccess) return error;
  return p.dtype == DType::f16 ? launch_type<f16>(p, device, stream, pdl)
                               : launch_type<bf16>(p, device, stream, pdl);
}

}  // namespace edet::cuda
