// The CUDA kernels for an inverted residual block: expand, depthwise and pooled sums, and the gates
// of squeeze-excite here; products by the kernels of gemm.cu and lateral.cu, the depthwise
// convolution of an expanded map by that of depthwise.cu.
//
// Floors. Bytes: the input, the expanded map written and read, the map after the depthwise
// convolution written and read, the output, the weights.
// Operations: 2·pixels·C_mid·(C_in + k² + C_out).
// Budget: 128 registers, tensor cores.
//
// Maps of floats are expanded where they are convolved. A block owns a tile of output pixels and 64
// channels of the middle. It expands the tile and its halo, 32 or 64 pixels at a time, into shared
// memory, convolves, adds up and multiplies the sums by its channels' part of squeeze-excite's
// first weights. Sums are added in a fixed order. Maps of 16 bits are expanded through memory.
#include "mbconv.h"

#include <algorithm>

#include "block_mma.cuh"
#include "depthwise.h"
#include "fusion.cuh"
#include "gemm.h"
#include "lateral.h"
#include "squeeze.cuh"

namespace edet::cuda {
namespace {

constexpr int kMiddle = 64;  // channels of a block
constexpr int kWidth = 8;    // of its tile
constexpr int kMostTaps = 25;

// ---- maps of floats: expanded where they are convolved ----

struct Plan {
  MbconvParams p;
  int height;        // of a tile
  int across, down;  // tiles of an image
  int chunks;        // of middle channels
  int parts;         // of an image's pooled sums: blocks
  bool aligned_in;
};

// A tile's height: its patch of expanded pixels, (height·stride + k − stride) × (8·stride + k −
// stride) of 64 channels, is to leave room for two blocks on a multiprocessor. `low`: half of that,
// for maps of few tiles.
EDET_EVERYWHERE constexpr int tile_height(int stride, bool low) {
  return 4 / stride / (low ? 2 : 1);
}
// Blocks of a product of 64 rows are those of low tiles: fewer steps wait for each other.
template <class Mma>
constexpr bool kLow = Mma::kRows == 64;

// Bytes of shared memory, where they begin: the patch, the operands, where the patch's pixels are
// in the input, scales and shifts of the expansion and of the depthwise convolution, its weights,
// sums of warps.
struct Memory {
  int a, w, source, affine, dw, sums, bytes;
};
template <class Mma>
EDET_EVERYWHERE constexpr Memory memory_of(int height, int kernel, int stride) {
  const int rows = (height - 1) * stride + kernel, columns = (kWidth - 1) * stride + kernel;
  Memory m{};
  m.a = rows * columns * kMiddle * 4;
  m.w = m.a + Mma::kBytesA;
  m.source = m.w + Mma::kBytesW;
  m.affine = m.source + round_up(rows * columns * 4, 16);
  m.dw = m.affine + 4 * kMiddle * 4;
  m.sums = m.dw + kMostTaps * kMiddle * 4;
  m.bytes = m.sums + (1 + kProductThreads / kWarp) * kMiddle * 4;
  return m;
}

// What a thread brings of a block's depthwise weights to shared memory: all its reads are on their
// way before the first is stored.
class TapPart {
 public:
  EDET_DEVICE TapPart(const float* dw, int taps, int c_mid, int first) : taps_(taps) {
    const bool aligned = c_mid % 4 == 0;
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) {
      const int i = int(thread().x) + j * kProductThreads, channel = first + i % kFours * 4;
      v_[j] = {};
      if (i >= taps * kFours || channel >= c_mid) continue;
      const float* const from = dw + i / kFours * c_mid + channel;
      if (aligned) {
        v_[j] = load_constant<float, 4>(from);
      } else {
        EDET_UNROLL
        for (int l = 0; l < 4; l++)
          if (channel + l < c_mid) v_[j].value[l] = load_constant<float, 1>(from + l).value[0];
      }
    }
  }
  EDET_DEVICE void store_to(Shared<float> dw) const {
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) {
      const int i = int(thread().x) + j * kProductThreads;
      if (i < taps_ * kFours) store(dw + i * 4, v_[j]);
    }
  }

