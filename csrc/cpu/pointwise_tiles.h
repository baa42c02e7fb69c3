// The pointwise convolution in tiles of AMX: two by two tiles of 16 rows and 16 output channels at
// a time, whose sums go through a buffer to the same end as those of pointwise.h.
#pragma once

#include "tiles.h"

#if defined(EDET_TILES)

namespace edet::cpu::EDET_ISA {

// The sums of two tiles of rows, one after the other, and of two panels.
struct TileSums {
  static constexpr int64_t kPitch = 2 * kPanel;  // floats
  alignas(64) float data[2 * kTileRows][kPitch];
};

// sums = a · W of R tiles of rows and N panels from `w` on; `second` is where the second tile
// begins.
template <int R, int N>
EDET_INLINE void tile_sums(Tiles& tiles, const bf16* a, const bf16* second, int64_t lda,
                           int64_t c_in, const bf16* w, TileSums& sums) {
  constexpr int64_t kElement = sizeof(bf16), kSumPitch = TileSums::kPitch * sizeof(float);
  constexpr int64_t kWeightPitch = 2 * kPanel * kElement;  // a pair of each of 16 outputs
  const int64_t step = 2 * tile_groups(c_in / 2);
  tiles.zero<0>();
  if constexpr (N == 2) tiles.zero<1>();
  if constexpr (R == 2) tiles.zero<2>();
  if constexpr (R == 2 && N == 2) tiles.zero<3>();
  for (int64_t i = 0; i < c_in; i += step) {
    tiles.load<4>(a + i, lda * kElement);
    tiles.load<6>(w + i * kPanel, kWeightPitch);
    tiles.add_product<0, 4, 6>();
    if constexpr (N == 2) {
      tiles.load<7>(w + (c_in + i) * kPanel, kWeightPitch);
      tiles.add_product<1, 4, 7>();
    }
    if constexpr (R == 2) {
      tiles.load<5>(second + i, lda * kElement);
      tiles.add_product<2, 5, 6>();
      if constexpr (N == 2) tiles.add_product<3, 5, 7>();
    }
  }
  float* to = sums.data[0];
  tiles.store<0>(to, kSumPitch);
  if constexpr (N == 2) tiles.store<1>(to + kPanel, kSumPitch);
  to = sums.data[kTileRows];
  if constexpr (R == 2) tiles.store<2>(to, kSumPitch);
  if constexpr (R == 2 && N == 2) tiles.store<3>(to + kPanel, kSumPitch);
}

// Puts `rows` rows of sums into the output, a few at a time; the rows of a group (PairOut) are one
// of each tile.
template <int N, Activation A, class Out>
void put_sums(const float (*sums)[TileSums::kPitch], int64_t rows, const float* scale,
              const float* shift, int64_t columns, const Out& out) {
  constexpr int V = N * kPanelVectors, G = Out::kGroup;
  int64_t row = 0;
  const auto run = [&](auto height) {
    constexpr int H = decltype(height)::value;
    for (; rows - row >= H; row += H) {
      vf acc[H * G][V];
#pragma GCC unroll 16
      for (int m = 0; m < H * G; m++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++)
          acc[m][v] = load(sums[row + m / G + m % G * kTileRows] + v * kWidth);
      const Out to = out.from(row, 0);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++)
        to.template put<A>(acc, v, load(scale + v * kWidth), load(shift + v * kWidth),
                           columns - v * kWidth);
    }
  };
  run(Constant<4>{});
  run(Constant<1>{});
}

// `rows` counts groups of rows. The last tile ends with the last row: rows that it has in common
// with the one before are computed twice, in the same way. Fewer than 16 rows are a lower tile.
template <Activation A, class Out>
void pointwise_tiles(const bf16* a, int64_t lda, int64_t rows, const PointwiseWeights<bf16>& w,
                     const Out& out) {
  if (!rows) return;
  constexpr bool kPairs = Out::kGroup == 2;
  const int64_t height = rows < kTileRows ? rows : kTileRows, last = rows - height;
  Tiles tiles(height, tile_groups(w.c_in / 2));
  TileSums sums;
  const auto run = [&](auto row_tiles, auto panels, int64_t panel, int64_t first, int64_t second) {
    constexpr int R = decltype(row_tiles)::value, N = decltype(panels)::value;
    const int64_t from = panel * kPanel;
    const bf16* begin = a + first * lda;
    tile_sums<R, N>(tiles, begin, kPairs ? begin + out.apart : a + second * lda, lda, w.c_in,
                    w.panels + from * w.c_in, sums);
    const auto put = [&](int tile, int64_t row) {
      put_sums<N, A>(sums.data + tile * kTileRows, height, w.scale + from, w.shift + from,
                     w.c_out - from, out.from(row, from));
    };
    put(0, first);
    if (!kPairs && R == 2) put(1, second);
  };
  const auto all_panels = [&](auto row_tiles, int64_t first, int64_t second) {
    const int64_t panels = divide_up(w.c_out, kPanel);
    int64_t p = 0;
    for (; p + 2 <= panels; p += 2) run(row_tiles, Constant<2>{}, p, first, second);
    if (p < panels) run(row_tiles, Constant<1>{}, p, first, second);
  };
  for (int64_t row = 0; row < rows;) {
    const int64_t first = row < last ? row : last;
    row += kTileRows;
    if constexpr (kPairs) {
      all_panels(Constant<2>{}, first, 0);
    } else if (row < rows) {
      all_panels(Constant<2>{}, first, row < last ? row : last);
      row += kTileRows;
    } else {
      all_panels(Constant<1>{}, first, 0);
    }
  }
}

}  // namespace edet::cpu::EDET_ISA
#endif
