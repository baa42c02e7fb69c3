// The pointwise convolution: rows of channels times packed panels of 16 output channels.
#pragma once

#include "vec.h"

namespace edet::cpu::EDET_ISA {

constexpr int kPanelVectors = kPanel / kWidth;

// Rows of a register tile that is `panels` panels wide: as many as leave registers for one row of
// weights and one broadcast. AVX-512: 24 to 28 accumulators, enough to hide 4 cycles × 2 ports.
constexpr int tile_rows(int panels) {
  if (kRegisters == 32 && kWidth == 16)
    return panels == 1 ? 14 : panels == 2 ? 12 : panels == 3 ? 8 : 6;
  if (kRegisters == 32) return 6;  // NEON: 6 × 4 vectors
  return kWidth == 8 ? 6 : 3;      // 16 registers: 6 × 2 (AVX2) or 3 × 4 (SSE2) accumulators
}
constexpr int kMaxTilePanels = kWidth == 16 ? 4 : 1;

// How the products of operands of type In are summed: `kStep` neighbours of a row at a time.
template <class In>
struct Product;

template <>
struct Product<float> {
  static constexpr int kStep = 1;
  static EDET_INLINE vf broadcast(const float* a) { return set1(*a); }
  static EDET_INLINE vf weights(const float* w) { return load(w); }
  static EDET_INLINE vf add(vf sum, vf a, vf w) { return sum + a * w; }
};

// The operands of products for maps of T: floats, but pairs of bf16 where the CPU multiplies them.
template <class T>
struct OperandOf {
  using type = float;
};
template <class T>
using Operand = typename OperandOf<T>::type;

// EDET_BF16_PAIRS takes that way without the instruction too, for tests on other CPUs.
#if defined(__AVX512BF16__) || defined(EDET_BF16_PAIRS)
#define EDET_PAIRS
template <>
struct OperandOf<bf16> {
  using type = bf16;
};

#if defined(__AVX512BF16__)
EDET_INLINE vf add_pairs(vf sum, vu a, vu w) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)w);
}
// Both as bf16 operands, the first in the low half of each lane; subnormal numbers become zero.
EDET_INLINE vu pair_of(vf low, vf high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (vu)_mm512_permutexvar_epi16(order, halves);
}
EDET_INLINE void store_operand(bf16* p, vf v) {
  const __m256i h = (__m256i)_mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, sizeof h);
}
#else
// What the instruction reads and writes: subnormal numbers are zeros of their sign.
EDET_INLINE vf flushed(vf v) {
  const vu bits = (vu)v;
  return (vf)((bits & 0x7f800000u) ? bits : bits & 0x80000000u);
}
EDET_INLINE vf add_pairs(vf sum, vu a, vu w) {
  const auto add = [&sum](vu x, vu y) {
    const vf from = flushed(sum), left = flushed((vf)x), right = flushed((vf)y);
    for (int i = 0; i < kWidth; i++) sum[i] = __builtin_fmaf(left[i], right[i], from[i]);
    sum = flushed(sum);
  };
  add(a & 0xffff0000u, w & 0xffff0000u);
  add(a << 16, w << 16);
  return sum;
}
EDET_INLINE vu pair_of(vf low, vf high) {
  const vh a = float_to_bf16(flushed(low)), b = float_to_bf16(flushed(high));
  return __builtin_convertvector(a, vu) | __builtin_convertvector(b, vu) << 16;
}
EDET_INLINE void store_operand(bf16* p, vf v) { store(p, flushed(v)); }
#endif

// Pairs of bf16 by one instruction, vdpbf16ps: it adds the product of the second numbers, then that
// of the first, each rounded once to fp32, and takes subnormal operands and sums as zero, whatever
// torch.set_flush_denormal says.
template <>
struct Product<bf16> {
  static constexpr int kStep = 2;
  static EDET_INLINE vu broadcast(const bf16* a) {
    uint32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return pair - vu{};
  }
  static EDET_INLINE vu weights(const bf16* w) {
    vu pairs;
    std::memcpy(&pairs, w, sizeof pairs);
    return pairs;
  }
  static EDET_INLINE vf add(vf sum, vu a, vu w) { return add_pairs(sum, a, w); }
};
#endif

