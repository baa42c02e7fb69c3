// The gradients of a fusion → depthwise → pointwise node, a band of rows at a time. What the
// forward pass did not keep is computed again. Three kernels, each over the whole map before the
// next:
//   conv_backward    gradients of the weights, and of the depthwise sums (conv_grad)
//   fusion_backward  gradients of the fusion's factors, of the fused map (fused_grad), and of the
//                    inputs that have the node's size
//   resize_backward  gradients of one enlarged or max-pooled input
#pragma once

#include "../core/params.h"
#include "dispatch.h"
#include "separable_node.h"

namespace edet::cpu::EDET_ISA {

// d activation / d x, times g, by torch's rules at the corners.
template <Activation A>
EDET_INLINE vf activation_gradient(vf x, vf g) {
  if constexpr (A == Activation::swish) {
    const vf s = sigmoid(x);
    return g * (s * (1.0f + x * (1.0f - s)));
  }
  if constexpr (A == Activation::relu) return select(x <= 0.0f, vf{}, g);
  if constexpr (A == Activation::relu6) return select((x <= 0.0f) | (x >= 6.0f), vf{}, g);
  if constexpr (A == Activation::hard_swish)
    return select(x <= -3.0f, vf{}, select(x < 3.0f, g * (x * (1.0f / 3.0f) + 0.5f), g));
  return g;
}

// w[m, :] += Σ a[pixel, m] · g[pixel, :] for MR rows of w and NP of its panels.
template <int MR, int NP>
EDET_INLINE void weight_gradient_tile(const float* a, int64_t lda, const float* g, int64_t ldg,
                                      int64_t pixels, float* w, int64_t panel) {
  constexpr int V = NP * kPanelVectors;
  const auto at = [&](int m, int v) {
    return w + (v / kPanelVectors) * panel + m * kPanel + (v % kPanelVectors) * kWidth;
  };
  vf acc[MR][V];
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) acc[m][v] = vf{};
  for (int64_t p = 0; p < pixels; p++) {
    vf b[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) b[v] = load(g + p * ldg + v * kWidth);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
      const vf x = set1(a[p * lda + m]);
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) acc[m][v] += x * b[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) store(at(m, v), load(at(m, v)) + acc[m][v]);
}

template <int NP>
void weight_gradient_panels(const float* a, int64_t lda, const float* g, int64_t ldg,
                            int64_t pixels, int64_t c, float* w) {
  int64_t i = 0;
  const auto run = [&](auto height) {
    constexpr int MR = decltype(height)::value;
    for (; c - i >= MR; i += MR)
      weight_gradient_tile<MR, NP>(a + i, lda, g, ldg, pixels, w + i * kPanel, c * kPanel);
  };
  run(Constant<tile_rows(NP)>{});
  run(Constant<1>{});
}

// w, packed (⌈c_out/16⌉, c, 16), += aᵀ · g of `pixels` rows a (c) and g (c_out).
inline void weight_gradient(const float* a, int64_t lda, const float* g, int64_t ldg,
                            int64_t pixels, int64_t c, int64_t c_out, float* w) {
  const int64_t panels = divide_up(c_out, kPanel);
  int64_t p = 0;
  const auto run = [&](auto width) {
    constexpr int NP = decltype(width)::value;
    for (; panels - p >= NP; p += NP)
      weight_gradient_panels<NP>(a, lda, g + p * kPanel, ldg, pixels, c, w + p * c * kPanel);
  };
  run(Constant<kMaxTilePanels>{});
  if constexpr (kMaxTilePanels > 2) run(Constant<2>{});
  run(Constant<1>{});
}

