// The CUDA kernel for large products: rows of 16-bit maps, times a gate where there is one, by
// pointwise weights, then scale, shift, activation and residual.
//
// Floors. Bytes: rows and results once, from DRAM where the maps are large. Operations: 2·rows·k·n;
// at k = n = 384 of D7 192 a byte, where an H100's memory allows 330 at the tensor cores' peak.
// Budget: 128 registers, tensor cores.
//
// A block owns 128 rows and up to 128 columns. Chunks of 64 channels of rows and of weights come by
// asynchronous copies, two of them on their way during the product of a third; 8 warps, 4 along
// the rows and 2 along the columns, keep 32 rows of half the columns each in registers.
// Weights are 16 bits wide, made of the packed ones by a launch of their own, so that a copy brings
// them as they are multiplied. Blocks of the same rows follow each other: their rows come from the
// second-level cache.
#include "gemm.h"

#include <algorithm>

#include "block_mma.cuh"
#include "fusion.cuh"

namespace edet::cuda {
namespace {

constexpr int kGemmRows = 128, kStages = 3;

// The block's tile, and its operands in shared memory: rows are padded by 16 bytes, which keeps 8
// of them in different banks.
template <class Operand, int kTilesN>
class GemmTile {
 public:
  using Type = Operand;
  static constexpr int kRows = kGemmRows, kColumns = 32 * kTilesN;
  static constexpr int kPitchA = kChunk<Operand> + 8, kPitchW = kColumns + 8;
  static constexpr int kBytesA = kRows * kPitchA * 2, kBytesW = kChunk<Operand> * kPitchW * 2;
  static constexpr int kBytesOut = kRows * kPitchW * 2;
  static constexpr int kStage = kBytesA + kBytesW;

  EDET_DEVICE GemmTile() {
    EDET_UNROLL
    for (int m = 0; m < kM; m++) {
      EDET_UNROLL
      for (int n = 0; n < kN; n++) {
        EDET_UNROLL
        for (int i = 0; i < 4; i++) acc_[m][n][i] = 0.0f;
      }
    }
  }

  // Adds a (128, depth) · w (depth, columns), depth a multiple of kDepth. change(m, k, rows) gates
  // the m-th 16 rows of a warp, at channels from k on.
  template <class Change>
  EDET_DEVICE void mma(Shared<Type> a, Shared<Type> w, int depth, const Change& change) {
    const int t = opaque(thread().x), lane = t % kWarp, warp = t / kWarp;
    const Shared<Type> left = a + ((warp % 4 * 32 + lane % 16) * kPitchA + lane / 16 * 8);
    const Shared<Type> right = w + (lane * kPitchW + warp / 4 * (kN * 8));
    EDET_LOOP
    for (int k = 0; k < depth; k += kDepth) {
      uint32_t rows[2][kM][4];
      EDET_UNROLL
      for (int half = 0; half < 2; half++) {
        EDET_UNROLL
        for (int m = 0; m < kM; m++) {
          ldmatrix_x4(left + (m * 16 * kPitchA + k + 16 * half), rows[half][m]);
        }
      }
      EDET_UNROLL
      for (int half = 0; half < 2; half++) {
        EDET_UNROLL
        for (int m = 0; m < kM; m++) change(m, k + 16 * half, rows[half][m]);
      }
      EDET_UNROLL
      for (int n = 0; n < kN; n++) {
        uint32_t b[4];
        ldmatrix_x4_trans(right + (k * kPitchW + n * 8), b);
        EDET_UNROLL
        for (int half = 0; half < 2; half++) {
          EDET_UNROLL
          for (int m = 0; m < kM; m++) {
            warp_mma<Type>(acc_[m][n], rows[half][m], b[2 * half], b[2 * half + 1]);
          }
        }
      }
    }
  }

