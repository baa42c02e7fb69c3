// The inverted residual block in two phases: a band of rows and a chunk of middle channels is
// expanded into rolling rows, depthwise-convolved, activated and summed; when all sums of an image
// are known, squeeze-excite gives the gate and blocks of pixels are gated, projected and stored.
#pragma once

#include "depthwise.h"
#include "dispatch.h"
#include "fuse.h"
#include "mbconv_pairs.h"
#include "pointwise.h"

namespace edet::cpu::EDET_ISA {

inline int64_t mbconv_scratch(const MbconvParams& p) {
  const int64_t channels = p.chunk_panels * kPanel;
  // of pairs of rows: two input rows, and the taps twice; of floats: K rows instead of pairs
  const int64_t expand = p.kernel * pair_row_lanes(p, channels) +
                         p.kernel * (p.kernel + 1) * channels + 4 * channels +
                         2 * p.w * padded(p.c_in) + operand_scratch(p.c_in, p.chunk_panels);
  const int64_t op = padded(p.c_out), mp = padded(p.c_mid);
  const int64_t project = kLateralPixels * mp + 2 * op + operand_scratch(p.c_mid, op / kPanel);
  const int64_t squeeze = 2 * mp + 4 * padded(p.c_reduced) + 2 * mp;
  const int64_t most = expand > project ? expand : project;
  return most > squeeze ? most : squeeze;
}

// Input row y as it enters the depthwise convolution: expanded and activated, or as it is.
template <class T>
EDET_INLINE void mbconv_row(const MbconvParams& p, const PointwiseWeights<float>& expand,
                            int64_t image, int64_t y, int64_t first, int64_t cp, float* pixels,
                            float* row) {
  const T* from = static_cast<const T*>(p.input) + (image * p.h + y) * p.w * p.c_in;
  if (p.expand) {
    const float* a = operand_rows(from, p.w, p.c_in, pixels);
    return pointwise<float>(a, operand_pitch<T>(p.c_in), p.w, expand, {row, cp, nullptr});
  }
  const int64_t c = p.c_mid - first < cp ? p.c_mid - first : cp;
  load_pixels(from + first, p.w, p.c_in, c, cp, row);
}

// One output row: depthwise sums plus shift, activated, to out (pixels `pitch` apart) and added up.
template <int K, int S>
void mbconv_depthwise(const float* const* rows, const float* dw, const float* shift, int64_t cp,
                      int64_t count, Activation activation, float* out, int64_t pitch,
                      float* sums) {
  const auto run = [&](auto tag) {
    depthwise_row<K, S>(rows, dw, cp, count, [&](int64_t x, int64_t i, const auto& sum) {
      const vf b = load(shift + i);
      vf total = vf{};
      for (const vf& s : sum) {
        const vf v = activate<decltype(tag)::value>(s + b);
        store(out + x++ * pitch + i, v);
        total += v;
      }
      store(sums + i, load(sums + i) + total);
    });
  };
  if (activation == Activation::swish) return run(Constant<Activation::swish>{});
  if (activation == Activation::relu6) return run(Constant<Activation::relu6>{});
  // The activations that no published model has here: a second pass over the row.
  depthwise_row<K, S>(rows, dw, cp, count, [&](int64_t x, int64_t i, const auto& sum) {
    for (const vf& s : sum) store(out + x++ * pitch + i, s + load(shift + i));
  });
  with_activation(activation, [&](auto tag) {
    for (int64_t x = 0; x < count; x++)
      for (int64_t i = 0; i < cp; i += kWidth) {
        const vf v = activate<decltype(tag)::value>(load(out + x * pitch + i));
        store(out + x * pitch + i, v);
        store(sums + i, load(sums + i) + v);
      }
  });
}

// The first phase with rolling rows of floats.
template <class T>
void mbconv_expand_floats(const MbconvParams& p, int64_t image, int64_t band, int64_t first,
                          int64_t c, float* scratch) {
  const int K = p.kernel, S = p.stride;
  const int64_t pitch = padded(p.c_mid);
  const int64_t cp = padded(c);
  const int64_t row_floats = pair_row_lanes(p, cp);

  float* ring = scratch;  // (K, columns or more, cp); row y of the input is in ring row y mod K
  float* dw = ring + K * row_floats;
  float* shift = dw + K * K * cp;
  float* e_scale = shift + cp;
  float* e_shift = e_scale + cp;
  float* pixels = e_shift + cp;  // one input row, as operands
  for (int t = 0; t < K * K; t++) {
    copy_padded(p.dw + t * p.c_mid + first, c, cp, dw + t * cp);
    for (int64_t i = 0; i < c; i++) dw[t * cp + i] *= p.dw_scale[first + i];
  }
  copy_padded(p.dw_shift + first, c, cp, shift);
  if (p.expand) {
    copy_padded(p.expand_scale + first, c, cp, e_scale);
    copy_padded(p.expand_shift + first, c, cp, e_shift);
  }
  std::memset(ring, 0, sizeof(float) * static_cast<size_t>(K * row_floats));

  const int64_t y_begin = band * p.band_rows;
  const int64_t y_end = y_begin + p.band_rows < p.out_h ? y_begin + p.band_rows : p.out_h;
  // whole panels are stored: the channels past c_mid are zero
  const PointwiseWeights<float> expand{
      p.expand ? p.expand + first * p.c_in : nullptr, e_scale, e_shift, p.c_in, cp, p.activation};
  const auto ring_row = [&](int64_t y) { return ring + (y + K) % K * row_floats; };
  int64_t next = y_begin * S - p.pad_top;  // first input row not yet in the ring
  for (int64_t y = y_begin; y < y_end; y++) {
    const int64_t top = y * S - p.pad_top;
    for (; next < top + K; next++) {
      float* row = ring_row(next) + p.pad_left * cp;
      if (next < 0 || next >= p.h)
        std::memset(row, 0, sizeof(float) * static_cast<size_t>(p.w * cp));
      else
        mbconv_row<T>(p, expand, image, next, first, cp, pixels, row);
    }
    const float* rows[5];
    for (int r = 0; r < K; r++) rows[r] = ring_row(top + r);
    float* out = p.mid + ((image * p.out_h + y) * p.out_w) * pitch + first;
    const auto convolve = K == 3 ? (S == 1 ? &mbconv_depthwise<3, 1> : &mbconv_depthwise<3, 2>)
                                 : (S == 1 ? &mbconv_depthwise<5, 1> : &mbconv_depthwise<5, 2>);
    float* sums = p.sums + (image * p.out_h + y) * pitch + first;
    std::memset(sums, 0, sizeof(float) * static_cast<size_t>(cp));
    convolve(rows, dw, shift, cp, p.out_w, p.activation, out, pitch, sums);
  }
}

template <class T>
void mbconv_expand_as(const MbconvParams& p, int64_t image, int64_t band, int64_t chunk,
                      float* scratch) {
  const int64_t channels = p.chunk_panels * kPanel, first = chunk * channels;
  const int64_t c = p.c_mid - first < channels ? p.c_mid - first : channels;
#if defined(EDET_PAIRS)
  if constexpr (sizeof(Operand<T>) == sizeof(bf16)) {
    const auto run =
        p.kernel == 3 ? (p.stride == 1 ? &mbconv_expand_pairs<3, 1> : &mbconv_expand_pairs<3, 2>)
                      : (p.stride == 1 ? &mbconv_expand_pairs<5, 1> : &mbconv_expand_pairs<5, 2>);
    return run(p, image, band, first, c, scratch);
  } else
#endif
    mbconv_expand_floats<T>(p, image, band, first, c, scratch);
}

inline void mbconv_expand(const MbconvParams& p, int64_t image, int64_t band, int64_t chunk,
                          float* scratch) {
  switch (p.dtype) {
    case DType::f32: return mbconv_expand_as<float>(p, image, band, chunk, scratch);
    case DType::f16: return mbconv_expand_as<f16>(p, image, band, chunk, scratch);
    case DType::bf16: return mbconv_expand_as<bf16>(p, image, band, chunk, scratch);
  }
}

// gate = σ(excite · activation(reduce · mean + reduce_bias) + excite_bias) of one image.
inline void mbconv_squeeze(const MbconvParams& p, int64_t image, float* scratch) {
  const int64_t pitch = padded(p.c_mid), rp = padded(p.c_reduced);
  float* mean = scratch;       // (pitch)
  float* ones = mean + pitch;  // (max(pitch, rp))
  float* bias = ones + pitch + rp;
  float* reduced = bias + pitch + rp;
  float* gate = p.gate + image * pitch;
  const float inverse = 1.0f / static_cast<float>(p.out_h * p.out_w);
  // An error of the mean is one of every pixel: it does not average out in the layers to come, so
  // sums of few terms are summed.
  constexpr int64_t kFew = 16;
  for (int64_t i = 0; i < pitch; i += kWidth) {
    vf sum = vf{};
    for (int64_t first = 0; first < p.out_h; first += kFew) {
      vf few = vf{};
      for (int64_t y = first; y < p.out_h && y < first + kFew; y++)
        few += load(p.sums + (image * p.out_h + y) * pitch + i);
      sum += few;
    }
    store(mean + i, sum * inverse);
  }
  for (int64_t i = 0; i < pitch + rp; i += kWidth) store(ones + i, set1(1.0f));
  copy_padded(p.reduce_bias, p.c_reduced, rp, bias);
  // rp and pitch channels: the padding that the next product reads is zero
  pointwise<float, float>(mean, pitch, 1, {p.reduce, ones, bias, p.c_mid, rp, p.activation},
                          {reduced, rp, nullptr});
  copy_padded(p.excite_bias, p.c_mid, pitch, bias);
  pointwise<float, float>(reduced, rp, 1,
                          {p.excite, ones, bias, p.c_reduced, pitch, Activation::none},
                          {gate, pitch, nullptr});
  for (int64_t i = 0; i < pitch; i += kWidth) store(gate + i, sigmoid(load(gate + i)));
}

// One panel of the projection times the gate of an image, as operands.
template <class T>
void mbconv_gate_as(const MbconvParams& p, int64_t image, int64_t panel) {
  using In = Operand<T>;
  const float* gate = p.gate + image * padded(p.c_mid);
  const float* from = p.project + panel * p.c_mid * kPanel;
  const int64_t panels = padded(p.c_out) / kPanel;
  In* to = reinterpret_cast<In*>(p.gated + image * panels * kPanel * p.c_mid) +
           panel * whole_steps<In>(p.c_mid) * kPanel;
  for (int64_t k = 0; k < p.c_mid; k += Product<In>::kStep)
    for (int64_t i = 0; i < kPanel; i += kWidth, to += kWidth * Product<In>::kStep) {
      const vf first = load(from + k * kPanel + i) * gate[k];
#if defined(EDET_PAIRS)
      if constexpr (sizeof(In) == sizeof(bf16)) {
        const bool both = k + 1 < p.c_mid;
        const vu pairs =
            pair_of(first, both ? load(from + (k + 1) * kPanel + i) * gate[k + 1] : vf{});
        std::memcpy(to, &pairs, sizeof pairs);
      } else
#endif
        store(to, first);
    }
}

inline void mbconv_gate(const MbconvParams& p, int64_t image, int64_t panel) {
  if (p.dtype == DType::bf16) return mbconv_gate_as<bf16>(p, image, panel);
  mbconv_gate_as<float>(p, image, panel);
}

template <class T>
void mbconv_project_as(const MbconvParams& p, int64_t image, int64_t begin, int64_t end,
                       float* scratch) {
  const int64_t mp = padded(p.c_mid), op = padded(p.c_out);
  const int64_t area = p.out_h * p.out_w, rows = end - begin;
  using In = Operand<T>;
  float* scale = scratch + kLateralPixels * mp;
  float* shift = scale + op;
  copy_padded(p.project_scale, p.c_out, op, scale);
  copy_padded(p.project_shift, p.c_out, op, shift);
  const In* a = reinterpret_cast<const In*>(p.mid) + (image * area + begin) * mp;
  if (p.c_reduced && !p.gated) {
    const float* gate = p.gate + image * mp;
    In* strip = reinterpret_cast<In*>(scratch);  // (kLateralPixels, mp)
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < mp; i += kWidth)
        store_operand(strip + r * mp + i, load(a + r * mp + i) * load(gate + i));
    a = strip;
  }
  const In* panels = p.gated ? reinterpret_cast<const In*>(p.gated + image * op * p.c_mid)
                             : operand_weights<In>(p.project, p.c_mid, op / kPanel, shift + op);
  const int64_t at = (image * area + begin) * p.c_out;
  const T* input = p.residual ? static_cast<const T*>(p.input) + at : nullptr;
  pointwise<T, In>(a, mp, rows,
                   {panels, scale, shift, whole_steps<In>(p.c_mid), p.c_out, Activation::none},
                   {static_cast<T*>(p.out) + at, p.c_out, input});
}

inline void mbconv_project(const MbconvParams& p, int64_t image, int64_t begin, int64_t end,
                           float* scratch) {
  switch (p.dtype) {
    case DType::f32: return mbconv_project_as<float>(p, image, begin, end, scratch);
    case DType::f16: return mbconv_project_as<f16>(p, image, begin, end, scratch);
    case DType::bf16: return mbconv_project_as<bf16>(p, image, begin, end, scratch);
  }
}

}  // namespace edet::cpu::EDET_ISA
