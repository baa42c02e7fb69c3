// One block's product of rows (pixels) by packed pointwise weights, accumulated in registers over
// chunks of input channels in shared memory: on tensor cores for 16-bit maps and for floats that
// may be rounded to tf32, by FMA for other floats.
#pragma once

#include <algorithm>

#include "../core/params.h"
#include "vectors.cuh"
#include "warp_mma.cuh"

namespace edet::cuda {

constexpr int kProductThreads = 256;

// Channels of a chunk: 128 bytes of a pixel, which 8 lanes move at once, 16 bytes each. An eighth
// of a warp's 16-byte accesses is served at a time: these 8 lanes touch every bank once.
template <class T>
constexpr int kChunk = 128 / int(sizeof(T));
constexpr int kVectors = 8;  // of a chunk
// Depth a product's step is a multiple of; operands are padded to it with zeros.
constexpr int kDepth = 32;

// Operands that are floats with a mantissa of 10 bits.
struct tf32 {};

// The block's tile, kRows rows (32·kTilesM, or 16 where that is 0) and kColumns columns, and its
// operands in shared memory, in the type
// T of the maps. Both operands' rows are padded by 16 bytes or more, which keeps 8 rows in
// different banks.
template <class T, int kTilesM, int kTilesN>
struct ProductTile {
  using Type = T;
  static constexpr int kRows = kTilesM ? 32 * kTilesM : 16, kColumns = 32 * kTilesN;
  static constexpr int kPitchA = kChunk<T> + kVector<T>, kPitchW = kColumns + 8;
  static constexpr int kBytesA = kRows * kPitchA * int(sizeof(T));
  static constexpr int kBytesW = kChunk<T> * kPitchW * int(sizeof(T));
  static constexpr int kBytesOut = kRows * kPitchW * int(sizeof(T));
};

// Sums on tensor cores: 8 warps, 2 along the rows and 4 along the columns (of 16 rows: 8 along the
// columns), whose tiles of 8 columns take turns so that a narrow product keeps all warps busy.
template <int kTilesM, int kTilesN>
class TensorCoreSums {
 public:
  // Blocks that a multiprocessor must hold: with up to 128 columns a thread gets 128 registers and
  // two blocks hide each other's latency; more sums than that leave room for one block. Tiles of 16
  // rows are for maps of fewer tiles than there are multiprocessors.
  static constexpr int kBlocks = kTilesN <= 4 ? 2 : 1;

  EDET_DEVICE TensorCoreSums() {
    EDET_UNROLL
    for (int m = 0; m < kM; m++) {
      EDET_UNROLL
      for (int n = 0; n < kN; n++) {
        EDET_UNROLL
        for (int i = 0; i < 4; i++) acc_[m][n][i] = 0.0f;
      }
    }
  }

  // Calls use(number, sum, sum of the next column) for all of this thread's sums, by reference.
  template <class Use>
  EDET_DEVICE void for_sums(const Use& use) {
    EDET_UNROLL
    for (int n = 0; n < kN; n++) {
      EDET_UNROLL
      for (int m = 0; m < kM; m++) {
        EDET_UNROLL
        for (int i = 0; i < 4; i += 2) {
          use((n * kM + m) * 2 + i / 2, acc_[m][n][i], acc_[m][n][i + 1]);
        }
      }
    }
  }