 private:
  static constexpr int kFours = kMiddle / 4;
  static constexpr int kParts = divide_up(kMostTaps * kFours, kProductThreads);
  const int taps_;
  Vector<float, 4> v_[kParts];
};

// What a thread brings of a patch's pixels to the product's left operand: one vector of every 32nd,
// read while the block works on the chunk before.
template <class Mma>
class PixelPart {
  static constexpr int V = kVector<float>, kStep = kProductThreads / kVectors;
  static constexpr int kParts = Mma::kRows / kStep;

 public:
  EDET_DEVICE PixelPart(const float* image, int c, bool aligned)
      : image_(image), c_(c), aligned_(aligned) {}

  // Goes to the first channels of pixels [row0, row0 + kRows), of `pixels`.
  EDET_DEVICE void begin(Shared<int> source, int row0, int pixels) {
    const int vector = thread().x % kVectors;
    left_ = c_ - vector * V;
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) {
      const int pixel = row0 + int(thread().x) / kVectors + j * kStep;
      const int at = pixel < pixels ? get(source + pixel) : -1;
      real_[j] = at >= 0;
      from_[j] = image_ + int64_t(max(at, 0)) * c_ + vector * V;
    }
  }
  // Reads the next chunk's channels; zeros where there are none.
  EDET_DEVICE void load() {
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) {
      v_[j] = {};
      if (real_[j] && left_ > 0) v_[j] = load_pixel(from_[j], left_, aligned_);
      from_[j] += kChunk<float>;
    }
    left_ -= kChunk<float>;
  }
  EDET_DEVICE void store_to(Shared<float> a) const {
    a = a + (thread().x / kVectors * Mma::kPitchA + thread().x % kVectors * V);
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) store(a + j * kStep * Mma::kPitchA, as_operands<Mma>(v_[j]));
  }

 private:
  const float* const image_;
  const int c_;
  const bool aligned_;
  int left_ = 0;  // channels
  const float* from_[kParts] = {};
  bool real_[kParts] = {};
  Vector<float, V> v_[kParts];
};

// The patch's pixels as the depthwise convolution reads them: expanded and activated; zero outside.
// `source` says where they are in the image, or that they are not.
template <class Mma>
EDET_DEVICE void expand_patch(const Plan& plan, int64_t image, int pixels, int first,
                              Shared<char> memory, const Memory& at) {
  constexpr int V = kVector<float>;
  const MbconvParams& p = plan.p;
  const Shared<float> patch = as<float>(memory);
  const Shared<int> source = as<int>(memory + at.source);
  const Shared<float> affine = as<float>(memory + at.affine);
  const int c = int(p.c_in), chunks = divide_up(c, kChunk<float>);
  const float* const input = static_cast<const float*>(p.input) + image * p.h * p.w * c;
  if (!p.expand) {
    for (int i = thread().x; i < pixels * (kMiddle / V); i += kProductThreads) {
      const int vector = i % (kMiddle / V), pixel = i / (kMiddle / V);
      const int channel = first + vector * V, from = get(source + pixel);
      Vector<float, V> v{};
      if (from >= 0 && channel < c) {
        v = load_pixel(input + int64_t(from) * c + channel, c - channel, plan.aligned_in);
      }
      store(patch + (pixel * kMiddle + vector * V), v);
    }
    return;
  }
  WeightPart<Mma> weights;
  PixelPart<Mma> rows(input, c, plan.aligned_in);
  bool with_weights = true;  // that are not in shared memory yet
  const auto begin = [&](int row0) {
    if (with_weights) weights.begin(p.expand, c, int(p.c_mid), first, kMiddle);
    rows.begin(source, row0, pixels);
  };
  const auto load_next = [&] {
    if (with_weights) weights.load();
    rows.load();
  };
  const Shared<float> a = as<float>(memory + at.a), w = as<float>(memory + at.w);
  begin(0);
  load_next();
  for (int row0 = 0; row0 < pixels; row0 += Mma::kRows) {
    const bool last_rows = row0 + Mma::kRows >= pixels;
    Mma product;
    for (int chunk = 0; chunk < chunks; chunk++) {
      const bool last = chunk + 1 == chunks;
      sync_threads();  // the operands before are no longer read
      if (with_weights) weights.store_to(w);
      rows.store_to(a);
      if (last && !last_rows) {
        if (chunks == 1) with_weights = false;  // they stay where they are
        begin(row0 + Mma::kRows);
      }
      if (!last || !last_rows) load_next();
      sync_threads();
      const int depth = round_up(min(kChunk<float>, c - chunk * kChunk<float>), kDepth);
      product.mma(a, w, depth, kMiddle);
    }
    // all of a thread's sums are activated together, so that they wait for each other's results
    constexpr int kSums = Mma::kRows * Mma::kColumns / kProductThreads;
    float x[kSums];
    int sums = 0;
    product.each(
        [&](int column) {
          const Vector<float, 2> scale = load<2>(affine + column);
          const Vector<float, 2> shift = load<2>(affine + (kMiddle + column));
          return Affine{{scale.value[0], scale.value[1]}, {shift.value[0], shift.value[1]}};
        },
        [] {},
        [&](const Affine& f, int, int, float one, float two) {
          x[sums++] = f.scale[0] * one + f.shift[0];
          x[sums++] = f.scale[1] * two + f.shift[1];
        });
    activate<float>(x, p.activation);
    sums = 0;
    product.each([](int) { return 0; }, [] {},
                 [&](int, int row, int column, float, float) {
                   const Vector<float, 2> two{{x[sums], x[sums + 1]}};
                   sums += 2;
                   if (row0 + row >= pixels) return;
                   const bool inside = get(source + (row0 + row)) >= 0;
                   const Vector<float, 2> v = inside ? two : Vector<float, 2>{};
                   store(patch + ((row0 + row) * kMiddle + column), v);
                 });
  }
}

