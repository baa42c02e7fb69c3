// The products of maps of bytes: pointwise by register tiles, depthwise over a ring of rows whose
// bytes lie side by side in a lane, so that one instruction multiplies a column of taps.
#pragma once

#include "int8_lanes.h"
#include "int8_tiles.h"

namespace edet::cpu::EDET_ISA {

constexpr int kByteVectors = kPanel / kWidth;  // registers of a panel

constexpr int byte_tile_rows(int panels) {
  if (kRegisters == 32 && kWidth == 16)
    return panels == 1 ? 14 : panels == 2 ? 12 : panels == 3 ? 8 : 6;
  if (kRegisters == 32) return 6;
  return kWidth == 8 ? 6 : 3;
}

// Sums of MR rows of bytes and NP panels; emit(row, channel, sums) for each register of channels.
template <int MR, int NP, class Emit>
void byte_tile(const uint8_t* a, int64_t lda, int64_t k, const int8_t* w, int64_t row,
               int64_t channel, const Emit& emit) {
  constexpr int V = NP * kByteVectors;
  const int64_t panel = k * kPanel;
  vi acc[V][MR];
#pragma GCC unroll 16
  for (int v = 0; v < V; v++)
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) acc[v][m] = vi{};
  for (int64_t i = 0; i < k; i += 4) {
    vi b[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++)
      b[v] =
          load_lanes(w + (v / kByteVectors) * panel + i * kPanel + (v % kByteVectors) * kWidth * 4);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
      int32_t four;
      std::memcpy(&four, a + m * lda + i, sizeof four);
      const vi x = four - vi{};
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) acc[v][m] = dot(acc[v][m], x, b[v]);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; v++) emit(row, channel + v * kWidth, acc[v]);
}

// Sums of `rows` rows of k bytes, a multiple of 4, and `panels` panels of weights.
template <class Emit>
EDET_INLINE void byte_pointwise(const uint8_t* a, int64_t lda, int64_t rows, int64_t k,
                                const int8_t* w, int64_t panels, const Emit& emit) {
#if defined(EDET_TILES)
  byte_pointwise_tiles(a, lda, rows, k, w, panels, emit);
#else
  const auto run = [&](auto count, int64_t p) {
    constexpr int NP = decltype(count)::value;
    const int8_t* from = w + p * k * kPanel;
    int64_t i = 0;
    const auto tiles = [&](auto height) {
      constexpr int MR = decltype(height)::value;
      for (; rows - i >= MR; i += MR)
        byte_tile<MR, NP>(a + i * lda, lda, k, from, i, p * kPanel, emit);
    };
    tiles(Constant<byte_tile_rows(NP)>{});
    if constexpr (byte_tile_rows(NP) > 4) tiles(Constant<4>{});
    tiles(Constant<2>{});
    tiles(Constant<1>{});
    return NP;
  };
  for (int64_t p = 0; p < panels;) {
    const int64_t left = panels - p;
    if constexpr (kWidth == 16) {
      if (left == 4 || left >= 6)
        p += run(Constant<4>{}, p);
      else if (left >= 2)
        p += run(Constant<2>{}, p);
      else
        p += run(Constant<1>{}, p);
    } else {
      p += run(Constant<1>{}, p);
    }
  }
#endif
}

// Rows (count, c) of bytes whose k, c rounded up to 4, may be read: as they lie, or in scratch.
EDET_INLINE const uint8_t* whole_rows(const uint8_t* from, int64_t count, int64_t c,
                                      uint8_t* scratch) {
  const int64_t k = round_up(c, 4);
  if (k == c) return from;
  std::memset(scratch, 0, static_cast<size_t>(count * k));
  for (int64_t i = 0; i < count; i++)
    std::memcpy(scratch + i * k, from + i * c, static_cast<size_t>(c));
  return scratch;
}

// Lanes of four rows that hold K rows: one, or two for K = 5. Row y lies in byte y mod 4·lanes.
template <int K>
constexpr int kGroups = (K + 3) / 4;