  // As TensorCoreSums::each.
  template <class Factors, class Begin, class Put>
  EDET_DEVICE void each(const Factors& factors, const Begin& begin, const Put& put) const {
    const int t = opaque(thread().x), lane = t % kWarp, warp = t / kWarp;
    begin();
    EDET_UNROLL
    for (int n = 0; n < kN; n++) {
      const int column = (warp / 4 * kN + n) * 8 + lane % 4 * 2;
      const auto f = factors(column);
      EDET_UNROLL
      for (int m = 0; m < kM; m++) {
        const int row = warp % 4 * 32 + m * 16 + lane / 4;
        put(f, row, column, acc_[m][n][0], acc_[m][n][1]);
        put(f, row + 8, column, acc_[m][n][2], acc_[m][n][3]);
      }
    }
  }

 private:
  static constexpr int kM = 2, kN = 2 * kTilesN;  // of 16 rows and 8 columns
  float acc_[kM][kN][4];
};

// What the launcher adds to the op's parameters.
struct LargeProduct {
  GemmParams p;
  int first_tile[kMaxLevels + 1];  // of 128 rows
  int columns, slices;             // of a block, and blocks of a tile
  int stages;                      // of shared memory
  bool aligned_out;
};

// Where a block's shared memory holds scales and shifts, gates of two images, and the stages, in
// the place of which the result comes.
template <class Tile>
struct Memory {
  int gates, stages;

  EDET_EVERYWHERE constexpr Memory(int64_t k, bool gated)
      : gates(2 * Tile::kColumns * 4), stages(gates + (gated ? 2 * int(k) * 4 : 0)) {}
};

// What a thread copies of a stage: of rows and of weights one vector of 8 channels every so often.
template <class Tile>
class StagePart {
  using T = typename Tile::Type;
  static constexpr int kParts = Tile::kRows * kVectors / kProductThreads;
  static constexpr int kAcross = Tile::kColumns / 8;
  static constexpr int kVectorsW = kChunk<T> * kAcross;
  static constexpr int kPartsW = kVectorsW / kProductThreads;
  static_assert(kVectorsW % kProductThreads == 0, "whole parts");

 public:
  EDET_DEVICE StagePart(const GemmParams& p, const GemmRows& level, int64_t row0, int n)
      : k_(int(p.k)), pitch_(int(round_up(p.n, 8))) {
    const int t = thread().x;
    rows_ = int(min64(level.rows - row0, Tile::kRows)) - t / kVectors;
    from_ = static_cast<const T*>(level.input) + (row0 + t / kVectors) * k_ + t % kVectors * 8;
    w_ = static_cast<const T*>(p.w) + n;
    columns_ = pitch_ - n;
  }
  // Copies channels [k, k + 64).
  EDET_DEVICE void copy(int k, Shared<T> a, Shared<T> w) const {
    const int t = thread().x, vector = t % kVectors;
    const bool real = k + vector * 8 < k_;
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) {
      const int row = j * (kProductThreads / kVectors);
      const bool there = real && row < rows_;
      cp_async_16(a + ((t / kVectors + row) * Tile::kPitchA + vector * 8),
                  from_ + (there ? row * k_ + k : 0), there);
    }
    EDET_UNROLL
    for (int j = 0; j < kPartsW; j++) {
      const int i = t + j * kProductThreads, row = i / kAcross, column = i % kAcross * 8;
      const bool there = k + row < k_ && column < columns_;
      cp_async_16(w + (row * Tile::kPitchW + column),
                  w_ + (there ? (k + row) * pitch_ + column : 0), there);
    }
  }

 private:
  static EDET_DEVICE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

