// The first phase of an inverted residual block where the CPU multiplies pairs of bf16: the rolling
// rows that the depthwise convolution reads are pairs, row 2j in the low and row 2j + 1 in the high
// half of each lane, so that one instruction multiplies two taps of a column.
#pragma once

#include "dispatch.h"
#include "pointwise.h"

namespace edet::cpu::EDET_ISA {

// Lanes of a pair row, the columns that the depthwise convolution pads it with included.
EDET_INLINE int64_t pair_row_lanes(const MbconvParams& p, int64_t cp) {
  const int64_t columns = (p.out_w - 1) * p.stride + p.kernel;
  return (columns > p.w + p.kernel ? columns : p.w + p.kernel) * cp;
}

#if defined(EDET_PAIRS)

EDET_INLINE vu load_lanes_of(const uint32_t* p) {
  vu v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// A K×K depthwise convolution's taps of cp channels. A window of K rows is (K − 1)/2 pairs and one
// row: its last row where the window begins on an even row, its first where it begins on an odd
// one. That row is multiplied as floats: a zero as its other half's tap would make NaN of infinity.
template <int K>
struct PairTaps {
  static constexpr int kPairs = (K - 1) / 2;
  const uint32_t* pairs;  // (2: even, odd; kPairs, K, cp)
  const float* single;    // (2, K, cp)
  int64_t cp;

  static int64_t lanes(int64_t cp) { return 2 * (kPairs + 1) * K * cp; }

  // Fills lanes(cp) of memory with taps (K·K, pitch) of c channels, rounded to bf16.
  PairTaps(const float* taps, int64_t pitch, int64_t c, int64_t padded_c, float* memory)
      : pairs(reinterpret_cast<uint32_t*>(memory)),
        single(memory + 2 * kPairs * K * padded_c),
        cp(padded_c) {
    const auto tap = [&](int row, int column, int64_t i) {
      const float* from = taps + (row * K + column) * pitch + i;
      return c - i >= kWidth ? load(from) : c > i ? load_tail(from, static_cast<int>(c - i)) : vf{};
    };
    for (int odd = 0; odd < 2; odd++)
      for (int column = 0; column < K; column++)
        for (int64_t i = 0; i < cp; i += kWidth) {
          for (int r = 0; r < kPairs; r++) {
            const int row = 2 * r + odd;
            const vu both = pair_of(tap(row, column, i), tap(row + 1, column, i));
            std::memcpy(memory + ((odd * kPairs + r) * K + column) * cp + i, &both, sizeof both);
          }
          store(memory + (2 * kPairs + odd) * K * cp + column * cp + i,
                (vf)(pair_of(tap(odd ? 0 : K - 1, column, i), vf{}) << 16));
        }
  }
};

// emit(i, sums) with the sums of X outputs, as depthwise_pixels does; rows are the pair rows of the
// window from its first column on.
template <int K, int S, int X, class Emit>
EDET_INLINE void pair_depthwise_pixels(const uint32_t* const* rows, bool odd,
                                       const PairTaps<K>& taps, const Emit& emit) {
  constexpr int kPairs = PairTaps<K>::kPairs, kColumns = (X - 1) * S + K;
  const int64_t cp = taps.cp;
  const uint32_t* w = taps.pairs + odd * kPairs * K * cp;
  const float* w_single = taps.single + odd * K * cp;
  const uint32_t* single = rows[odd ? 0 : kPairs];
  const int shift = odd ? 0 : 16;
  for (int64_t i = 0; i < cp; i += kWidth) {
    vf sum[X];
#pragma GCC unroll 8
    for (int x = 0; x < X; x++) sum[x] = vf{};
#pragma GCC unroll 8
    for (int r = 0; r < kPairs; r++) {
      vu tap[K];
#pragma GCC unroll 8
      for (int k = 0; k < K; k++) tap[k] = load_lanes_of(w + (r * K + k) * cp + i);
      const uint32_t* row = rows[r + odd] + i;
#pragma GCC unroll 32
      for (int column = 0; column < kColumns; column++) {
        const vu v = load_lanes_of(row + column * cp);
#pragma GCC unroll 8
        for (int x = 0; x < X; x++) {
          const int k = column - x * S;
          if (k >= 0 && k < K) sum[x] = add_pairs(sum[x], v, tap[k]);
        }
      }
    }
    vf tap[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) tap[k] = load(w_single + k * cp + i);
#pragma GCC unroll 32
    for (int column = 0; column < kColumns; column++) {
      const vf v = (vf)((load_lanes_of(single + column * cp + i) << shift) & 0xffff0000u);
#pragma GCC unroll 8
      for (int x = 0; x < X; x++) {
        const int k = column - x * S;
        if (k >= 0 && k < K) sum[x] += v * tap[k];
      }
    }
    emit(i, sum);
  }
}

// One output row, as mbconv_depthwise: activation(sums · scale + shift) to out and added to `sums`.
template <int K, int S>
void mbconv_depthwise_pairs(const uint32_t* const* rows, bool odd, const PairTaps<K>& taps,
                            const float* scale, const float* shift, int64_t count,
                            Activation activation, bf16* out, int64_t pitch, float* sums) {
  constexpr int kRows = (K + 1) / 2;
  const auto run = [&](auto tag) {
    constexpr Activation A = decltype(tag)::value;
    const uint32_t* at[kRows];
    for (int r = 0; r < kRows; r++) at[r] = rows[r];
    int64_t x = 0;
    const auto strips = [&](auto outputs) {
      constexpr int X = decltype(outputs)::value;
      for (; count - x >= X; x += X) {
        pair_depthwise_pixels<K, S, X>(at, odd, taps, [&](int64_t i, const auto& sum) {
          const vf s = load(scale + i), t = load(shift + i);
          vf total = load(sums + i);
#pragma GCC unroll 8
          for (int j = 0; j < X; j++) {
            const vf v = activate<A, bf16>(sum[j] * s + t);
            store_operand(out + (x + j) * pitch + i, v);
            total += v;
          }
          store(sums + i, total);
        });
        for (int r = 0; r < kRows; r++) at[r] += X * S * taps.cp;
      }
    };
    strips(Constant<kStrip>{});
    strips(Constant<2>{});
    strips(Constant<1>{});
  };
  with_activation(activation, run);
}

// Pixels of two rows of a map as pairs, c of their channels; null: a row outside the map, zeros.
EDET_INLINE void interleave_rows(const bf16* low, const bf16* high, int64_t pixels, int64_t stride,
                                 int64_t c, int64_t cp, uint32_t* to) {
  const auto half = [](const bf16* from, int64_t n) {
    vh h = vh{};
    if (n >= kWidth)
      h = load_half(from);
    else if (n > 0)
      std::memcpy(&h, from, static_cast<size_t>(n) * sizeof(bf16));
    return __builtin_convertvector(h, vu);
  };
  const int64_t c_low = low ? c : 0, c_high = high ? c : 0;
  for (int64_t x = 0; x < pixels; x++)
    for (int64_t i = 0; i < cp; i += kWidth) {
      const int64_t at = x * stride + i;
      const vu pairs = half(low + at, c_low - i) | half(high + at, c_high - i) << 16;
      std::memcpy(to + x * cp + i, &pairs, sizeof pairs);
    }
}

// The rolling pair rows of a band and a chunk of channels.
class PairRing {
 public:
  PairRing(const MbconvParams& p, int64_t image, int64_t first, int64_t cp, uint32_t* memory)
      : p_(p),
        map_(static_cast<const bf16*>(p.input) + image * p.h * p.w * p.c_in),
        first_(first),
        cp_(cp),
        lanes_(pair_row_lanes(p, cp)),
        rows_((p.kernel + 1) / 2),
        ring_(memory) {
    std::memset(ring_, 0, sizeof(uint32_t) * static_cast<size_t>(rows_ * lanes_));
  }

  uint32_t* row(int64_t j) { return ring_ + (j + rows_) % rows_ * lanes_; }  // j ≥ −2

  // Computes pair row j: expanded and activated, or as it is.
  void fill(int64_t j, const PointwiseWeights<bf16>& expand, float* pixels) {
    uint32_t* to = row(j) + p_.pad_left * cp_;
    const auto inside = [&](int64_t y) {
      return y >= 0 && y < p_.h ? map_ + y * p_.w * p_.c_in : nullptr;
    };
    const bf16 *low = inside(2 * j), *high = inside(2 * j + 1);
    if (!low && !high) {
      std::memset(to, 0, sizeof(uint32_t) * static_cast<size_t>(p_.w * cp_));
    } else if (!p_.expand) {
      const int64_t c = p_.c_mid - first_ < cp_ ? p_.c_mid - first_ : cp_;
      interleave_rows(low ? low + first_ : nullptr, high ? high + first_ : nullptr, p_.w, p_.c_in,
                      c, cp_, to);
    } else {
      const int64_t pitch = operand_pitch<bf16>(p_.c_in);
      const bool both = low && high;
      const uint32_t keep = both ? 0xffffffffu : low ? 0xffffu : 0xffff0000u;
      // both rows at once: they follow each other in the map
      const bf16* a = operand_rows(low ? low : high, both ? 2 * p_.w : p_.w, p_.c_in, pixels);
      pointwise_pairs(a, pitch, p_.w, expand, {to, cp_, both ? p_.w * pitch : 0, keep});
    }
  }

 private:
  const MbconvParams& p_;
  const bf16* map_;
  int64_t first_, cp_, lanes_, rows_;
  uint32_t* ring_;
};

template <int K, int S>
void mbconv_expand_pairs(const MbconvParams& p, int64_t image, int64_t band, int64_t first,
                         int64_t c, float* scratch) {
  const int64_t pitch = padded(p.c_mid), cp = padded(c);
  constexpr int kRows = (K + 1) / 2;
  float* memory = scratch + kRows * pair_row_lanes(p, cp);
  const PairTaps<K> taps(p.dw + first, p.c_mid, c, cp, memory);
  float* scale = memory + PairTaps<K>::lanes(cp);
  float* shift = scale + cp;
  float* e_scale = shift + cp;
  float* e_shift = e_scale + cp;
  float* operands = e_shift + cp;
  float* pixels = operands + operand_scratch(p.c_in, cp / kPanel);  // two rows, as operands
  copy_padded(p.dw_scale + first, c, cp, scale);
  copy_padded(p.dw_shift + first, c, cp, shift);
  PointwiseWeights<bf16> expand{};
  if (p.expand) {
    copy_padded(p.expand_scale + first, c, cp, e_scale);
    copy_padded(p.expand_shift + first, c, cp, e_shift);
    const bf16* panels =
        operand_weights<bf16>(p.expand + first * p.c_in, p.c_in, cp / kPanel, operands);
    expand = {panels, e_scale, e_shift, whole_steps<bf16>(p.c_in), cp, p.activation};
  }
  PairRing ring(p, image, first, cp, reinterpret_cast<uint32_t*>(scratch));
  const auto pair_of_row = [](int64_t y) { return (y + 4) / 2 - 2; };  // ⌊y/2⌋ of y ≥ −4

  const int64_t y_begin = band * p.band_rows;
  const int64_t y_end = y_begin + p.band_rows < p.out_h ? y_begin + p.band_rows : p.out_h;
  int64_t next = pair_of_row(y_begin * S - p.pad_top);
  for (int64_t y = y_begin; y < y_end; y++) {
    const int64_t top = y * S - p.pad_top, from = pair_of_row(top);
    for (; next < from + kRows; next++) ring.fill(next, expand, pixels);
    const uint32_t* rows[kRows];
    for (int r = 0; r < kRows; r++) rows[r] = ring.row(from + r);
    float* sums = p.sums + (image * p.out_h + y) * pitch + first;
    std::memset(sums, 0, sizeof(float) * static_cast<size_t>(cp));
    bf16* out = reinterpret_cast<bf16*>(p.mid) + ((image * p.out_h + y) * p.out_w) * pitch + first;
    mbconv_depthwise_pairs<K, S>(rows, top & 1, taps, scale, shift, p.out_w, p.activation, out,
                                 pitch, sums);
  }
}

#endif

}  // namespace edet::cpu::EDET_ISA
