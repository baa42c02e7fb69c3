// Rows of the first layer: pixels of any layout and dtype are normalised into an im2col strip of 27
// values each, multiplied with the packed 3×3 weights and activated.
#pragma once

#include "dispatch.h"
#include "pointwise.h"

namespace edet::cpu::EDET_ISA {

constexpr int64_t kStemTaps = 27;

inline int64_t stem_scratch(const StemParams& p) {
  const int64_t op = padded(p.c_out);
  return 3 * 3 * (2 * p.out_w + 2 + kPanel) + kLateralPixels * (kStemTaps + 5) + 2 * op;
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

template <class I, class T>
void stem_rows_as(const StemParams& p, int64_t image, int64_t y_begin, int64_t y_end,
                  float* scratch) {
  const int64_t op = padded(p.c_out);
  const int64_t columns = 2 * p.out_w + 1;  // of the image, that one output row reads
  float* lines = scratch;                   // (3 rows, columns, 3 channels)
  float* strip = lines + 3 * 3 * (2 * p.out_w + 2 + kPanel);  // (kLateralPixels, 27)
  float* scale = strip + kLateralPixels * (kStemTaps + 5);
  float* shift = scale + op;
  copy_padded(p.scale, p.c_out, op, scale);
  copy_padded(p.shift, p.c_out, op, shift);
  const PointwiseWeights<float> weights{p.weight, scale, shift, kStemTaps, p.c_out, p.activation};
  const I* base = static_cast<const I*>(p.image) + image * p.stride[0];

  for (int64_t y = y_begin; y < y_end; y++) {
    for (int r = 0; r < 3; r++) {
      float* line = lines + r * columns * 3;
      const int64_t row = y * 2 - p.pad_top + r;
      std::memset(line, 0, sizeof(float) * static_cast<size_t>(columns * 3));
      if (row < 0 || row >= p.h) continue;  // the padding is zero after normalisation
      const int64_t last = columns - p.pad_left < p.w ? columns - p.pad_left : p.w;
      for (int ch = 0; ch < 3; ch++) {
        const float mean = p.mean ? p.mean[ch] : 0.0f;
        const float factor = p.mean ? 1.0f / p.std[ch] : 1.0f;
        const I* from = base + ch * p.stride[1] + row * p.stride[2];
        float* to = line + p.pad_left * 3 + ch;
        for (int64_t x = 0; x < last; x++) {
          const float v = to_float(from[x * p.stride[3]]);
          to[3 * x] = p.mean ? (v - mean) * factor : v;
        }
      }
    }
    T* out = static_cast<T*>(p.out) + (image * p.out_h + y) * p.out_w * p.c_out;
    for (int64_t x = 0; x < p.out_w; x += kLateralPixels) {
      const int64_t count = p.out_w - x < kLateralPixels ? p.out_w - x : kLateralPixels;
      for (int64_t i = 0; i < count; i++)
        for (int r = 0; r < 3; r++)
          std::memcpy(strip + i * kStemTaps + r * 9, lines + (r * columns + 2 * (x + i)) * 3,
                      9 * sizeof(float));
      pointwise<T>(strip, kStemTaps, count, weights, {out + x * p.c_out, p.c_out, nullptr});
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
