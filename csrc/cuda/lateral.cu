// The CUDA kernel for 1×1 projections: all of one map in one launch, with an optional gate per
// image and channel before and an optional residual after (the last layer of mbconv).
//
// Floors. Bytes: the input, the outputs and the weights once. Operations: 2·rows·C_in·ΣC_out, at
// C_in = 320 and 3·64 outputs 120 a byte: bandwidth, except for the widest models.
// Budget: 255 registers, tensor cores.
#include "lateral.h"

#include <algorithm>

#include "block_mma.cuh"
#include "fusion.cuh"

namespace edet::cuda {
namespace {

// What the launcher adds to the op's parameters.
struct Plan {
  ProjectionParams p;
  int columns;    // of a block
  int few;        // chunks of a block of multiply_few
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

// The same for multiply_few, whose blocks have rows and weights of all their chunks; and where they
// keep scales and shifts, and whether they are the last of their tile.
struct FewMemory {
  int w, affine, last, bytes;
};
template <class Mma>
EDET_EVERYWHERE constexpr FewMemory few_memory(int chunks) {
  FewMemory m{};
  m.w = chunks * Mma::kBytesA > Mma::kBytesOut ? chunks * Mma::kBytesA : Mma::kBytesOut;
  m.affine = m.w + chunks * Mma::kBytesW;
  m.last = m.affine + 2 * Mma::kColumns * 4;
  m.bytes = m.last + 16;
  return m;
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

  // Goes to channels [k, k + kChunk) of rows [row0, row0 + kRows).
  EDET_DEVICE void begin(int64_t row0, int k) {
    const ProjectionParams& p = plan_.p;
    const int c = int(p.c_in), row = thread().x / kVectors;
    const int channel = k + int(thread().x) % kVectors * V;
    left_ = c - channel;
    from_ = static_cast<const T*>(p.input) + (row0 + row) * c + channel;
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
      gates_[j] = p.gate + int64_t(first + next) * c + channel;
    }
  }
  // What it reads of a chunk.
  struct Loaded {
    Words v[kParts];
    float gate[kParts][V];
  };
  // Reads the channels of the next chunks; zeros where there are none. All rows are on their way
  // before the first gate is.
  template <int kChunks>
  EDET_DEVICE void load(Loaded (&parts)[kChunks]) {
    const int c = int(plan_.p.c_in);
    const auto each = [&](const auto& use) {
      EDET_UNROLL
      for (int i = 0; i < kChunks; i++) {
        EDET_UNROLL
        for (int j = 0; j < kParts; j++) {
          if (real_[j] && left_ - i * kChunk<T> > 0) use(parts[i], j, i * kChunk<T>);
        }
      }
    };
    EDET_UNROLL
    for (int i = 0; i < kChunks; i++) parts[i] = {};
    const auto load_rows = [&](bool aligned) {
      each([&](Loaded& part, int j, int k) {
        part.v[j] = load_words<true>(from_ + (j * kStep * c + k), left_ - k, aligned);
      });
    };
    if (plan_.aligned_in) {
      load_rows(true);
    } else {
      load_rows(false);
    }
    if (plan_.p.gate) {
      each([&](Loaded& part, int j, int k) { load_gate(gates_[j] + k, left_ - k, part.gate[j]); });
    }
    from_ += kChunks * kChunk<T>;
    left_ -= kChunks * kChunk<T>;
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) gates_[j] += kChunks * kChunk<T>;
  }
  // Stores the first `count` of them, gated, each where place(i) is.
  template <int kChunks, class Place>
  EDET_DEVICE void store_to(const Loaded (&parts)[kChunks], int count, const Place& place) const {
    const int offset = thread().x / kVectors * Mma::kPitchA + thread().x % kVectors * V;
    const auto each = [&](const auto& change) {
      EDET_UNROLL
      for (int i = 0; i < kChunks; i++) {
        if (i >= count) break;
        EDET_UNROLL
        for (int j = 0; j < kParts; j++) {
          store(as<uint32_t>(place(i) + (offset + j * kStep * Mma::kPitchA)), change(parts[i], j));
        }
      }
    };
    const bool gated = plan_.p.gate;
    if (!gated && !Mma::kRounds) return each([](const Loaded& part, int j) { return part.v[j]; });
    each([&](const Loaded& part, int j) {
      float x[V];
      to_floats<T>(part.v[j], x);
      EDET_UNROLL
      for (int i = 0; i < V; i++) {
        if (gated) x[i] *= part.gate[j][i];
        if constexpr (Mma::kRounds) x[i] = Mma::operand(x[i]);
      }
      return to_words<T>(x);
    });
  }