// to (K, groups, cp) = taps (K, c, 4·groups), `pitch` lanes apart, turned so that the first row of
// taps meets byte `first`; zero past c.
template <int K>
EDET_INLINE void turned_taps(const int8_t* taps, int64_t pitch, int64_t c, int64_t cp, int first,
                             uint32_t* to) {
  const int bits = 8 * first;
  for (int k = 0; k < K; k++) {
    uint32_t* row = to + k * kGroups<K> * cp;
    if constexpr (K == 3) {
      const int8_t* from = taps + k * pitch * 4;
      for (int64_t i = 0; i < c; i++) {
        uint32_t t;
        std::memcpy(&t, from + 4 * i, sizeof t);
        row[i] = t << bits | t >> ((32 - bits) & 31);
      }
    } else {
      const int8_t* from = taps + k * pitch * 8;
      for (int64_t i = 0; i < c; i++) {
        uint64_t t;
        std::memcpy(&t, from + 8 * i, sizeof t);
        t = t << bits | t >> ((64 - bits) & 63);
        row[i] = static_cast<uint32_t>(t);
        row[cp + i] = static_cast<uint32_t>(t >> 32);
      }
    }
    for (int g = 0; g < kGroups<K>; g++)
      std::memset(row + g * cp + c, 0, sizeof(uint32_t) * static_cast<size_t>(cp - c));
  }
}

// emit(i, sums) for X outputs and each register of channels of a ring (columns, groups, cp).
template <int K, int S, int X, class Emit>
EDET_INLINE void byte_depthwise_pixels(const uint32_t* ring, const uint32_t* w, int64_t cp,
                                       const Emit& emit) {
  constexpr int G = kGroups<K>;
  for (int64_t i = 0; i < cp; i += kWidth) {
    vi sum[X];
#pragma GCC unroll 8
    for (int x = 0; x < X; x++) sum[x] = vi{};
#pragma GCC unroll 2
    for (int g = 0; g < G; g++) {
      vi tap[K];
#pragma GCC unroll 8
      for (int k = 0; k < K; k++) tap[k] = load_lanes(w + (k * G + g) * cp + i);
#pragma GCC unroll 32
      for (int column = 0; column < (X - 1) * S + K; column++) {
        const vi v = load_lanes(ring + (column * G + g) * cp + i);
#pragma GCC unroll 8
        for (int x = 0; x < X; x++) {
          const int k = column - x * S;
          if (k >= 0 && k < K) sum[x] = dot(sum[x], v, tap[k]);
        }
      }
    }
    emit(i, sum);
  }
}

constexpr int kByteStrip = kRegisters == 32 ? 8 : 4;

// `count` outputs from the ring's column 0 on; emit(x, i, sums) for runs of outputs from x on.
template <int K, int S, class Emit>
EDET_INLINE void byte_depthwise(const uint32_t* ring, const uint32_t* w, int64_t cp, int64_t count,
                                const Emit& emit) {
  int64_t x = 0;
  const auto run = [&](auto outputs) {
    constexpr int X = decltype(outputs)::value;
    for (; count - x >= X; x += X)
      byte_depthwise_pixels<K, S, X>(ring + x * S * kGroups<K> * cp, w, cp,
                                     [&](int64_t i, const auto& sum) { emit(x, i, sum); });
  };
  run(Constant<kByteStrip>{});
  if constexpr (kByteStrip > 4) run(Constant<4>{});
  run(Constant<2>{});
  run(Constant<1>{});
}

// Rows of a requantisation (count, c), `pitch` apart, from `first` on, each filled up with zeros.
EDET_INLINE void padded_rows(const float* rows, int count, int64_t pitch, int64_t first, int64_t c,
                             int64_t cp, float* to) {
  for (int r = 0; r < count; r++) copy_padded(rows + r * pitch + first, c, cp, to + r * cp);
}

}  // namespace edet::cpu::EDET_ISA
