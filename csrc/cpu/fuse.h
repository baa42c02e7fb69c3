// Weighted fusion of one output row: up to kMaxEdges maps, resized on the fly, summed in fp32.
#pragma once

#include "vec.h"

namespace edet::cpu::EDET_ISA {

EDET_INLINE int64_t clip(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Where output row y of image b finds its inputs. Edges that read one pixel (same size or nearest)
// come first, then the max-pooled ones.
template <class T>
struct FusionRow {
  struct Direct {
    const T* row;
    const float* coefficient;
    int64_t w;
  };
  struct Pooled {
    const T* top;     // first row of the window that is inside the map
    int64_t rows, w;  // rows inside the map
    Window columns;
    const float *coefficient, *sign;
  };
  int direct, pooled;
  Direct one[kMaxEdges];
  Pooled pool[kMaxEdges];

  FusionRow(const FusionParams& p, int64_t image, int64_t y) : direct(0), pooled(0) {
    const int64_t cp = padded(p.c);
    for (int e = 0; e < p.edges; e++) {
      const Edge& edge = p.edge[e];
      const T* map = static_cast<const T*>(edge.data) + image * edge.h * edge.w * p.c;
      const float* coefficient = p.coefficients + e * cp;
      if (edge.resize == Resize::max_pool) {
        const int64_t first = y * edge.rows.stride - edge.rows.before;
        const int64_t begin = clip(first, 0, edge.h);
        const int64_t end = clip(first + edge.rows.kernel, 0, edge.h);
        const float* sign = p.signs ? p.signs + e * cp : nullptr;
        pool[pooled++] = {
            map + begin * edge.w * p.c, end - begin, edge.w, edge.columns, coefficient, sign};
      } else {
        const int64_t from = edge.h == p.h ? y : nearest_source(y, edge.h, p.h);
        one[direct++] = {map + from * edge.w * p.c, coefficient, edge.w};
      }
    }
  }
};

template <class T, bool Tail>
EDET_INLINE vf load_some(const T* p, int n) {
  if constexpr (Tail) return load_tail(p, n);
  return load(p);
}

// ND direct and NP pooled edges are compile-time constants in the common cases, −1 otherwise.
// Affine: the fusion has signs and offsets.
template <class T, Activation A, int ND, int NP, bool Affine>
void fuse_row_as(const FusionParams& p, const FusionRow<T>& row, int64_t x_begin, int64_t x_end,
                 float* out) {
  const int direct = ND >= 0 ? ND : row.direct;
  const int pooled = NP >= 0 ? NP : row.pooled;
  const int64_t c = p.c, cp = padded(c);
  const int64_t whole = c / kWidth * kWidth;
  const int rest = static_cast<int>(c - whole);
  // The nearest column floor(x·w/p.w) is stepped like Bresenham's line: a division per pixel would
  // cost as much as the fusion itself.
  const T* pixel[ND > 0 ? ND : kMaxEdges];
  int64_t fraction[ND > 0 ? ND : kMaxEdges];
  for (int e = 0; e < direct; e++) {
    const int64_t from = nearest_source(x_begin, row.one[e].w, p.w);
    pixel[e] = row.one[e].row + from * c;
    fraction[e] = x_begin * row.one[e].w - from * p.w;
  }
  for (int64_t x = x_begin; x < x_end; x++, out += cp) {
    const T* corner[NP > 0 ? NP : kMaxEdges];
    int64_t columns[NP > 0 ? NP : kMaxEdges];
    for (int e = 0; e < pooled; e++) {
      const auto& pool = row.pool[e];
      const int64_t first = x * pool.columns.stride - pool.columns.before;
      const int64_t begin = clip(first, 0, pool.w);
      columns[e] = clip(first + pool.columns.kernel, 0, pool.w) - begin;
      corner[e] = pool.top + begin * c;
    }
    auto vector = [&](int64_t i, int n, auto tail) {
      constexpr bool kTail = decltype(tail)::value;
      vf sum = vf{};
      for (int e = 0; e < direct; e++) {
        const vf term = load_some<T, kTail>(pixel[e] + i, n) * load(row.one[e].coefficient + i);
        sum = e ? sum + term : term;
      }
      for (int e = 0; e < pooled; e++) {
        const int64_t pitch = row.pool[e].w * c;
        Maximum best;
        for (int64_t r = 0; r < row.pool[e].rows; r++)
          for (int64_t k = 0; k < columns[e]; k++) {
            const vf v = load_some<T, kTail>(corner[e] + r * pitch + k * c + i, n);
            if constexpr (Affine)
              best.add(v * load(row.pool[e].sign + i));
            else
              best.add(v);
          }
        const vf term = best.value() * load(row.pool[e].coefficient + i);
        sum = direct + e ? sum + term : term;
      }
      if constexpr (Affine) sum += load(p.offsets + i);
      store(out + i, activate<A>(sum));
    };
    for (int64_t i = 0; i < whole; i += kWidth) vector(i, kWidth, Constant<false>{});
    if (rest) vector(whole, rest, Constant<true>{});
    for (int e = 0; e < direct; e++) {
      fraction[e] += row.one[e].w;
      if (fraction[e] >= p.w) {  // w ≤ p.w: at most one step
        fraction[e] -= p.w;
        pixel[e] += c;
      }
    }
  }
}

template <class T, bool Affine>
EDET_INLINE void fuse_row_with(const FusionParams& p, int64_t image, int64_t y, int64_t x_begin,
                               int64_t x_end, float* out) {
  const FusionRow<T> row(p, image, y);
  with_activation(p.activation, [&](auto tag) {
    constexpr Activation A = decltype(tag)::value;
    constexpr bool kCommon = A == Activation::swish || A == Activation::none;
    if constexpr (kCommon) {
      if (row.pooled == 0 && row.direct == 1)
        return fuse_row_as<T, A, 1, 0, Affine>(p, row, x_begin, x_end, out);
      if (row.pooled == 0 && row.direct == 2)
        return fuse_row_as<T, A, 2, 0, Affine>(p, row, x_begin, x_end, out);
      if (row.pooled == 1 && row.direct == 1)
        return fuse_row_as<T, A, 1, 1, Affine>(p, row, x_begin, x_end, out);
      if (row.pooled == 1 && row.direct == 2)
        return fuse_row_as<T, A, 2, 1, Affine>(p, row, x_begin, x_end, out);
    }
    fuse_row_as<T, A, -1, -1, Affine>(p, row, x_begin, x_end, out);
  });
}

// Writes pixels [x_begin, x_end) of output row y as floats, C rounded up to kPanel apart. Lanes
// past C are zero to the end of their register; what is beyond has no weight and is not written.
template <class T>
inline void fuse_row(const FusionParams& p, int64_t image, int64_t y, int64_t x_begin,
                     int64_t x_end, float* out) {
  if (p.offsets) return fuse_row_with<T, true>(p, image, y, x_begin, x_end, out);
  fuse_row_with<T, false>(p, image, y, x_begin, x_end, out);
}

}  // namespace edet::cpu::EDET_ISA
