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

// Pairs of bf16, multiplied and summed in fp32 by one instruction. EDET_BF16_PAIRS takes this way
// without the instruction too, for tests on other CPUs.
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
  static EDET_INLINE vf add(vf sum, vu a, vu w) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)w);
#else
    sum += (vf)(a << 16) * (vf)(w << 16);
    return sum + (vf)(a & 0xffff0000u) * (vf)(w & 0xffff0000u);
#endif
  }
};

// The operands of products for maps of T: floats, but pairs of bf16 where the CPU multiplies them.
template <class T>
struct OperandOf {
  using type = float;
};
#if defined(__AVX512BF16__) || defined(EDET_BF16_PAIRS)
template <>
struct OperandOf<bf16> {
  using type = bf16;
};
#endif
template <class T>
using Operand = typename OperandOf<T>::type;

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

// acc[m][v] = a[m, begin…end) · W of MR rows and V registers of output channels.
template <int MR, int V, class In>
EDET_INLINE void pointwise_block(const In* a, int64_t lda, int64_t begin, int64_t end, const In* w,
                                 int64_t panel, vf (&acc)[MR][V]) {
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
      const auto x = P::broadcast(a + m * lda + i);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) acc[m][v] = P::add(acc[m][v], x, b[v]);
    }
  }
}

// Where a product goes: rows of T, `pitch` apart; `add`, when given, is added and lies like data.
template <class T>
struct PointwiseOut {
  T* data;
  int64_t pitch;
  const T* add;
};

// out[m, :] = activation((a[m, :] · W) · scale + shift) (+ add) for MR rows and NP panels, of which
// `columns` channels are stored.
template <int MR, int NP, Activation A, class In, class T>
void pointwise_tile(const In* a, int64_t lda, int64_t k, const In* w, const float* scale,
                    const float* shift, int64_t columns, const PointwiseOut<T>& out) {
  constexpr int V = NP * kPanelVectors;
  const int64_t panel = k * kPanel;
  const int64_t tail = k > kSumBlock ? (k - 1) / kSumBlock * kSumBlock : 0;
  float earlier[MR * V * kWidth];  // sums of the blocks before the last
  for (int64_t begin = 0; begin < tail; begin += kSumBlock) {
    vf acc[MR][V];
    pointwise_block<MR, V>(a, lda, begin, begin + kSumBlock, w, panel, acc);
#pragma GCC unroll 32
    for (int i = 0; i < MR * V; i++) {
      float* sum = earlier + i * kWidth;
      store(sum, begin ? load(sum) + acc[i / V][i % V] : acc[i / V][i % V]);
    }
  }
  vf acc[MR][V];
  pointwise_block<MR, V>(a, lda, tail, k, w, panel, acc);
  if (tail) {
#pragma GCC unroll 32
    for (int i = 0; i < MR * V; i++) acc[i / V][i % V] += load(earlier + i * kWidth);
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; v++) {
    const vf s = load(scale + v * kWidth), t = load(shift + v * kWidth);
    const int64_t left = columns - v * kWidth;
    T* to = out.data + v * kWidth;
    if (left >= kWidth) {
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++) acc[m][v] = activate<A>(acc[m][v] * s + t);
      if (out.add)
#pragma GCC unroll 16
        for (int m = 0; m < MR; m++) acc[m][v] += load(out.add + m * out.pitch + v * kWidth);
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++) store(to + m * out.pitch, acc[m][v]);
    } else if (left > 0) {
      const int n = static_cast<int>(left);
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++) {
        vf r = activate<A>(acc[m][v] * s + t);
        if (out.add) r += load_tail(out.add + m * out.pitch + v * kWidth, n);
        store_tail(to + m * out.pitch, r, n);
      }
    }
  }
}

// Full tiles of MR rows, then tiles of 4, 2 and 1 for what is left.
template <int NP, Activation A, class In, class T>
EDET_INLINE void pointwise_panels(const In* a, int64_t lda, int64_t rows, int64_t k, const In* w,
                                  const float* scale, const float* shift, int64_t columns,
                                  const PointwiseOut<T>& out) {
  int64_t i = 0;
  const auto run = [&](auto height) {
    constexpr int MR = decltype(height)::value;
    for (; rows - i >= MR; i += MR) {
      const int64_t at = i * out.pitch;
      pointwise_tile<MR, NP, A, In, T>(
          a + i * lda, lda, k, w, scale, shift, columns,
          {out.data + at, out.pitch, out.add ? out.add + at : nullptr});
    }
  };
  run(Constant<tile_rows(NP)>{});
  if constexpr (tile_rows(NP) > 4) run(Constant<4>{});
  run(Constant<2>{});
  run(Constant<1>{});
}

// From this many panels on, the rows are the outer loop: a row of the output is then written from
// left to right, which the cache needs when rows are long, and the weights come from L2.
constexpr int64_t kWidePanels = 16;

template <Activation A, class In, class T>
void pointwise_as(const In* a, int64_t lda, int64_t rows, const PointwiseWeights<In>& w,
                  const PointwiseOut<T>& out) {
  const int64_t panels = divide_up(w.c_out, kPanel);
  const auto run = [&](auto count, int64_t p, int64_t row, int64_t height) {
    constexpr int NP = decltype(count)::value;
    const int64_t from = p * kPanel, at = row * out.pitch + from;
    pointwise_panels<NP, A, In, T>(a + row * lda, lda, height, w.c_in, w.panels + from * w.c_in,
                                   w.scale + from, w.shift + from, w.c_out - from,
                                   {out.data + at, out.pitch, out.add ? out.add + at : nullptr});
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

// out (rows, c_out) = activation(a (rows, c_in) · W · scale + shift) (+ add). Swish, the activation
// of the published models, is applied in registers, the others in a second pass.
template <class T, class In>
inline void pointwise(const In* a, int64_t lda, int64_t rows, const PointwiseWeights<In>& w,
                      const PointwiseOut<T>& out) {
  if (w.activation == Activation::swish)
    return pointwise_as<Activation::swish, In, T>(a, lda, rows, w, out);
  pointwise_as<Activation::none, In, T>(a, lda, rows, w, out);
  if (w.activation == Activation::none) return;
  const int64_t whole = w.c_out / kWidth * kWidth;
  const int rest = static_cast<int>(w.c_out - whole);
  with_activation(w.activation, [&](auto tag) {
    constexpr Activation A = decltype(tag)::value;
    for (int64_t r = 0; r < rows; r++) {
      T* row = out.data + r * out.pitch;
      for (int64_t i = 0; i < whole; i += kWidth) store(row + i, activate<A>(load(row + i)));
      if (rest) store_tail(row + whole, activate<A>(load_tail(row + whole, rest)), rest);
    }
  });
}

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