EDET_INLINE void store_operand(float* p, vf v) { store(p, v); }

// Inputs of a product, with those that fill up its last step: zeros.
template <class In>
constexpr int64_t whole_steps(int64_t c_in) {
  return round_up(c_in, Product<In>::kStep);
}

template <class In>
struct PointwiseWeights {
  const In* panels;     // (⌈c_out/16⌉, c_in/step, 16, step)
  const float* scale;   // padded to the panel
  const float* shift;   // padded to the panel
  int64_t c_in, c_out;  // c_in in whole steps
  Activation activation;
};

// Floats of scratch for weights of `panels` panels as operands for maps of any type.
constexpr int64_t operand_scratch(int64_t c_in, int64_t panels) {
  return sizeof(Operand<bf16>) == sizeof(float) ? 0 : (c_in + 1) / 2 * panels * kPanel;
}

// Packed weights (panels, c_in, 16) as operands: as they are, or written to scratch.
template <class In>
EDET_INLINE const In* operand_weights(const float* packed, int64_t c_in, int64_t panels,
                                      float* scratch) {
  if constexpr (sizeof(In) == sizeof(float)) {
    return packed;
  } else {
    bf16* to = reinterpret_cast<bf16*>(scratch);
    for (int64_t p = 0; p < panels; p++)
      for (int64_t i = 0; i < c_in; i += 2)
        for (int v = 0; v < kPanel; v += kWidth, to += 2 * kWidth) {
          const float* from = packed + (p * c_in + i) * kPanel + v;
          const vh low = float_to_bf16(load(from));
          const vh high = i + 1 < c_in ? float_to_bf16(load(from + kPanel)) : vh{};
          const vu pairs = __builtin_convertvector(low, vu) | __builtin_convertvector(high, vu)
                                                                  << 16;
          std::memcpy(to, &pairs, sizeof pairs);
        }
    return reinterpret_cast<const bf16*>(scratch);
  }
}

// Products summed one after the other; longer sums are sums of such blocks, whose rounding error
// grows with the square root of the length instead of with the length.
constexpr int64_t kSumBlock = 64;

// acc[m][v] = a[m, begin…end) · W of MR rows and V registers of output channels. Rows come in
// groups of G: row m lies at (m / G) · lda + (m % G) · apart.
template <int MR, int V, int G, class In>
EDET_INLINE void pointwise_block(const In* a, int64_t lda, int64_t apart, int64_t begin,
                                 int64_t end, const In* w, int64_t panel, vf (&acc)[MR][V]) {
  using P = Product<In>;
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) acc[m][v] = vf{};
  for (int64_t i = begin; i < end; i += P::kStep) {
    decltype(P::weights(w)) b[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++)
      b[v] = P::weights(w + (v / kPanelVectors) * panel + i * kPanel +
                        (v % kPanelVectors) * kWidth * P::kStep);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
      const auto x = P::broadcast(a + (m / G) * lda + (m % G) * apart + i);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) acc[m][v] = P::add(acc[m][v], x, b[v]);
    }
  }
}

// Where a product goes: rows of T, `pitch` apart; `add`, when given, is added and lies like data.
template <class T>
struct PointwiseOut {
  static constexpr int kGroup = 1;
  static constexpr int64_t apart = 0;

  T* data;
  int64_t pitch;
  const T* add;

  EDET_INLINE PointwiseOut from(int64_t row, int64_t channel) const {
    const int64_t at = row * pitch + channel;
    return {data + at, pitch, add ? add + at : nullptr};
  }