// Convolves the patch depthwise. A warp computes a column of the tile, each lane one channel of all
// its rows, as in node_tile.cuh. done(channel, sums) takes the results.
template <int kKernel, int kStride, bool kIsLow, class Done>
EDET_DEVICE void convolve(Shared<float> patch, Shared<float> dw, const Done& done) {
  constexpr int kDown = tile_height(kStride, kIsLow);
  constexpr int kRows = (kDown - 1) * kStride + kKernel;
  constexpr int kColumns = (kWidth - 1) * kStride + kKernel;
  static_assert(kProductThreads == kWarp * kWidth, "a warp for each column");
  const int lane = thread().x % kWarp, x = thread().x / kWarp * kStride;
  EDET_LOOP
  for (int channel = lane; channel < kMiddle; channel += kWarp) {
    float sum[kDown] = {};
    EDET_LOOP
    for (int dx = 0; dx < kKernel; dx++) {
      float w[kKernel];
      EDET_UNROLL
      for (int dy = 0; dy < kKernel; dy++) {
        w[dy] = get(dw + ((dy * kKernel + dx) * kMiddle + channel));
      }
      EDET_UNROLL
      for (int r = 0; r < kRows; r++) {
        const float in = get(patch + ((r * kColumns + x + dx) * kMiddle + channel));
        EDET_UNROLL
        for (int dy = 0; dy < kKernel; dy++) {
          if (r < dy || (r - dy) % kStride != 0 || (r - dy) / kStride >= kDown) continue;
          sum[(r - dy) / kStride] += w[dy] * in;
        }
      }
    }
    done(channel, sum);
  }
}

