// The CUDA kernels for the first layer: normalise, 3×3 stride-2 convolution, batch norm,
// activation.
//
// Floors. Bytes: the image and the output once; with 32 channels of 16 bits the output is 64 bytes
// a pixel and the image 12 (of uint8). Operations: 2·27·C_out a pixel, 23 a byte, which FMA would
// take longer for than the bytes take.
// Budget: 128 registers, tensor cores.
//
// A block brings the image's part below a tile of output pixels to shared memory. Of 16-bit maps, a
// warp multiplies it, rounded to the map's type, by the weights: a row of the product is a pixel,
// of which a tap row is nine numbers that follow each other. Floats are multiplied by FMA.
#include "stem.h"

#include <algorithm>

#include "block_mma.cuh"
#include "fusion.cuh"
#include "warp_mma.cuh"

namespace edet::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 3;               // per multiprocessor, which leaves a thread 80 registers
constexpr int kHeight = 4, kWidth = 16;  // of a block's output tile
constexpr int kRows = 2 * kHeight + 1, kColumns = 2 * kWidth + 1;
constexpr int kTaps = 27;
constexpr int kImage = kRows * kColumns * 3 + 1;  // floats; weights begin at a multiple of 16 bytes

struct Plan {
  StemParams p;
  int across, down;  // tiles of an image
  int padded;        // channels, a multiple of 16
  bool aligned;
};

template <class I, class T>
EDET_KERNEL(kThreads, kBlocks)
convolve(EDET_PARAMS(Plan) plan) {
  constexpr int V = kVector<T>;
  const StemParams& p = plan.p;
  EDET_SHARED(float, image);
  const Shared<float> weights = image + kImage;  // (27, padded), in groups of 4 of each V channels
  const auto place = [&](int tap, int channel) {
    return tap * plan.padded + channel % V / 4 * (plan.padded / (V / 4)) + channel / V * 4 +
           channel % 4;
  };
  for (int i = thread().x; i < kTaps * plan.padded; i += kThreads) {
    const int channel = i % plan.padded, tap = i / plan.padded;
    const int at = (channel / kPanel * kTaps + tap) * kPanel + channel % kPanel;
    store(weights + place(tap, channel), load_constant<float, 1>(p.weight + at).value[0]);
  }

  const int tiles = plan.across * plan.down;
  for (int64_t tile = block().x; tile < p.n * tiles; tile += grid_size().x) {
    const int64_t n = tile / tiles;
    const int y0 = int(tile % tiles) / plan.across * kHeight;
    const int x0 = int(tile % tiles) % plan.across * kWidth;
    sync_threads();  // the tile before is done
    for (int i = thread().x; i < kRows * kColumns * 3; i += kThreads) {
      const int channel = i % 3, column = i / 3 % kColumns, row = i / 3 / kColumns;
      const int64_t y = int64_t(y0) * 2 - p.pad_top + row,
                    x = int64_t(x0) * 2 - p.pad_left + column;
      float value = 0.0f;  // the padding is zero after normalisation
      if (y >= 0 && y < p.h && x >= 0 && x < p.w) {
        const I* from = static_cast<const I*>(p.image) + n * p.stride[0] + channel * p.stride[1] +
                        y * p.stride[2] + x * p.stride[3];
        value = to_float(load_constant<I, 1>(from).value[0]);
        if (p.mean) {
          value = (value - load_constant<float, 1>(p.mean + channel).value[0]) /
                  load_constant<float, 1>(p.std + channel).value[0];
        }
      }
      store(image + i, value);
    }
    sync_threads();
    const int vectors = int(divide_up(p.c_out, V));
    for (int i = thread().x; i < kHeight * kWidth * vectors; i += kThreads) {
      const int channel = i % vectors * V, pixel = i / vectors;
      const int y = y0 + pixel / kWidth, x = x0 + pixel % kWidth;
      if (y >= p.out_h || x >= p.out_w) continue;
      float sum[V] = {};
      Shared<float> from = image + (pixel / kWidth * 2 * kColumns + pixel % kWidth * 2) * 3;
      Shared<float> w = weights + place(0, channel);
      EDET_LOOP
      for (int dy = 0; dy < 3; dy++) {
        EDET_UNROLL
        for (int i = 0; i < kTaps / 3; i++) {  // three neighbouring pixels' three channels
          const float in = get(from + i);
          EDET_UNROLL
          for (int group = 0; group < V / 4; group++) {
            const Vector<float, 4> four = load<4>(w + group * (plan.padded / (V / 4)));
            EDET_UNROLL
            for (int j = 0; j < 4; j++) sum[group * 4 + j] += in * four.value[j];
          }
          w = w + plan.padded;
        }
        from = from + kColumns * 3;
      }
      EDET_UNROLL
      for (int j = 0; j < V; j += 2) {
        const Affine f = load_affine(p.scale, p.shift, channel + j, p.c_out, plan.aligned);
        EDET_UNROLL
        for (int k = 0; k < 2; k++) sum[j + k] = f.scale[k] * sum[j + k] + f.shift[k];
      }
      activate<T>(sum, p.activation);
      const Vector<T, V> result = from_floats<T>(sum);
      T* to = static_cast<T*>(p.out) + ((n * p.out_h + y) * p.out_w + x) * p.c_out + channel;
      if (plan.aligned) {
        store(to, result);
      } else {
        EDET_UNROLL
        for (int j = 0; j < V; j++) {
          if (channel + j < p.c_out) store(to + j, result.value[j]);
        }
      }
    }
  }
}