  // Stores activation(acc · scale + shift) (+ add) of one register of channels, of which `left`
  // are the output's.
  template <Activation A, int MR, int V>
  EDET_INLINE void put(vf (&acc)[MR][V], int v, vf scale, vf shift, int64_t left) const {
    T* to = data + v * kWidth;
    if (left >= kWidth) {
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++) acc[m][v] = activate<A, T>(acc[m][v] * scale + shift);
      if (add)
#pragma GCC unroll 16
        for (int m = 0; m < MR; m++) acc[m][v] += load(add + m * pitch + v * kWidth);
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++) store(to + m * pitch, acc[m][v]);
    } else if (left > 0) {
      const int n = static_cast<int>(left);
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++) {
        vf r = activate<A, T>(acc[m][v] * scale + shift);
        if (add) r += load_tail(add + m * pitch + v * kWidth, n);
        store_tail(to + m * pitch, r, n);
      }
    }
  }
};

#if defined(EDET_PAIRS)
// The products of two rows of a map, `apart` elements from each other, as pairs of bf16: whole
// registers, `pitch` lanes between pixels. What is not in `keep` is zero: a row outside the map.
struct PairOut {
  static constexpr int kGroup = 2;

  uint32_t* data;
  int64_t pitch, apart;
  uint32_t keep;

  EDET_INLINE PairOut from(int64_t row, int64_t channel) const {
    return {data + row * pitch + channel, pitch, apart, keep};
  }

  template <Activation A, int MR, int V>
  EDET_INLINE void put(vf (&acc)[MR][V], int v, vf scale, vf shift, int64_t) const {
#pragma GCC unroll 16
    for (int m = 0; m < MR; m += 2) {
      const vf low = activate<A, bf16>(acc[m][v] * scale + shift);
      const vf high = activate<A, bf16>(acc[m + 1][v] * scale + shift);
      const vu pairs = pair_of(low, high) & keep;
      std::memcpy(data + m / 2 * pitch + v * kWidth, &pairs, sizeof pairs);
    }
  }
};
#endif

// out[m, :] = activation((a[m, :] · W) · scale + shift) (+ add) for MR rows and NP panels, of which
// `columns` channels are stored.
template <int MR, int NP, Activation A, class In, class Out>
void pointwise_tile(const In* a, int64_t lda, int64_t k, const In* w, const float* scale,
                    const float* shift, int64_t columns, const Out& out) {
  constexpr int V = NP * kPanelVectors, G = Out::kGroup;
  const int64_t panel = k * kPanel;
  const int64_t tail = k > kSumBlock ? (k - 1) / kSumBlock * kSumBlock : 0;
  float earlier[MR * V * kWidth];  // sums of the blocks before the last
  for (int64_t begin = 0; begin < tail; begin += kSumBlock) {
    vf acc[MR][V];
    pointwise_block<MR, V, G>(a, lda, out.apart, begin, begin + kSumBlock, w, panel, acc);
#pragma GCC unroll 32
    for (int i = 0; i < MR * V; i++) {
      float* sum = earlier + i * kWidth;
      store(sum, begin ? load(sum) + acc[i / V][i % V] : acc[i / V][i % V]);
    }
  }
  vf acc[MR][V];
  pointwise_block<MR, V, G>(a, lda, out.apart, tail, k, w, panel, acc);
  if (tail) {
#pragma GCC unroll 32
    for (int i = 0; i < MR * V; i++) acc[i / V][i % V] += load(earlier + i * kWidth);
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; v++)
    out.template put<A>(acc, v, load(scale + v * kWidth), load(shift + v * kWidth),
                        columns - v * kWidth);
}

// Full tiles of MR rows, then tiles of 4, 2 and 1 for what is left; `rows` counts groups of rows.
template <int NP, Activation A, class In, class Out>
EDET_INLINE void pointwise_panels(const In* a, int64_t lda, int64_t rows, int64_t k, const In* w,
                                  const float* scale, const float* shift, int64_t columns,
                                  const Out& out) {
  constexpr int G = Out::kGroup;
  int64_t i = 0;
  const auto run = [&](auto height) {
    constexpr int H = decltype(height)::value;
    for (; rows - i >= H; i += H)
      pointwise_tile<H * G, NP, A>(a + i * lda, lda, k, w, scale, shift, columns, out.from(i, 0));
  };
  run(Constant<tile_rows(NP) / G>{});
  if constexpr (tile_rows(NP) > 4 * G) run(Constant<4>{});
  run(Constant<2>{});
  run(Constant<1>{});
}

}  // namespace edet::cpu::EDET_ISA

