// The CUDA kernel for weighted fusion. Floor: each input and the output once through memory; there
// is next to no arithmetic, so that time is bytes / bandwidth from batch 8 or so and launch latency
// below.
// Budget: 64 registers.
#include "weighted_fusion.h"

#include <algorithm>

#include "fusion.cuh"

namespace edet::cuda {
namespace {

constexpr int kThreads = 256;           // of one block
constexpr int kBlocks = 4;              // per multiprocessor, which leaves a thread 64 registers
constexpr int kLanes = 32;              // most vectors of one pixel that one block handles
constexpr int64_t kMostImages = 65535;  // the grid's third dimension

// A block covers block_size().x vectors of V channels; its rows of threads walk over the pixels of
// an image. kEdges is the number of edges where it is known, else 0.
template <class T, int V, int kEdges>
EDET_KERNEL(kThreads, kBlocks)
fuse(EDET_PARAMS(WeightedFusionParams) p) {
  EDET_SHARED(float, a);  // (edges, channels of this block)
  const int channels = block_size().x * V;
  const int64_t first = int64_t(block().y) * channels;
  for (int i = thread().y * block_size().x + thread().x; i < channels;
       i += block_size().x * block_size().y) {
    if (first + i < p.c) {
      EdgeFactors(p.weights, p.edges, p.c, first + i).store_to<T>(a + i, channels);
    }
  }
  sync_threads();

  const int lane = thread().x * V;
  const int64_t channel = first + lane;
  if (channel >= p.c) return;
  const uint32_t height = static_cast<uint32_t>(p.h), width = static_cast<uint32_t>(p.w);
  const int64_t pixels = p.h * p.w;
  for (int64_t image = block().z; image < p.n; image += grid_size().z) {
    T* const out = static_cast<T*>(p.out) + image * pixels * p.c + channel;
    for (int64_t pixel = int64_t(block().x) * block_size().y + thread().y; pixel < pixels;
         pixel += int64_t(grid_size().x) * block_size().y) {
      const uint32_t y = static_cast<uint32_t>(pixel) / width;
      const uint32_t x = static_cast<uint32_t>(pixel) - y * width;
      const auto read = [&](int e) {
        const Edge& edge = p.edge[e];
        const T* map = static_cast<const T*>(edge.data) + image * edge.h * edge.w * p.c + channel;
        return sample<T, V>(edge, height, width, y, x,
                            [&](int64_t at) { return load_constant<T, V>(map + at * p.c); });
      };
      float sum[V];
      const auto add = [&](int e, const Vector<T, V>& v) {
        for (int i = 0; i < V; i++) {
          const float term = get(a + (e * channels + lane + i)) * to_float(v.value[i]);
          sum[i] = e ? sum[i] + term : term;
        }
      };
      if constexpr (kEdges > 0) {
        Vector<T, V> tap[kEdges];  // all on their way before the first is used
        for (int e = 0; e < kEdges; e++) tap[e] = read(e);
        for (int e = 0; e < kEdges; e++) add(e, tap[e]);
      } else {
        for (int e = 0; e < p.edges; e++) add(e, read(e));
      }
      activate<T>(sum, p.activation);
      Vector<T, V> result;
      for (int i = 0; i < V; i++) result.value[i] = from_float<T>(sum[i]);
      store(out + pixel * p.c, result);
    }
  }
}

template <class T, int V>
Error launch_fuse(const WeightedFusionParams& p, Stream stream) {
  Device device;
  const Error error = current_device(&device);
  if (error != kSuccess) return error;
  // as many lanes as share the vectors of a pixel evenly among the blocks
  const int64_t vectors = divide_up(p.c, V);
  const int64_t spans = divide_up(vectors, kLanes);
  const int lanes = static_cast<int>(divide_up(vectors, spans));
  const int rows = kThreads / lanes;
  const int64_t images = std::min(p.n, kMostImages);
  const int64_t resident = divide_up(int64_t(device.multiprocessors) * kBlocks, images);
  const int64_t steps = std::min(divide_up(p.h * p.w, rows), resident);
  const Dim3 grid(static_cast<unsigned>(steps), static_cast<unsigned>(spans),
                  static_cast<unsigned>(images));
  const Dim3 block(static_cast<unsigned>(lanes), static_cast<unsigned>(rows));
  const size_t shared_bytes = sizeof(float) * p.edges * lanes * V;
  if constexpr (V > 1) {
    if (p.edges == 2) return launch(fuse<T, V, 2>, grid, block, shared_bytes, stream, p);
    if (p.edges == 3) return launch(fuse<T, V, 3>, grid, block, shared_bytes, stream, p);
  }
  return launch(fuse<T, V, 0>, grid, block, shared_bytes, stream, p);
}

template <class T>
Error launch_type(const WeightedFusionParams& p, Stream stream) {
  constexpr int kVector = 16 / sizeof(T);
  bool aligned = p.c % kVector == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  for (int e = 0; e < p.edges; e++) {
    aligned = aligned && reinterpret_cast<uintptr_t>(p.edge[e].data) % 16 == 0;
  }
  return aligned ? launch_fuse<T, kVector>(p, stream) : launch_fuse<T, 1>(p, stream);
}

}  // namespace

Error weighted_fusion(const WeightedFusionParams& p, Stream stream) {
  if (p.n * p.c * p.h * p.w == 0) return kSuccess;
  if (p.h > kMostSide || p.w > kMostSide) return kInvalidValue;
  switch (p.dtype) {
    case DType::f32: return launch_type<float>(p, stream);
    case DType::f16: return launch_type<f16>(p, stream);
    case DType::bf16: return launch_type<bf16>(p, stream);
  }
  return kInvalidValue;
}

}  // namespace edet::cuda
