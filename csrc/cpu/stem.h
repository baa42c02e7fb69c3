// Rows of the first layer: pixels of any layout and dtype are normalised into lines of one channel
// each, convolved 3×3 with stride 2 by register tiles of the packed weights, and activated.
#pragma once

#include "dispatch.h"
#include "pointwise.h"

namespace edet::cpu::EDET_ISA {

constexpr int64_t kStemTaps = 27;

// Numbers of a line: the columns that a row of the output reads, and room for whole registers.
inline int64_t stem_pitch(const StemParams& p) { return round_up(2 * p.out_w + 1, kPanel); }

inline int64_t stem_scratch(const StemParams& p) {
  return 3 * 3 * stem_pitch(p) + 2 * padded(p.c_out);
}

EDET_INLINE float to_float(uint8_t x) { return static_cast<float>(x); }
EDET_INLINE float to_float(float x) { return x; }
EDET_INLINE float to_float(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
EDET_INLINE float to_float(f16 x) { return load_tail(&x, 1)[0]; }

// Row `row` of an image as three lines, one for each channel; outside the image they are zero,
// which the padding is after normalisation.
template <class I>
void stem_lines(const StemParams& p, int64_t image, int64_t row, float* lines) {
  const int64_t pitch = stem_pitch(p), columns = 2 * p.out_w + 1;
  if (row < 0 || row >= p.h) {
    std::memset(lines, 0, sizeof(float) * static_cast<size_t>(3 * pitch));
    return;
  }
  const int64_t most = columns - p.pad_left, count = most < p.w ? most : p.w;
  const I* base = static_cast<const I*>(p.image) + image * p.stride[0] + row * p.stride[2];
  for (int ch = 0; ch < 3; ch++) {
    const float mean = p.mean ? p.mean[ch] : 0.0f;
    const float factor = p.mean ? 1.0f / p.std[ch] : 1.0f;
    const I* from = base + ch * p.stride[1];
    float* line = lines + ch * pitch;
    float* to = line + p.pad_left;
    const auto copy = [&](int64_t stride) {
      if (p.mean)
        for (int64_t x = 0; x < count; x++) to[x] = (to_float(from[x * stride]) - mean) * factor;
      else
        for (int64_t x = 0; x < count; x++) to[x] = to_float(from[x * stride]);
    };
    if (p.stride[3] == 1)
      copy(1);
    else
      copy(p.stride[3]);
    for (int64_t x = 0; x < p.pad_left; x++) line[x] = 0.0f;
    for (int64_t x = p.pad_left + count; x < columns; x++) line[x] = 0.0f;
  }
}

// out[m, :] = activation(sums · scale + shift) of MR neighbouring pixels and NP panels, the first
// of which begins at column 2x of the lines of three rows.
template <int MR, int NP, Activation A, class T>
void stem_tile(const float* const* rows, int64_t pitch, int64_t x, const float* w,
               const float* scale, const float* shift, int64_t columns,
               const PointwiseOut<T>& out) {
  constexpr int V = NP * kPanelVectors;
  vf acc[MR][V];
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) acc[m][v] = vf{};
  for (int r = 0; r < 3; r++)
    for (int64_t column = 0; column < 3; column++)
      for (int64_t ch = 0; ch < 3; ch++, w += kPanel) {
        const float* a = rows[r] + ch * pitch + 2 * x + column;
        vf b[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; v++)
          b[v] = load(w + (v / kPanelVectors) * kStemTaps * kPanel + v % kPanelVectors * kWidth);
#pragma GCC unroll 16
        for (int m = 0; m < MR; m++) {
          const vf pixel = set1(a[2 * m]);
#pragma GCC unroll 16
          for (int v = 0; v < V; v++) acc[m][v] = acc[m][v] + pixel * b[v];
        }
      }
#pragma GCC unroll 16
  for (int v = 0; v < V; v++)
    out.template put<A>(acc, v, load(scale + v * kWidth), load(shift + v * kWidth),
                        columns - v * kWidth);
}

// A row of the output of NP panels from channel `first` on.
template <int NP, Activation A, class T>
void stem_panels(const StemParams& p, const float* const* rows, int64_t first, const float* scale,
                 const float* shift, T* out) {
  const int64_t pitch = stem_pitch(p);
  const PointwiseOut<T> whole{out, p.c_out, nullptr};
  int64_t x = 0;
  const auto run = [&](auto height) {
    constexpr int H = decltype(height)::value;
    for (; p.out_w - x >= H; x += H)
      stem_tile<H, NP, A>(rows, pitch, x, p.weight + first * kStemTaps, scale + first,
                          shift + first, p.c_out - first, whole.from(x, first));
  };
  run(Constant<tile_rows(NP)>{});
  if constexpr (tile_rows(NP) > 4) run(Constant<4>{});
  run(Constant<1>{});
}

template <Activation A, class T>
void stem_row(const StemParams& p, const float* const* rows, const float* scale, const float* shift,
              T* out) {
  constexpr int NP = kMaxTilePanels == 4 ? 2 : 1;
  const int64_t op = padded(p.c_out);
  int64_t first = 0;
  for (; op - first >= NP * kPanel; first += NP * kPanel)
    stem_panels<NP, A>(p, rows, first, scale, shift, out);
  if (first < op) stem_panels<1, A>(p, rows, first, scale, shift, out);
}

template <class I, class T>
void stem_rows_as(const StemParams& p, int64_t image, int64_t y_begin, int64_t y_end,
                  float* scratch) {
  const int64_t op = padded(p.c_out), size = 3 * stem_pitch(p);
  float* scale = scratch + 3 * size;
  float* shift = scale + op;
  copy_padded(p.scale, p.c_out, op, scale);
  copy_padded(p.shift, p.c_out, op, shift);
  const auto lines = [&](int64_t row) { return scratch + (row + 3) % 3 * size; };
  int64_t next = y_begin * 2 - p.pad_top;  // first input row whose lines are not there yet
  for (int64_t y = y_begin; y < y_end; y++) {
    const int64_t top = y * 2 - p.pad_top;
    for (; next < top + 3; next++) stem_lines<I>(p, image, next, lines(next));
    const float* rows[3] = {lines(top), lines(top + 1), lines(top + 2)};
    T* out = static_cast<T*>(p.out) + (image * p.out_h + y) * p.out_w * p.c_out;
    // the activations of the published models are applied in registers
    if (p.activation == Activation::swish) {
      stem_row<Activation::swish>(p, rows, scale, shift, out);
    } else if (p.activation == Activation::relu6) {
      stem_row<Activation::relu6>(p, rows, scale, shift, out);
    } else {
      stem_row<Activation::none>(p, rows, scale, shift, out);
      activate_rows(p.activation, p.out_w, p.c_out, PointwiseOut<T>{out, p.c_out, nullptr});
    }
  }
}

template <class T>
void stem_rows_to(const StemParams& p, int64_t image, int64_t begin, int64_t end, float* scratch) {
  if (p.is_uint8) return stem_rows_as<uint8_t, T>(p, image, begin, end, scratch);
  return stem_rows_as<T, T>(p, image, begin, end, scratch);
}

inline void stem_rows(const StemParams& p, int64_t image, int64_t begin, int64_t end,
                      float* scratch) {
  switch (p.dtype) {
    case DType::f32: return stem_rows_to<float>(p, image, begin, end, scratch);
    case DType::f16: return stem_rows_to<f16>(p, image, begin, end, scratch);
    case DType::bf16: return stem_rows_to<bf16>(p, image, begin, end, scratch);
  }
}

}  // namespace edet::cpu::EDET_ISA
