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

  // Adds a (128, depth) · w (depth, columns), depth a multiple of kStepDepth. change(m, k, rows)
  // gates the m-th 16 rows of a warp, at channels from k on.
  static constexpr int kStepDepth = 16;
  template <class Change>
  EDET_DEVICE void mma(Shared<Type> a, Shared<Type> w, int depth, const Change& change) {
    const int t = opaque(thread().x), lane = t % kWarp, warp = t / kWarp;
    const int row = lane % 16,
              column = lane / 16 * 8;  // of a lane's 8 numbers of four 8×8 matrices
    const Shared<Type> left = a + ((warp % 4 * 32 + row) * kPitchA + column);
    const Shared<Type> right = w + (row * kPitchW + warp / 4 * (kN * 8) + column);
    const auto step = [&](int k) {
      uint32_t rows[kM][4];
      EDET_UNROLL
      for (int m = 0; m < kM; m++) ldmatrix_x4(left + (m * 16 * kPitchA + k), rows[m]);
      EDET_UNROLL
      for (int m = 0; m < kM; m++) change(m, k, rows[m]);
      EDET_UNROLL
      for (int n = 0; n < kN; n += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(right + (k * kPitchW + n * 8), b);
        EDET_UNROLL
        for (int other = 0; other < 2; other++) {
          EDET_UNROLL
          for (int m = 0; m < kM; m++) {
            warp_mma<Type>(acc_[m][n + other], rows[m], b[2 * other], b[2 * other + 1]);
          }
        }
      }
    };
    if (!blackwell() &&
        depth == kChunk<Type>) {  // the next step's operands are on their way during a step
      EDET_UNROLL
      for (int k = 0; k < kChunk<Type>; k += kStepDepth) step(k);
      return;
    }
    EDET_LOOP
    for (int k = 0; k < depth; k += kStepDepth) step(k);
  }

  // Calls put(factors(column), row, column, sum, sum of column + 1) for all sums of this thread.
  template <class Factors, class Put>
  EDET_DEVICE void each(const Factors& factors, const Put& put) const {
    const int t = opaque(thread().x), lane = t % kWarp, warp = t / kWarp;
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
      : gates(2 * Tile::kColumns * 4), stages(gates + (gated ? 2 * int(k) * 2 : 0)) {}
};

// What a thread copies of a tile's rows: one vector of 8 channels of every 32nd. Its address goes
// on from chunk to chunk.
template <class Tile>
class RowCopies {
  using T = typename Tile::Type;
  static constexpr int kStep = kProductThreads / kVectors, kParts = Tile::kRows / kStep;

 public:
  EDET_DEVICE RowCopies(const GemmParams& p, const GemmRows& level, int64_t row0) : k_(int(p.k)) {
    const int t = thread().x, row = t / kVectors;
    const int64_t left = level.rows - row0 - row;
    rows_ = left < Tile::kRows ? int(left) : Tile::kRows;
    channels_ = k_ - t % kVectors * 8;
    from_ = static_cast<const T*>(level.input) + (row0 + row) * k_ + t % kVectors * 8;
  }
  // Copies the next 64 channels; zeros where there are none.
  EDET_DEVICE void copy(Shared<T> a) {
    const int t = thread().x;
    a = a + (t / kVectors * Tile::kPitchA + t % kVectors * 8);
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) {
      cp_async_16(a + j * kStep * Tile::kPitchA, from_ + j * kStep * k_,
                  channels_ > 0 && j * kStep < rows_);
    }
    channels_ -= kChunk<T>;
    from_ += kChunk<T>;
  }

 private:
  const int k_;
  int rows_, channels_;  // from the thread's first on
  const T* from_;
};

// The same of weights, of which a row has a power of two of threads.
template <class Tile>
class WeightCopies {
  using T = typename Tile::Type;
  static constexpr int kAcross = Tile::kColumns == 96 ? 16 : Tile::kColumns / 8;
  static constexpr int kStep = kProductThreads / kAcross, kParts = kChunk<T> / kStep;