// w (9, cp) += for each tap and channel Σ rows[r][x + k] · g[x] over `count` pixels.
inline void depthwise_gradient(const float* const* rows, const float* g, int64_t cp, int64_t count,
                               float* w) {
  for (int64_t i = 0; i < cp; i += kWidth) {
    vf sum[9];
#pragma GCC unroll 9
    for (int k = 0; k < 9; k++) sum[k] = vf{};
    for (int64_t x = 0; x < count; x++) {
      const vf v = load(g + x * cp + i);
#pragma GCC unroll 9
      for (int k = 0; k < 9; k++) sum[k] += v * load(rows[k / 3] + (x + k % 3) * cp + i);
    }
#pragma GCC unroll 9
    for (int k = 0; k < 9; k++) store(w + k * cp + i, load(w + k * cp + i) + sum[k]);
  }
}

inline int64_t node_backward_scratch(const NodeBackwardParams& b) {
  const FusionParams& f = b.node.fusion;
  const int64_t cp = padded(f.c), op = padded(b.node.c_out);
  int64_t floats = (2 + f.edges) * f.w * cp;
  for (int e = 0; e < f.edges; e++) {
    const int64_t pooled = kResizeRows * f.edge[e].w * cp;
    if (f.edge[e].resize != Resize::none && pooled > floats) floats = pooled;
  }
  const int64_t conv = 3 * (f.w + 2) * cp + 9 * cp + 2 * op + kStripPixels * (cp + 3 * op);
  return b.node.dw && conv > floats ? conv : floats;
}

// Adds to partial: pw's gradient over scale, packed (⌈c_out/16⌉, C, 16); dw's (9, pitch); shift's
// (pitch of c_out).
template <class T>
void conv_backward_as(const NodeBackwardParams& b, int64_t image, int64_t y_begin, int64_t y_end,
                      float* partial, float* scratch) {
  const NodeParams& p = b.node;
  const FusionParams& f = p.fusion;
  const int64_t cp = padded(f.c), op = padded(p.c_out);
  const int64_t pitch = (f.w + 2) * cp;
  float* pw_grad = partial;
  float* dw_grad = pw_grad + op * f.c;
  float* shift_grad = dw_grad + 9 * cp;
  float* ring = scratch;  // (3, w + 2, cp), as in the forward pass
  float* dw = ring + 3 * pitch;
  float* scale = dw + 9 * cp;
  float* shift = scale + op;
  float* strip = shift + op;                // (kStripPixels, cp): depthwise sums
  float* grad = strip + kStripPixels * cp;  // (kStripPixels, op)
  float* out = grad + kStripPixels * op;    // (kStripPixels, op): the node's output
  const bool activated = p.activation != Activation::none;

  padded_weights(p, dw, scale, shift);
  // whole panels, the padding included
  const PointwiseWeights<float> forward{p.pw, scale, shift, f.c, op, Activation::none};
  const PointwiseWeights<float> backward{b.pw, b.ones, b.zeros, p.c_out, cp, Activation::none};

  const auto ring_row = [&](int64_t y) { return ring + (y + 1) % 3 * pitch; };
  for (int r = 0; r < 3; r++) {
    std::memset(ring + r * pitch, 0, sizeof(float) * static_cast<size_t>(cp));
    std::memset(ring + (r + 1) * pitch - cp, 0, sizeof(float) * static_cast<size_t>(cp));
  }
  const auto fuse = [&](int64_t y) {
    float* row = ring_row(y) + cp;
    if (y < 0 || y >= f.h)
      std::memset(row, 0, sizeof(float) * static_cast<size_t>(f.w * cp));
    else
      fuse_row<T>(f, image, y, 0, f.w, row);
  };

  fuse(y_begin - 1);
  fuse(y_begin);
  for (int64_t y = y_begin; y < y_end; y++) {
    fuse(y + 1);
    const float *above = ring_row(y - 1), *here = ring_row(y), *below = ring_row(y + 1);
    float* conv_row = b.conv_grad + (image * f.h + y) * pitch;
    std::memset(conv_row, 0, sizeof(float) * static_cast<size_t>(cp));
    std::memset(conv_row + pitch - cp, 0, sizeof(float) * static_cast<size_t>(cp));
    for (int64_t x = 0; x < f.w; x += kStripPixels) {
      const int64_t count = f.w - x < kStripPixels ? f.w - x : kStripPixels;
      const float* rows[3] = {above + x * cp, here + x * cp, below + x * cp};
      depthwise_row<3, 1>(rows, dw, cp, count, [strip, cp](int64_t at, int64_t i, const auto& sum) {
        for (const vf& s : sum) store(strip + at++ * cp + i, s);
      });
      const int64_t first = ((image * f.h + y) * f.w + x) * p.c_out;
      load_pixels(static_cast<const T*>(b.grad) + first, count, p.c_out, p.c_out, op, grad);
      if (b.slope) {
        load_pixels(static_cast<const T*>(p.out) + first, count, p.c_out, p.c_out, op, out);
        for (int64_t r = 0; r < count; r++)
          for (int64_t i = 0; i < op; i += kWidth) {
            const vf from_statistics =
                (load(out + r * op + i) - load(b.mean + i)) * load(b.slope + i) +
                load(b.constant + i);
            store(grad + r * op + i, load(grad + r * op + i) + from_statistics);
          }
      }
      if (activated) {
        pointwise<float>(strip, cp, count, forward, {out, op, nullptr});
        with_activation(p.activation, [&](auto tag) {
          for (int64_t i = 0; i < count * op; i += kWidth)
            store(grad + i,
                  activation_gradient<decltype(tag)::value>(load(out + i), load(grad + i)));
        });
      }
      for (int64_t i = 0; i < op; i += kWidth) {
        vf sum = vf{};
        for (int64_t r = 0; r < count; r++) sum += load(grad + r * op + i);
        store(shift_grad + i, load(shift_grad + i) + sum);
      }
      weight_gradient(strip, cp, grad, op, count, f.c, p.c_out, pw_grad);
      float* conv = conv_row + (x + 1) * cp;
      pointwise<float>(grad, op, count, backward, {conv, cp, nullptr});
      depthwise_gradient(rows, conv, cp, count, dw_grad);
    }
  }
}

