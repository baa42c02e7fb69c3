// The pointwise products of maps of bytes in tiles of AMX, as pointwise_tiles.h has those of bf16.
#pragma once

#include "int8_lanes.h"
#include "tiles.h"

#if defined(EDET_TILES)

namespace edet::cpu::EDET_ISA {

// As byte_pointwise. The last tile ends with the last row: rows that it has in common with the one
// before are computed and emitted twice.
template <class Emit>
void byte_pointwise_tiles(const uint8_t* a, int64_t lda, int64_t rows, int64_t k, const int8_t* w,
                          int64_t panels, const Emit& emit) {
  if (!rows) return;
  constexpr int64_t kWeightPitch = 4 * kPanel;  // four bytes of each of 16 outputs
  const int64_t height = rows < kTileRows ? rows : kTileRows, last = rows - height;
  const int64_t step = 4 * tile_groups(k / 4);
  Tiles tiles(height, step / 4);
  alignas(64) int32_t sums[kTileRows][kPanel];
  const auto put = [&](int64_t from, int64_t panel) {
    int64_t row = 0;
    const auto run = [&](auto count) {
      constexpr int MR = decltype(count)::value;
      for (; height - row >= MR; row += MR)
        for (int v = 0; v < kPanel; v += kWidth) {
          vi acc[MR];
          for (int m = 0; m < MR; m++) acc[m] = load_lanes(sums[row + m] + v);
          emit(from + row, panel * kPanel + v, acc);
        }
    };
    run(Constant<8>{});
    run(Constant<1>{});
  };
  for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
    const int64_t first = row < last ? row : last;
    const bool two = row + kTileRows < rows;
    const int64_t second = !two ? first : row + kTileRows < last ? row + kTileRows : last;
    for (int64_t p = 0; p < panels; p += 2) {
      const bool pair = p + 1 < panels;
      const int8_t* left = w + p * k * kPanel;
      tiles.zero<0>(), tiles.zero<1>(), tiles.zero<2>(), tiles.zero<3>();
      for (int64_t i = 0; i < k; i += step) {
        tiles.load<4>(a + first * lda + i, lda);
        tiles.load<6>(left + i * kPanel, kWeightPitch);
        tiles.add_byte_product<0, 4, 6>();
        if (pair) {
          tiles.load<7>(left + (k + i) * kPanel, kWeightPitch);
          tiles.add_byte_product<1, 4, 7>();
        }
        if (two) {
          tiles.load<5>(a + second * lda + i, lda);
          tiles.add_byte_product<2, 5, 6>();
          if (pair) tiles.add_byte_product<3, 5, 7>();
        }
      }
      constexpr int64_t kSumPitch = kPanel * sizeof(int32_t);
      tiles.store<0>(sums, kSumPitch), put(first, p);
      if (pair) tiles.store<1>(sums, kSumPitch), put(first, p + 1);
      if (two) tiles.store<2>(sums, kSumPitch), put(second, p);
      if (two && pair) tiles.store<3>(sums, kSumPitch), put(second, p + 1);
    }
  }
}

}  // namespace edet::cpu::EDET_ISA
#endif