  const int k_, pitch_;
  int rows_, columns_;
  const T *from_, *w_;
};

template <class Tile, bool kGated>
EDET_KERNEL(kProductThreads, 2)
multiply_large(EDET_PARAMS(LargeProduct) plan) {
  using T = typename Tile::Type;
  if (turing()) return;  // which lacks asynchronous copies: gemm_can() says no
  const GemmParams& p = plan.p;
  EDET_SHARED(char, memory);
  griddep_launch();
  const Memory<Tile> at(p.k, kGated);
  const Shared<float> affine = as<float>(memory), gates = as<float>(memory + at.gates);
  const auto left_of = [&](int stage) {
    return as<T>(memory + (at.stages + stage * Tile::kStage));
  };
  const auto right_of = [&](int stage) {
    return as<T>(memory + (at.stages + stage * Tile::kStage + Tile::kBytesA));
  };
  const int tile = int(block().x) / plan.slices, t = thread().x;
  const int n = int(block().x) % plan.slices * plan.columns, n_all = int(p.n);
  const int columns = min(n_all - n, plan.columns), k_all = int(p.k);
  int l = 0;
  while (tile >= plan.first_tile[l + 1]) l++;
  const GemmRows& level = p.level[l];
  const int64_t row0 = int64_t(tile - plan.first_tile[l]) * Tile::kRows;
  if (t < Tile::kColumns) {
    const bool real = t < columns;
    store(affine + t, real ? load_constant<float, 1>(level.scale + n + t).value[0] : 0.0f);
    store(affine + (Tile::kColumns + t),
          real ? load_constant<float, 1>(level.shift + n + t).value[0] : 0.0f);
  }
  const StagePart<Tile> part(p, level, row0, n);
  // the image of a warp's 16 rows is the tile's first or the one after
  const int first_image = kGated ? int(row0 / p.image_rows) : 0;
  const int next_rows = kGated ? int((first_image + 1) * p.image_rows - row0) : 0;
  griddep_wait();
  if (kGated) {
    const int images = int(p.level[0].rows / p.image_rows);
    for (int i = t; i < k_all / 2; i += kProductThreads) {
      const int image = i / (k_all / 4), four = i % (k_all / 4) * 4;
      const bool there = first_image + image < images;
      cp_async_16(gates + (image * k_all + four),
                  p.gate + (there ? int64_t(first_image + image) * k_all + four : 0), there);
    }
  }
  const int chunks = divide_up(k_all, kChunk<T>);
  EDET_UNROLL
  for (int chunk = 0; chunk < kStages - 1; chunk++) {
    if (chunk < chunks) part.copy(chunk * kChunk<T>, left_of(chunk), right_of(chunk));
    cp_async_commit();
  }
  Tile product;
  int stage = 0, next = kStages - 1;
  EDET_LOOP
  for (int chunk = 0; chunk < chunks; chunk++) {
    cp_async_wait<kStages - 2>();
    sync_threads();  // the chunk is there, and nobody reads the stage that the next one goes to
    const int ahead = chunk + kStages - 1;
    if (ahead < chunks) part.copy(ahead * kChunk<T>, left_of(next), right_of(next));
    cp_async_commit();
    const int k0 = chunk * kChunk<T>;
    const int depth = round_up(min(kChunk<T>, k_all - k0), kDepth);
    product.mma(left_of(stage), right_of(stage), depth, [&](int m, int k, uint32_t (&rows)[4]) {
      if constexpr (kGated) {
        const int lane = thread().x % kWarp, warp = thread().x / kWarp;
        const int image = warp % 4 * 32 + m * 16 >= next_rows ? 1 : 0;
        EDET_UNROLL
        for (int half = 0; half < 2; half++) {
          // zeros past the rows' channels, whatever they are multiplied by
          const int channel = min(k0 + k + half * 8, k_all - 8) + lane % 4 * 2;
          const Vector<float, 2> gate = load<2>(gates + (image * k_all + channel));
          EDET_UNROLL
          for (int i = 0; i < 2; i++) {
            float one, two;
            unpack<T>(rows[half * 2 + i], one, two);
            rows[half * 2 + i] = pack<T>(one * gate.value[0], two * gate.value[1]);
          }
        }
      }
    });
    stage = stage + 1 == kStages ? 0 : stage + 1;
    next = next + 1 == kStages ? 0 : next + 1;
  }
  cp_async_wait<0>();
  const auto store_all = [&](const auto& change) {
    store_product(
        product, left_of(0),
        [&](int column) {
          const Vector<float, 2> scale = load<2>(affine + column);
          const Vector<float, 2> shift = load<2>(affine + (Tile::kColumns + column));
          return Affine{{scale.value[0], scale.value[1]}, {shift.value[0], shift.value[1]}};
        },
        n, columns, n_all, plan.aligned_out, change,
        [&](auto v, const T* to) {
          constexpr int V = sizeof(v) / sizeof(T);
          if (!p.residual) return v;
          const T* const from =
              static_cast<const T*>(p.residual) + (to - static_cast<const T*>(level.out));
          return sum_of(v, load_constant<T, V>(from));
        },
        [&](int row) -> T* {
          if (row0 + row >= level.rows) return nullptr;
          return static_cast<T*>(level.out) + (row0 + row) * n_all;
        });
  };
  const Activation activation = p.activation;
  if (activation == Activation::none) return store_all([](float (&)[2], int, int) {});
  if (activation == Activation::swish) {
    return store_all([](float (&x)[2], int, int) {
      x[0] = swish<T>(x[0]);
      x[1] = swish<T>(x[1]);
    });
  }
  store_all([&](float (&x)[2], int, int) { activate<T>(x, activation); });
}

// Bytes of shared memory of a block of so many columns.
int shared_of(int64_t k, int64_t columns, bool gated) {
  const int64_t stage = (kGemmRows * (64 + 8) + 64 * (columns + 8)) * 2;
  const int64_t stages = std::min<int64_t>(divide_up(k, 64), kStages) * stage;
  const int64_t out = kGemmRows * (columns + 8) * 2;
  return static_cast<int>(2 * columns * 4 + (gated ? 2 * k * 4 : 0) + std::max(stages, out));
}

template <class Tile, bool kGated>
Error launch_tile(const LargeProduct& plan, const Device& device, Stream stream, bool pdl) {
  const GemmParams& p = plan.p;
  const int bytes = shared_of(p.k, Tile::kColumns, kGated);
  if (bytes > device.shared_bytes) return kInvalidValue;
  const Dim3 grid(static_cast<unsigned>(plan.first_tile[p.levels] * plan.slices));
  return launch(multiply_large<Tile, kGated>, grid, Dim3(kProductThreads),
                static_cast<size_t>(bytes), stream, plan, pdl);
}

struct Packing {
  GemmWeights weights[kMostGemmWeights];
  int first[kMostGemmWeights + 1];  // vectors of 8 columns
  int count;
};

template <class T>
EDET_KERNEL(kProductThreads, 4)
narrow(EDET_PARAMS(Packing) packing) {
  griddep_launch();
  griddep_wait();
  const int i = int(block().x) * kProductThreads + int(thread().x);
  if (i >= packing.first[packing.count]) return;
  int which = 0;
  while (i >= packing.first[which + 1]) which++;
  const GemmWeights& w = packing.weights[which];
  // two vectors of a row of a panel follow each other, then the panel's next row
  const int local = i - packing.first[which], k = int(w.k);
  const int row = local / 2 % k, panel = local / 2 / k, column = panel * kPanel + local % 2 * 8;
  if (column >= w.n) return;
  float x[8];
  EDET_UNROLL
  for (int half = 0; half < 2; half++) {
    const Vector<float, 4> v = load_constant<float, 4>(w.packed + local * 8 + half * 4);
    EDET_UNROLL
    for (int j = 0; j < 4; j++) x[half * 4 + j] = v.value[j];
  }
  store(static_cast<T*>(w.to) + (int64_t(row) * round_up(int(w.n), 8) + column), from_floats<T>(x));
}

// A block has as many columns as shared memory allows; to gate rows takes registers, which leave
// room for fewer. 0: none.
int64_t columns_of(int64_t k, int64_t n, bool gated, int shared_bytes) {
  for (int64_t most = gated ? 96 : 128; most > 0; most -= 32) {
    const int64_t columns = round_up(divide_up(n, divide_up(n, most)), 32);
    if (shared_of(k, columns, gated) <= shared_bytes) return columns;
  }
  return 0;
}

}  // namespace