// Adds to partial: for each edge Σ fused_grad · resized input (edges, pitch), then Σ fused_grad.
template <class T>
void fusion_backward_as(const NodeBackwardParams& b, int64_t image, int64_t y_begin, int64_t y_end,
                        float* partial, float* scratch) {
  const FusionParams& f = b.node.fusion;
  const int64_t cp = padded(f.c), row = f.w * cp, pitch = row + 2 * cp;
  float* grad = scratch;         // (w, cp)
  float* fused = scratch + row;  // (w, cp)
  float* term = fused + row;     // (edges, w, cp): the resized inputs
  const int64_t whole = f.c / kWidth * kWidth;
  const int rest = static_cast<int>(f.c - whole);
  for (int64_t y = y_begin; y < y_end; y++) {
    if (b.node.dw) {
      const float* rows[3];
      for (int r = 0; r < 3; r++) {
        const int64_t from = y - 1 + r;
        rows[r] = from < 0 || from >= f.h ? b.zeros : b.conv_grad + (image * f.h + from) * pitch;
      }
      depthwise_row<3, 1>(rows, b.dw, cp, f.w, [grad, cp](int64_t at, int64_t i, const auto& sum) {
        for (const vf& s : sum) store(grad + at++ * cp + i, s);
      });
    } else {
      load_pixels(static_cast<const T*>(b.grad) + (image * f.h + y) * f.w * f.c, f.w, f.c, f.c, cp,
                  grad);
    }
    for (int e = 0; e < f.edges; e++) {
      FusionParams one = f;
      one.edges = 1;
      one.edge[0] = f.edge[e];
      one.coefficients = b.ones;
      one.activation = Activation::none;
      if (f.offsets) one.offsets = b.zeros, one.signs = f.signs + e * cp;
      fuse_row<T>(one, image, y, 0, f.w, term + e * row);
    }
    with_activation(f.activation, [&](auto tag) {
      for (int64_t i = 0; i < row; i += kWidth) {
        const int64_t c = i % cp;
        vf sum = f.offsets ? load(f.offsets + c) : vf{};
        for (int e = 0; e < f.edges; e++)
          sum += load(term + e * row + i) * load(f.coefficients + e * cp + c);
        store(fused + i, activation_gradient<decltype(tag)::value>(sum, load(grad + i)));
      }
    });
    for (int64_t i = 0; i < cp; i += kWidth) {
      for (int e = 0; e < f.edges; e++) {
        vf sum = vf{};
        for (int64_t x = 0; x < f.w; x++)
          sum += load(fused + x * cp + i) * load(term + e * row + x * cp + i);
        store(partial + e * cp + i, load(partial + e * cp + i) + sum);
      }
      vf sum = vf{};
      for (int64_t x = 0; x < f.w; x++) sum += load(fused + x * cp + i);
      float* total = partial + f.edges * cp + i;
      store(total, load(total) + sum);
    }
    if (b.fused_grad)
      std::memcpy(b.fused_grad + (image * f.h + y) * row, fused,
                  sizeof(float) * static_cast<size_t>(row));
    for (int e = 0; e < f.edges; e++) {
      if (f.edge[e].resize != Resize::none || !b.input_grad[e]) continue;
      const float* coefficient = b.coefficients + e * cp;
      T* to = static_cast<T*>(b.input_grad[e]) + (image * f.h + y) * f.w * f.c;
      for (int64_t x = 0; x < f.w; x++, to += f.c) {
        const float* from = fused + x * cp;
        for (int64_t i = 0; i < whole; i += kWidth)
          store(to + i, load(from + i) * load(coefficient + i));
        if (rest) store_tail(to + whole, load(from + whole) * load(coefficient + whole), rest);
      }
    }
  }
}

