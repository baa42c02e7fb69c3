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

// Where a block's shared memory holds the weights, and its bytes: rows of two chunks, or the result
// in their place; weights of two chunks, or of all that the slice needs.
struct Memory {
  int w, bytes;
};
template <class Mma>
EDET_EVERYWHERE constexpr Memory memory_of(int chunks, bool resident) {
  Memory m{};
  m.w = 2 * Mma::kBytesA > Mma::kBytesOut ? 2 * Mma::kBytesA : Mma::kBytesOut;
  m.bytes = m.w + Mma::kBytesW * (resident ? chunks : 2);
  return m;
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

// What a thread brings of a tile's rows to shared memory, gated: one vector of every 32nd row. Read
// while the block works on the chunk before.
template <class Mma>
class RowPart {
  using T = typename Mma::Type;
  static constexpr int V = kVector<T>, kStep = kProductThreads / kVectors;
  static constexpr int kParts = Mma::kRows / kStep;

 public:
  EDET_DEVICE explicit RowPart(const Plan& plan) : plan_(plan) {}

  // Goes to the first channels of rows [row0, row0 + kRows).
  EDET_DEVICE void begin(int64_t row0) {
    const ProjectionParams& p = plan_.p;
    const int c = int(p.c_in), vector = thread().x % kVectors, row = thread().x / kVectors;
    left_ = c - vector * V;
    from_ = static_cast<const T*>(p.input) + (row0 + row) * c + vector * V;
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) real_[j] = row0 + row + j * kStep < p.rows;
    if (!p.gate) return;
    // whose gates: the image of the first row, and the row in it
    const uint32_t image_rows = uint32_t(p.image_rows);
    const bool one_further = image_rows >= Mma::kRows;  // rows of two images at most
    const uint32_t first = uint32_t(row0) / image_rows;
    const uint32_t first_row = uint32_t(row0 - int64_t(first) * p.image_rows);
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) {
      const uint32_t local = first_row + uint32_t(row + j * kStep);
      const uint32_t next = local < image_rows ? 0 : one_further ? 1 : local / image_rows;
      gates_[j] = p.gate + int64_t(first + next) * c + vector * V;
    }
  }
  // Reads the next chunk's channels; zeros where there are none.
  EDET_DEVICE void load() {
    const int c = int(plan_.p.c_in);
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) {
      v_[j] = {};
      EDET_UNROLL
      for (int i = 0; i < V; i++) gate_[j][i] = 0.0f;
      if (!real_[j] || left_ <= 0) continue;
      v_[j] = load_words<true>(from_ + j * kStep * c, left_, plan_.aligned_in);
      if (plan_.p.gate) load_gate(gates_[j], gate_[j]);
    }
    from_ += kChunk<T>;
    left_ -= kChunk<T>;
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) gates_[j] += kChunk<T>;
  }
  EDET_DEVICE void store_to(Shared<T> a) const {
    a = a + (thread().x / kVectors * Mma::kPitchA + thread().x % kVectors * V);
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) {
      Words v = v_[j];
      if (plan_.p.gate || Mma::kRounds) {
        float x[V];
        to_floats<T>(v, x);
        EDET_UNROLL
        for (int i = 0; i < V; i++) {
          if (plan_.p.gate) x[i] *= gate_[j][i];
          if constexpr (Mma::kRounds) x[i] = Mma::operand(x[i]);
        }
        v = to_words<T>(x);
      }
      store(as<uint32_t>(a + j * kStep * Mma::kPitchA), v);
    }
  }

 private:
  EDET_DEVICE void load_gate(const float* gate, float (&factor)[V]) const {
    if (plan_.aligned_in) {
      EDET_UNROLL
      for (int i = 0; i < V; i += 4) {
        const Vector<float, 4> four = load_written<float, 4>(gate + i);
        EDET_UNROLL
        for (int j = 0; j < 4; j++) factor[i + j] = four.value[j];
      }
    } else {
      EDET_UNROLL
      for (int i = 0; i < V; i++)
        if (i < left_) factor[i] = load_written<float, 1>(gate + i).value[0];
    }
  }

  const Plan& plan_;
  int left_ = 0;  // channels
  const T* from_ = nullptr;
  const float* gates_[kParts] = {};
  bool real_[kParts] = {};
  Words v_[kParts];
  float gate_[kParts][V];
};

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
  WeightPart<Mma> weights;
  RowPart<Mma> rows(plan);
  bool with_weights = true;  // that are not in shared memory yet
  const auto begin = [&](int64_t at) {
    if (with_weights) weights.begin(to.pw, c, int(to.c_out), n, columns);
    rows.begin(at);
  };
  const auto load = [&] {
    if (with_weights) weights.load();
    rows.load();
  };
  const int64_t step = int64_t(grid_size().x) * Mma::kRows;
  int64_t row0 = int64_t(block().x) * Mma::kRows;
  if (row0 >= p.rows) return;
  begin(row0);
  weights.load();
  griddep_wait();
  rows.load();

  for (; row0 < p.rows; row0 += step) {
    Mma product;
    for (int chunk = 0; chunk < chunks; chunk++) {
      const int turn = chunk % 2;
      const Shared<T> left = a + turn * (Mma::kBytesA / int(sizeof(T)));
      const Shared<T> right = w + (plan.resident ? chunk : turn) * (Mma::kBytesW / int(sizeof(T)));
      if (with_weights) weights.store_to(right);
      rows.store_to(left);
      // the next chunk is on its way during the product
      const bool last = chunk + 1 == chunks;
      if (last && row0 + step < p.rows) {
        if (plan.resident) with_weights = false;
        begin(row0 + step);
      }
      if (!last || row0 + step < p.rows) load();
      sync_threads();
      product.mma(left, right, round_up(min(kChunk<T>, c - chunk * kChunk<T>), kDepth), columns);
    }
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
    if (row0 + step < p.rows) sync_threads();  // rows come where the result is read
  }
}