  // Calls factors(column) for the columns of this thread, then begin(), then for all of its sums
  // put(factors, row, column, sum, sum of column + 1).
  template <class Factors, class Begin, class Put>
  EDET_DEVICE void each(const Factors& factors, const Begin& begin, const Put& put) const {
    const int t = opaque(thread().x), lane = t % kWarp, warp = t / kWarp;
    const auto column = [&](int n) {
      return (n * kColumnWarps + warp / kRowWarps) * 8 + lane % 4 * 2;
    };
    constexpr int kTogether = kN < 4 ? kN : 4;  // columns whose factors are loaded at once
    EDET_UNROLL
    for (int first = 0; first < kN; first += kTogether) {
      decltype(factors(0)) f[kTogether];
      EDET_UNROLL
      for (int n = 0; n < kTogether; n++) f[n] = factors(column(first + n));
      if (first == 0) begin();
      EDET_UNROLL
      for (int n = 0; n < kTogether; n++) {
        EDET_UNROLL
        for (int m = 0; m < kM; m++) {
          const float (&acc)[4] = acc_[m][first + n];
          const int row = (warp % kRowWarps * kM + m) * 16 + lane / 4;
          put(f[n], row, column(first + n), acc[0], acc[1]);
          put(f[n], row + 8, column(first + n), acc[2], acc[3]);
        }
      }
    }
  }