// Output rows and columns [begin, end) whose windows hold inputs [from, to) of an axis.
struct Readers {
  int64_t begin, end;

  Readers(const Edge& edge, const Window& window, int64_t in, int64_t out, int64_t from,
          int64_t to) {
    if (edge.resize == Resize::nearest) {
      begin = divide_up(from * out, in);
      end = divide_up(to * out, in);
    } else {
      const int64_t first = from + window.before - window.kernel + 1;
      begin = first <= 0 ? 0 : divide_up(first, window.stride);
      end = (to - 1 + window.before) / window.stride + 1;
    }
    begin = clip(begin, 0, out);
    end = clip(end, begin, out);
  }
};

// sum (rows, w, cp) of the gradients that pooled pixels send to the largest value of their window,
// the first of equal ones, the last NaN, as in torch.
template <class T>
void max_pool_backward(const NodeBackwardParams& b, int e, int64_t image, int64_t y_begin,
                       int64_t y_end, float* sum) {
  const FusionParams& f = b.node.fusion;
  const Edge& edge = f.edge[e];
  const int64_t cp = padded(f.c);
  const T* map = static_cast<const T*>(edge.data) + image * edge.h * edge.w * f.c;
  const Readers readers(edge, edge.rows, edge.h, f.h, y_begin, y_end);
  for (int64_t y = readers.begin; y < readers.end; y++) {
    const int64_t top = y * edge.rows.stride - edge.rows.before;
    const int64_t r_begin = clip(top, 0, edge.h), r_end = clip(top + edge.rows.kernel, 0, edge.h);
    for (int64_t x = 0; x < f.w; x++) {
      const int64_t left = x * edge.columns.stride - edge.columns.before;
      const int64_t k_begin = clip(left, 0, edge.w);
      const int64_t k_end = clip(left + edge.columns.kernel, 0, edge.w);
      const float* grad = b.fused_grad + ((image * f.h + y) * f.w + x) * cp;
      const auto position = [&](int64_t r, int64_t k) {
        return vi{} + static_cast<int32_t>((r - top) * edge.columns.kernel + (k - left));
      };
      for (int64_t i = 0; i < f.c; i += kWidth) {
        const int n = static_cast<int>(f.c - i < kWidth ? f.c - i : kWidth);
        vf best = set1(-__builtin_inff());
        vi where = vi{};  // where nothing is above −inf torch chooses the window's first position
        for (int64_t r = r_begin; r < r_end; r++)
          for (int64_t k = k_begin; k < k_end; k++) {
            const T* at = map + (r * edge.w + k) * f.c + i;
            vf v = n == kWidth ? load(at) : load_tail(at, n);
            if (f.signs) v *= load(f.signs + e * cp + i);
            const vi better = (v > best) | (v != v);
            best = select(better, v, best);
            where = better ? position(r, k) : where;
          }
        const vf g = load(grad + i) * load(b.coefficients + e * cp + i);
        for (int64_t r = r_begin < y_begin ? y_begin : r_begin; r < r_end && r < y_end; r++)
          for (int64_t k = k_begin; k < k_end; k++) {
            float* to = sum + ((r - y_begin) * edge.w + k) * cp + i;
            store(to, load(to) + select(where == position(r, k), g, vf{}));
          }
      }
    }
  }
}