template <class Mma>
Error launch_multiply(const ProjectionParams& p, int64_t columns, const Device& device,
                      Stream stream, bool pdl) {
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
  return launch(multiply<Mma>, blocks.grid, Dim3(kProductThreads), blocks.bytes, stream, plan, pdl);
}

// A block's rows and columns. Wide blocks read their rows seldom; but a map of few rows is sooner
// done by many blocks, so that each multiprocessor has one. 64 rows of 128 columns would leave no
// registers for what is on its way.
struct Cut {
  int rows, columns;
};
Cut cut_of(const ProjectionParams& p, int64_t widest, const Device& device) {
  const Cut large = widest <= 64 ? Cut{64, 64} : Cut{32, 128};
  int64_t slices = 0;
  for (int i = 0; i < p.projections; i++) {
    slices += divide_up(p.projection[i].c_out, large.columns);
  }
  const bool few = divide_up(p.rows, large.rows) * slices < device.multiprocessors;
  return few ? Cut{32, 64} : large;
}

}  // namespace

Error project(const ProjectionParams& p, Stream stream, bool pdl) {
  if (p.rows * p.c_in == 0) return kSuccess;
  if (p.gate && p.rows > UINT32_MAX) return kInvalidValue;  // rows are divided in 32 bits
  int64_t widest = 0;
  for (int i = 0; i < p.projections; i++) widest = std::max(widest, p.projection[i].c_out);
  return by_operand(p.dtype, p.tf32, [&](auto operand, const Device& device) {
    using Operand = typename decltype(operand)::Type;
    const Cut cut = cut_of(p, widest, device);
    const int64_t columns = round_up(divide_up(widest, divide_up(widest, cut.columns)), kPanel);
    if (cut.rows == 64) {
      return launch_multiply<BlockMma<Operand, 2, 2>>(p, columns, device, stream,
                                                      pdl && device.capability >= 90);
    }
    if (cut.columns == 128) {
      return launch_multiply<BlockMma<Operand, 1, 4>>(p, columns, device, stream,
                                                      pdl && device.capability >= 90);
    }
    return launch_multiply<BlockMma<Operand, 1, 2>>(p, columns, device, stream,
                                                    pdl && device.capability >= 90);
  });
}

}  // namespace edet::cuda