 protected:
  static constexpr int kRowWarps = kTilesM ? 2 : 1, kColumnWarps = 8 / kRowWarps;
  // tiles of 16 rows, and of 8 columns, of a warp
  static constexpr int kM = kTilesM ? kTilesM : 1, kN = 4 * kTilesN / kColumnWarps;
  float acc_[kM][kN][4];
};

// The product of a block; Operand is f16 or bf16, or one of those below.
template <class Operand, int kTilesM, int kTilesN>
class BlockMma : public ProductTile<Operand, kTilesM, kTilesN>,
                 public TensorCoreSums<kTilesM, kTilesN> {
  using Tile = ProductTile<Operand, kTilesM, kTilesN>;
  using Sums = TensorCoreSums<kTilesM, kTilesN>;
  using Sums::kColumnWarps, Sums::kM, Sums::kN, Sums::kRowWarps;

 public:
  using T = Operand;
  static constexpr bool kRounds = false;  // whether maps' numbers are no operands as they are

  // A number as an operand.
  static EDET_DEVICE T operand(float x) { return from_float<T>(x); }

  // Adds a (kRows, depth) · w (depth, columns); depth is a multiple of kDepth.
  EDET_DEVICE void mma(Shared<T> a, Shared<T> w, int depth, int columns) {
    constexpr int kPitchA = Tile::kPitchA, kPitchW = Tile::kPitchW;
    const int t = opaque(thread().x), lane = t % kWarp, warp = t / kWarp;
    const Shared<T> left = a + ((warp % kRowWarps * kM * 16 + lane % 16) * kPitchA + lane / 16 * 8);
    const Shared<T> right = w + (lane * kPitchW + warp / kRowWarps * 8);
    const auto load_rows = [&](int k, uint32_t (&rows)[2][kM][4]) {
      EDET_UNROLL
      for (int half = 0; half < 2; half++) {
        EDET_UNROLL
        for (int m = 0; m < kM; m++) {
          ldmatrix_x4(left + (m * 16 * kPitchA + k + 16 * half), rows[half][m]);
        }
      }
    };
    const auto load_columns = [&](int k, int n, uint32_t (&b)[4]) {
      ldmatrix_x4_trans(right + (k * kPitchW + n * 8 * kColumnWarps), b);
    };
    const auto multiply = [&](int half, int n, const uint32_t (&rows)[2][kM][4],
                              const uint32_t (&b)[4]) {
      EDET_UNROLL
      for (int m = 0; m < kM; m++) {
        warp_mma<T>(this->acc_[m][n], rows[half][m], b[2 * half], b[2 * half + 1]);
      }
    };
    if constexpr (kM * kN <= 2) {
      // few sums, each of which must wait for itself: all operands of a step come first, and sums
      // take turns
      EDET_UNROLL
      for (int k = 0; k < kChunk<T>; k += kDepth) {
        if (k >= depth) break;
        uint32_t rows[2][kM][4], b[kN][4];
        load_rows(k, rows);
        EDET_UNROLL
        for (int n = 0; n < kN; n++) load_columns(k, n, b[n]);
        EDET_UNROLL
        for (int half = 0; half < 2; half++) {
          EDET_UNROLL
          for (int n = 0; n < kN; n++) multiply(half, n, rows, b[n]);
        }
      }
    } else {
      EDET_LOOP
      for (int k = 0; k < depth; k += kDepth) {
        uint32_t rows[2][kM][4];
        load_rows(k, rows);
        EDET_UNROLL
        for (int n = 0; n < kN; n++) {
          if ((n * kColumnWarps + warp / kRowWarps) * 8 >= columns) break;
          uint32_t b[4];
          load_columns(k, n, b);
          EDET_UNROLL
          for (int half = 0; half < 2; half++) multiply(half, n, rows, b);
        }
      }
    }
  }
};

// Floats rounded to tf32, on tensor cores: half the depth of 16-bit numbers at a time, in the same
// places; the right operand's words lie 8 banks apart from row to row.
template <int kTilesM, int kTilesN>
class BlockMma<tf32, kTilesM, kTilesN> : public ProductTile<float, kTilesM, kTilesN>,
                                         public TensorCoreSums<kTilesM, kTilesN> {
  using Tile = ProductTile<float, kTilesM, kTilesN>;
  using Sums = TensorCoreSums<kTilesM, kTilesN>;
  using Sums::kColumnWarps, Sums::kM, Sums::kN, Sums::kRowWarps;

 public:
  static constexpr bool kRounds = true;
  static EDET_DEVICE float operand(float x) { return to_tf32(x); }

  EDET_DEVICE void mma(Shared<float> a, Shared<float> w, int depth, int columns) {
    constexpr int kPitchA = Tile::kPitchA, kPitchW = Tile::kPitchW;
    const int lane = thread().x % kWarp, warp = thread().x / kWarp;
    const Shared<float> left =
        a + ((warp % kRowWarps * kM * 16 + lane % 16) * kPitchA + lane / 16 * 4);
    const Shared<float> right = w + (lane % 4 * kPitchW + warp / kRowWarps * 8 + lane / 4);
    for (int k = 0; k < depth; k += 8) {
      uint32_t rows[kM][4];
      EDET_UNROLL
      for (int m = 0; m < kM; m++) {
        ldmatrix_x4(left + (m * 16 * kPitchA + k), rows[m]);
      }
      EDET_UNROLL
      for (int n = 0; n < kN; n++) {
        if ((n * kColumnWarps + warp / kRowWarps) * 8 >= columns) break;
        const uint32_t b0 = float_bits(get(right + (k * kPitchW + n * 8 * kColumnWarps)));
        const uint32_t b1 = float_bits(get(right + ((k + 4) * kPitchW + n * 8 * kColumnWarps)));
        EDET_UNROLL
        for (int m = 0; m < kM; m++) mma_m16n8k8_tf32(this->acc_[m][n], rows[m], b0, b1);
      }
    }
  }
};

// Floats by FMA: 16 × 16 threads, each with every 16th row and groups of 4 neighbouring columns.
template <int kTilesM, int kTilesN>
class BlockMma<float, kTilesM, kTilesN> : public ProductTile<float, kTilesM, kTilesN> {
  static_assert(kTilesN % 2 == 0, "a thread owns groups of 4 columns");
  using Tile = ProductTile<float, kTilesM, kTilesN>;

 public:
  static constexpr int kBlocks = 2;
  static constexpr bool kRounds = false;
  static EDET_DEVICE float operand(float x) { return x; }

  EDET_DEVICE BlockMma() {
    EDET_UNROLL
    for (int m = 0; m < kM; m++) {
      EDET_UNROLL
      for (int n = 0; n < kN; n++) {
        EDET_UNROLL
        for (int i = 0; i < 4; i++) acc_[m][n][i] = 0.0f;
      }
    }
  }