// The same by tensor cores, in tiles of a row for each warp. The product's depth is 32: of each tap
// row nine numbers and one that is left out, in pairs as lanes hold them, and a pair of zeros.
constexpr int kMmaThreads = 128;
constexpr int kMmaHeight = kMmaThreads / kWarp, kMmaWidth = 32;
constexpr int kMmaRows = 2 * kMmaHeight + 1, kMmaColumns = 2 * kMmaWidth + 1;
constexpr int kPitch = (kMmaColumns * 3 + 1) / 2;  // words, pairs of numbers, of the image's rows
constexpr int kPairs = 5;                          // of a tap row
constexpr int kGroup = 32;                         // channels that a warp multiplies together
constexpr int kGroupWords = 16 * kWarp;            // of their weights

// A lane's weights for a group: words 4i to 4i + 3 are those of column i of its columns, for
// pairs t, t + 4, t + 8 and t + 12 of the depth, with t its number in four. Columns are such that
// in a row of sums the lane has eight channels that follow each other.
template <class T>
EDET_DEVICE void load_fragments(const StemParams& p, int groups, Shared<uint32_t> to) {
  for (int i = thread().x; i < groups * kGroupWords; i += kMmaThreads) {
    const int part = i % 4, lane = i / 4 % kWarp, tile = i / (4 * kWarp) % 4;
    const int pair = lane % 4 + part * 4, g = lane / 4;
    const int channel = i / kGroupWords * kGroup + g / 2 * 8 + tile * 2 + g % 2;
    float w[2] = {};
    EDET_UNROLL
    for (int j = 0; j < 2; j++) {
      const int number = pair % kPairs * 2 + j, tap = pair / kPairs * 9 + number;
      if (number == 9 || tap >= kTaps || channel >= p.c_out) continue;
      const int64_t at = (int64_t(channel / kPanel) * kTaps + tap) * kPanel + channel % kPanel;
      w[j] = load_constant<float, 1>(p.weight + at).value[0];
    }
    store(to + i, pack<T>(w[0], w[1]));
  }
}

// What a thread brings of a tile's image to shared memory: every 256th pixel. It reads the next
// tile's while the block works on this one.
template <class I, class T>
class ImagePart {
  static constexpr int kParts = divide_up(kMmaRows * kMmaColumns, kMmaThreads);