// Rows [y_begin, y_end), at most kResizeRows, of the gradient of an edge that is resized.
template <class T>
void resize_backward_as(const NodeBackwardParams& b, int e, int64_t image, int64_t y_begin,
                        int64_t y_end, float* scratch) {
  const FusionParams& f = b.node.fusion;
  const Edge& edge = f.edge[e];
  const int64_t cp = padded(f.c), pixels = (y_end - y_begin) * edge.w;
  std::memset(scratch, 0, sizeof(float) * static_cast<size_t>(pixels * cp));
  if (edge.resize == Resize::max_pool) {
    max_pool_backward<T>(b, e, image, y_begin, y_end, scratch);
  } else {
    for (int64_t r = y_begin; r < y_end; r++) {
      const Readers rows(edge, edge.rows, edge.h, f.h, r, r + 1);
      for (int64_t k = 0; k < edge.w; k++) {
        const Readers columns(edge, edge.columns, edge.w, f.w, k, k + 1);
        float* to = scratch + ((r - y_begin) * edge.w + k) * cp;
        for (int64_t i = 0; i < cp; i += kWidth) {
          vf sum = vf{};
          for (int64_t y = rows.begin; y < rows.end; y++)
            for (int64_t x = columns.begin; x < columns.end; x++)
              sum += load(b.fused_grad + ((image * f.h + y) * f.w + x) * cp + i);
          store(to + i, sum * load(b.coefficients + e * cp + i));
        }
      }
    }
  }
  convert(scratch, cp, pixels, f.c,
          static_cast<T*>(b.input_grad[e]) + (image * edge.h + y_begin) * edge.w * f.c);
}

template <class F>
EDET_INLINE void with_element(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f16: return f(f16{});
    case DType::bf16: return f(bf16{});
  }
}

inline void conv_backward(const NodeBackwardParams& b, int64_t image, int64_t y_begin,
                          int64_t y_end, float* partial, float* scratch) {
  with_element(b.node.fusion.dtype, [&](auto element) {
    conv_backward_as<decltype(element)>(b, image, y_begin, y_end, partial, scratch);
  });
}

inline void fusion_backward(const NodeBackwardParams& b, int64_t image, int64_t y_begin,
                            int64_t y_end, float* partial, float* scratch) {
  with_element(b.node.fusion.dtype, [&](auto element) {
    fusion_backward_as<decltype(element)>(b, image, y_begin, y_end, partial, scratch);
  });
}

inline void resize_backward(const NodeBackwardParams& b, int edge, int64_t image, int64_t y_begin,
                            int64_t y_end, float* scratch) {
  with_element(b.node.fusion.dtype, [&](auto element) {
    resize_backward_as<decltype(element)>(b, edge, image, y_begin, y_end, scratch);
  });
}

}  // namespace edet::cpu::EDET_ISA
