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

struct PointwiseWeights {
  const float* panels;  // (⌈c_out/16⌉, c_in, 16)
  const float* scale;   // padded to the panel
  const float* shift;   // padded to the panel
  int64_t c_in, c_out;
  Activation activation;
};

// Products summed one after the other; longer sums are sums of such blocks, whose rounding error
// grows with the square root of the length instead of with the length.
constexpr int64_t kSumBlock = 64;

// acc[m][v] = a[m, begin…end) · W of MR rows and V registers of output channels.
template <int MR, int V>
EDET_INLINE void pointwise_block(const float* a, int64_t lda, int64_t begin, int64_t end,
                                 const float* w, int64_t panel, vf (&acc)[MR][V]) {
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) acc[m][v] = vf{};
  for (int64_t i = begin; i < end; i++) {
    vf b[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++)
      b[v] = load(w + (v / kPanelVectors) * panel + i * kPanel + (v % kPanelVectors) * kWidth);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
      const vf x = set1(a[m * lda + i]);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) acc[m][v] += x * b[v];
    }
  }
}

// out[m, :] = activation((a[m, :] · W) · scale + shift) for MR rows and NP panels.
template <int MR, int NP, Activation A>
void pointwise_tile(const float* a, int64_t lda, int64_t k, const float* w, const float* scale,
                    const float* shift, float* out, int64_t ldo) {
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
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) store(out + m * ldo + v * kWidth, activate<A>(acc[m][v] * s + t));
  }
}

// Full tiles of MR rows, then tiles of 4, 2 and 1 for what is left.
template <int NP, Activation A>
EDET_INLINE void pointwise_panels(const float* a, int64_t lda, int64_t rows, int64_t k,
                                  const float* w, const float* scale, const float* shift,
                                  float* out, int64_t ldo) {
  int64_t i = 0;
  const auto run = [&](auto height) {
    constexpr int MR = decltype(height)::value;
    for (; rows - i >= MR; i += MR)
      pointwise_tile<MR, NP, A>(a + i * lda, lda, k, w, scale, shift, out + i * ldo, ldo);
  };
  run(Constant<tile_rows(NP)>{});
  if constexpr (tile_rows(NP) > 4) run(Constant<4>{});
  run(Constant<2>{});
  run(Constant<1>{});
}

template <Activation A>
void pointwise_as(const float* a, int64_t lda, int64_t rows, const PointwiseWeights& w, float* out,
                  int64_t ldo) {
  const int64_t panels = (w.c_out + kPanel - 1) / kPanel;
  for (int64_t p = 0; p < panels;) {
    const int64_t left = panels - p;
    const float* wp = w.panels + p * w.c_in * kPanel;
    const float *s = w.scale + p * kPanel, *t = w.shift + p * kPanel;
    float* o = out + p * kPanel;
    if constexpr (kMaxTilePanels == 1) {
      pointwise_panels<1, A>(a, lda, rows, w.c_in, wp, s, t, o, ldo);
      p += 1;
    } else if (left == 4 || left >= 7) {
      pointwise_panels<4, A>(a, lda, rows, w.c_in, wp, s, t, o, ldo);
      p += 4;
    } else if (left >= 5 || left == 3) {  // 5 = 3 + 2, 6 = 3 + 3
      pointwise_panels<3, A>(a, lda, rows, w.c_in, wp, s, t, o, ldo);
      p += 3;
    } else if (left == 2) {
      pointwise_panels<2, A>(a, lda, rows, w.c_in, wp, s, t, o, ldo);
      p += 2;
    } else {
      pointwise_panels<1, A>(a, lda, rows, w.c_in, wp, s, t, o, ldo);
      p += 1;
    }
  }
}

// out (rows, ⌈c_out/16⌉·16) = activation(a (rows, c_in) · W · scale + shift), all panels. Swish,
// the activation of the published models, is applied in registers, the others in a second pass.
inline void pointwise(const float* a, int64_t lda, int64_t rows, const PointwiseWeights& w,
                      float* out, int64_t ldo) {
  if (w.activation == Activation::swish)
    return pointwise_as<Activation::swish>(a, lda, rows, w, out, ldo);
  pointwise_as<Activation::none>(a, lda, rows, w, out, ldo);
  if (w.activation == Activation::none) return;
  with_activation(w.activation, [&](auto tag) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < w.c_out; i += kWidth) {
        float* at = out + r * ldo + i;
        store(at, activate<decltype(tag)::value>(load(at)));
      }
  });
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

// The same with the result as a map (rows, c_out) of T; tile holds rows · ⌈c_out/16⌉·16 floats.
template <class T>
inline void pointwise_to(const float* a, int64_t lda, int64_t rows, const PointwiseWeights& w,
                         float* tile, T* out) {
  const int64_t op = (w.c_out + kPanel - 1) / kPanel * kPanel;
  if (sizeof(T) == sizeof(float) && op == w.c_out)
    return pointwise(a, lda, rows, w, reinterpret_cast<float*>(out), op);
  pointwise(a, lda, rows, w, tile, op);
  convert(tile, op, rows, w.c_out, out);
}

}  // namespace edet::cpu::EDET_ISA