  template <class Use>
  EDET_DEVICE void for_sums(const Use& use) {
    EDET_UNROLL
    for (int n = 0; n < kN; n++) {
      EDET_UNROLL
      for (int m = 0; m < kM; m++) {
        EDET_UNROLL
        for (int i = 0; i < 4; i += 2) {
          use((n * kM + m) * 2 + i / 2, acc_[m][n][i], acc_[m][n][i + 1]);
        }
      }
    }
  }

  EDET_DEVICE void mma(Shared<float> a, Shared<float> w, int depth, int) {
    const Shared<float> left = a + thread().x / 16 * Tile::kPitchA;
    const Shared<float> right = w + thread().x % 16 * 4;
    float part[kM][kN][4] = {};  // a sum of few terms: long sums in one register round too often
    for (int k = 0; k < depth; k += 4) {
      Vector<float, 4> rows[kM];
      EDET_UNROLL
      for (int m = 0; m < kM; m++) rows[m] = load<4>(left + (m * 16 * Tile::kPitchA + k));
      EDET_UNROLL
      for (int i = 0; i < 4; i++) {
        EDET_UNROLL
        for (int n = 0; n < kN; n++) {
          const Vector<float, 4> b = load<4>(right + ((k + i) * Tile::kPitchW + n * 64));
          EDET_UNROLL
          for (int m = 0; m < kM; m++) {
            EDET_UNROLL
            for (int j = 0; j < 4; j++) part[m][n][j] += rows[m].value[i] * b.value[j];
          }
        }
      }
    }
    EDET_UNROLL
    for (int m = 0; m < kM; m++) {
      EDET_UNROLL
      for (int n = 0; n < kN; n++) {
        EDET_UNROLL
        for (int j = 0; j < 4; j++) acc_[m][n][j] += part[m][n][j];
      }
    }
  }

  template <class Factors, class Begin, class Put>
  EDET_DEVICE void each(const Factors& factors, const Begin& begin, const Put& put) const {
    begin();
    EDET_UNROLL
    for (int n = 0; n < kN; n++) {
      EDET_UNROLL
      for (int pair = 0; pair < 4; pair += 2) {
        const int column = n * 64 + thread().x % 16 * 4 + pair;
        const auto f = factors(column);
        EDET_UNROLL
        for (int m = 0; m < kM; m++) {
          put(f, m * 16 + thread().x / 16, column, acc_[m][n][pair], acc_[m][n][pair + 1]);
        }
      }
    }
  }