 private:
  EDET_DEVICE void load_gate(const float* gate, int left, float (&factor)[V]) const {
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
        if (i < left) factor[i] = load_written<float, 1>(gate + i).value[0];
    }
  }

  const Plan& plan_;
  int left_ = 0;  // channels
  const T* from_ = nullptr;
  const float* gates_[kParts] = {};
  bool real_[kParts] = {};
};

// A block's projection, its first column and how many it has.
struct Slice {
  const Projection& to;
  int n, columns;

  EDET_DEVICE explicit Slice(const Plan& plan) : Slice(plan, 0, int(block().y) * plan.columns) {}

 private:
  EDET_DEVICE Slice(const Plan& plan, int which, int first)
      : to(plan.p.projection[skip(plan, which, first)]),
        n(first),
        columns(int(to.c_out - first < plan.columns ? to.c_out - first : plan.columns)) {}
  // Goes on to the projection that has a column.
  static EDET_DEVICE int skip(const Plan& plan, int which, int& column) {
    for (; column >= plan.p.projection[which].c_out; which++) {
      column -= round_up(int(plan.p.projection[which].c_out), plan.columns);
    }
    return which;
  }
};

// What a thread brings of a slice's scales and shifts to shared memory.
template <class Mma>
class FactorPart {
  static_assert(Mma::kColumns <= kProductThreads, "a thread has one column");

 public:
  EDET_DEVICE explicit FactorPart(const Slice& slice) {
    const int t = thread().x, column = slice.n + t;
    if (t >= slice.columns || column >= int(slice.to.c_out)) return;
    scale_ = load_constant<float, 1>(slice.to.scale + column).value[0];
    shift_ = load_constant<float, 1>(slice.to.shift + column).value[0];
  }
  EDET_DEVICE void store_to(Shared<float> affine) const {
    const int t = thread().x;
    if (t >= Mma::kColumns) return;
    store(affine + t, scale_);
    store(affine + (Mma::kColumns + t), shift_);
  }

 private:
  float scale_ = 0.0f, shift_ = 0.0f;
};
// Of two columns.
template <class Mma>
EDET_DEVICE Affine factors_of(Shared<float> affine, int column) {
  const Vector<float, 2> scale = load<2>(affine + column);
  const Vector<float, 2> shift = load<2>(affine + (Mma::kColumns + column));
  return {{scale.value[0], scale.value[1]}, {shift.value[0], shift.value[1]}};
}

