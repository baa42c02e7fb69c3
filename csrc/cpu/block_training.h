// An inverted residual block in training, in three steps that end where a batch norm needs the
// whole map, each with its gradients:
//   moments            of a map: means, and the products of the channels' deviations
//   block_depthwise    expand 1×1, normalised and activated, then depthwise k×k
//   block_project      normalised and activated, gated, then project 1×1
// The expanded map is never written: each pass makes the rows that it needs again.
#pragma once

#include "block_dispatch.h"
#include "depthwise.h"
#include "node_backward.h"

namespace edet::cpu::EDET_ISA {

// `count` rows of a map as floats: as they lie there, or written to scratch, `pitch` apart.
template <class T>
EDET_INLINE const float* float_rows(const T* from, int64_t count, int64_t c, float* scratch,
                                    int64_t* pitch) {
  if constexpr (sizeof(T) == sizeof(float)) {
    *pitch = c;
    return from;
  } else {
    *pitch = padded(c);
    load_pixels(from, count, c, c, padded(c), scratch);
    return scratch;
  }
}

// rows = rows · scale + offset, activated, of `count` pixels of cp channels.
inline void normalise_rows(float* rows, int64_t count, int64_t cp, const float* scale,
                           const float* offset, Activation activation) {
  with_activation(activation, [&](auto tag) {
    for (int64_t x = 0; x < count; x++)
      for (int64_t i = 0; i < cp; i += kWidth) {
        float* at = rows + x * cp + i;
        store(at, activate<decltype(tag)::value>(load(at) * load(scale + i) + load(offset + i)));
      }
  });
}

// grad (count, pitch) of a map's pixels, c channels of them from `first` on, with what the gradient
// of the statistics adds: slope·(out − mean) + constant.
template <class T>
void load_gradient(const T* grad, const T* out, const StatisticsGradient& s, int64_t count,
                   int64_t stride, int64_t first, int64_t c, int64_t pitch, float* to,
                   float* scratch) {
  load_pixels(grad + first, count, stride, c, pitch, to);
  if (!s.slope) return;
  load_pixels(out + first, count, stride, c, pitch, scratch);
  for (int64_t x = 0; x < count; x++)
    for (int64_t i = 0; i < pitch; i += kWidth) {
      const int64_t at = x * pitch + i, k = first + i;
      const vf deviation = load(scratch + at) - load(s.mean + k);
      store(to + at, load(to + at) + deviation * load(s.slope + k) + load(s.constant + k));
    }
}

// to[i] += Σ rows[x, i] (· times[x, i]) over `count` pixels of cp channels.
inline void add_sums(const float* rows, const float* times, int64_t count, int64_t cp, float* to) {
  for (int64_t i = 0; i < cp; i += kWidth) {
    CarefulSum sum;
    for (int64_t x = 0; x < count; x++) {
      const vf v = load(rows + x * cp + i);
      sum.add(times ? v * load(times + x * cp + i) : v);
    }
    store(to + i, load(to + i) + sum.value());
  }
}

// Moments ------------------------------------------------------------------------------------

inline int64_t moments_scratch(const MomentsParams& p) { return 2 * kStripPixels * padded(p.c); }

// Calls f(pixels from, count) for strips of [begin, end).
template <class F>
EDET_INLINE void each_strip(int64_t begin, int64_t end, int64_t strip, const F& f) {
  for (int64_t x = begin; x < end; x += strip) f(x, end - x < strip ? end - x : strip);
}

// A sum of each channel of pixels [begin, end), as values and what they lack, (2, pitch): of the
// values themselves, or with a mean of the squared deviations from it.
inline void moments_sums(const MomentsParams& p, int64_t begin, int64_t end, float* sums,
                         float* scratch) {
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t cp = padded(p.c);
    std::memset(sums, 0, sizeof(float) * static_cast<size_t>(2 * cp));
    each_strip(begin, end, kStripPixels, [&](int64_t x, int64_t count) {
      load_pixels(static_cast<const T*>(p.input) + x * p.c, count, p.c, p.c, cp, scratch);
      for (int64_t i = 0; i < cp; i += kWidth) {
        CarefulSum sum(load(sums + i), load(sums + cp + i));
        for (int64_t r = 0; r < count; r++) {
          const vf v = load(scratch + r * cp + i), d = p.mean ? v - load(p.mean + i) : v;
          sum.add(p.mean ? d * d : v);
        }
        store(sums + i, sum.value()), store(sums + cp + i, sum.lost());
      }
    });
  });
}