template <class Mma>
EDET_KERNEL(kProductThreads, 2)
expand(EDET_PARAMS(Plan) plan) {
  constexpr int kWarps = kProductThreads / kWarp;
  const MbconvParams& p = plan.p;
  EDET_SHARED(char, memory);
  griddep_launch();
  const Memory at = memory_of<Mma>(plan.height, p.kernel, p.stride);
  const Shared<float> patch = as<float>(memory);
  const Shared<int> source = as<int>(memory + at.source);
  const Shared<float> dw = as<float>(memory + at.dw), sums = as<float>(memory + at.sums),
                      affine = as<float>(memory + at.affine);
  const int tiles = plan.across * plan.down, c_mid = int(p.c_mid);
  const int64_t image = block().x / (tiles * plan.chunks);
  const int tile = block().x / plan.chunks % tiles;
  const int first = block().x % plan.chunks * kMiddle;  // chunks of a tile share its input
  const int y0 = tile / plan.across * plan.height, x0 = tile % plan.across * kWidth;
  const int columns = (kWidth - 1) * p.stride + p.kernel;
  const int pixels = ((plan.height - 1) * p.stride + p.kernel) * columns;
  const int taps = p.kernel * p.kernel;

  // what is small is on its way while the pixels are looked up
  const TapPart tap_part(p.dw, taps, c_mid, first);
  static_assert(kProductThreads == 4 * kMiddle, "a scale or shift for each thread");
  const int which = int(thread().x) / kMiddle, own = first + int(thread().x) % kMiddle;
  const float* const factors = which == 0   ? p.expand_scale
                               : which == 1 ? p.expand_shift
                               : which == 2 ? p.dw_scale
                                            : p.dw_shift;
  const bool real = own < c_mid && (which > 1 || p.expand);
  const float factor = real ? load_constant<float, 1>(factors + own).value[0] : 0.0f;
  for (int i = thread().x; i < pixels; i += kProductThreads) {
    const int y = int(y0 * p.stride - p.pad_top) + i / columns;
    const int x = int(x0 * p.stride - p.pad_left) + i % columns;
    const bool inside = y >= 0 && y < p.h && x >= 0 && x < p.w;
    store(source + i, inside ? int(y * p.w + x) : -1);
  }
  tap_part.store_to(dw);
  store(affine + int(thread().x), factor);
  sync_threads();
  expand_patch<Mma>(plan, image, pixels, first, memory, at);
  sync_threads();

  const int x = x0 + int(thread().x) / kWarp;
  float* const mid =
      p.mid + ((image * p.out_h + y0) * p.out_w + min(x, int(p.out_w) - 1)) * c_mid + first;
  const auto done = [&](int channel, auto& sum) {
    constexpr int kDown = sizeof(sum) / sizeof(sum[0]);
    float total = 0.0f;
    const float scale = get(affine + (2 * kMiddle + channel));
    const float shift = get(affine + (3 * kMiddle + channel));
    EDET_UNROLL
    for (int row = 0; row < kDown; row++) sum[row] = scale * sum[row] + shift;
    activate<float>(sum, p.activation);
    EDET_UNROLL
    for (int row = 0; row < kDown; row++) {
      if (y0 + row >= p.out_h || x >= p.out_w) break;
      total += sum[row];
      if (first + channel < c_mid) store(mid + int64_t(row) * p.out_w * c_mid + channel, sum[row]);
    }
    store(sums + (int(thread().x) / kWarp * kMiddle + channel), total);
  };
  if (p.kernel == 3) {
    p.stride == 1 ? convolve<3, 1, kLow<Mma>>(patch, dw, done)
                  : convolve<3, 2, kLow<Mma>>(patch, dw, done);
  } else {
    p.stride == 1 ? convolve<5, 1, kLow<Mma>>(patch, dw, done)
                  : convolve<5, 2, kLow<Mma>>(patch, dw, done);
  }
  if (!p.c_reduced) return;

  sync_threads();
  if (thread().x < kMiddle) {
    float sum = 0.0f;
    EDET_UNROLL
    for (int g = 0; g < kWarps; g++) sum += get(sums + (g * kMiddle + int(thread().x)));
    store(sums + int(thread().x), sum);
  }
  sync_threads();
  reduce_part(p, first, kMiddle, kProductThreads, sums, sums + kMiddle,
              p.sums + int64_t(block().x) * p.c_reduced);
}

Plan plan_of(const MbconvParams& p, bool low) {
  Plan plan{};
  plan.p = p;
  plan.height = tile_height(p.stride, low);
  plan.across = static_cast<int>(divide_up(p.out_w, kWidth));
  plan.down = static_cast<int>(divide_up(p.out_h, plan.height));
  plan.chunks = static_cast<int>(divide_up(p.c_mid, kMiddle));
  plan.parts = plan.across * plan.down * plan.chunks;
  plan.aligned_in = p.c_in % kVector<float> == 0;
  return plan;
}

int64_t blocks_of(const Plan& plan) { return plan.p.n * plan.parts; }

