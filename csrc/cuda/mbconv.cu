// The CUDA kernels for an inverted residual block: expand, depthwise, pooled sums and
// squeeze-excite here, projection and residual by the kernel of lateral.
//
// Floors. Bytes: the input, the expanded map once written and once read, the output, the weights:
// the expansion itself never leaves the chip before the depthwise convolution has shrunk it.
// Operations: 2·pixels·C_mid·(C_in + k² + C_out).
// Budget: 128 registers, tensor cores.
//
// A block owns a tile of output pixels and 64 channels of the middle. It expands the tile and its
// halo, 64 pixels at a time, into shared memory, convolves, adds up; the last block of an image to
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
  int inverse;       // ⌈2^16 / columns of a patch⌉: division of its few pixels
  int* counters;     // (n): blocks that are done
  bool aligned_in, aligned_mid;
};

// A tile's height: its patch of expanded pixels, (height·stride + k − stride) × (8·stride + k −
// stride) of 64 channels, is to leave room for two blocks on a multiprocessor.
constexpr int tile_height(int element_bytes, int stride) { return 16 / element_bytes / stride; }

// Bytes of shared memory, where they begin.
struct Memory {
  int a, w, dw, sums, bytes;
};
template <class Mma>
EDET_EVERYWHERE constexpr Memory memory_of(int height, int kernel, int stride, int c_mid,
                                           int c_reduced) {
  using T = typename Mma::Type;
  const int rows = (height - 1) * stride + kernel, columns = (kWidth - 1) * stride + kernel;
  Memory m{};
  m.a = round_up(rows * columns * kMiddle * int(sizeof(T)), 16);
  m.w = m.a + Mma::kBytesA;
  m.dw = m.w + Mma::kBytesW;
  m.sums = m.dw + kMostTaps * kMiddle * 4;
  m.bytes = m.sums + kProductThreads / (kMiddle / kVector<T>)*kMiddle * 4;
  // squeeze-excite, when all else is done: means, reduced channels and partial sums
  const int squeeze = (c_mid + c_reduced + kProductThreads) * 4 + 16;
  if (m.bytes < squeeze) m.bytes = squeeze;
  return m;
}

// The patch's pixels as the depthwise convolution reads them: expanded and activated; zero outside.
template <class Mma>
EDET_DEVICE void expand_patch(const Plan& plan, int64_t image, int top, int left, int rows,
                              int columns, int first, Shared<typename Mma::Type> patch,
                              Shared<typename Mma::Type> a, Shared<typename Mma::Type> w) {
  using T = typename Mma::Type;
  constexpr int V = kVector<T>;
  const MbconvParams& p = plan.p;
  const int pixels = rows * columns;
  const T* const input = static_cast<const T*>(p.input) + image * p.h * p.w * p.c_in;
  // a pixel of the patch in the input, or none
  const auto source = [&](int pixel) -> int64_t {
    const int row = pixel * plan.inverse >> 16;
    const int y = top + row, x = left + pixel - row * columns;
    const bool inside = pixel < pixels && y >= 0 && y < p.h && x >= 0 && x < p.w;
    return inside ? int64_t(y) * p.w + x : -1;
  };
  if (!p.expand) {
    for (int i = thread().x; i < pixels * (kMiddle / V); i += kProductThreads) {
      const int vector = i % (kMiddle / V), pixel = i / (kMiddle / V);
      const int channel = first + vector * V;
      const int64_t at = source(pixel);
      Vector<T, V> v{};
      if (at >= 0 && channel < p.c_in) {
        v = load_pixel(input + at * p.c_in + channel, p.c_in - channel, plan.aligned_in);
      }
      store(patch + (pixel * kMiddle + vector * V), v);
    }
    return;
  }
  const int c = int(p.c_in), chunks = divide_up(c, kChunk<T>);
  for (int row0 = 0; row0 < pixels; row0 += Mma::kRows) {
    Mma product;
    for (int chunk = 0; chunk < chunks; chunk++) {
      const int k = chunk * kChunk<T>;
      const int depth = round_up(min(kChunk<T>, c - k), kDepth);
      sync_threads();  // the operands before are no longer read
      if (chunks > 1 || row0 == 0) {
        load_weights<Mma>(p.expand, c, p.c_mid, k, first, depth, kMiddle, w);
      }
      for (int i = thread().x; i < Mma::kRows * kVectors; i += kProductThreads) {
        const int vector = i % kVectors, row = i / kVectors, channel = k + vector * V;
        if (vector * V >= depth) continue;
        const int64_t at = source(row0 + row);
        Vector<T, V> v{};
        if (at >= 0 && channel < c) {
          v = load_pixel(input + at * c + channel, c - channel, plan.aligned_in);
        }
        store(a + (row * Mma::kPitchA + vector * V), as_operands<Mma>(v));
      }
      sync_threads();
      product.mma(a, w, depth, kMiddle);
    }
    product.each(
        [&](int column) {
          return load_affine(p.expand_scale, p.expand_shift, first + column, p.c_mid,
                             plan.aligned_mid);
        },
        [] {},
        [&](const Affine& f, int row, int column, float one, float two) {
          if (row0 + row >= pixels) return;
          Vector<T, 2> v{};
          if (source(row0 + row) >= 0) {
            float x[2] = {f.scale[0] * one + f.shift[0], f.scale[1] * two + f.shift[1]};
            activate<T>(x, p.activation);
            v = from_floats<T>(x);
          }
          store(patch + ((row0 + row) * kMiddle + column), v);
        });
  }
}