// products, packed (⌈c/16⌉, c, 16), += Σ (x − mean)ᵀ(x − mean) over pixels [begin, end).
inline void moments_products(const MomentsParams& p, int64_t begin, int64_t end, float* products,
                             float* scratch) {
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t cp = padded(p.c);
    each_strip(begin, end, kStripPixels, [&](int64_t x, int64_t count) {
      load_pixels(static_cast<const T*>(p.input) + x * p.c, count, p.c, p.c, cp, scratch);
      for (int64_t r = 0; r < count; r++)
        for (int64_t i = 0; i < cp; i += kWidth) {
          float* at = scratch + r * cp + i;
          store(at, load(at) - load(p.mean + i));
        }
      weight_gradient(scratch, cp, scratch, cp, count, p.c, p.c, products);
    });
  });
}

// input_grad = x · matrix + constant, or x · slope + constant, of pixels [begin, end).
inline void moments_backward(const MomentsParams& p, int64_t begin, int64_t end, float* scratch) {
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t cp = padded(p.c);
    each_strip(begin, end, kStripPixels, [&](int64_t x, int64_t count) {
      const T* from = static_cast<const T*>(p.input) + x * p.c;
      T* to = static_cast<T*>(p.input_grad) + x * p.c;
      if (p.matrix) {
        int64_t pitch = 0;
        const float* rows = float_rows(from, count, p.c, scratch, &pitch);
        pointwise<T, float>(rows, pitch, count,
                            {p.matrix, p.slope, p.constant, p.c, p.c, Activation::none},
                            {to, p.c, nullptr});
        return;
      }
      load_pixels(from, count, p.c, p.c, cp, scratch);
      normalise_rows(scratch, count, cp, p.slope, p.constant, Activation::none);
      convert(scratch, cp, count, p.c, to);
    });
  });
}

// Expand and depthwise -----------------------------------------------------------------------

// Columns of a row that a depthwise convolution reads, the map's own and the padding.
inline int64_t padded_columns(const BlockDepthwiseParams& p) {
  const int64_t read = (p.out_w - 1) * p.stride + p.kernel, held = p.w + p.pad_left;
  return read > held ? read : held;
}

inline int64_t block_depthwise_scratch(const BlockDepthwiseParams& p) {
  const int64_t columns = padded_columns(p), K = p.kernel;
  const int64_t forward = K * columns + K * K + p.out_w;  // times the channels of a chunk
  const int64_t backward = 2 * columns + 2 * p.w + (K + 1) * p.out_w;
  return (forward > backward ? forward : backward) * p.chunk + p.w * padded(p.c_in) +
         (p.dtype == DType::f32 ? 0 : p.h * p.w * padded(p.c_in));
}

// Row y of the map in front of the activation, `channels` from `first` on, cp apart.
template <class T>
EDET_INLINE void expanded_row(const BlockDepthwiseParams& p, const T* row, int64_t first,
                              int64_t channels, int64_t cp, Activation activation, float* pixels,
                              float* to) {
  if (p.expand) {
    int64_t pitch = 0;
    const float* a = float_rows(row, p.w, p.c_in, pixels, &pitch);
    pointwise<float, float>(
        a, pitch, p.w,
        {p.expand + first * p.c_in, p.scale + first, p.offset + first, p.c_in, cp, activation},
        {to, cp, nullptr});
    return;
  }
  load_pixels(row + first, p.w, p.c_in, channels, cp, to);
  normalise_rows(to, p.w, cp, p.scale + first, p.offset + first, activation);
}