template <class Mma>
Error launch_expand(const Plan& plan, const Device& device, Stream stream) {
  const MbconvParams& p = plan.p;
  const int64_t blocks = blocks_of(plan);
  const int bytes = memory_of<Mma>(plan.height, p.kernel, p.stride).bytes;
  if (blocks > INT32_MAX || p.h * p.w > INT32_MAX || bytes > device.shared_bytes)
    return kInvalidValue;
  return launch(expand<Mma>, Dim3(static_cast<unsigned>(blocks)), Dim3(kProductThreads),
                static_cast<size_t>(bytes), stream, plan);
}

// Expands and convolves; *parts: of an image's pooled sums.
Error expand_floats(const MbconvParams& p, const Device& device, Stream stream, int* parts) {
  // a map of fewer tiles than there are multiprocessors is sooner done by twice as many
  const bool low = blocks_of(plan_of(p, false)) <= device.multiprocessors;
  const Plan plan = plan_of(p, low);
  *parts = plan.parts;
  const auto start = [&](auto operand) {
    using Operand = typename decltype(operand)::Type;
    return low ? launch_expand<BlockMma<Operand, 2, 2>>(plan, device, stream)
               : launch_expand<BlockMma<Operand, 1, 2>>(plan, device, stream);
  };
  if (!p.tf32) return start(Tag<float>{});
  return device.capability < 80 ? kInvalidValue : start(Tag<tf32>{});
}

// ---- squeeze-excite ----

struct Gates {
  MbconvParams p;
  int parts;      // of an image's pooled sums
  int* counters;  // of the projection, which are set to zero
  int counted;
};

constexpr int kAtOnce = 32;  // loads of a thread that are on their way together

constexpr int kGateRows = 4;  // of excite's weights, that a thread keeps

