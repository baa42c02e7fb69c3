// The CUDA kernel for the first layer: normalise, 3×3 stride-2 convolution, batch norm, activation.
//
// Floors. Bytes: the image and the output once; with 32 channels of 16 bits the output is 64 bytes
// a pixel and the image 12 (of uint8). Operations: 2·27·C_out a pixel, 23 a byte: bandwidth, so FMA
// is enough.
// Budget: 80 registers.
//
// A block brings the image's part below its 4×16 output pixels and all weights to shared memory; a
// thread computes one vector of channels of a pixel at a time.
#include "stem.h"

#include <algorithm>

#include "block_mma.cuh"
#include "fusion.cuh"

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

template <class I, class T>
Error launch_convolve(const StemParams& p, Stream stream) {
  Device device;
  const Error error = current_device(&device);
  if (error != kSuccess) return error;
  Plan plan{};
  plan.p = p;
  plan.across = static_cast<int>(divide_up(p.out_w, kWidth));
  plan.down = static_cast<int>(divide_up(p.out_h, kHeight));
  plan.padded = static_cast<int>(padded(p.c_out));
  plan.aligned = p.c_out % kVector<T> == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  const int bytes = 4 * (kImage + kTaps * plan.padded);
  if (bytes > device.shared_bytes) return kInvalidValue;
  const int64_t blocks =
      std::min(p.n * plan.across * plan.down, int64_t(kBlocks) * device.multiprocessors);
  return launch(convolve<I, T>, Dim3(static_cast<unsigned>(blocks)), Dim3(kThreads),
                static_cast<size_t>(bytes), stream, plan);
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
