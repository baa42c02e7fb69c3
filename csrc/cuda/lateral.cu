// The CUDA kernel for 1×1 projections: all of one map in one launch, with an optional gate per
// image and channel before and an optional residual after (the last layer of mbconv).
//
// Floors. Bytes: the input, the outputs and the weights once. Operations: 2·rows·C_in·ΣC_out, at
// C_in = 320 and 3·64 outputs 120 a byte: bandwidth, except for the widest models.
// Budget: 255 registers, tensor cores.
#include "lateral.h"

#include <algorithm>

#include "block_mma.cuh"

namespace edet::cuda {
namespace {

// What the launcher adds to the op's parameters.
struct Plan {
  ProjectionParams p;
  int columns;    // of a block
  bool resident;  // all weights of the slice stay in shared memory
  bool aligned_in, aligned_out;
};

// Where a block's shared memory holds the weights, and its bytes.
struct Memory {
  int w, bytes;
};
template <class Mma>
EDET_EVERYWHERE constexpr Memory memory_of(int chunks, bool resident) {
  Memory m{};
  m.w = resident && Mma::kBytesOut > Mma::kBytesA ? Mma::kBytesOut : Mma::kBytesA;
  m.bytes = m.w + Mma::kBytesW * (resident ? chunks : 1);
  if (m.bytes < Mma::kBytesOut) m.bytes = Mma::kBytesOut;
  return m;
}

// A vector of a pixel times the gates of its channels, of which `c` are left; `aligned` when 16
// bytes of them may be read at once.
template <class T, int V>
EDET_DEVICE Vector<T, V> times(const Vector<T, V>& v, const float* gate, int c, bool aligned) {
  float x[V], factor[V] = {};
  to_floats(v, x);
  if (aligned) {
    EDET_UNROLL
    for (int j = 0; j < V; j += 4) {
      const Vector<float, 4> four = load_constant<float, 4>(gate + j);
      EDET_UNROLL
      for (int i = 0; i < 4; i++) factor[j + i] = four.value[i];
    }
  } else {
    EDET_UNROLL
    for (int j = 0; j < V; j++)
      if (j < c) factor[j] = load_constant<float, 1>(gate + j).value[0];
  }
  EDET_UNROLL
  for (int j = 0; j < V; j++) x[j] *= factor[j];
  return from_floats<T>(x);
}

template <class T, int V>
EDET_DEVICE Vector<T, V> sum_of(const Vector<T, V>& a, const Vector<T, V>& b) {
  if constexpr (V == 1) {
    return {{from_float<T>(to_float(a.value[0]) + to_float(b.value[0]))}};
  } else {
    float x[V], y[V];
    to_floats(a, x);
    to_floats(b, y);
    EDET_UNROLL
    for (int i = 0; i < V; i++) x[i] += y[i];
    return from_floats<T>(x);
  }
}

// Rows [row0, row0 + kRows) and channels [k, k + depth) of the input; zeros where there are none.
template <class Mma>
EDET_DEVICE void load_rows(const Plan& plan, int64_t row0, int k, int depth,
                           Shared<typename Mma::Type> a) {
  using T = typename Mma::Type;
  constexpr int V = kVector<T>;
  const ProjectionParams& p = plan.p;
  // whose gates: the image of the first row, and the row in it
  const uint32_t image_rows = uint32_t(p.image_rows);
  int64_t image = 0;
  uint32_t first_row = 0;
  if (p.gate) {
    image = uint32_t(row0) / image_rows;
    first_row = uint32_t(row0 - image * p.image_rows);
  }
  const bool one_further = image_rows >= Mma::kRows;  // rows of two images at most
  EDET_UNROLL
  for (int i = thread().x; i < Mma::kRows * kVectors; i += kProductThreads) {
    const int vector = i % kVectors, row = i / kVectors, channel = k + vector * V;
    if (vector * V >= depth) continue;
    const bool real = row0 + row < p.rows && channel < p.c_in;
    const T* from = static_cast<const T*>(p.input) + (row0 + row) * p.c_in + channel;
    const Shared<T> to = a + (row * Mma::kPitchA + vector * V);
    if (plan.aligned_in && !p.gate && !Mma::kRounds) {
      cp_async_16(to, from, real);
      continue;
    }
    Vector<T, V> v{};
    if (real) v = load_pixel(from, p.c_in - channel, plan.aligned_in);
    if (real && p.gate) {
      const uint32_t local = first_row + uint32_t(row);
      const uint32_t next = local < image_rows ? 0 : one_further ? 1 : local / image_rows;
      v = times(v, p.gate + (image + next) * p.c_in + channel, int(p.c_in) - channel,
                plan.aligned_in);
    }
    store(to, as_operands<Mma>(v));
  }
  cp_async_wait_all();
}

template <class Mma>
EDET_KERNEL(kProductThreads, Mma::kBlocks)
multiply(EDET_PARAMS(Plan) plan) {
  using T = typename Mma::Type;
  const ProjectionParams& p = plan.p;
  const int c = int(p.c_in), chunks = divide_up(c, kChunk<T>);
  EDET_SHARED(char, memory);
  const Shared<T> a = as<T>(memory);
  const Shared<T> w = as<T>(memory + memory_of<Mma>(chunks, plan.resident).w);
  // the slice's projection and first column
  int which = 0, n = int(block().y) * plan.columns;
  for (; n >= p.projection[which].c_out; which++) {
    n -= round_up(int(p.projection[which].c_out), plan.columns);
  }
  const Projection& to = p.projection[which];
  const int columns = int(to.c_out - n < plan.columns ? to.c_out - n : plan.columns);
  bool first = true;

  for (int64_t row0 = int64_t(block().x) * Mma::kRows; row0 < p.rows;
       row0 += int64_t(grid_size().x) * Mma::kRows) {
    Mma product;
    for (int chunk = 0; chunk < chunks; chunk++) {
      const int k = chunk * kChunk<T>;
      const int depth = round_up(min(kChunk<T>, c - k), kDepth);
      const Shared<T> weights = w + (plan.resident ? chunk * (Mma::kBytesW / int(sizeof(T))) : 0);
      sync_threads();  // the chunk before, or the tile before, is no longer read
      if (first || !plan.resident) {
        load_weights<Mma>(to.pw, c, to.c_out, k, n, depth, columns, weights);
      }
      load_rows<Mma>(plan, row0, k, depth, a);
      sync_threads();
      product.mma(a, weights, depth, columns);
    }
    first = false;
    store_product(
        product, a,
        [&](int column) {
          return load_affine(to.scale, to.shift, n + column, to.c_out, plan.aligned_out);
        },
        n, columns, to.c_out, plan.aligned_out, [](float (&)[2], int, int) {},
        [&](auto v, const T* at) {
          constexpr int V = sizeof(v) / sizeof(T);
          if (!p.residual) return v;
          const T* const from =
              static_cast<const T*>(p.residual) + (at - static_cast<const T*>(to.out));
          return sum_of(v, load_constant<T, V>(from));
        },
        [&](int row) -> T* {
          if (row0 + row >= p.rows) return nullptr;
          return static_cast<T*>(to.out) + (row0 + row) * to.c_out;
        });
  }
}

template <class Mma>
Error launch_multiply(const ProjectionParams& p, int64_t columns, const Device& device,
                      Stream stream) {
  using T = typename Mma::Type;
  Plan plan{};
  plan.p = p;
  plan.columns = static_cast<int>(columns);
  plan.aligned_in = p.c_in % kVector<T> == 0 && is_aligned(p.input);
  plan.aligned_out = true;
  int64_t slices = 0;
  for (int i = 0; i < p.projections; i++) {
    const Projection& to = p.projection[i];
    slices += divide_up(to.c_out, columns);
    plan.aligned_out = plan.aligned_out && to.c_out % kVector<T> == 0 && is_aligned(to.out);
  }
  const int chunks = static_cast<int>(divide_up(p.c_in, kChunk<T>));
  ProductGrid blocks{};
  const Error error = product_grid<Mma>(
      divide_up(p.rows, Mma::kRows), slices, device,
      [&](bool resident) { return memory_of<Mma>(chunks, resident).bytes; }, &blocks);
  if (error != kSuccess) return error;
  plan.resident = blocks.resident;
  return launch(multiply<Mma>, blocks.grid, Dim3(kProductThreads), blocks.bytes, stream, plan);
}

}  // namespace

Error project(const ProjectionParams& p, Stream stream) {
  if (p.rows * p.c_in == 0) return kSuccess;
  if (p.gate && p.rows > UINT32_MAX) return kInvalidValue;  // rows are divided in 32 bits
  int64_t widest = 0;
  for (int i = 0; i < p.projections; i++) widest = std::max(widest, p.projection[i].c_out);
  return by_operand(p.dtype, p.tf32, [&](auto operand, const Device& device) {
    using Operand = typename decltype(operand)::Type;
    const ProductShape shape = product_shape<Operand>(widest, device.shared_bytes);
    const int64_t columns = round_up(divide_up(widest, shape.slices), kPanel);
    const bool few = p.rows < int64_t(64) * device.multiprocessors;
    return by_tiles<Operand>(shape, few, [&](auto mma) {
      return launch_multiply<typename decltype(mma)::Type>(p, columns, device, stream);
    });
  });
}

}  // namespace edet::cuda