// Rows [y_begin, y_end) of the output, one chunk of its channels. moments: as Statistics has them.
template <class T>
void block_depthwise_as(const BlockDepthwiseParams& p, int64_t image, int64_t y_begin,
                        int64_t y_end, int64_t chunk, float* moments, float* scratch) {
  const int K = p.kernel, S = p.stride;
  const int64_t first = chunk * p.chunk, pitch = padded(p.c);
  const int64_t c = p.c - first < p.chunk ? p.c - first : p.chunk, cp = padded(c);
  const int64_t row_floats = padded_columns(p) * cp;
  float* ring = scratch;  // row y of the input is in ring row y mod K
  float* dw = ring + K * row_floats;
  float* sums = dw + K * K * cp;  // (out_w, cp)
  float* pixels = sums + p.out_w * cp;
  for (int t = 0; t < K * K; t++)
    std::memcpy(dw + t * cp, p.dw + t * pitch + first, sizeof(float) * static_cast<size_t>(cp));
  std::memset(ring, 0, sizeof(float) * static_cast<size_t>(K * row_floats));
  Statistics statistics(moments, cp);
  const auto ring_row = [&](int64_t y) { return ring + (y + K) % K * row_floats; };
  int64_t next = y_begin * S - p.pad_top;  // first input row not yet in the ring
  for (int64_t y = y_begin; y < y_end; y++) {
    const int64_t top = y * S - p.pad_top;
    for (next = next < top ? top : next; next < top + K; next++) {
      float* row = ring_row(next) + p.pad_left * cp;
      if (next < 0 || next >= p.h)
        std::memset(row, 0, sizeof(float) * static_cast<size_t>(p.w * cp));
      else
        expanded_row(p, static_cast<const T*>(p.input) + (image * p.h + next) * p.w * p.c_in, first,
                     c, cp, p.activation, pixels, row);
    }
    const float* rows[5];
    for (int r = 0; r < K; r++) rows[r] = ring_row(top + r);
    const auto keep = [&](int64_t x, int64_t i, const auto& sum) {
      for (const vf& s : sum) store(sums + x++ * cp + i, s);
    };
    if (K == 3 && S == 1) depthwise_row<3, 1>(rows, dw, cp, p.out_w, keep);
    if (K == 3 && S == 2) depthwise_row<3, 2>(rows, dw, cp, p.out_w, keep);
    if (K == 5 && S == 1) depthwise_row<5, 1>(rows, dw, cp, p.out_w, keep);
    if (K == 5 && S == 2) depthwise_row<5, 2>(rows, dw, cp, p.out_w, keep);
    if (moments) statistics.add(sums, cp, p.out_w);
    T* out = static_cast<T*>(p.out) + (image * p.out_h + y) * p.out_w * p.c + first;
    for (int64_t x = 0; x < p.out_w; x++) convert(sums + x * cp, cp, 1, c, out + x * p.c);
  }
}

// Part of depthwise_backward: X outputs.
template <int K, int S, int X>
EDET_INLINE void depthwise_backward_pixels(const float* grad, const float* a, float* a_grad,
                                           int64_t cp, const vf (&tap)[K], vf (&sum)[K]) {
  vf g[X];
#pragma GCC unroll 8
  for (int x = 0; x < X; x++) g[x] = load(grad + x * cp);
#pragma GCC unroll 32
  for (int column = 0; column < (X - 1) * S + K; column++) {
    const vf v = load(a + column * cp);
    vf d = load(a_grad + column * cp);
#pragma GCC unroll 8
    for (int x = 0; x < X; x++) {
      const int k = column - x * S;
      if (k < 0 || k >= K) continue;
      d += g[x] * tap[k];
      sum[k] += v * g[x];
    }
    store(a_grad + column * cp, d);
  }
}

// What one row a of a depthwise convolution's input has to do with `rows` rows of its output, whose
// gradients are grad[r] (count, cp) and whose taps for a are w[r] (K), `pitch` apart:
// a_grad[x·S + k] += grad[r][x] · w[r][k], w_grad[r][k] += Σ a[x·S + k] · grad[r][x].
template <int K, int S>
void depthwise_backward(int rows, const float* const* grad, const float* const* w,
                        float* const* w_grad, int64_t pitch, const float* a, float* a_grad,
                        int64_t cp, int64_t count) {
  constexpr int X = kRegisters == 32 ? 6 : 2;
  for (int64_t i = 0; i < cp; i += kWidth)
    for (int r = 0; r < rows; r++) {
      vf tap[K], sum[K];
#pragma GCC unroll 8
      for (int k = 0; k < K; k++) tap[k] = load(w[r] + k * pitch + i), sum[k] = vf{};
      int64_t x = 0;
      for (; count - x >= X; x += X)
        depthwise_backward_pixels<K, S, X>(grad[r] + x * cp + i, a + x * S * cp + i,
                                           a_grad + x * S * cp + i, cp, tap, sum);
      for (; x < count; x++)
        depthwise_backward_pixels<K, S, 1>(grad[r] + x * cp + i, a + x * S * cp + i,
                                           a_grad + x * S * cp + i, cp, tap, sum);
#pragma GCC unroll 8
      for (int k = 0; k < K; k++) {
        float* to = w_grad[r] + k * pitch + i;
        store(to, load(to) + sum[k]);
      }
    }
}