 public:
  EDET_DEVICE WeightCopies(const GemmParams& p, int n) : pitch_(int(round_up(p.n, 8))) {
    const int t = thread().x, column = n + t % kAcross * 8;
    rows_ = column < pitch_ ? int(p.k) - t / kAcross : 0;
    from_ = static_cast<const T*>(p.w) + (t / kAcross * pitch_ + column);
  }
  EDET_DEVICE void copy(Shared<T> w) {
    const int t = thread().x;
    if (Tile::kColumns != 96 || t % kAcross < 12) {
      w = w + (t / kAcross * Tile::kPitchW + t % kAcross * 8);
      EDET_UNROLL
      for (int j = 0; j < kParts; j++) {
        cp_async_16(w + j * kStep * Tile::kPitchW, from_ + j * kStep * pitch_, j * kStep < rows_);
      }
    }
    rows_ -= kChunk<T>;
    from_ += kChunk<T> * pitch_;
  }

 private:
  const int pitch_;
  int rows_;
  const T* from_;
};

// Stores the tile's result, which is in shared memory, 16 bytes at a time where rows are aligned to
// that, else words or elements.
template <class Tile, class Finish>
EDET_DEVICE void store_tile(Shared<typename Tile::Type> from, typename Tile::Type* to, int rows,
                            int columns, int pitch, bool aligned, const Finish& finish) {
  using T = typename Tile::Type;
  constexpr int kAcross = Tile::kColumns / 8, kStep = kProductThreads / kAcross;
  const int t = opaque(thread().x);
  if (aligned) {
    if (t >= kStep * kAcross) return;
    const int row = t / kAcross, column = t % kAcross * 8;
    if (column >= columns) return;
    to += int64_t(row) * pitch + column;
    from = from + (row * Tile::kPitchW + column);
    EDET_UNROLL
    for (int r = 0; r < Tile::kRows; r += kStep) {
      if (r + row >= rows) break;
      store(to, finish(load<8>(from + r * Tile::kPitchW), to));
      to += kStep * pitch;
    }
    return;
  }
  if (pitch % 2 == 0 && reinterpret_cast<uintptr_t>(to) % 4 == 0) {
    // a warp has a row at a time, each lane a word of every 32
    constexpr int kWarps = kProductThreads / kWarp, kParts = divide_up(Tile::kColumns / 2, kWarp);
    const int column = t % kWarp * 2, row = t / kWarp;
    to += int64_t(row) * pitch + column;
    from = from + (row * Tile::kPitchW + column);
    EDET_UNROLL
    for (int r = 0; r < Tile::kRows; r += kWarps) {
      if (r + row >= rows) break;
      EDET_UNROLL
      for (int j = 0; j < kParts; j++) {
        if (column + j * 2 * kWarp >= columns) break;
        T* const at = to + j * 2 * kWarp;
        store(at, finish(load<2>(from + (r * Tile::kPitchW + j * 2 * kWarp)), at));
      }
      to += kWarps * pitch;
    }
    return;
  }
  EDET_LOOP
  for (int i = t; i < Tile::kRows * Tile::kColumns; i += kProductThreads) {
    const int row = i / Tile::kColumns, column = i % Tile::kColumns;
    if (row >= rows || column >= columns) continue;
    T* const at = to + (int64_t(row) * pitch + column);
    store(at, finish(load<1>(from + (row * Tile::kPitchW + column)), at));
  }
}

// Scales and shifts of a block's columns to shared memory, where `finish_tile` reads them.
template <class Tile>
EDET_DEVICE void load_factors(const GemmRows& level, int n, int columns, Shared<float> affine) {
  const int t = thread().x;
  if (t >= Tile::kColumns) return;
  const bool real = t < columns;
  store(affine + t, real ? load_constant<float, 1>(level.scale + n + t).value[0] : 0.0f);
  store(affine + (Tile::kColumns + t),
        real ? load_constant<float, 1>(level.shift + n + t).value[0] : 0.0f);
}