// The gates of 64 channels of an image, from what its blocks have reduced. Weights are packed.
template <class T>
EDET_KERNEL(kProductThreads, 2)
gates(EDET_PARAMS(Gates) plan) {
  constexpr int kFours = kMiddle / 4, kGroups = kProductThreads / kFours;
  constexpr int kWarps = kProductThreads / kWarp;
  const MbconvParams& p = plan.p;
  EDET_SHARED(float, part);  // sums of warps, the reduced channels, a thread's weights
  griddep_launch();
  const Shared<float> hidden = part + kWarps * kMiddle;
  const int t = thread().x, warp = t / kWarp, lane = t % kWarp;
  const int c = int(p.c_mid), reduced = int(p.c_reduced), image = int(block().y);
  const Shared<float> own = hidden + (round_up(reduced, 4) + t * 4);
  // A thread multiplies every 16th reduced channel for 4 gates.
  const int four = t % kFours * 4, group = t / kFours, first = int(block().x) * kMiddle;
  const int channel = first + four;
  const float* const weights =
      p.excite + int64_t(channel / kPanel) * reduced * kPanel + channel % kPanel;
  const auto weights_of = [&](int row) {  // they have ⌈c/16⌉·16 columns
    return row < reduced && channel < c ? load_constant<float, 4>(weights + row * kPanel)
                                        : Vector<float, 4>{};
  };
  // What nothing waits for is in shared memory before the launch before has ended: a compiler may
  // move loads into registers to where they are used.
  EDET_UNROLL
  for (int j = 0; j < kGateRows; j++) {
    store(own + j * 4 * kProductThreads, weights_of(j * kGroups + group));
  }
  for (int i = t; i < reduced; i += kProductThreads) {
    store(hidden + i, load_constant<float, 1>(p.reduce_bias + i).value[0]);
  }
  const float bias = t < kMiddle && first + t < c
                         ? load_constant<float, 1>(p.excite_bias + first + t).value[0]
                         : 0.0f;
  griddep_wait();
  if (block().x == 0 && block().y == 0) {
    for (int i = t; i < plan.counted; i += kProductThreads) store(plan.counters + i, 0);
  }

  const int blocks = plan.parts;
  const float pixels = float(p.out_h * p.out_w);
  const float scale = sizeof(T) == 2 ? rcp_approx(pixels) : 1.0f / pixels;
  const float* const sums = p.sums + int64_t(image) * blocks * reduced;
  int across = 1;  // columns at once; the other threads share the blocks
  while (across < reduced && across < kProductThreads) across *= 2;
  const int down = kProductThreads / across, warps_across = divide_up(across, kWarp);
  for (int begin = 0; begin < reduced; begin += across) {
    const int column = begin + t % across, step = down * reduced;
    const int end = column < reduced ? blocks * reduced : 0;
    float sum = 0.0f;
    for (int at = t / across * reduced + column; at < end; at += kAtOnce * step) {
      float v[kAtOnce];
      EDET_UNROLL
      for (int j = 0; j < kAtOnce; j++) {
        const int place = at + j * step;
        v[j] = place < end ? load_written<float, 1>(sums + uint32_t(place)).value[0] : 0.0f;
      }
      EDET_UNROLL
      for (int j = 0; j < kAtOnce; j++) sum += v[j];
    }
    for (int mask = across; mask < kWarp; mask *= 2) sum += shuffle_xor(sum, mask);
    store(part + t, sum);
    sync_threads();
    if (t < across && column < reduced) {
      float total = 0.0f;
      EDET_UNROLL
      for (int other = 0; other < kWarps; other++) {
        if ((other & (warps_across - 1)) == warp) total += get(part + (other * kWarp + lane));
      }
      store(hidden + column, activate<T>(get(hidden + column) + total * scale, p.activation));
    }
    sync_threads();
  }

  float gate[4] = {};
  const auto add = [&](int row, const Vector<float, 4>& w) {
    const float x = row < reduced ? get(hidden + row) : 0.0f;
    EDET_UNROLL
    for (int l = 0; l < 4; l++) gate[l] += x * w.value[l];
  };
  EDET_UNROLL
  for (int j = 0; j < kGateRows; j++) {
    add(j * kGroups + group, load<4>(own + j * 4 * kProductThreads));
  }
  for (int row = kGateRows * kGroups + group; row < reduced; row += kGroups) {
    add(row, weights_of(row));
  }
  EDET_UNROLL
  for (int l = 0; l < 4; l++) gate[l] += shuffle_xor(gate[l], kFours);
  if (lane < kFours) {
    Vector<float, 4> v;
    EDET_UNROLL
    for (int l = 0; l < 4; l++) v.value[l] = gate[l];
    store(part + (warp * kMiddle + four), v);
  }
  sync_threads();
  if (t < kMiddle && first + t < c) {
    float sum = bias;
    EDET_UNROLL
    for (int other = 0; other < kWarps; other++) sum += get(part + (other * kMiddle + t));
    store(p.gate + int64_t(image) * c + first + t, sigmoid<T>(sum));
  }
}

template <class T>
Error launch_gates(const Gates& plan, Stream stream, bool pdl) {
  const MbconvParams& p = plan.p;
  const int64_t floats = kProductThreads / kWarp * kMiddle + round_up(p.c_reduced, 4) +
                         kGateRows * 4 * kProductThreads;
  if (p.n > 65535 || plan.parts * p.c_reduced > INT32_MAX) return kInvalidValue;
  const Dim3 grid(static_cast<unsigned>(divide_up(p.c_mid, kMiddle)), static_cast<unsigned>(p.n));
  return launch(gates<T>, grid, Dim3(kProductThreads), static_cast<size_t>(floats * 4), stream,
                plan, pdl);
}

// ---- products ----

ProjectionParams projection_of(const MbconvParams& p) {
  ProjectionParams to{};
  to.dtype = p.dtype;
  to.tf32 = p.tf32;
  to.input = p.mid;
  to.image_rows = p.out_h * p.out_w;
  to.rows = p.n * to.image_rows;
  to.c_in = p.c_mid;
  to.projections = 1;
  to.projection[0] = {p.project, p.project_scale, p.project_shift, p.c_out, p.out};
  to.gate = p.c_reduced ? p.gate : nullptr;
  to.residual = p.residual ? p.input : nullptr;
  return to;
}