// The gate of one image, from the sums of all its tiles, by one block. Weights are packed.
template <class T>
EDET_DEVICE void squeeze_excite(const MbconvParams& p, int64_t image, int tiles,
                                Shared<float> memory) {
  const int t = thread().x, c = int(p.c_mid), reduced = int(p.c_reduced);
  const Shared<float> mean = memory, hidden = memory + c, part = hidden + reduced;
  const float pixels = float(p.out_h * p.out_w);
  const float scale = sizeof(T) == 2 ? rcp_approx(pixels) : 1.0f / pixels;
  for (int i = t; i < c; i += kProductThreads) {
    const float* sums = p.sums + image * tiles * c + i;
    float sum = 0.0f;
    for (int tile = 0; tile < tiles; tile++) {
      sum += load_shared_by_blocks(sums + int64_t(tile) * c);
    }
    store(mean + i, sum * scale);
  }
  sync_threads();
  // 16 threads for each of a panel's 16 columns
  for (int panel = 0; panel * kPanel < reduced; panel++) {
    const int j = t % kPanel, first = t / kPanel;
    float sum = 0.0f;
    for (int k = first; k < c; k += kProductThreads / kPanel) {
      const int64_t at = (int64_t(panel) * c + k) * kPanel + j;
      sum += get(mean + k) * load_constant<float, 1>(p.reduce + at).value[0];
    }
    store(part + t, sum);
    sync_threads();
    const int column = panel * kPanel + j;
    if (first == 0 && column < reduced) {
      float total = load_constant<float, 1>(p.reduce_bias + column).value[0];
      for (int i = 0; i < kProductThreads / kPanel; i++) total += get(part + (i * kPanel + j));
      store(hidden + column, activate<T>(total, p.activation));
    }
    sync_threads();
  }
  for (int i = t; i < c; i += kProductThreads) {
    float sum = load_constant<float, 1>(p.excite_bias + i).value[0];
    for (int k = 0; k < reduced; k++) {
      const int64_t at = (int64_t(i / kPanel) * reduced + k) * kPanel + i % kPanel;
      sum += get(hidden + k) * load_constant<float, 1>(p.excite + at).value[0];
    }
    store(p.gate + image * c + i, sigmoid<T>(sum));
  }
}