// Gates of a tile's first image and the one after, as the rows' numbers, to shared memory.
template <class T>
EDET_DEVICE void load_gates(const GemmParams& p, int first_image, Shared<T> gates) {
  const int images = int(p.level[0].rows / p.image_rows), k = int(p.k), fours = k / 4;
  for (int i = thread().x; i < 2 * fours; i += kProductThreads) {
    const int image = i / fours, four = i % fours * 4;
    if (first_image + image >= images) break;
    const Vector<float, 4> v =
        load_written<float, 4>(p.gate + int64_t(first_image + image) * k + four);
    store(gates + (image * k + four), from_floats<T>(v.value));
  }
}

// Multiplies the rows of a product by their gates. Rows of a warp's 16 are of one image: the tile's
// first, of which it has `next_rows` more, or the one after.
template <class T>
struct Gate {
  Shared<T> gates;
  int k_all, k0, next_rows;

  EDET_DEVICE void operator()(int m, int k, uint32_t (&rows)[4]) const {
    const int lane = thread().x % kWarp, warp = thread().x / kWarp;
    const int image = warp % 4 * 32 + m * 16 >= next_rows ? 1 : 0;
    EDET_UNROLL
    for (int half = 0; half < 2; half++) {
      // past the rows' channels are zeros, whatever they are multiplied by
      const int channel = min(k0 + k + half * 8, k_all - 8) + lane % 4 * 2;
      const uint32_t gate = get(as<uint32_t>(gates + (image * k_all + channel)));
      EDET_UNROLL
      for (int i = 0; i < 2; i++) rows[half * 2 + i] = product<T>(rows[half * 2 + i], gate);
    }
  }
};
struct NoGate {
  EDET_DEVICE void operator()(int, int, uint32_t (&)[4]) const {}
};

// Scales, shifts and activates a tile's sums, adds the residual and stores them, by way of `out` in
// shared memory, which nobody reads.
template <class Tile>
EDET_DEVICE void finish_tile(const LargeProduct& plan, const GemmRows& level, const Tile& sums,
                             int64_t row0, int n, int columns, Shared<float> affine,
                             Shared<typename Tile::Type> out) {
  using T = typename Tile::Type;
  const GemmParams& p = plan.p;
  const Activation activation = p.activation;
  const auto stage_all = [&](const auto& change) {
    sums.each(
        [&](int column) {
          const Vector<float, 2> scale = load<2>(affine + column);
          const Vector<float, 2> shift = load<2>(affine + (Tile::kColumns + column));
          return Affine{{scale.value[0], scale.value[1]}, {shift.value[0], shift.value[1]}};
        },
        [&](const Affine& f, int row, int column, float first, float second) {
          float x[2] = {f.scale[0] * first + f.shift[0], f.scale[1] * second + f.shift[1]};
          change(x);
          store(out + (row * Tile::kPitchW + column), from_floats<T>(x));
        });
  };
  if (activation == Activation::none) {
    stage_all([](float (&)[2]) {});
  } else if (activation == Activation::swish) {
    stage_all([](float (&x)[2]) { x[0] = swish<T>(x[0]), x[1] = swish<T>(x[1]); });
  } else {
    stage_all([&](float (&x)[2]) { activate<T>(x, activation); });
  }
  sync_threads();
  const int n_all = int(p.n);
  T* const to = static_cast<T*>(level.out) + row0 * n_all + n;
  const int64_t rows_left = level.rows - row0;
  const int rows = rows_left < Tile::kRows ? int(rows_left) : Tile::kRows;
  if (!p.residual) {
    return store_tile<Tile>(out, to, rows, columns, n_all, plan.aligned_out, AsItIs{});
  }
  const int64_t residual = static_cast<const T*>(p.residual) - static_cast<const T*>(level.out);
  store_tile<Tile>(out, to, rows, columns, n_all, plan.aligned_out, [&](auto v, const T* at) {
    return sum_of(v, load_constant<T, sizeof(v) / sizeof(T)>(at + residual));
  });
}