// How a block's products are computed. The expanded map of 16-bit numbers is written and read: to
// convolve it from shared memory takes longer, because tiles' halos are expanded again and few
// blocks of it run at a time (D0 at batch 64 11.9 ms, 6.6 through memory, measured on an H100). A
// large one is written for one group of images after the other. (Groups whose map stays in the
// second-level cache take longer, 7.7 ms: each launch ends with a few blocks.)
struct Products {
  bool expand_by_gemm, project_by_gemm;  // else by `project`
  int64_t images;                        // of a group that is expanded through memory; 0: none are
};
constexpr int64_t kLeastByGemm = 16 << 10;           // bytes of all images' maps per multiprocessor
constexpr int64_t kMostExpanded = int64_t(1) << 30;  // bytes of a group's map

Products products_of(const MbconvParams& p) {
  const int64_t out_rows = p.out_h * p.out_w, image_bytes = p.h * p.w * p.c_mid * 2;
  Products products{};
  Device device;
  if (p.dtype == DType::f32 || current_device(&device) != kSuccess) return products;
  products.project_by_gemm =
      gemm_pays(p.dtype, p.n * out_rows, p.c_mid, p.c_out, p.c_reduced ? out_rows : 0);
  if (!p.expand) return products;
  products.expand_by_gemm =
      p.n * image_bytes >= kLeastByGemm * device.multiprocessors && gemm_can(p.dtype, p.c_in, 0);
  products.images =
      std::min(p.n, std::max<int64_t>(1, kMostExpanded / std::max<int64_t>(1, image_bytes)));
  return products;
}

// Where the op's buffer holds the expanded map, and weights as gemm reads them.
struct Buffer {
  int64_t expand, project, bytes;
};
Buffer buffer_of(const MbconvParams& p, const Products& products) {
  Buffer at{};
  at.expand = round_up(products.images * p.h * p.w * p.c_mid * 2, int64_t(256));
  at.project = at.expand;
  if (products.expand_by_gemm)
    at.project += round_up(gemm_weight_bytes(p.c_in, p.c_mid), int64_t(256));
  at.bytes = at.project + (products.project_by_gemm ? gemm_weight_bytes(p.c_mid, p.c_out) : 0);
  return at;
}

Error pack_products(const MbconvParams& p, const Products& products, char* buffer, Stream stream) {
  const Buffer at = buffer_of(p, products);
  GemmWeights weights[2];
  int count = 0;
  if (products.expand_by_gemm) weights[count++] = {p.expand, p.c_in, p.c_mid, buffer + at.expand};
  if (products.project_by_gemm)
    weights[count++] = {p.project, p.c_mid, p.c_out, buffer + at.project};
  return count ? pack_weights(p.dtype, weights, count, stream, true) : kSuccess;
}

// Expands some images, from which it knows only where they begin.
Error expand_images(const MbconvParams& p, const Products& products, const void* input,
                    int64_t images, char* buffer, Stream stream, bool pdl) {
  const int64_t rows = images * p.h * p.w;
  if (products.expand_by_gemm) {
    GemmParams to{};
    to.dtype = p.dtype;
    to.k = p.c_in, to.n = p.c_mid;
    to.w = buffer + buffer_of(p, products).expand;
    to.activation = p.activation;
    to.levels = 1;
    to.level[0] = {input, rows, p.expand_scale, p.expand_shift, buffer};
    return gemm(to, stream, pdl);
  }
  ProjectionParams to{};
  to.dtype = p.dtype;
  to.input = input;
  to.rows = rows;
  to.c_in = p.c_in;
  to.projections = 1;
  to.projection[0] = {p.expand, p.expand_scale, p.expand_shift, p.c_mid, buffer};
  to.activation = p.activation;
  return project(to, stream, pdl);
}

// Expands and convolves one group of images after the other. `packed`: weights were packed just
// now.
Error expand_through_memory(const MbconvParams& p, const Products& products, char* buffer,
                            Stream stream, int* parts, bool pdl, bool packed) {
  MbconvParams group = p;
  group.n = products.images;
  for (int64_t image = 0; image < p.n; image += products.images) {
    const int64_t images = std::min(products.images, p.n - image);
    const char* const input = static_cast<const char*>(p.input) + image * p.h * p.w * p.c_in * 2;
    // what came before the call's first launch is not known
    const bool overlaps = pdl && (packed || image > 0);
    Error error = expand_images(p, products, input, images, buffer, stream, overlaps);
    if (error != kSuccess) return error;
    error = depthwise(group, buffer, images, stream, parts, pdl);
    if (error != kSuccess) return error;
    group.mid += images * p.out_h * p.out_w * p.c_mid / 2;  // floats, of 16-bit numbers
    if (group.sums) group.sums += images * *parts * p.c_reduced;
  }
  return kSuccess;
}