bool gemm_can(DType dtype, int64_t k, int64_t image_rows) {
  Device device;
  if (dtype == DType::f32 || current_device(&device) != kSuccess || device.capability < 80)
    return false;
  // rows of a warp's product are of one image, those of a block of two at most
  const bool images = image_rows == 0 || (image_rows % 16 == 0 && image_rows >= kGemmRows - 16);
  return k > 0 && k % 8 == 0 && images && shared_of(k, 32, image_rows > 0) <= device.shared_bytes;
}

bool gemm_pays(DType dtype, int64_t rows, int64_t k, int64_t n, int64_t image_rows) {
  if (!gemm_can(dtype, k, image_rows)) return false;
  Device device;
  if (current_device(&device) != kSuccess) return false;
  const int64_t slices = divide_up(n, columns_of(k, n, image_rows > 0, device.shared_bytes));
  return divide_up(rows, int64_t(kGemmRows)) * slices >= 2 * device.multiprocessors;
}

Error pack_weights(DType dtype, const GemmWeights* weights, int count, Stream stream, bool pdl) {
  if (count > kMostGemmWeights) return kInvalidValue;
  Packing packing{};
  packing.count = count;
  for (int i = 0; i < count; i++) {
    packing.weights[i] = weights[i];
    packing.first[i + 1] =
        packing.first[i] + static_cast<int>(divide_up(weights[i].n, kPanel) * weights[i].k * 2);
  }
  const Dim3 grid(static_cast<unsigned>(divide_up(packing.first[count], kProductThreads)));
  const auto kernel = dtype == DType::f16 ? narrow<f16> : narrow<bf16>;
  return launch(kernel, grid, Dim3(kProductThreads), 0, stream, packing, pdl);
}