// Scales, shifts, activates, adds the residual and stores the rows from row0 on; `stage`: where
// operands were; factors(column): scale and shift of two columns of the slice.
template <class Mma, class Factors>
EDET_DEVICE void store_rows(const Plan& plan, const Slice& slice, int64_t row0, const Mma& product,
                            Shared<typename Mma::Type> stage, const Factors& factors) {
  using T = typename Mma::Type;
  const ProjectionParams& p = plan.p;
  const Projection& to = slice.to;
  const int n = slice.n;
  const auto store = [&](const auto& change) {
    store_product(
        product, stage, factors, n, slice.columns, to.c_out, plan.aligned_out, change,
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
  };
  const Activation activation = p.activation;
  if (activation == Activation::none) return store([](float (&)[2], int, int) {});
  store([&](float (&x)[2], int, int) { activate<T>(x, activation); });
}

// Only the smallest tiles have their channels shared out among blocks.
template <class Mma>
constexpr bool kSplits = Mma::kRows == 32 && Mma::kColumns == 64;

// A block's sums over its channels and those of the blocks that have the others, in the order of
// the channels; for the last of them to come, which is true of one.
template <class Mma>
EDET_DEVICE bool add_splits(const Plan& plan, Mma& product, Shared<int> last) {
  constexpr int kPairs = Mma::kRows * Mma::kColumns / (2 * kProductThreads), kTogether = 2;
  const int splits = int(grid_size().z), t = thread().x;
  const int tile = int(block().y) * int(grid_size().x) + int(block().x);
  const int tiles = int(grid_size().x) * int(grid_size().y);
  const auto sums_of = [&](int split) {
    return plan.p.partial + (int64_t(split) * tiles + tile) * (Mma::kRows * Mma::kColumns) + t * 2;
  };
  float* const mine = sums_of(int(block().z));
  product.for_sums([&](int i, float& first, float& second) {
    store(mine + i * 2 * kProductThreads, Vector<float, 2>{{first, second}});
    first = 0.0f, second = 0.0f;
  });
  global_fence();
  sync_threads();
  if (t == 0) store(last, int(atomic_add(plan.p.counters + tile, 1) == splits - 1));
  sync_threads();
  if (!get(last)) return false;
  global_fence();
  sync_threads();  // what thread 0 has learned is known to all
  for (int split = 0; split < splits; split += kTogether) {
    Vector<float, 2> v[kTogether][kPairs];
    EDET_UNROLL
    for (int j = 0; j < kTogether; j++) {
      const float* const from = sums_of(min(split + j, splits - 1));
      EDET_UNROLL
      for (int i = 0; i < kPairs; i++) {
        v[j][i] = {{load_shared_by_blocks(from + i * 2 * kProductThreads),
                    load_shared_by_blocks(from + i * 2 * kProductThreads + 1)}};
      }
    }
    EDET_UNROLL
    for (int j = 0; j < kTogether; j++) {
      if (split + j >= splits) break;
      product.for_sums([&](int i, float& first, float& second) {
        first += v[j][i].value[0], second += v[j][i].value[1];
      });
    }
  }
  return true;
}

template <class Mma>
EDET_KERNEL(kProductThreads, Mma::kBlocks)
multiply(EDET_PARAMS(Plan) plan) {
  using T = typename Mma::Type;
  const ProjectionParams& p = plan.p;
  const int c = int(p.c_in), chunks = divide_up(c, kChunk<T>);
  EDET_SHARED(char, memory);
  griddep_launch();
  const Shared<T> a = as<T>(memory);
  const Shared<T> w = as<T>(memory + memory_of<Mma>(chunks, plan.resident).w);
  const Slice slice(plan);
  const Projection& to = slice.to;
  const int n = slice.n, columns = slice.columns;
  WeightPart<Mma> weights;
  RowPart<Mma> rows(plan);
  typename RowPart<Mma>::Loaded part[1];
  bool with_weights = true;  // that are not in shared memory yet
  const auto begin = [&](int64_t at) {
    if (with_weights) weights.begin(to.pw, c, int(to.c_out), n, columns);
    rows.begin(at, 0);
  };
  const auto load = [&] {
    if (with_weights) weights.load();
    rows.load(part);
  };
  const int64_t step = int64_t(grid_size().x) * Mma::kRows;
  int64_t row0 = int64_t(block().x) * Mma::kRows;
  if (row0 >= p.rows) return;
  begin(row0);
  weights.load();
  griddep_wait();
  rows.load(part);

  for (; row0 < p.rows; row0 += step) {
    Mma product;
    for (int chunk = 0; chunk < chunks; chunk++) {
      const int turn = chunk % 2;
      const Shared<T> left = a + turn * (Mma::kBytesA / int(sizeof(T)));
      const Shared<T> right = w + (plan.resident ? chunk : turn) * (Mma::kBytesW / int(sizeof(T)));
      if (with_weights) weights.store_to(right);
      rows.store_to(part, 1, [&](int) { return left; });
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
    store_rows(plan, slice, row0, product, a, [&](int column) {
      return load_affine(to.scale, to.shift, n + column, to.c_out, plan.aligned_out);
    });
    if (row0 + step < p.rows) sync_threads();  // rows come where the result is read
  }
}

// A block that has so many chunks at most keeps all their weights in shared memory, from before the
// launch before has ended; and the rows of kTogether chunks are on their way at once, those of the
// next tile during the product.
constexpr int kFew = 6;
template <class Mma>
constexpr int kTogether = Mma::kRows == 64 ? 2 : 3;

template <class Mma>
EDET_KERNEL(kProductThreads, Mma::kBlocks)
multiply_few(EDET_PARAMS(Plan) plan) {
  using T = typename Mma::Type;
  const ProjectionParams& p = plan.p;
  EDET_SHARED(char, memory);
  griddep_launch();
  const int k0 = int(block().z) * plan.few * kChunk<T>, c = int(p.c_in);  // k0: first channel
  const int chunks = min(plan.few, divide_up(c - k0, kChunk<T>));
  const Shared<T> a = as<T>(memory), w = as<T>(memory + few_memory<Mma>(plan.few).w);
  const auto left_of = [&](int chunk) { return a + chunk * (Mma::kBytesA / int(sizeof(T))); };
  const auto right_of = [&](int chunk) { return w + chunk * (Mma::kBytesW / int(sizeof(T))); };
  const Slice slice(plan);
  const Shared<float> affine = as<float>(memory + few_memory<Mma>(plan.few).affine);
  {
    const FactorPart<Mma> factors(slice);
    WeightPart<Mma> weights;
    weights.begin(slice.to.pw, c, int(slice.to.c_out), slice.n, slice.columns, k0);
    for (int chunk = 0; chunk < chunks; chunk++) {
      weights.load();
      weights.store_to(right_of(chunk));
    }
    factors.store_to(affine);
  }
  const int64_t step = int64_t(grid_size().x) * Mma::kRows;
  int64_t row0 = int64_t(block().x) * Mma::kRows;
  RowPart<Mma> rows(plan);
  typename RowPart<Mma>::Loaded part[kTogether<Mma>];
  const auto load = [&] { rows.load(part); };
  rows.begin(row0, k0);
  griddep_wait();
  load();
  for (; row0 < p.rows; row0 += step) {
    for (int begin = 0; begin < chunks; begin += kTogether<Mma>) {
      rows.store_to(part, chunks - begin, [&](int i) { return left_of(begin + i); });
      if (begin + kTogether<Mma> < chunks) load();
    }
    const bool more = row0 + step < p.rows;
    if (more) {
      rows.begin(row0 + step, k0);
      load();
    }
    sync_threads();
    Mma product;
    for (int chunk = 0; chunk < chunks; chunk++) {
      const int depth = round_up(min(kChunk<T>, c - k0 - chunk * kChunk<T>), kDepth);
      product.mma(left_of(chunk), right_of(chunk), depth, slice.columns);
    }
    if constexpr (kSplits<Mma>) {
      if (grid_size().z > 1) {
        const Shared<int> last = as<int>(memory + few_memory<Mma>(plan.few).last);
        if (!add_splits(plan, product, last)) return;
      }
    }
    store_rows(plan, slice, row0, product, a,
               [&](int column) { return factors_of<Mma>(affine, column); });
    if (more) sync_threads();  // rows come where the result is read
  }
}

// `splits`: among how many blocks the channels of a tile are shared out.
template <class Mma>
Error launch_multiply(const ProjectionParams& p, int64_t columns, int splits, const Device& device,
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
  const int64_t tiles = divide_up(p.rows, Mma::kRows);
  plan.few = divide_up(chunks, kSplits<Mma> ? splits : 1);
  ProductGrid blocks{};
  if (plan.few <= kFew) {
    const int bytes = few_memory<Mma>(plan.few).bytes;
    if (product_grid<Mma>(
            tiles, slices, device, [&](bool) { return bytes; }, &blocks) == kSuccess) {
      blocks.grid.z = static_cast<unsigned>(divide_up(chunks, plan.few));
      return launch(multiply_few<Mma>, blocks.grid, Dim3(kProductThreads),
                    static_cast<size_t>(blocks.bytes), stream, plan, pdl);
    }
  }
  const Error error = product_grid<Mma>(
      tiles, slices, device, [&](bool resident) { return memory_of<Mma>(chunks, resident).bytes; },
      &blocks);
  if (error != kSuccess) return error;
  plan.resident = blocks.resident;
  return launch(multiply<Mma>, blocks.grid, Dim3(kProductThreads), blocks.bytes, stream, plan, pdl);
}

int64_t widest_of(const ProjectionParams& p) {
  int64_t widest = 0;
  for (int i = 0; i < p.projections; i++) widest = std::max(widest, p.projection[i].c_out);
  return widest;
}

// A block's rows and columns, and among how many blocks its channels are shared out. Wide blocks
// read their rows seldom; but a map of few rows is sooner done by many blocks, if all of them run
// at once. 64 rows of 128 columns would leave no registers for what is on its way.
struct Cut {
  int rows, columns, splits;
};
Cut cut_of(const ProjectionParams& p, const Device& device) {
  const auto blocks = [&](int rows, int columns) {
    int64_t slices = 0;
    for (int i = 0; i < p.projections; i++) slices += divide_up(p.projection[i].c_out, columns);
    return divide_up(p.rows, rows) * slices;
  };
  const int64_t most = 2 * device.multiprocessors, small = blocks(32, 64);
  if (small <= most) {
    // a block has two chunks at least: to add what others found takes as long as one or two
    const int64_t chunks = divide_up(p.c_in, p.dtype == DType::f32 ? kChunk<float> : kChunk<f16>);
    const int64_t splits = p.projections > 1 ? 1 : std::min(chunks / 2, most / 2 / small);
    return {32, 64, static_cast<int>(std::max<int64_t>(1, splits))};
  }
  if (widest_of(p) <= 64 || blocks(64, 64) <= most) return {64, 64, 1};
  return {32, 128, 1};
}

}  // namespace

SplitMemory split_memory(const ProjectionParams& p) {
  Device device;
  if (p.rows * p.c_in == 0 || current_device(&device) != kSuccess) return {};
  const Cut cut = cut_of(p, device);
  if (cut.splits == 1) return {};
  const int64_t tiles = divide_up(p.rows, cut.rows) * divide_up(p.projection[0].c_out, cut.columns);
  return {cut.splits * tiles * cut.rows * cut.columns * 4, static_cast<int>(tiles)};
}

Error project(const ProjectionParams& p, Stream stream, bool pdl) {
  if (p.rows * p.c_in == 0) return kSuccess;
  if (p.gate && p.rows > UINT32_MAX) return kInvalidValue;  // rows are divided in 32 bits
  const int64_t widest = widest_of(p);
  return by_operand(p.dtype, p.tf32, [&](auto operand, const Device& device) {
    using Operand = typename decltype(operand)::Type;
    const Cut cut = cut_of(p, device);
    const int splits = p.partial ? cut.splits : 1;
    const int64_t columns = round_up(divide_up(widest, divide_up(widest, cut.columns)), kPanel);
    const bool overlaps = pdl && device.capability >= 90;
    if (cut.rows == 64) {
      return launch_multiply<BlockMma<Operand, 2, 2>>(p, columns, 1, device, stream, overlaps);
    }
    if (cut.columns == 128) {
      return launch_multiply<BlockMma<Operand, 1, 4>>(p, columns, 1, device, stream, overlaps);
    }
    return launch_multiply<BlockMma<Operand, 1, 2>>(p, columns, splits, device, stream, overlaps);
  });
}

}  // namespace edet::cuda