 public:
  EDET_DEVICE explicit ImagePart(const StemParams& p) : p_(p) {
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) {
      const int i = int(thread().x) + j * kMmaThreads, row = i / kMmaColumns,
                column = i % kMmaColumns;
      place_[j] = row << 16 | column;
      offset_[j] = row * int(p.stride[2]) + column * int(p.stride[3]);
    }
  }

  EDET_DEVICE void load(int64_t n, int y0, int x0) {
    const int top = y0 * 2 - int(p_.pad_top), left = x0 * 2 - int(p_.pad_left);
    const I* const first = opaque(static_cast<const I*>(p_.image) + n * p_.stride[0] +
                                  top * p_.stride[2] + left * p_.stride[3]);
    real_ = 0;
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) {
      const int row = place_[j] >> 16, column = place_[j] & 0xffff;
      const bool real = exists(j, row) && uint32_t(top + row) < uint32_t(p_.h) &&
                        uint32_t(left + column) < uint32_t(p_.w);
      if (!real) continue;
      real_ |= 1u << j;
      const I* const from = first + offset_[j];
      EDET_UNROLL
      for (int c = 0; c < 3; c++) {
        v_[j][c] = load_constant<I, 1>(from + c * p_.stride[1]).value[0];
      }
    }
  }

  // `normal` are factors of the channels and what is added then.
  EDET_DEVICE void store_to(Shared<T> image, Shared<float> normal) const {
    const Vector<float, 4> one = ::edet::cuda::load<4>(normal),
                           two = ::edet::cuda::load<4>(normal + 4);
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) {
      const int row = place_[j] >> 16, column = place_[j] & 0xffff;
      if (!exists(j, row)) break;
      const Shared<T> to = image + (row * 2 * kPitch + column * 3);
      EDET_UNROLL
      for (int c = 0; c < 3; c++) {
        // the padding is zero after normalisation
        const float x = as_float(v_[j][c]) * one.value[c] + two.value[c];
        store(to + c, from_float<T>(real_ & 1u << j ? x : 0.0f));
      }
    }
  }

 private:
  EDET_DEVICE static bool exists(int j, int row) {
    return (j + 1) * kMmaThreads <= kMmaRows * kMmaColumns || row < kMmaRows;
  }
  // A byte by an addition: a conversion takes as long as an exponential.
  EDET_DEVICE static float as_float(I x) {
    if constexpr (std::is_same_v<I, uint8_t>) {
      constexpr float kOne = 8388608.0f;  // 2²³: its last bit is worth 1
      return bits_float(float_bits(kOne) | x) - kOne;
    } else {
      return to_float(x);
    }
  }

  const StemParams& p_;
  int place_[kParts], offset_[kParts];  // rows and columns of the tile, elements of the image
  uint32_t real_;                       // a bit for each that is in the image
  I v_[kParts][3];
};

constexpr int kMmaBlocks = 4;  // of a multiprocessor

template <class I, class T>
EDET_KERNEL(kMmaThreads, kMmaBlocks)
multiply_pixels(EDET_PARAMS(Plan) plan) {
  constexpr int V = 8;
  const StemParams& p = plan.p;
  const int groups = divide_up(int(p.c_out), kGroup), tiles = plan.across * plan.down;
  EDET_SHARED(uint32_t, image);
  const Shared<uint32_t> weights = image + round_up(kMmaRows * kPitch, 4);
  const Shared<float> affine = as<float>(weights + groups * kGroupWords);  // scales, then shifts
  const Shared<float> normal = affine + 2 * groups * kGroup;               // factors, then shifts
  ImagePart<I, T> part(p);
  int n, y0, x0;  // of the tile that is read
  const auto begin = [&](int tile) {
    const int rest = tile % tiles;
    n = tile / tiles, y0 = rest / plan.across * kMmaHeight, x0 = rest % plan.across * kMmaWidth;
    part.load(n, y0, x0);
  };
  const int all = int(p.n) * tiles, c_out = int(p.c_out), out_w = int(p.out_w);
  begin(int(block().x));
  load_fragments<T>(p, groups, weights);
  for (int i = thread().x; i < groups * kGroup; i += kMmaThreads) {
    const bool real = i < p.c_out;
    store(affine + i, real ? load_constant<float, 1>(p.scale + i).value[0] : 0.0f);
    store(affine + (groups * kGroup + i),
          real ? load_constant<float, 1>(p.shift + i).value[0] : 0.0f);
  }

  if (thread().x < 3) {
    const int c = thread().x;
    const float mean = p.mean ? load_constant<float, 1>(p.mean + c).value[0] : 0.0f;
    const float deviation = p.mean ? load_constant<float, 1>(p.std + c).value[0] : 1.0f;
    const float factor = rcp_approx(deviation);
    store(normal + c, factor);
    store(normal + (4 + c), -mean * factor);
  }

  // where a lane's pairs are, for its first pixel, and what of them counts
  const int lane = thread().x % kWarp, row = thread().x / kWarp, g = lane / 4, t = lane % 4;
  Shared<uint32_t> from[4];
  uint32_t mask[4];
  EDET_UNROLL
  for (int i = 0; i < 4; i++) {
    const int pair = t + 4 * i, dy = pair / kPairs, number = pair % kPairs;
    const bool real = dy < 3;
    mask[i] = !real ? 0 : number == kPairs - 1 ? 0xffffu : ~0u;
    from[i] = image + (real ? (2 * row + dy) * kPitch + number : 0) + 3 * g;
  }
  for (int tile = block().x; tile < all; tile += grid_size().x) {
    const int y = y0 + row, x = x0 + g;
    T* const out =
        static_cast<T*>(p.out) + ((int64_t(n) * p.out_h + y) * out_w + x) * c_out + t * V;
    sync_threads();  // the tile before is done, and all is there for the first
    part.store_to(as<T>(image), normal);
    sync_threads();
    if (tile + grid_size().x < all) begin(tile + grid_size().x);
    if (y >= p.out_h) continue;
    for (int group = 0; group < groups; group++) {
      const int first = group * kGroup + t * V;
      Vector<uint32_t, 4> b[4];
      EDET_UNROLL
      for (int i = 0; i < 4; i++) {
        b[i] = load<4>(weights + (group * kGroupWords + (i * kWarp + lane) * 4));
      }
      EDET_UNROLL
      for (int column = 0; column < kMmaWidth; column += 16) {
        uint32_t a[2][4];
        EDET_UNROLL
        for (int i = 0; i < 4; i++) {
          EDET_UNROLL
          for (int half = 0; half < 2; half++) {
            a[i / 2][i % 2 * 2 + half] = get(from[i] + 3 * (column + 8 * half)) & mask[i];
          }
        }
        float d[4][4] = {};
        EDET_UNROLL
        for (int i = 0; i < 4; i++) {
          warp_mma<T>(d[i], a[0], b[i].value[0], b[i].value[1]);
          warp_mma<T>(d[i], a[1], b[i].value[2], b[i].value[3]);
        }
        float scale[V], shift[V];
        EDET_UNROLL
        for (int i = 0; i < V; i += 4) {
          const Vector<float, 4> one = load<4>(affine + (first + i));
          const Vector<float, 4> two = load<4>(affine + (groups * kGroup + first + i));
          EDET_UNROLL
          for (int j = 0; j < 4; j++) scale[i + j] = one.value[j], shift[i + j] = two.value[j];
        }
        EDET_UNROLL
        for (int half = 0; half < 2; half++) {
          float v[V];
          EDET_UNROLL
          for (int i = 0; i < V; i++) {
            v[i] = scale[i] * d[i / 2][half * 2 + i % 2] + shift[i];
          }
          activate<T>(v, p.activation);
          const int dx = column + 8 * half;
          if (x + dx >= out_w || first >= c_out) continue;
          const Vector<T, V> result = from_floats<T>(v);
          T* const to = out + (dx * c_out + group * kGroup);
          if (plan.aligned) {
            store(to, result);
          } else {
            EDET_UNROLL
            for (int i = 0; i < V; i++) {
              if (first + i < c_out) store(to + i, result.value[i]);
            }
          }
        }
      }
    }
  }
}