Error gemm(const GemmParams& p, Stream stream, bool pdl) {
  Device device;
  const Error error = current_device(&device);
  if (error != kSuccess) return error;
  LargeProduct plan{};
  plan.p = p;
  plan.columns = static_cast<int>(columns_of(p.k, p.n, p.gate != nullptr, device.shared_bytes));
  if (plan.columns == 0) return kInvalidValue;
  plan.slices = static_cast<int>(divide_up(p.n, plan.columns));
  plan.aligned_out = p.n % 8 == 0;
  int64_t tiles = 0;
  for (int l = 0; l < p.levels; l++) {
    plan.first_tile[l] = static_cast<int>(tiles);
    tiles += divide_up(p.level[l].rows, int64_t(kGemmRows));
    plan.aligned_out = plan.aligned_out && is_aligned(p.level[l].out);
  }
  plan.first_tile[p.levels] = static_cast<int>(tiles);
  if (tiles == 0) return kSuccess;
  if (tiles * plan.slices > INT32_MAX) return kInvalidValue;
  pdl = pdl && device.capability >= 90;
  const auto by_columns = [&](auto type) {
    using T = typename decltype(type)::Type;
    const auto tile = [&](auto tag) {
      using Tile = typename decltype(tag)::Type;
      return p.gate ? launch_tile<Tile, true>(plan, device, stream, pdl)
                    : launch_tile<Tile, false>(plan, device, stream, pdl);
    };
    switch (plan.columns) {
      case 32: return tile(Tag<GemmTile<T, 1>>{});
      case 64: return tile(Tag<GemmTile<T, 2>>{});
      case 96: return tile(Tag<GemmTile<T, 3>>{});
      default: return launch_tile<GemmTile<T, 4>, false>(plan, device, stream, pdl);
    }
  };
  switch (p.dtype) {
    case DType::f16: return by_columns(Tag<f16>{});
    case DType::bf16: return by_columns(Tag<bf16>{});
    case DType::f32: break;
  }
  return kInvalidValue;
}

}  // namespace edet::cuda