#include "pointwise_tiles.h"

namespace edet::cpu::EDET_ISA {

// From this many panels on, the rows are the outer loop: a row of the output is then written from
// left to right, which the cache needs when rows are long, and the weights come from L2.
constexpr int64_t kWidePanels = 16;

template <Activation A, class In, class Out>
void pointwise_registers(const In* a, int64_t lda, int64_t rows, const PointwiseWeights<In>& w,
                         const Out& out) {
  const int64_t panels = divide_up(w.c_out, kPanel);
  const auto run = [&](auto count, int64_t p, int64_t row, int64_t height) {
    constexpr int NP = decltype(count)::value;
    const int64_t from = p * kPanel;
    pointwise_panels<NP, A>(a + row * lda, lda, height, w.c_in, w.panels + from * w.c_in,
                            w.scale + from, w.shift + from, w.c_out - from, out.from(row, from));
    return NP;
  };
  if constexpr (kMaxTilePanels == 4) {
    constexpr int64_t kRows = tile_rows(2);
    for (int64_t row = 0; panels >= kWidePanels && row < rows; row += kRows) {
      const int64_t height = rows - row < kRows ? rows - row : kRows;
      int64_t p = 0;
      while (p + 2 <= panels) p += run(Constant<2>{}, p, row, height);
      if (p < panels) run(Constant<1>{}, p, row, height);
    }
    if (panels >= kWidePanels) return;
    for (int64_t p = 0; p < panels;) {
      const int64_t left = panels - p;
      if (left == 4 || left >= 7)
        p += run(Constant<4>{}, p, 0, rows);
      else if (left >= 5 || left == 3)  // 5 = 3 + 2, 6 = 3 + 3
        p += run(Constant<3>{}, p, 0, rows);
      else if (left == 2)
        p += run(Constant<2>{}, p, 0, rows);
      else
        p += run(Constant<1>{}, p, 0, rows);
    }
  } else {
    for (int64_t p = 0; p < panels;) p += run(Constant<1>{}, p, 0, rows);
  }
}

template <Activation A, class In, class Out>
EDET_INLINE void pointwise_as(const In* a, int64_t lda, int64_t rows, const PointwiseWeights<In>& w,
                              const Out& out) {
#if defined(EDET_TILES)
  if constexpr (sizeof(In) == sizeof(bf16))
    pointwise_tiles<A>(a, lda, rows, w, out);
  else
#endif
    pointwise_registers<A>(a, lda, rows, w, out);
}

// Activates (rows, columns) of an output in a second pass.
template <class T>
void activate_rows(Activation activation, int64_t rows, int64_t columns,
                   const PointwiseOut<T>& out) {
  if (activation == Activation::none) return;
  const int64_t whole = columns / kWidth * kWidth;
  const int rest = static_cast<int>(columns - whole);
  with_activation(activation, [&](auto tag) {
    constexpr Activation A = decltype(tag)::value;
    for (int64_t r = 0; r < rows; r++) {
      T* row = out.data + r * out.pitch;
      for (int64_t i = 0; i < whole; i += kWidth) store(row + i, activate<A, T>(load(row + i)));
      if (rest) store_tail(row + whole, activate<A, T>(load_tail(row + whole, rest)), rest);
    }
  });
}

// out (rows, c_out) = activation(a (rows, c_in) · W · scale + shift) (+ add). Swish is applied in
// registers, the others in a second pass, which takes no longer for ReLU6.
template <class T, class In>
inline void pointwise(const In* a, int64_t lda, int64_t rows, const PointwiseWeights<In>& w,
                      const PointwiseOut<T>& out) {
  if (w.activation == Activation::swish)
    return pointwise_as<Activation::swish>(a, lda, rows, w, out);
  pointwise_as<Activation::none>(a, lda, rows, w, out);
  activate_rows(w.activation, rows, w.c_out, out);
}

#if defined(EDET_PAIRS)
// The same for pairs of rows; activations other than swish are taken of the rounded products.
inline void pointwise_pairs(const bf16* a, int64_t lda, int64_t pixels,
                            const PointwiseWeights<bf16>& w, const PairOut& out) {
  if (w.activation == Activation::swish)
    return pointwise_as<Activation::swish>(a, lda, pixels, w, out);
  pointwise_as<Activation::none>(a, lda, pixels, w, out);
  if (w.activation == Activation::none) return;
  with_activation(w.activation, [&](auto tag) {
    constexpr Activation A = decltype(tag)::value;
    for (int64_t i = 0; i < pixels * out.pitch; i += kWidth) {
      vu pairs;
      std::memcpy(&pairs, out.data + i, sizeof pairs);
      pairs = pair_of(activate<A, bf16>((vf)(pairs << 16)),
                      activate<A, bf16>((vf)(pairs & 0xffff0000u)));
      std::memcpy(out.data + i, &pairs, sizeof pairs);
    }
  });
}
#endif

// Rows (count, c) of T as floats, `pitch` apart and zero past c; the rows of T are `stride` apart.
template <class T>
EDET_INLINE void load_pixels(const T* from, int64_t count, int64_t stride, int64_t c, int64_t pitch,
                             float* to) {
  const int64_t whole = c / kWidth * kWidth;
  const int rest = static_cast<int>(c - whole);
  for (int64_t i = 0; i < count; i++, from += stride, to += pitch) {
    for (int64_t k = 0; k < whole; k += kWidth) store(to + k, load(from + k));
    int64_t k = whole;
    if (rest) {
      store(to + k, load_tail(from + k, rest));
      k += kWidth;
    }
    for (; k < pitch; k += kWidth) store(to + k, vf{});
  }
}

// How far apart operand_rows puts the rows of a map of T with c channels.
template <class T>
EDET_INLINE int64_t operand_pitch(int64_t c) {
  const bool as_they_are = sizeof(T) == sizeof(Operand<T>) && c % Product<Operand<T>>::kStep == 0;
  return as_they_are ? c : padded(c);
}

// Pixels of a map as operands of a product: as they lie there, or written to scratch.
template <class T>
EDET_INLINE const Operand<T>* operand_rows(const T* from, int64_t rows, int64_t c, float* scratch) {
  const int64_t pitch = operand_pitch<T>(c);
  if constexpr (sizeof(T) == sizeof(Operand<T>)) {
    if (pitch == c) return from;
    T* to = reinterpret_cast<T*>(scratch);
    std::memset(to, 0, sizeof(T) * static_cast<size_t>(rows * pitch));
    for (int64_t i = 0; i < rows; i++)
      std::memcpy(to + i * pitch, from + i * c, sizeof(T) * static_cast<size_t>(c));
    return to;
  } else {
    load_pixels(from, rows, c, c, pitch, scratch);
    return scratch;
  }
}

// out[p, :] = tile[p, :] for `pixels` rows of c channels, converted to T.
template <class T>
inline void convert(const float* tile, int64_t ldt, int64_t pixels, int64_t c, T* out) {
  const int64_t whole = c / kWidth * kWidth;
  const int rest = static_cast<int>(c - whole);
  for (int64_t p = 0; p < pixels; p++) {
    const float* from = tile + p * ldt;
    T* to = out + p * c;
    for (int64_t i = 0; i < whole; i += kWidth) store(to + i, load(from + i));
    if (rest) store_tail(to + whole, load(from + whole), rest);
  }
}

}  // namespace edet::cpu::EDET_ISA