// Activations and their derivatives of `count` values z: to a, and in the place of z.
inline void activate_rows(float* z, float* a, int64_t count, Activation activation) {
  with_activation(activation, [&](auto tag) {
    constexpr Activation A = decltype(tag)::value;
    for (int64_t i = 0; i < count; i += kWidth) {
      const vf v = load(z + i);
      store(a + i, activate<A>(v));
      store(z + i, activation_gradient<A>(v, set1(1.0f)));
    }
  });
}

// Rows [y_begin, y_end) of the input's gradient, and to partial, as BlockDepthwiseSums has it,
// what these rows add to those of the weights.
template <class T>
void block_depthwise_backward_as(const BlockDepthwiseParams& p, int64_t image, int64_t y_begin,
                                 int64_t y_end, float* partial, float* scratch) {
  const int K = p.kernel, S = p.stride;
  const int64_t pitch = padded(p.c), columns = padded_columns(p);
  const T* input = static_cast<const T*>(p.input) + image * p.h * p.w * p.c_in;
  T* input_grad = static_cast<T*>(p.input_grad) + image * p.h * p.w * p.c_in;
  const int64_t out_image = image * p.out_h * p.out_w * p.c;
  float* pixels = scratch;                       // (w, padded c_in)
  float* added = pixels + p.w * padded(p.c_in);  // (rows, w, c_in): of half maps, the sum of chunks
  float* rest = added + (p.dtype == DType::f32 ? 0 : p.h * p.w * padded(p.c_in));
  for (int64_t first = 0; first < p.c; first += p.chunk) {
    const int64_t c = p.c - first < p.chunk ? p.c - first : p.chunk, cp = padded(c);
    const int64_t out_row = p.out_w * cp;
    float* a = rest;                       // (columns, cp): the activated row
    float* a_grad = a + columns * cp;      // (columns, cp)
    float* slope = a_grad + columns * cp;  // (w, cp): z, then derivatives, then z's gradient
    float* raw = slope + p.w * cp;         // (w, cp): without an expansion, the input
    float* ring = raw + p.w * cp;          // (K, out_w, cp): gradients of the output's rows
    float* saved = ring + K * out_row;     // (out_w, cp)
    const auto ring_row = [&](int64_t y) { return ring + y % K * out_row; };
    std::memset(a, 0, sizeof(float) * static_cast<size_t>(columns * cp));
    int64_t next = -1;  // first row of the output not yet in the ring
    for (int64_t y = y_begin; y < y_end; y++) {
      const T* row = input + y * p.w * p.c_in;
      expanded_row(p, row, first, c, cp, Activation::none, pixels, slope);
      activate_rows(slope, a + p.pad_left * cp, p.w * cp, p.activation);

      const float *grads[5], *taps[5];
      float* tap_grads[5];
      int rows = 0;
      for (int k = K - 1; k >= 0; k--) {  // from the topmost row of the output that reads this one
        const int64_t from = y + p.pad_top - k;
        if (from < 0 || from % S || from / S >= p.out_h) continue;
        const int64_t out_y = from / S;
        for (next = next < 0 ? out_y : next; next <= out_y; next++) {
          const int64_t start = out_image + next * p.out_w * p.c;
          load_gradient(static_cast<const T*>(p.grad) + start, static_cast<const T*>(p.out) + start,
                        p.statistics, p.out_w, p.c, first, c, cp, ring_row(next), saved);
        }
        grads[rows] = ring_row(out_y);
        taps[rows] = p.dw + k * K * pitch + first;
        tap_grads[rows++] = partial + p.at.dw + k * K * pitch + first;
      }
      std::memset(a_grad, 0, sizeof(float) * static_cast<size_t>(columns * cp));
      const auto convolve = K == 3
                                ? (S == 1 ? &depthwise_backward<3, 1> : &depthwise_backward<3, 2>)
                                : (S == 1 ? &depthwise_backward<5, 1> : &depthwise_backward<5, 2>);
      convolve(rows, grads, taps, tap_grads, pitch, a, a_grad, cp, p.out_w);

      const float* inner = a_grad + p.pad_left * cp;
      for (int64_t i = 0; i < p.w * cp; i += kWidth)
        store(slope + i, load(slope + i) * load(inner + i));
      add_sums(slope, nullptr, p.w, cp, partial + p.at.offset + first);
      if (!p.expand) {
        load_pixels(row + first, p.w, p.c_in, c, cp, raw);
        add_sums(slope, raw, p.w, cp, partial + p.at.scale + first);
        for (int64_t x = 0; x < p.w; x++) {
          for (int64_t i = 0; i < cp; i += kWidth)
            store(slope + x * cp + i, load(slope + x * cp + i) * load(p.scale + first + i));
          convert(slope + x * cp, cp, 1, c, input_grad + (y * p.w + x) * p.c_in + first);
        }
        continue;
      }
      int64_t lda = 0;
      const float* x = float_rows(row, p.w, p.c_in, pixels, &lda);
      weight_gradient(x, lda, slope, cp, p.w, p.c_in, cp, partial + first * p.c_in);
      const PointwiseWeights<float> back{
          p.expand_back + first * padded(p.c_in), p.ones, p.zeros, cp, p.c_in, Activation::none};
      if constexpr (sizeof(T) == sizeof(float)) {
        float* to = input_grad + y * p.w * p.c_in;
        pointwise<float, float>(slope, cp, p.w, back, {to, p.c_in, first ? to : nullptr});
      } else {
        float* to = added + (y - y_begin) * p.w * p.c_in;
        pointwise<float, float>(slope, cp, p.w, back, {to, p.c_in, first ? to : nullptr});
      }
    }
  }
  if constexpr (sizeof(T) != sizeof(float)) {
    if (!p.expand) return;
    for (int64_t i = y_begin * p.w; i < y_end * p.w; i++)
      convert(added + (i - y_begin * p.w) * p.c_in, p.c_in, 1, p.c_in, input_grad + i * p.c_in);
  }
}

