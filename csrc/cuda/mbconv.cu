// The CUDA kernels for an inverted residual block: expand, depthwise, pooled sums and
// squeeze-excite here, projection and residual by the kernel of lateral.
//
// Floors. Bytes: the input, the expanded map once written and once read, the output, the weights:
// the expansion itself never leaves the chip before the depthwise convolution has shrunk it.
// Operations: 2·pixels·C_mid·(C_in + k² + C_out).
// Budget: 128 registers, tensor cores.
//
// A block owns a tile of output pixels and 64 channels of the middle. It expands the tile and its
// halo, 32 pixels at a time, into shared memory, convolves, adds up; the last block of an image to
// finish computes the image's gate. Sums are added in a fixed order: no result depends on it.
#include "mbconv.h"

#include <algorithm>

#include "block_mma.cuh"
#include "fusion.cuh"
#include "lateral.h"

namespace edet::cuda {
namespace {

constexpr int kMiddle = 64;  // channels of a block
constexpr int kWidth = 8;    // of its tile
constexpr int kMostTaps = 25;

struct Plan {
  MbconvParams p;
  int height;        // of a tile
  int across, down;  // tiles of an image
  int chunks;        // of middle channels
  int* counters;     // (n): blocks that are done
  bool aligned_in, aligned_mid;
};

// A tile's height: its patch of expanded pixels, (height·stride + k − stride) × (8·stride + k −
// stride) of 64 channels, is to leave room for two blocks on a multiprocessor.
EDET_EVERYWHERE constexpr int tile_height(int element_bytes, int stride) {
  return 16 / element_bytes / stride;
}

// Operands of so many chunks are in shared memory: with two, one is on its way while the other is
// multiplied; floats would leave no room for the patch.
template <class T>
constexpr int kBuffers = sizeof(T) == 2 ? 2 : 1;

// Bytes of shared memory, where they begin: the patch, the operands, where the patch's pixels are
// in the input, scales and shifts of the expansion, depthwise weights, sums of warps.
struct Memory {
  int a, w, source, affine, dw, sums, bytes;
};
template <class Mma>
EDET_EVERYWHERE constexpr Memory memory_of(int height, int kernel, int stride, int c_reduced) {
  using T = typename Mma::Type;
  const int rows = (height - 1) * stride + kernel, columns = (kWidth - 1) * stride + kernel;
  Memory m{};
  m.a = round_up(rows * columns * kMiddle * int(sizeof(T)), 16);
  m.w = m.a + kBuffers<T> * Mma::kBytesA;
  m.source = m.w + kBuffers<T> * Mma::kBytesW;
  m.affine = m.source + round_up(rows * columns * 4, 16);
  m.dw = m.affine + 2 * kMiddle * 4;
  m.sums = m.dw + kMostTaps * kMiddle * 4;
  m.bytes = m.sums + (1 + kProductThreads / kWarp) * kMiddle * 4;
  // squeeze-excite, when all else is done: reduced channels and partial sums
  const int squeeze = (round_up(c_reduced, 4) + kProductThreads) * 4;
  if (m.bytes < squeeze) m.bytes = squeeze;
  return m;
}

// What a thread brings of a patch's pixels to the product's left operand: one vector, read while
// the block works on the chunk before.
template <class Mma>
class PixelPart {
  using T = typename Mma::Type;
  static constexpr int V = kVector<T>;
  static_assert(Mma::kRows * kVectors == kProductThreads, "a vector for each thread");

 public:
  EDET_DEVICE PixelPart(const T* image, int c, bool aligned)
      : image_(image), c_(c), aligned_(aligned) {}

  // Goes to the first channels of pixels [row0, row0 + kRows), of `pixels`.
  EDET_DEVICE void begin(Shared<int> source, int row0, int pixels) {
    const int vector = thread().x % kVectors, pixel = row0 + thread().x / kVectors;
    const int at = pixel < pixels ? get(source + pixel) : -1;
    left_ = at < 0 ? 0 : c_ - vector * V;
    from_ = image_ + int64_t(max(at, 0)) * c_ + vector * V;
  }
  // Reads the next chunk's channels; zeros where there are none.
  EDET_DEVICE void load() {
    v_ = {};
    if (left_ > 0) v_ = load_words(from_, left_, aligned_);
    from_ += kChunk<T>;
    left_ -= kChunk<T>;
  }
  EDET_DEVICE void store_to(Shared<T> a) const {
    a = a + (thread().x / kVectors * Mma::kPitchA + thread().x % kVectors * V);
    Words v = v_;
    if constexpr (Mma::kRounds) {
      float x[V];
      to_floats<T>(v, x);
      EDET_UNROLL
      for (int i = 0; i < V; i++) x[i] = Mma::operand(x[i]);
      v = to_words<T>(x);
    }
    store(as<uint32_t>(a), v);
  }