EDET_DEVICE int level_of(const LargeProduct& plan, int tile) {
  int l = 0;
  while (tile >= plan.first_tile[l + 1]) l++;
  return l;
}

template <class Tile, bool kGated>
EDET_KERNEL(kProductThreads, 2)
multiply_large(EDET_PARAMS(LargeProduct) plan) {
  using T = typename Tile::Type;
  if (turing()) return;  // which lacks asynchronous copies: gemm_can() says no
  const GemmParams& p = plan.p;
  EDET_SHARED(char, memory);
  griddep_launch();
  const Memory<Tile> at(p.k, kGated);
  const Shared<float> affine = as<float>(memory);
  const Shared<T> gates = as<T>(memory + at.gates);
  const auto left_of = [&](int stage) {
    return as<T>(memory + (at.stages + stage * Tile::kStage));
  };
  const auto right_of = [&](int stage) {
    return as<T>(memory + (at.stages + stage * Tile::kStage + Tile::kBytesA));
  };
  const int tile = int(block().x) / plan.slices;
  const int n = int(block().x) % plan.slices * plan.columns;
  const int columns = min(int(p.n) - n, plan.columns), k_all = int(p.k);
  const int l = level_of(plan, tile);
  const GemmRows& level = p.level[l];
  const int64_t row0 = int64_t(tile - plan.first_tile[l]) * Tile::kRows;
  load_factors<Tile>(level, n, columns, affine);
  RowCopies<Tile> rows(p, level, row0);
  WeightCopies<Tile> weights(p, n);
  const auto copy = [&](int stage) {
    rows.copy(left_of(stage));
    weights.copy(right_of(stage));
  };
  const int first_image = kGated ? int(row0 / p.image_rows) : 0;
  const int next_rows = kGated ? int((first_image + 1) * p.image_rows - row0) : 0;
  griddep_wait();
  const int chunks = divide_up(k_all, kChunk<T>);
  EDET_UNROLL
  for (int chunk = 0; chunk < kStages - 1; chunk++) {
    if (chunk < chunks) copy(chunk);
    cp_async_commit();
  }
  if (kGated) load_gates(p, first_image, gates);  // they are there at the first barrier
  Tile sums;
  int stage = 0, next = kStages - 1;
  EDET_LOOP
  for (int chunk = 0; chunk < chunks; chunk++) {
    cp_async_wait<kStages - 2>();
    sync_threads();  // the chunk is there, and nobody reads the stage that the next one goes to
    if (chunk + kStages - 1 < chunks) copy(next);
    cp_async_commit();
    const int k0 = chunk * kChunk<T>;
    const int depth = round_up(min(kChunk<T>, k_all - k0), Tile::kStepDepth);
    if constexpr (kGated) {
      sums.mma(left_of(stage), right_of(stage), depth, Gate<T>{gates, k_all, k0, next_rows});
    } else {
      sums.mma(left_of(stage), right_of(stage), depth, NoGate{});
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
    next = next + 1 == kStages ? 0 : next + 1;
  }
  sync_threads();  // the operands, in whose place the result comes, are read
  finish_tile(plan, level, sums, row0, n, columns, affine, left_of(0));
}

// Where a block of multiply_rows has what: factors, weights, gates and rows of two tiles, the
// result.
template <class Tile>
struct RowsMemory {
  static constexpr int kWeights = 2 * Tile::kColumns * 4;
  static constexpr int kRows = kWeights + Tile::kBytesW, kGates = kRows + 2 * Tile::kBytesA;
  static constexpr int kGate = 2 * kChunk<typename Tile::Type> * 2;  // bytes of a tile's
  static constexpr int kOut = kGates + 2 * kGate, kBytes = kOut + Tile::kBytesOut;
};

// A product of one chunk of channels, whose time is that of its rows' and results' bytes: blocks
// take tiles in turns, and the rows of the next two are on their way while one is finished.
template <class Tile, bool kGated>
EDET_KERNEL(kProductThreads, Tile::kColumns <= 64 ? 3 : 2)
multiply_rows(EDET_PARAMS(LargeProduct) plan) {
  using T = typename Tile::Type;
  using At = RowsMemory<Tile>;
  if (turing()) return;
  const GemmParams& p = plan.p;
  EDET_SHARED(char, memory);
  griddep_launch();
  const Shared<float> affine = as<float>(memory);
  const Shared<T> w = as<T>(memory + At::kWeights), out = as<T>(memory + At::kOut);
  const auto rows_of = [&](int turn) { return as<T>(memory + (At::kRows + turn * Tile::kBytesA)); };
  const auto gates_of = [&](int turn) { return as<T>(memory + (At::kGates + turn * At::kGate)); };
  // a block's tiles are all of one slice
  const int slices = plan.slices, tiles = plan.first_tile[p.levels];
  const int n = int(block().x) % slices * plan.columns, step = int(grid_size().x) / slices;
  const int columns = min(int(p.n) - n, plan.columns), k = int(p.k);
  const auto begin = [&](int tile, int turn) {
    if (tile < tiles) {
      const int l = level_of(plan, tile);
      const int64_t row0 = int64_t(tile - plan.first_tile[l]) * Tile::kRows;
      RowCopies<Tile>(p, p.level[l], row0).copy(rows_of(turn));
      if (kGated) load_gates(p, int(row0 / p.image_rows), gates_of(turn));
    }
    cp_async_commit();
  };
  int tile = int(block().x) / slices;
  griddep_wait();
  WeightCopies<Tile>(p, n).copy(w);
  begin(tile, 0);
  begin(tile + step, 1);
  int turn = 0, loaded = -1;  // loaded: whose factors are in shared memory
  for (; tile < tiles; tile += step) {
    const int l = level_of(plan, tile);
    const GemmRows& level = p.level[l];
    const int64_t row0 = int64_t(tile - plan.first_tile[l]) * Tile::kRows;
    cp_async_wait<1>();
    sync_threads();  // the rows are there, and what the tile before left is stored
    if (l != loaded) load_factors<Tile>(level, n, columns, affine);
    loaded = l;
    Tile sums;
    const int depth = round_up(k, Tile::kStepDepth);
    if constexpr (kGated) {
      const int next_rows = int((row0 / p.image_rows + 1) * p.image_rows - row0);
      sums.mma(rows_of(turn), w, depth, Gate<T>{gates_of(turn), k, 0, next_rows});
    } else {
      sums.mma(rows_of(turn), w, depth, NoGate{});
    }
    sync_threads();  // the rows are read
    begin(tile + 2 * step, turn);
    finish_tile(plan, level, sums, row0, n, columns, affine, out);
    turn ^= 1;
  }
}

// Whether a product is multiply_rows'.
bool in_turns(int64_t k) { return k <= kChunk<f16>; }

// Bytes of shared memory of a block.
template <class Tile>
int shared_of(int64_t k, bool gated) {
  if (in_turns(k)) return RowsMemory<Tile>::kBytes;
  const int chunks = static_cast<int>(divide_up(k, kChunk<f16>));
  return Memory<Tile>(k, gated).stages +
         std::max(std::min(chunks, kStages) * Tile::kStage, Tile::kBytesOut);
}
int shared_of(int64_t k, int64_t columns, bool gated) {
  switch (columns) {
    case 32: return shared_of<GemmTile<f16, 1>>(k, gated);
    case 64: return shared_of<GemmTile<f16, 2>>(k, gated);
    case 96: return shared_of<GemmTile<f16, 3>>(k, gated);
    default: return shared_of<GemmTile<f16, 4>>(k, gated);
  }
}

template <class Tile, bool kGated>
Error launch_tile(const LargeProduct& plan, const Device& device, Stream stream, bool pdl) {
  const GemmParams& p = plan.p;
  const int bytes = shared_of<Tile>(p.k, kGated), tiles = plan.first_tile[p.levels];
  const bool turns = in_turns(p.k);
  // as many as run at once, of which all slices have as many
  const int held =
      std::min(Tile::kColumns <= 64 ? 3 : 2, device.multiprocessor_bytes / (bytes + kReserved));
  const int most = std::max(1, std::max(1, held) * device.multiprocessors / plan.slices);
  const Dim3 grid(static_cast<unsigned>((turns ? std::min(tiles, most) : tiles) * plan.slices));
  return launch(turns ? multiply_rows<Tile, kGated> : multiply_large<Tile, kGated>, grid,
                Dim3(kProductThreads), static_cast<size_t>(bytes), stream, plan, pdl);
}

struct Packing {
  GemmWeights weights[kMostGemmWeights];
  int first[kMostGemmWeights + 1];  // vectors of 8 columns
  int count;
};

template <class T>
EDET_KERNEL(kProductThreads, 4)
narrow(EDET_PARAMS(Packing) packing) {
  // In this order: the launch after it reads what nothing of its op writes before it waits, which
  // is safe once all that came before the op has ended.
  griddep_wait();
  griddep_launch();
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

// The columns of blocks of `most` at most, which share out n.
int64_t columns_within(int64_t n, int64_t most) {
  return round_up(divide_up(n, divide_up(n, most)), 32);
}

// A block's columns: those that are predicted to take least. A block takes as long as 58 columns
// and its own; two at once on a multiprocessor take 7/4 of that, and of few such waves the last as
// long as the others. In turns, blocks have as many columns as leave one for each multiprocessor.
// To gate rows takes registers, which leave room for fewer. 0: none that shared memory has room
// for. tiles: of rows.
int64_t columns_of(int64_t tiles, int64_t k, int64_t n, bool gated, const Device& device) {
  int64_t columns = 0, least = INT64_MAX;
  for (int64_t most = gated ? 96 : 128; most > 0; most -= 32) {
    const int64_t now = columns_within(n, most);
    if (shared_of(k, now, gated) > device.shared_bytes) continue;
    const int64_t blocks = tiles * divide_up(n, now), all = device.multiprocessors;
    const int64_t quarters = blocks <= all       ? 4
                             : blocks <= 8 * all ? 7 * divide_up(blocks, 2 * all)
                                                 : 7 * (blocks + all) / (2 * all);
    const int64_t cost = (58 + now) * quarters;
    if (!in_turns(k) && cost >= least) continue;
    columns = now, least = cost;
    if (in_turns(k) && (blocks >= all || most == 64)) break;
  }
  return columns;
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
  // fewer blocks than that leave the machine emptier than smaller tiles would
  const int64_t slices = divide_up(n, columns_within(n, 64));
  return divide_up(rows, int64_t(kGemmRows)) * slices >= device.multiprocessors * 3 / 8;
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
  Device device;
  const Error error = current_device(&device);
  if (error != kSuccess) return error;
  pdl = pdl && device.capability >= 90;
  const auto kernel = dtype == DType::f16 ? narrow<f16> : narrow<bf16>;
  return launch(kernel, grid, Dim3(kProductThreads), 0, stream, packing, pdl);
}

Error gemm(const GemmParams& p, Stream stream, bool pdl) {
  Device device;
  const Error error = current_device(&device);
  if (error != kSuccess) return error;
  LargeProduct plan{};
  plan.p = p;
  plan.aligned_out = p.n % 8 == 0;
  int64_t tiles = 0;
  for (int l = 0; l < p.levels; l++) {
    plan.first_tile[l] = static_cast<int>(tiles);
    tiles += divide_up(p.level[l].rows, int64_t(kGemmRows));
    plan.aligned_out = plan.aligned_out && is_aligned(p.level[l].out);
  }
  plan.first_tile[p.levels] = static_cast<int>(tiles);
  if (tiles == 0) return kSuccess;
  plan.columns = static_cast<int>(columns_of(tiles, p.k, p.n, p.gate != nullptr, device));
  if (plan.columns == 0) return kInvalidValue;
  plan.slices = static_cast<int>(divide_up(p.n, plan.columns));
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