template <class I, class T>
Error launch_convolve(const StemParams& p, Stream stream) {
  constexpr bool kMma = sizeof(T) == 2;
  constexpr int kTileWidth = kMma ? kMmaWidth : kWidth, kTileHeight = kMma ? kMmaHeight : kHeight;
  Device device;
  const Error error = current_device(&device);
  if (error != kSuccess) return error;
  Plan plan{};
  plan.p = p;
  plan.across = static_cast<int>(divide_up(p.out_w, kTileWidth));
  plan.down = static_cast<int>(divide_up(p.out_h, kTileHeight));
  plan.padded = static_cast<int>(padded(p.c_out));
  plan.aligned = p.c_out % kVector<T> == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  const int groups = static_cast<int>(divide_up(p.c_out, kGroup));
  const int words = kMma ? round_up(kMmaRows * kPitch, 4) + groups * (kGroupWords + 2 * kGroup) + 8
                         : kImage + kTaps * plan.padded;
  const int64_t tiles = p.n * plan.across * plan.down;
  // of the image's part below a tile
  const bool near = kMmaRows * p.stride[2] + kMmaColumns * p.stride[3] <= INT32_MAX;
  if (4 * words > device.shared_bytes || tiles > INT32_MAX || (kMma && !near)) return kInvalidValue;
  const int64_t blocks =
      std::min(tiles, int64_t(kMma ? kMmaBlocks : kBlocks) * device.multiprocessors);
  const auto start = [&](auto kernel) {
    return launch(kernel, Dim3(static_cast<unsigned>(blocks)), Dim3(kMma ? kMmaThreads : kThreads),
                  static_cast<size_t>(4 * words), stream, plan);
  };
  if constexpr (kMma) {
    return start(multiply_pixels<I, T>);
  } else {
    return start(convolve<I, T>);
  }
}

template <class T>
Error launch_type(const StemParams& p, Stream stream) {
  return p.is_uint8 ? launch_convolve<uint8_t, T>(p, stream) : launch_convolve<T, T>(p, stream);
}

}  // namespace

Error stem(const StemParams& p, Stream stream) {
  if (p.n * p.c_out == 0) return kSuccess;
  switch (p.dtype) {
    case DType::f32: return launch_type<float>(p, stream);
    case DType::f16: return launch_type<f16>(p, stream);
    case DType::bf16: return launch_type<bf16>(p, stream);
  }
  return kInvalidValue;
}

}  // namespace edet::cuda