inline void block_depthwise(const BlockDepthwiseParams& p, int64_t image, int64_t y_begin,
                            int64_t y_end, int64_t chunk, float* moments, float* scratch) {
  with_element(p.dtype, [&](auto element) {
    block_depthwise_as<decltype(element)>(p, image, y_begin, y_end, chunk, moments, scratch);
  });
}

inline void block_depthwise_backward(const BlockDepthwiseParams& p, int64_t image, int64_t y_begin,
                                     int64_t y_end, float* partial, float* scratch) {
  with_element(p.dtype, [&](auto element) {
    block_depthwise_backward_as<decltype(element)>(p, image, y_begin, y_end, partial, scratch);
  });
}

// Gate and project ---------------------------------------------------------------------------

inline int64_t block_project_scratch(const BlockProjectParams& p) {
  return p.strip * (2 * padded(p.c) + 2 * padded(p.c_out));
}

// sums[i] += Σ of the activated pixels [begin, end) of an image.
inline void block_pool(const BlockProjectParams& p, int64_t image, int64_t begin, int64_t end,
                       float* sums, float* scratch) {
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t cp = padded(p.c);
    each_strip(begin, end, p.strip, [&](int64_t x, int64_t count) {
      const T* from = static_cast<const T*>(p.input) + (image * p.area + x) * p.c;
      load_pixels(from, count, p.c, p.c, cp, scratch);
      normalise_rows(scratch, count, cp, p.scale, p.offset, p.activation);
      add_sums(scratch, nullptr, count, cp, sums);
    });
  });
}

// rows (count, cp) *= gate (cp).
inline void gate_rows(float* rows, const float* gate, int64_t count, int64_t cp) {
  for (int64_t x = 0; x < count; x++)
    for (int64_t i = 0; i < cp; i += kWidth) {
      float* at = rows + x * cp + i;
      store(at, load(at) * load(gate + i));
    }
}

// Pixels [begin, end) of an image. moments: as Statistics has them.
inline void block_project(const BlockProjectParams& p, int64_t image, int64_t begin, int64_t end,
                          float* moments, float* scratch) {
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t cp = padded(p.c), op = padded(p.c_out);
    float* projected = scratch + p.strip * cp;  // (strip, op)
    Statistics statistics(moments, op);
    each_strip(begin, end, p.strip, [&](int64_t x, int64_t count) {
      const int64_t pixel = image * p.area + x;
      load_pixels(static_cast<const T*>(p.input) + pixel * p.c, count, p.c, p.c, cp, scratch);
      normalise_rows(scratch, count, cp, p.scale, p.offset, p.activation);
      if (p.gate) gate_rows(scratch, p.gate + image * cp, count, cp);
      pointwise<float, float>(scratch, cp, count,
                              {p.project, p.ones, p.zeros, p.c, op, Activation::none},
                              {projected, op, nullptr});
      if (moments) statistics.add(projected, op, count);
      convert(projected, op, count, p.c_out, static_cast<T*>(p.out) + pixel * p.c_out);
    });
  });
}