 private:
  static constexpr int kM = Tile::kRows / 16, kN = kTilesN / 2;
  float acc_[kM][kN][4];
};

// The columns of a block in units of 32, and how many blocks share the output channels. A block
// that has all of them reads its rows once; up to 384 columns fit the registers. Weights and
// results that are floats need twice the shared memory: 256 columns. Without tensor cores more sums
// than of 128 columns would leave no registers.
struct ProductShape {
  int tiles_n;
  int64_t slices;
};
template <class Operand>
constexpr ProductShape product_shape(int64_t c_out, int64_t shared_bytes) {
  // 64 KiB (Turing) do not hold a chunk of 384 columns
  const int64_t most = std::is_same_v<Operand, float>                              ? 128
                       : std::is_same_v<Operand, tf32> || shared_bytes < 80 * 1024 ? 256
                                                                                   : 384;
  const int64_t slices = divide_up(c_out, most);
  const int64_t columns = round_up(divide_up(c_out, slices), kPanel);
  return {columns <= 64 ? 2 : columns <= 128 ? 4 : columns <= 256 ? 8 : 12, slices};
}

template <class T>
struct Tag {
  using Type = T;
};

// Calls launch(Tag<Operand>, device) for maps of a type.
template <class Launch>
Error by_operand(DType dtype, bool allow_tf32, const Launch& launch) {
  Device device;
  const Error error = current_device(&device);
  if (error != kSuccess) return error;
  switch (dtype) {
    case DType::f32:
      if (!allow_tf32) return launch(Tag<float>{}, device);
      return device.capability < 80 ? kInvalidValue : launch(Tag<tf32>{}, device);
    case DType::f16: return launch(Tag<f16>{}, device);
    case DType::bf16: return launch(Tag<bf16>{}, device);
  }
  return kInvalidValue;
}

// Calls launch(Tag<BlockMma>) for the tiles of a shape, of `rows` (16, 32 or 64) rows; where there
// are many columns, of 64.
template <class Operand, class Launch>
Error by_tiles(const ProductShape& shape, int rows, const Launch& launch) {
  const auto narrow = [&](auto tall, auto low, auto lowest) {
    return rows == 64 ? launch(tall) : rows == 32 ? launch(low) : launch(lowest);
  };
  if (shape.tiles_n == 2) {
    return narrow(Tag<BlockMma<Operand, 2, 2>>{}, Tag<BlockMma<Operand, 1, 2>>{},
                  Tag<BlockMma<Operand, 0, 2>>{});
  }
  if (shape.tiles_n == 4) {
    return narrow(Tag<BlockMma<Operand, 2, 4>>{}, Tag<BlockMma<Operand, 1, 4>>{},
                  Tag<BlockMma<Operand, 0, 4>>{});
  }
  if constexpr (!std::is_same_v<Operand, float>) {
    if (shape.tiles_n == 8) return launch(Tag<BlockMma<Operand, 2, 8>>{});
  }
  if constexpr (sizeof(Operand) == 2) return launch(Tag<BlockMma<Operand, 2, 12>>{});
  return kInvalidValue;
}

constexpr int kReserved = 1024;  // bytes of shared memory that CUDA takes of every block's

// How a product's weights are held and its blocks laid out.
struct ProductGrid {
  bool resident;  // all weights of a slice stay in shared memory, read once per multiprocessor
  int bytes;      // of shared memory
  Dim3 grid;
};
// bytes(resident): of a block's shared memory.
template <class Mma, class Bytes>
Error product_grid(int64_t tiles, int64_t slices, const Device& device, const Bytes& bytes,
                   ProductGrid* result) {
  const bool resident = bytes(true) <= device.shared_bytes;
  const int block_bytes = bytes(resident);
  if (block_bytes > device.shared_bytes) return kInvalidValue;
  const int64_t held =
      std::max(1, std::min(Mma::kBlocks, device.multiprocessor_bytes / (block_bytes + kReserved)));
  const int64_t blocks =
      std::min(tiles, std::max<int64_t>(1, device.multiprocessors * held / slices));
  *result = {resident, block_bytes, Dim3(unsigned(blocks), unsigned(slices))};
  return kSuccess;
}

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Brings rows [k, k + depth) and `columns` columns from column n (a multiple of 16) of packed
// weights (⌈c_out/16⌉, c, 16) to shared memory, as operands; zeros past the weights. Four lanes
// read 64 neighbouring bytes, and four panels' parts of a row fill all banks when they are stored.
template <class Mma>
EDET_DEVICE void load_weights(const float* packed, int64_t c, int64_t c_out, int k, int n,
                              int depth, int columns, Shared<typename Mma::Type> w) {
  using T = typename Mma::Type;
  constexpr int kPanels = Mma::kColumns / kPanel, kTogether = 4;  // loads that are on their way
  packed += (int64_t(n / kPanel) * c + k) * kPanel;
  const int rows = int(c - k < depth ? c - k : depth), real = int(c_out - n);
  EDET_LOOP
  for (int begin = opaque(thread().x); begin < depth * kPanels * 4;
       begin += kTogether * kProductThreads) {
    Vector<float, 4> v[kTogether];
    EDET_UNROLL
    for (int j = 0; j < kTogether; j++) {
      const int i = begin + j * kProductThreads, quarter = i % 4;
      const int panel = i / 4 % kPanels, row = i / 4 / kPanels;
      v[j] = {};
      if (row < rows && panel * kPanel < min(columns, real)) {
        v[j] = load_constant<float, 4>(packed + (panel * int(c) + row) * kPanel + quarter * 4);
      }
    }
    EDET_UNROLL
    for (int j = 0; j < kTogether; j++) {
      const int i = begin + j * kProductThreads, quarter = i % 4;
      const int panel = i / 4 % kPanels, row = i / 4 / kPanels;
      if (row >= depth || panel * kPanel >= columns) continue;
      if constexpr (Mma::kRounds) {
        EDET_UNROLL
        for (int l = 0; l < 4; l++) v[j].value[l] = Mma::operand(v[j].value[l]);
      }
      store(w + (row * Mma::kPitchW + panel * kPanel + quarter * 4), from_floats<T>(v[j].value));
    }
  }
}

// Numbers as the operands of Mma.
template <class Mma, class T, int V>
EDET_DEVICE Vector<T, V> as_operands(Vector<T, V> v) {
  if constexpr (Mma::kRounds) {
    EDET_UNROLL
    for (int i = 0; i < V; i++) v.value[i] = Mma::operand(v.value[i]);
  }
  return v;
}

// What a thread brings of a chunk of packed weights to shared memory, as load_weights does, but in
// two steps: the loads are on their way while the block works on the chunk before.
template <class Mma>
class WeightPart {
  using T = typename Mma::Type;
  static constexpr int kPanels = Mma::kColumns / kPanel;
  static constexpr int kRowsAtOnce = kProductThreads / (4 * kPanels);
  static constexpr int kParts = kChunk<T> / kRowsAtOnce;
  static_assert(kProductThreads % (4 * kPanels) == 0 && kChunk<T> % kRowsAtOnce == 0,
                "a thread has the same columns of every row");