 private:
  const T* const image_;
  const int c_;
  const bool aligned_;
  int left_ = 0;  // channels
  const T* from_ = nullptr;
  Words v_;
};

// The patch's pixels as the depthwise convolution reads them: expanded and activated; zero outside.
// `source` says where they are in the image, or that they are not.
template <class Mma>
EDET_DEVICE void expand_patch(const Plan& plan, int64_t image, int pixels, int first,
                              Shared<char> memory, const Memory& at) {
  using T = typename Mma::Type;
  constexpr int V = kVector<T>;
  const MbconvParams& p = plan.p;
  const Shared<T> patch = as<T>(memory);
  const Shared<int> source = as<int>(memory + at.source);
  const Shared<float> affine = as<float>(memory + at.affine);
  const int c = int(p.c_in), chunks = divide_up(c, kChunk<T>);
  const T* const input = static_cast<const T*>(p.input) + image * p.h * p.w * c;
  if (!p.expand) {
    for (int i = thread().x; i < pixels * (kMiddle / V); i += kProductThreads) {
      const int vector = i % (kMiddle / V), pixel = i / (kMiddle / V);
      const int channel = first + vector * V, from = get(source + pixel);
      Words v{};
      if (from >= 0 && channel < c) {
        v = load_words(input + int64_t(from) * c + channel, c - channel, plan.aligned_in);
      }
      store(as<uint32_t>(patch + (pixel * kMiddle + vector * V)), v);
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
  begin(0);
  load_next();
  int turn = 0;
  for (int row0 = 0; row0 < pixels; row0 += Mma::kRows) {
    const bool last_rows = row0 + Mma::kRows >= pixels;
    Mma product;
    for (int chunk = 0; chunk < chunks; chunk++) {
      const bool last = chunk + 1 == chunks;
      const Shared<T> a = as<T>(memory + at.a) + turn * (Mma::kBytesA / int(sizeof(T)));
      // of one chunk the weights stay where they are
      const Shared<T> w =
          as<T>(memory + at.w) + (chunks > 1 ? turn : 0) * (Mma::kBytesW / int(sizeof(T)));
      if (kBuffers<T> == 1) sync_threads();  // the operands before are no longer read
      if (with_weights) weights.store_to(w);
      rows.store_to(a);
      if (last && !last_rows) {
        if (chunks == 1) with_weights = false;
        begin(row0 + Mma::kRows);
      }
      if (!last || !last_rows) load_next();
      sync_threads();
      product.mma(a, w, round_up(min(kChunk<T>, c - chunk * kChunk<T>), kDepth), kMiddle);
      if (kBuffers<T> > 1) turn ^= 1;
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
    activate<T>(x, p.activation);
    sums = 0;
    product.each([](int) { return 0; }, [] {},
                 [&](int, int row, int column, float, float) {
                   const float two[2] = {x[sums], x[sums + 1]};
                   sums += 2;
                   if (row0 + row >= pixels) return;
                   const bool inside = get(source + (row0 + row)) >= 0;
                   const Vector<T, 2> v = inside ? from_floats<T>(two) : Vector<T, 2>{};
                   store(patch + ((row0 + row) * kMiddle + column), v);
                 });
  }
}

// Convolves the patch depthwise. A warp computes a column of the tile, each lane one word of
// channels of all its rows, as in node_tile.cuh. done(row, channel, sums) takes the results.
template <int kKernel, int kStride, class T, class Done>
EDET_DEVICE void convolve(Shared<T> patch, Shared<float> dw, const Done& done) {
  constexpr int V = 4 / int(sizeof(T)), kDown = tile_height(sizeof(T), kStride);
  constexpr int kRows = (kDown - 1) * kStride + kKernel;
  constexpr int kColumns = (kWidth - 1) * kStride + kKernel;
  static_assert(kProductThreads == kWarp * kWidth, "a warp for each column");
  const int lane = thread().x % kWarp, x = thread().x / kWarp * kStride;
  EDET_LOOP
  for (int channel = lane * V; channel < kMiddle; channel += kWarp * V) {
    float sum[kDown][V] = {};
    EDET_LOOP
    for (int dx = 0; dx < kKernel; dx++) {
      Vector<float, V> w[kKernel];
      EDET_UNROLL
      for (int dy = 0; dy < kKernel; dy++) {
        w[dy] = load<V>(dw + ((dy * kKernel + dx) * kMiddle + channel));
      }
      EDET_UNROLL
      for (int r = 0; r < kRows; r++) {
        float in[V];
        to_floats(load<V>(patch + ((r * kColumns + x + dx) * kMiddle + channel)), in);
        EDET_UNROLL
        for (int dy = 0; dy < kKernel; dy++) {
          if (r < dy || (r - dy) % kStride != 0 || (r - dy) / kStride >= kDown) continue;
          EDET_UNROLL
          for (int j = 0; j < V; j++) sum[(r - dy) / kStride][j] += w[dy].value[j] * in[j];
        }
      }
    }
    done(channel, sum);
  }
}

constexpr int kAtOnce = 8;  // loads of a thread that are on their way together

// Reducing is linear: a block multiplies its sums over its pixels, `sums` of its kMiddle channels
// from `first` on, by their part of the weights, and writes the products' c_reduced sums to `to`.
EDET_DEVICE void reduce_part(const MbconvParams& p, int first, Shared<float> sums,
                             Shared<float> part, float* to) {
  constexpr int kTogether = 4, kWarps = kProductThreads / kWarp;  // panels of weights
  static_assert(kProductThreads == kMiddle * kPanel / 4, "16 bytes of a panel for each thread");
  const int t = thread().x, four = t % 4 * 4, row = t / 4, reduced = int(p.c_reduced);
  const bool real = first + row < p.c_mid;
  const float sum = get(sums + row);
  for (int panel = 0; panel * kPanel < reduced; panel += kTogether) {
    Vector<float, 4> v[kTogether];
    EDET_UNROLL
    for (int j = 0; j < kTogether; j++) {
      v[j] = {};
      if (real && (panel + j) * kPanel < reduced) {
        const int64_t at = (int64_t(panel + j) * p.c_mid + first + row) * kPanel + four;
        v[j] = load_constant<float, 4>(p.reduce + at);
      }
    }
    EDET_UNROLL
    for (int j = 0; j < kTogether; j++) {
      if ((panel + j) * kPanel >= reduced) break;
      EDET_UNROLL
      for (int i = 0; i < 4; i++) {
        float x = sum * v[j].value[i];
        // lanes 4 apart have the same columns
        EDET_UNROLL
        for (int mask = 4; mask < kWarp; mask *= 2) x += shuffle_xor(x, mask);
        if (t % kWarp < 4) store(part + ((t / kWarp * kTogether + j) * kPanel + four + i), x);
      }
    }
    sync_threads();
    const int column = panel * kPanel + t;
    if (t < kTogether * kPanel && column < reduced) {
      float total = 0.0f;
      EDET_UNROLL
      for (int g = 0; g < kWarps; g++) total += get(part + (g * kTogether * kPanel + t));
      store(to + column, total);
    }
    sync_threads();
  }
}

// The gate of one image, from what its `blocks` blocks have reduced, by one block. Weights are
// packed.
template <class T>
EDET_DEVICE void squeeze_excite(const MbconvParams& p, int64_t image, int blocks,
                                Shared<float> memory) {
  const int t = thread().x, c = int(p.c_mid), reduced = int(p.c_reduced);
  const Shared<float> hidden = memory, part = hidden + round_up(reduced, 4);
  const float pixels = float(p.out_h * p.out_w);
  const float scale = sizeof(T) == 2 ? rcp_approx(pixels) : 1.0f / pixels;
  const float* const sums = p.sums + image * blocks * reduced;
  int across = 1;  // columns at once; the other threads share the blocks
  while (across < reduced && across < kProductThreads) across *= 2;
  const int down = kProductThreads / across;
  for (int begin = 0; begin < reduced; begin += across) {
    const int column = begin + t % across;
    float sum = 0.0f;
    for (int b = t / across; b < blocks; b += kAtOnce * down) {
      float v[kAtOnce];
      EDET_UNROLL
      for (int j = 0; j < kAtOnce; j++) {
        const bool real = column < reduced && b + j * down < blocks;
        const float* const from = sums + int64_t(b + j * down) * reduced + column;
        v[j] = real ? load_shared_by_blocks(from) : 0.0f;
      }
      EDET_UNROLL
      for (int j = 0; j < kAtOnce; j++) sum += v[j];
    }
    store(part + t, sum);
    for (int half = down / 2; half > 0; half /= 2) {
      sync_threads();
      if (t < half * across) store(part + t, get(part + t) + get(part + (t + half * across)));
    }
    if (t < across && column < reduced) {
      const float bias = load_constant<float, 1>(p.reduce_bias + column).value[0];
      store(hidden + column, activate<T>(bias + get(part + t) * scale, p.activation));
    }
    sync_threads();
  }
  // a thread computes 4 gates; weights have ⌈c/16⌉·16 columns
  for (int i = t * 4; i < c; i += kProductThreads * 4) {
    const float* const weights = p.excite + int64_t(i / kPanel) * reduced * kPanel + i % kPanel;
    float sum[4] = {};
    for (int begin = 0; begin < reduced; begin += kAtOnce) {
      Vector<float, 4> v[kAtOnce];
      EDET_UNROLL
      for (int j = 0; j < kAtOnce; j++) {
        v[j] = {};
        if (begin + j < reduced) v[j] = load_constant<float, 4>(weights + (begin + j) * kPanel);
      }
      EDET_UNROLL
      for (int j = 0; j < kAtOnce; j++) {
        const float x = begin + j < reduced ? get(hidden + (begin + j)) : 0.0f;
        EDET_UNROLL
        for (int l = 0; l < 4; l++) sum[l] += x * v[j].value[l];
      }
    }
    EDET_UNROLL
    for (int j = 0; j < 4; j++) {
      if (i + j >= c) break;
      const float bias = load_constant<float, 1>(p.excite_bias + i + j).value[0];
      store(p.gate + image * c + i + j, sigmoid<T>(bias + sum[j]));
    }
  }
}

template <class Mma>
EDET_KERNEL(kProductThreads, 2)
expand(EDET_PARAMS(Plan) plan) {
  using T = typename Mma::Type;
  constexpr int V = 4 / int(sizeof(T)), kWarps = kProductThreads / kWarp;
  const MbconvParams& p = plan.p;
  EDET_SHARED(char, memory);
  griddep_launch();
  const Memory at = memory_of<Mma>(plan.height, p.kernel, p.stride, int(p.c_reduced));
  const Shared<T> patch = as<T>(memory);
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

  for (int i = thread().x; i < pixels; i += kProductThreads) {
    const int y = int(y0 * p.stride - p.pad_top) + i / columns;
    const int x = int(x0 * p.stride - p.pad_left) + i % columns;
    const bool inside = y >= 0 && y < p.h && x >= 0 && x < p.w;
    store(source + i, inside ? int(y * p.w + x) : -1);
  }
  for (int i = thread().x; i < taps * kMiddle; i += kProductThreads) {
    const int tap = i / kMiddle, channel = first + i % kMiddle;
    const bool real = channel < c_mid;
    store(dw + i, real ? load_constant<float, 1>(p.dw + tap * c_mid + channel).value[0] : 0.0f);
  }
  if (p.expand && thread().x < kMiddle) {
    const int channel = first + int(thread().x);
    const bool real = channel < c_mid;
    store(affine + thread().x,
          real ? load_constant<float, 1>(p.expand_scale + channel).value[0] : 0.0f);
    store(affine + (kMiddle + int(thread().x)),
          real ? load_constant<float, 1>(p.expand_shift + channel).value[0] : 0.0f);
  }
  sync_threads();
  expand_patch<Mma>(plan, image, pixels, first, memory, at);
  sync_threads();

  const int x = x0 + int(thread().x) / kWarp;
  // Params name it for the CPU, whose middle is float
  T* const mid = reinterpret_cast<T*>(p.mid) +
                 ((image * p.out_h + y0) * p.out_w + min(x, int(p.out_w) - 1)) * c_mid + first;
  const auto done = [&](int channel, auto& sum) {
    constexpr int kDown = sizeof(sum) / sizeof(sum[0]);
    float total[V] = {}, scale[V] = {}, shift[V] = {};
    EDET_UNROLL
    for (int j = 0; j < V; j++) {
      if (first + channel + j >= c_mid) break;
      scale[j] = load_constant<float, 1>(p.dw_scale + first + channel + j).value[0];
      shift[j] = load_constant<float, 1>(p.dw_shift + first + channel + j).value[0];
    }
    float all[kDown * V];  // activated together
    EDET_UNROLL
    for (int i = 0; i < kDown * V; i++) all[i] = scale[i % V] * sum[i / V][i % V] + shift[i % V];
    activate<T>(all, p.activation);
    EDET_UNROLL
    for (int row = 0; row < kDown; row++) {
      if (y0 + row >= p.out_h || x >= p.out_w) break;
      float v[V];
      EDET_UNROLL
      for (int j = 0; j < V; j++) {
        v[j] = all[row * V + j];
        total[j] += v[j];
      }
      T* const to = mid + int64_t(row) * p.out_w * c_mid + channel;
      const Vector<T, V> result = from_floats<T>(v);
      if (plan.aligned_mid) {
        if (first + channel < c_mid) store(to, result);
      } else {
        EDET_UNROLL
        for (int j = 0; j < V; j++) {
          if (first + channel + j < c_mid) store(to + j, result.value[j]);
        }
      }
    }
    EDET_UNROLL
    for (int j = 0; j < V; j++) {
      store(sums + (int(thread().x) / kWarp * kMiddle + channel + j), total[j]);
    }
  };
  if (p.kernel == 3) {
    p.stride == 1 ? convolve<3, 1>(patch, dw, done) : convolve<3, 2>(patch, dw, done);
  } else {
    p.stride == 1 ? convolve<5, 1>(patch, dw, done) : convolve<5, 2>(patch, dw, done);
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
  reduce_part(p, first, sums, sums + kMiddle, p.sums + int64_t(block().x) * p.c_reduced);
  global_fence();
  sync_threads();
  const Shared<int> last = as<int>(memory);
  if (thread().x == 0) {
    store(last, int(atomic_add(plan.counters + image, 1) == tiles * plan.chunks - 1));
  }
  sync_threads();
  const bool mine = get(last) != 0;
  global_fence();
  sync_threads();
  if (mine) squeeze_excite<T>(p, image, tiles * plan.chunks, as<float>(memory));
}

template <class T>
Plan plan_of(const MbconvParams& p) {
  Plan plan{};
  plan.p = p;
  plan.height = tile_height(sizeof(T), p.stride);
  plan.across = static_cast<int>(divide_up(p.out_w, kWidth));
  plan.down = static_cast<int>(divide_up(p.out_h, plan.height));
  plan.chunks = static_cast<int>(divide_up(p.c_mid, kMiddle));
  plan.aligned_in = p.c_in % kVector<T> == 0 && reinterpret_cast<uintptr_t>(p.input) % 16 == 0;
  plan.aligned_mid = p.c_mid % kVector<T> == 0;  // the middle is a buffer of its own
  return plan;
}

template <class Mma>
Error launch_block(const MbconvParams& p, int* counters, const Device& device, Stream stream) {
  Plan plan = plan_of<typename Mma::Type>(p);
  plan.counters = counters;
  const int64_t blocks = p.n * plan.across * plan.down * plan.chunks;
  const int bytes =
      memory_of<Mma>(plan.height, p.kernel, p.stride, static_cast<int>(p.c_reduced)).bytes;
  if (blocks > INT32_MAX || p.h * p.w > INT32_MAX || bytes > device.shared_bytes)
    return kInvalidValue;
  Error error = kSuccess;
  if (p.c_reduced) error = clear(counters, sizeof(int) * static_cast<size_t>(p.n), stream);
  if (error != kSuccess) return error;
  error = launch(expand<Mma>, Dim3(static_cast<unsigned>(blocks)), Dim3(kProductThreads),
                 static_cast<size_t>(bytes), stream, plan);
  if (error != kSuccess) return error;

  ProjectionParams project_params{};
  project_params.dtype = p.dtype;
  project_params.tf32 = p.tf32;
  project_params.input = p.mid;
  project_params.image_rows = p.out_h * p.out_w;
  project_params.rows = p.n * project_params.image_rows;
  project_params.c_in = p.c_mid;
  project_params.projections = 1;
  project_params.projection[0] = {p.project, p.project_scale, p.project_shift, p.c_out, p.out};
  project_params.gate = p.c_reduced ? p.gate : nullptr;
  project_params.residual = p.residual ? p.input : nullptr;
  return project(project_params, stream, true);
}

}  // namespace

MbconvMemory mbconv_memory(const MbconvParams& p) {
  const Plan plan = p.dtype == DType::f32 ? plan_of<float>(p) : plan_of<f16>(p);
  const int64_t element = p.dtype == DType::f32 ? 4 : 2;
  return {p.n * p.out_h * p.out_w * p.c_mid * element,
          p.c_reduced ? p.n * plan.across * plan.down * plan.chunks * p.c_reduced * 4 : 0,
          p.c_reduced ? p.n * p.c_mid * 4 : 0, p.c_reduced ? p.n * 4 : 0};
}

Error mbconv(const MbconvParams& p, int* counters, Stream stream) {
  if (p.n == 0) return kSuccess;
  return by_operand(p.dtype, p.tf32, [&](auto operand, const Device& device) {
    using Operand = typename decltype(operand)::Type;
    return launch_block<BlockMma<Operand, 1, 2>>(p, counters, device, stream);
  });
}

}  // namespace edet::cuda