// Of pixels [begin, end) of an image: to weights, packed (⌈c_out/16⌉, c, 16), what they add to the
// projection's gradient; to gate_grad (cp) to the gate's; and to input_grad the gradient of the
// gated pixels.
inline void block_project_backward(const BlockProjectParams& p, int64_t image, int64_t begin,
                                   int64_t end, float* weights, float* gate_grad, float* scratch) {
  with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t cp = padded(p.c), op = padded(p.c_out);
    float* activated = scratch;              // (strip, cp)
    float* back = activated + p.strip * cp;  // (strip, cp)
    float* grad = back + p.strip * cp;       // (strip, op)
    float* saved = grad + p.strip * op;      // (strip, op)
    each_strip(begin, end, p.strip, [&](int64_t x, int64_t count) {
      const int64_t pixel = image * p.area + x;
      const int64_t at = pixel * p.c_out;
      load_gradient(static_cast<const T*>(p.grad) + at, static_cast<const T*>(p.out) + at,
                    p.statistics, count, p.c_out, 0, p.c_out, op, grad, saved);
      pointwise<float, float>(grad, op, count,
                              {p.project_back, p.ones, p.zeros, p.c_out, cp, Activation::none},
                              {back, cp, nullptr});
      load_pixels(static_cast<const T*>(p.input) + pixel * p.c, count, p.c, p.c, cp, activated);
      normalise_rows(activated, count, cp, p.scale, p.offset, p.activation);
      if (p.gate) {
        add_sums(back, activated, count, cp, gate_grad);
        gate_rows(activated, p.gate + image * cp, count, cp);
      }
      weight_gradient(activated, cp, grad, op, count, p.c, p.c_out, weights);
      convert(back, cp, count, p.c, static_cast<T*>(p.input_grad) + pixel * p.c);
    });
  });
}

// input_grad from the gradient of the gated pixels that it holds; sums (2, cp) get what pixels
// [begin, end) add to the gradients of scale and offset.
template <class T>
void block_project_finish_as(const BlockProjectParams& p, int64_t image, int64_t begin, int64_t end,
                             float* sums, float* scratch) {
  const int64_t cp = padded(p.c);
  float* input = scratch;              // (strip, cp)
  float* grad = input + p.strip * cp;  // (strip, cp)
  const float* gate = p.gate ? p.gate + image * cp : p.ones;
  const float* pooled = p.gate ? p.pooled_grad + image * cp : p.zeros;
  each_strip(begin, end, p.strip, [&](int64_t x, int64_t count) {
    const int64_t pixel = image * p.area + x;
    T* to = static_cast<T*>(p.input_grad) + pixel * p.c;
    load_pixels(static_cast<const T*>(p.input) + pixel * p.c, count, p.c, p.c, cp, input);
    load_pixels(to, count, p.c, p.c, cp, grad);
    with_activation(p.activation, [&](auto tag) {
      constexpr Activation A = decltype(tag)::value;
      for (int64_t i = 0; i < cp; i += kWidth) {
        const vf scale = load(p.scale + i), offset = load(p.offset + i);
        const vf factor = load(gate + i), added = load(pooled + i);
        vf scale_grad = load(sums + i), offset_grad = load(sums + cp + i);
        for (int64_t r = 0; r < count; r++) {
          const vf v = load(input + r * cp + i);
          const vf g =
              activation_gradient<A>(v * scale + offset, load(grad + r * cp + i) * factor + added);
          scale_grad += g * v;
          offset_grad += g;
          store(grad + r * cp + i, g * scale);
        }
        store(sums + i, scale_grad);
        store(sums + cp + i, offset_grad);
      }
    });
    convert(grad, cp, count, p.c, to);
  });
}

inline void block_project_finish(const BlockProjectParams& p, int64_t image, int64_t begin,
                                 int64_t end, float* sums, float* scratch) {
  with_element(p.dtype, [&](auto element) {
    block_project_finish_as<decltype(element)>(p, image, begin, end, sums, scratch);
  });
}

}  // namespace edet::cpu::EDET_ISA