Error project_rows_by_gemm(const MbconvParams& p, const Products& products, const char* buffer,
                           Stream stream, bool pdl) {
  GemmParams to{};
  to.dtype = p.dtype;
  to.k = p.c_mid, to.n = p.c_out;
  to.w = buffer + buffer_of(p, products).project;
  to.levels = 1;
  to.image_rows = p.out_h * p.out_w;
  to.level[0] = {p.mid, p.n * to.image_rows, p.project_scale, p.project_shift, p.out};
  to.gate = p.c_reduced ? p.gate : nullptr;
  to.residual = p.residual ? p.input : nullptr;
  return gemm(to, stream, pdl);
}

// Expands, if the block does, and convolves; *parts: of an image's pooled sums.
Error convolve_block(const MbconvParams& p, const Products& products, char* buffer,
                     const Device& device, Stream stream, int* parts, bool pdl) {
  if (p.dtype == DType::f32) return expand_floats(p, device, stream, parts);
  if (!p.expand) return depthwise(p, p.input, p.n, stream, parts);
  const bool packed = products.expand_by_gemm || products.project_by_gemm;
  return expand_through_memory(p, products, buffer, stream, parts, pdl, packed);
}

Error gate_block(const Gates& plan, Stream stream, bool pdl) {
  switch (plan.p.dtype) {
    case DType::f32: return launch_gates<float>(plan, stream, pdl);
    case DType::f16: return launch_gates<f16>(plan, stream, pdl);
    case DType::bf16: return launch_gates<bf16>(plan, stream, pdl);
  }
  return kInvalidValue;
}

}  // namespace

bool mbconv_takes(const MbconvParams& p) { return p.dtype == DType::f32 || p.c_mid % 2 == 0; }

MbconvMemory mbconv_memory(const MbconvParams& p) {
  const bool floats = p.dtype == DType::f32;
  const SplitMemory split = split_memory(projection_of(p));
  const int64_t parts = floats ? int64_t(plan_of(p, true).parts) : depthwise_most_parts(p);
  return {p.n * p.out_h * p.out_w * p.c_mid * (floats ? 4 : 2),
          p.c_reduced ? p.n * parts * p.c_reduced * 4 : 0, p.c_reduced ? p.n * p.c_mid * 4 : 0,
          // `gates` is what sets the counters to zero
          p.c_reduced ? split.partial_bytes + 4 * split.counters : 0,
          buffer_of(p, products_of(p)).bytes};
}

Error mbconv(const MbconvParams& p, void* split, void* buffer, Stream stream) {
  if (p.n == 0) return kSuccess;
  Device device;
  Error error = current_device(&device);
  if (error != kSuccess) return error;
  const bool pdl = device.capability >= 90;
  const Products products = products_of(p);
  char* const own = static_cast<char*>(buffer);
  error = pack_products(p, products, own, stream);
  if (error != kSuccess) return error;
  ProjectionParams to = projection_of(p);
  Gates plan{};
  plan.p = p;
  if (split) {
    const SplitMemory at = split_memory(to);
    to.partial = static_cast<float*>(split);
    to.counters = reinterpret_cast<int*>(static_cast<char*>(split) + at.partial_bytes);
    plan.counters = to.counters, plan.counted = at.counters;
  }
  error = convolve_block(p, products, own, device, stream, &plan.parts, pdl);
  if (error == kSuccess && p.c_reduced) error = gate_block(plan, stream, pdl);
  if (error != kSuccess) return error;
  return products.project_by_gemm ? project_rows_by_gemm(p, products, own, stream, pdl)
                                  : project(to, stream, pdl);
}

}  // namespace edet::cuda