template <class Mma>
EDET_KERNEL(kProductThreads, 2)
expand(EDET_PARAMS(Plan) plan) {
  using T = typename Mma::Type;
  constexpr int V = kVector<T>, kAcross = kMiddle / V, kGroups = kProductThreads / kAcross;
  const MbconvParams& p = plan.p;
  EDET_SHARED(char, memory);
  const Memory at = memory_of<Mma>(plan.height, p.kernel, p.stride, int(p.c_mid), int(p.c_reduced));
  const Shared<T> patch = as<T>(memory);
  const Shared<float> dw = as<float>(memory + at.dw), sums = as<float>(memory + at.sums);
  const int tiles = plan.across * plan.down;
  const int64_t image = block().x / (tiles * plan.chunks);
  const int tile = block().x / plan.chunks % tiles;
  const int first = block().x % plan.chunks * kMiddle;  // chunks of a tile share its input
  const int y0 = tile / plan.across * plan.height, x0 = tile % plan.across * kWidth;
  const int rows = (plan.height - 1) * p.stride + p.kernel;
  const int columns = (kWidth - 1) * p.stride + p.kernel;
  const int taps = p.kernel * p.kernel, c_mid = int(p.c_mid);

  // in groups of 4 of each V channels, as fusion_node keeps them
  const auto place = [](int channel) {
    return channel % V / 4 * (kMiddle / (V / 4)) + channel / V * 4 + channel % 4;
  };
  for (int i = thread().x; i < taps * kMiddle; i += kProductThreads) {
    const int tap = i / kMiddle, channel = i % kMiddle;
    const float value = first + channel < c_mid
                            ? load_constant<float, 1>(p.dw + tap * c_mid + first + channel).value[0]
                            : 0.0f;
    store(dw + (tap * kMiddle + place(channel)), value);
  }
  expand_patch<Mma>(plan, image, int(y0 * p.stride - p.pad_top), int(x0 * p.stride - p.pad_left),
                    rows, columns, first, patch, as<T>(memory + at.a), as<T>(memory + at.w));
  sync_threads();

  const int vector = thread().x % kAcross, group = thread().x / kAcross;
  const int channel = first + vector * V;
  float total[V] = {}, scale[V], shift[V];
  EDET_UNROLL
  for (int j = 0; j < V; j += 2) {
    const Affine f = load_affine(p.dw_scale, p.dw_shift, channel + j, c_mid, plan.aligned_mid);
    scale[j] = f.scale[0], scale[j + 1] = f.scale[1];
    shift[j] = f.shift[0], shift[j + 1] = f.shift[1];
  }
  for (int pixel = group; pixel < plan.height * kWidth; pixel += kGroups) {
    const int y = pixel / kWidth, x = pixel % kWidth;
    if (y0 + y >= p.out_h || x0 + x >= p.out_w || channel >= c_mid) continue;
    float sum[V] = {};
    for (int dy = 0; dy < p.kernel; dy++) {
      for (int dx = 0; dx < p.kernel; dx++) {
        const int from = (y * p.stride + dy) * columns + x * p.stride + dx;
        const Vector<T, V> v = load<V>(patch + (from * kMiddle + vector * V));
        EDET_UNROLL
        for (int g = 0; g < V / 4; g++) {
          const Vector<float, 4> w =
              load<4>(dw + ((dy * p.kernel + dx) * kMiddle + place(vector * V + 4 * g)));
          EDET_UNROLL
          for (int j = 0; j < 4; j++) sum[4 * g + j] += w.value[j] * to_float(v.value[4 * g + j]);
        }
      }
    }
    EDET_UNROLL
    for (int j = 0; j < V; j++) sum[j] = scale[j] * sum[j] + shift[j];
    activate<T>(sum, p.activation);
    EDET_UNROLL
    for (int j = 0; j < V; j++) total[j] += sum[j];
    const Vector<T, V> result = from_floats<T>(sum);
    // Params name it for the CPU, whose middle is float
    T* to = reinterpret_cast<T*>(p.mid) + ((image * p.out_h + y0 + y) * p.out_w + x0 + x) * c_mid +
            channel;
    if (plan.aligned_mid) {
      store(to, result);
    } else {
      EDET_UNROLL
      for (int j = 0; j < V; j++) {
        if (channel + j < c_mid) store(to + j, result.value[j]);
      }
    }
  }
  if (!p.c_reduced) return;

  EDET_UNROLL
  for (int j = 0; j < V; j++) store(sums + (group * kMiddle + vector * V + j), total[j]);
  sync_threads();
  if (thread().x < kMiddle && first + int(thread().x) < c_mid) {
    float sum = 0.0f;
    for (int g = 0; g < kGroups; g++) sum += get(sums + (g * kMiddle + thread().x));
    store(p.sums + (image * tiles + tile) * c_mid + first + thread().x, sum);
  }
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
  if (mine) squeeze_excite<T>(p, image, tiles, as<float>(memory));
}

template <class T>
Plan plan_of(const MbconvParams& p) {
  Plan plan{};
  plan.p = p;
  plan.height = tile_height(sizeof(T), p.stride);
  plan.across = static_cast<int>(divide_up(p.out_w, kWidth));
  plan.down = static_cast<int>(divide_up(p.out_h, plan.height));
  plan.inverse = divide_up(1 << 16, static_cast<int>((kWidth - 1) * p.stride + p.kernel));
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
  const int bytes = memory_of<Mma>(plan.height, p.kernel, p.stride, static_cast<int>(p.c_mid),
                                   static_cast<int>(p.c_reduced))
                        .bytes;
  if (blocks > INT32_MAX || bytes > device.shared_bytes) return kInvalidValue;
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
  return project(project_params, stream);
}

}  // namespace

MbconvMemory mbconv_memory(const MbconvParams& p) {
  const Plan plan = p.dtype == DType::f32 ? plan_of<float>(p) : plan_of<f16>(p);
  const int64_t element = p.dtype == DType::f32 ? 4 : 2;
  return {p.n * p.out_h * p.out_w * p.c_mid * element,
          p.c_reduced ? p.n * plan.across * plan.down * p.c_mid * 4 : 0,
          p.c_reduced ? p.n * p.c_mid * 4 : 0, p.c_reduced ? p.n * 4 : 0};
}

Error mbconv(const MbconvParams& p, int* counters, Stream stream) {
  if (p.n == 0) return kSuccess;
  return by_operand(p.dtype, p.tf32, [&](auto operand, const Device& device) {
    using Operand = typename decltype(operand)::Type;
    return launch_block<BlockMma<Operand, 2, 2>>(p, counters, device, stream);
  });
}

}  // namespace edet::cuda