 public:
  // Goes to row k of weights (⌈c_out/16⌉, c, 16), columns from n on.
  EDET_DEVICE void begin(const float* packed, int c, int c_out, int n, int columns, int k = 0) {
    const int t = thread().x, panel = t / 4 % kPanels, row = k + t / 4 / kPanels;
    left_ = panel * kPanel < min(columns, c_out - n) ? c - row : 0;
    from_ = packed + (int64_t(n / kPanel + panel) * c + row) * kPanel + t % 4 * 4;
  }
  // Reads the next kChunk rows; zeros past the weights.
  EDET_DEVICE void load() {
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) {
      v_[j] = {};
      if (j * kRowsAtOnce < left_) {
        v_[j] = load_constant<float, 4>(from_ + j * kRowsAtOnce * kPanel);
      }
    }
    from_ += kChunk<T> * kPanel;
    left_ -= kChunk<T>;
  }
  EDET_DEVICE void store_to(Shared<T> w) const {
    const int t = thread().x, panel = t / 4 % kPanels, row = t / 4 / kPanels;
    w = w + (row * Mma::kPitchW + panel * kPanel + t % 4 * 4);
    EDET_UNROLL
    for (int j = 0; j < kParts; j++) {
      store(w + j * kRowsAtOnce * Mma::kPitchW, from_floats<T>(as_operands<Mma>(v_[j]).value));
    }
  }

 private:
  int left_ = 0;  // rows
  const float* from_ = nullptr;
  Vector<float, 4> v_[kParts];
};

// kWritten: the map may be written during the launch.
template <bool kWritten, int V, class T>
EDET_DEVICE Vector<T, V> load_map(const T* p) {
  if constexpr (kWritten) {
    return load_written<T, V>(p);
  } else {
    return load_constant<T, V>(p);
  }
}

// V channels of a pixel that `c` are left of; `aligned` when 16 bytes may be read at once.
template <bool kWritten = false, class T>
EDET_DEVICE Vector<T, kVector<T>> load_pixel(const T* p, int64_t c, bool aligned) {
  if (aligned) return load_map<kWritten, kVector<T>>(p);
  Vector<T, kVector<T>> v;
  EDET_UNROLL
  for (int i = 0; i < kVector<T>; i++) {
    v.value[i] = i < c ? load_map<kWritten, 1>(p + i).value[0] : from_float<T>(0.0f);
  }
  return v;
}

// V channels of a pixel, as words; of one that is not aligned, those of the `c` that are left.
template <bool kWritten = false, class T>
EDET_DEVICE Words load_words(const T* p, int c, bool aligned) {
  if (aligned) return load_map<kWritten, 4>(words(p));
  const Vector<T, kVector<T>> v = load_pixel<kWritten>(p, c, false);
  Words bits;
  memcpy(&bits, &v, sizeof(v));
  return bits;
}

struct Affine {
  float scale[2], shift[2];
};
// Scale and shift of two columns, of which those from c_out on do not exist; `aligned` when both
// are read at once.
EDET_DEVICE Affine load_affine(const float* scale, const float* shift, int64_t column,
                               int64_t c_out, bool aligned) {
  Affine f{};
  if (aligned) {
    if (column >= c_out) return f;
    const Vector<float, 2> a = load_constant<float, 2>(scale + column);
    const Vector<float, 2> b = load_constant<float, 2>(shift + column);
    return {{a.value[0], a.value[1]}, {b.value[0], b.value[1]}};
  }
  EDET_UNROLL
  for (int i = 0; i < 2; i++) {
    if (column + i >= c_out) break;
    f.scale[i] = load_constant<float, 1>(scale + column + i).value[0];
    f.shift[i] = load_constant<float, 1>(shift + column + i).value[0];
  }
  return f;
}

// Writes a product by way of shared memory, so that whole 16-byte parts of pixels are stored.
// factors(column) are scale and shift of a column of the block and the next one.
// change(x, row, column) makes of scale · sum + shift, in the columns' scales and shifts, the
// results of two columns; finish(v, to) of a vector of results what is stored there; pixel(row) is
// the first of its c_out channels, or null. `aligned` when 16 bytes may be written at once.
template <class Mma, class Factors, class Change, class Finish, class Pixel>
EDET_DEVICE void store_product(const Mma& product, Shared<typename Mma::Type> stage,
                               const Factors& factors, int n, int columns, int64_t c_out,
                               bool aligned, const Change& change, const Finish& finish,
                               const Pixel& pixel) {
  using T = typename Mma::Type;
  constexpr int V = kVector<T>;
  product.each(
      factors, [] { sync_threads(); },  // the operands, in whose place the result comes, are read
      [&](const Affine& f, int row, int column, float first, float second) {
        float x[2] = {f.scale[0] * first + f.shift[0], f.scale[1] * second + f.shift[1]};
        change(x, row, n + column);
        store(stage + (row * Mma::kPitchW + column), from_floats<T>(x));
      });
  sync_threads();
  const int real = int(c_out - n < columns ? c_out - n : columns);
  const auto store_vectors = [&](auto size) {
    constexpr int kSize = decltype(size)::value, kAcross = Mma::kColumns / kSize;
    EDET_LOOP
    for (int i = opaque(thread().x); i < Mma::kRows * kAcross; i += kProductThreads) {
      const int row = i / kAcross, column = i % kAcross * kSize;
      if (column >= real) continue;
      T* const to = pixel(row);
      if (!to) continue;
      store(to + n + column,
            finish(load<kSize>(stage + (row * Mma::kPitchW + column)), to + n + column));
    }
  };
  if (aligned) return store_vectors(std::integral_constant<int, V>{});
  if constexpr (V == 8) {  // even channels begin at a word
    if (c_out % 2 == 0) return store_vectors(std::integral_constant<int, 2>{});
  }
  store_vectors(std::integral_constant<int, 1>{});
}
// Stores a vector of results as it is.
struct AsItIs {
  template <class T, int V>
  EDET_DEVICE Vector<T, V> operator()(const Vector<T, V>& v, const T*) const {
    return v;
  }
};

}  // namespace edet::cuda
