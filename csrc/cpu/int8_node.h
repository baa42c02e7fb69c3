// A band of rows of one fusion → depthwise → pointwise node on bytes, a block of pixels of a
// projection, max pools, and the ways between maps of floats and of bytes.
#pragma once

#include "dispatch.h"
#include "fuse.h"
#include "int8_layers.h"

namespace edet::cpu::EDET_ISA {

constexpr int64_t kByteStripPixels = 96;

// Bytes of scratch of one thread.
inline int64_t int8_node_scratch(const Int8NodeParams& p) {
  const int64_t cp = padded(p.node.fusion.c), op = padded(p.node.c_out);
  return 4 * (p.node.fusion.w + 2 + 3 + p.node.fusion.edges + 3 + 2) * cp +
         4 * kRequantiseRows * op + kByteStripPixels * cp + 64;
}

template <bool Tail>
EDET_INLINE vb load_some_bytes(const uint8_t* p, int n) {
  if constexpr (Tail) return load_vb_tail(p, n);
  return load_vb(p);
}

// Row y of the fused map into one byte of each lane of `ring`; as fuse_row_as of fuse.h.
// rows: factors (edges, cp), then shift, inverse, zero.
template <Activation A, int ND, int NP>
void int8_fuse_row_as(const FusionParams& p, const FusionRow<uint8_t>& row, const float* rows,
                      const Slot& byte, uint32_t* ring) {
  const int direct = ND >= 0 ? ND : row.direct, pooled = NP >= 0 ? NP : row.pooled;
  const int64_t c = p.c, cp = padded(c), whole = c / kWidth * kWidth;
  const float* last = rows + p.edges * cp;
  const uint8_t* pixel[ND > 0 ? ND : kMaxEdges];
  int64_t fraction[ND > 0 ? ND : kMaxEdges];
  for (int e = 0; e < direct; e++) pixel[e] = row.one[e].row, fraction[e] = 0;
  for (int64_t x = 0; x < p.w; x++, ring += cp) {
    const uint8_t* corner[NP > 0 ? NP : kMaxEdges];
    int64_t columns[NP > 0 ? NP : kMaxEdges];
    for (int e = 0; e < pooled; e++) {
      const auto& pool = row.pool[e];
      const int64_t first = x * pool.columns.stride - pool.columns.before;
      const int64_t begin = clip(first, 0, pool.w);
      columns[e] = clip(first + pool.columns.kernel, 0, pool.w) - begin;
      corner[e] = pool.top + begin * c;
    }
    const auto vector = [&](int64_t i, int n, auto tail) {
      constexpr bool kTail = decltype(tail)::value;
      vf sum = vf{};
      for (int e = 0; e < direct; e++) {
        const vf term = to_floats(widened(load_some_bytes<kTail>(pixel[e] + i, n))) *
                        load(row.one[e].coefficient + i);
        sum = e ? sum + term : term;
      }
      for (int e = 0; e < pooled; e++) {
        const int64_t pitch = row.pool[e].w * c;
        vb best = vb{};
        for (int64_t r = 0; r < row.pool[e].rows; r++)
          for (int64_t k = 0; k < columns[e]; k++) {
            const vb b = load_some_bytes<kTail>(corner[e] + r * pitch + k * c + i, n);
            best = b > best ? b : best;
          }
        const vf term = to_floats(widened(best)) * load(row.pool[e].coefficient + i);
        sum = direct + e ? sum + term : term;
      }
      const vf y = activate4<A>(sum + load(last + i)) * load(last + cp + i);
      byte.put(ring + i, bounded_byte(y + load(last + 2 * cp + i)));
    };
    for (int64_t i = 0; i < whole; i += kWidth) vector(i, kWidth, Constant<false>{});
    if (whole < c) vector(whole, static_cast<int>(c - whole), Constant<true>{});
    for (int e = 0; e < direct; e++) {
      fraction[e] += row.one[e].w;
      if (fraction[e] >= p.w) {
        fraction[e] -= p.w;
        pixel[e] += c;
      }
    }
  }
}

EDET_INLINE void int8_fuse_row(const FusionParams& p, int64_t image, int64_t y, const float* rows,
                               const Slot& byte, uint32_t* ring) {
  const FusionRow<uint8_t> row(p, image, y);
  with_activation(p.activation, [&](auto tag) {
    constexpr Activation A = decltype(tag)::value;
    if constexpr (A == Activation::swish || A == Activation::none) {
      if (row.pooled == 0 && row.direct == 2)
        return int8_fuse_row_as<A, 2, 0>(p, row, rows, byte, ring);
      if (row.pooled == 1 && row.direct == 1)
        return int8_fuse_row_as<A, 1, 1>(p, row, rows, byte, ring);
      if (row.pooled == 1 && row.direct == 2)
        return int8_fuse_row_as<A, 2, 1>(p, row, rows, byte, ring);
    }
    int8_fuse_row_as<A, -1, -1>(p, row, rows, byte, ring);
  });
}

EDET_INLINE void int8_copy_row(const FusionParams& p, int64_t image, int64_t y, const Slot& byte,
                               uint32_t* ring) {
  const int64_t c = p.c, cp = padded(c), whole = c / kWidth * kWidth;
  const auto* from = static_cast<const uint8_t*>(p.edge[0].data) + (image * p.h + y) * p.w * c;
  for (int64_t x = 0; x < p.w; x++, from += c, ring += cp) {
    for (int64_t i = 0; i < whole; i += kWidth) byte.put(ring + i, load_bytes(from + i));
    if (whole < c)
      byte.put(ring + whole, widened(load_vb_tail(from + whole, static_cast<int>(c - whole))));
  }
}

template <Activation A>
void int8_node_as(const Int8NodeParams& q, int64_t image, int64_t y_begin, int64_t y_end,
                  char* scratch) {
  const NodeParams& p = q.node;
  FusionParams f = p.fusion;
  const int64_t c = f.c, cp = padded(c), op = padded(p.c_out), k4 = round_up(c, 4);
  const int fuse_rows = q.fused ? f.edges + 3 : 1, out_rows = q.float_out ? 2 : kRequantiseRows;
  auto* ring = reinterpret_cast<uint32_t*>(scratch);  // (w + 2, cp)
  uint32_t* taps = ring + (f.w + 2) * cp;             // (3, cp)
  auto* fuse = reinterpret_cast<float*>(taps + 3 * cp);
  float* mid = fuse + (f.edges + 3) * cp;  // (2, cp)
  float* out_row = mid + 2 * cp;           // (4, op)
  auto* strip = reinterpret_cast<uint8_t*>(out_row + kRequantiseRows * op);
  padded_rows(q.fuse, fuse_rows, c, 0, c, cp, fuse);
  padded_rows(q.mid, 2, c, 0, c, cp, mid);
  padded_rows(q.out_rows, out_rows, p.c_out, 0, p.c_out, op, out_row);
  f.coefficients = fuse;
  const float* zero = fuse + (fuse_rows - 1) * cp;
  for (int64_t x = 0; x < f.w + 2; x++)
    for (int64_t i = 0; i < cp; i++)
      ring[x * cp + i] = static_cast<uint32_t>(zero[i]) * 0x01010101u;

  const auto fill = [&](int64_t y) {  // row y lies in byte y mod 4
    const Slot byte((y + 4) & 3);
    uint32_t* to = ring + cp;
    if (y < 0 || y >= f.h) {
      for (int64_t x = 0; x < f.w; x++)
        for (int64_t i = 0; i < cp; i += kWidth)
          byte.put(to + x * cp + i, truncated(load(zero + i)));
    } else if (q.fused) {
      int8_fuse_row(f, image, y, fuse, byte, to);
    } else {
      int8_copy_row(f, image, y, byte, to);
    }
  };
  int64_t at = (image * f.h + y_begin) * f.w * p.c_out;  // of the result, in elements
  int64_t filled = 0;
  const auto flush = [&] {
    byte_pointwise(strip, cp, filled, k4, q.pw, op / kPanel,
                   [&](int64_t x, int64_t i, const auto& acc) {
                     const int64_t left = p.c_out - i;
                     if (left <= 0) return;
                     const int n = static_cast<int>(left < kWidth ? left : kWidth);
                     if (q.float_out) {
                       const vf scale = load(out_row + i), shift = load(out_row + op + i);
                       float* to = static_cast<float*>(p.out) + at + i;
                       for (const vi& sum : acc) {
                         const vf y = to_floats(sum) * scale + shift;
                         if (n == kWidth)
                           store(to + x++ * p.c_out, y);
                         else
                           store_tail(to + x++ * p.c_out, y, n);
                       }
                       return;
                     }
                     const Requantise<A> requantise(out_row, op, i);
                     uint8_t* to = static_cast<uint8_t*>(p.out) + at + i;
                     for (const vi& sum : acc) {
                       const vi u = requantise(sum);
                       if (n == kWidth)
                         store_bytes(to + x++ * p.c_out, u);
                       else
                         store_bytes_tail(to + x++ * p.c_out, u, n);
                     }
                   });
    at += filled * p.c_out;
    filled = 0;
  };
  fill(y_begin - 1);
  fill(y_begin);
  for (int64_t y = y_begin; y < y_end; y++) {
    fill(y + 1);
    turned_taps<3>(q.dw, c, c, cp, static_cast<int>((y + 3) & 3), taps);
    for (int64_t x = 0; x < f.w;) {
      const int64_t room = kByteStripPixels - filled, count = f.w - x < room ? f.w - x : room;
      uint8_t* to = strip + filled * cp;
      byte_depthwise<3, 1>(
          ring + x * cp, taps, cp, count, [&](int64_t column, int64_t i, const auto& acc) {
            const vf scale = load(mid + i), shift = load(mid + cp + i);
            for (const vi& sum : acc)
              store_bytes(to + column++ * cp + i, bounded_byte(to_floats(sum) * scale + shift));
          });
      x += count;
      filled += count;
      if (filled == kByteStripPixels) flush();
    }
  }
  if (filled) flush();
}

inline void int8_node(const Int8NodeParams& p, int64_t image, int64_t y_begin, int64_t y_end,
                      char* scratch) {
  with_requantise(p.node.activation, [&](auto tag) {
    int8_node_as<decltype(tag)::value>(p, image, y_begin, y_end, scratch);
  });
}

// Bytes of scratch for a block of kLateralPixels pixels.
inline int64_t int8_projection_scratch(const Int8Projection& p) {
  return 4 * 2 * padded(p.c_out) + kLateralPixels * round_up(p.c_in, 4) + 64;
}

inline void int8_projection(const Int8Projection& p, int64_t begin, int64_t end, char* scratch) {
  const int64_t op = padded(p.c_out), k4 = round_up(p.c_in, 4);
  auto* rows = reinterpret_cast<float*>(scratch);
  auto* pixels = reinterpret_cast<uint8_t*>(rows + 2 * op);
  padded_rows(p.rows, 2, p.c_out, 0, p.c_out, op, rows);
  uint8_t* out = p.out + begin * p.c_out;
  byte_pointwise(whole_rows(p.input + begin * p.c_in, end - begin, p.c_in, pixels), k4, end - begin,
                 k4, p.pw, op / kPanel, [&](int64_t x, int64_t i, const auto& acc) {
                   const vf scale = load(rows + i), shift = load(rows + op + i);
                   const int64_t left = p.c_out - i;
                   for (const vi& sum : acc) {
                     const vi u = bounded_byte(to_floats(sum) * scale + shift);
                     uint8_t* to = out + x++ * p.c_out + i;
                     if (left >= kWidth)
                       store_bytes(to, u);
                     else if (left > 0)
                       store_bytes_tail(to, u, static_cast<int>(left));
                   }
                 });
}

// Rows [y_begin, y_end) of the max pool of one map; p.edge[0] is the map.
inline void int8_pool(const FusionParams& p, uint8_t* out, int64_t image, int64_t y_begin,
                      int64_t y_end) {
  const Edge& edge = p.edge[0];
  const auto* map = static_cast<const uint8_t*>(edge.data) + image * edge.h * edge.w * p.c;
  uint8_t* to = out + (image * p.h + y_begin) * p.w * p.c;
  for (int64_t y = y_begin; y < y_end; y++) {
    const int64_t top = y * edge.rows.stride - edge.rows.before;
    for (int64_t x = 0; x < p.w; x++, to += p.c) {
      const int64_t first = x * edge.columns.stride - edge.columns.before;
      std::memset(to, 0, static_cast<size_t>(p.c));
      for (int64_t r = clip(top, 0, edge.h); r < clip(top + edge.rows.kernel, 0, edge.h); r++)
        for (int64_t k = clip(first, 0, edge.w); k < clip(first + edge.columns.kernel, 0, edge.w);
             k++) {
          const uint8_t* from = map + (r * edge.w + k) * p.c;
          for (int64_t i = 0; i < p.c; i++) to[i] = from[i] > to[i] ? from[i] : to[i];
        }
    }
  }
}

inline void int8_quantize(const float* from, int64_t n, float inverse, float zero, uint8_t* to) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth)
    store_bytes(to + i, bounded_byte(load(from + i) * inverse + zero));
  const int rest = static_cast<int>(n - i);
  if (rest)
    store_bytes_tail(to + i, bounded_byte(load_tail(from + i, rest) * inverse + zero), rest);
}

inline void int8_dequantize(const uint8_t* from, int64_t n, float scale, float zero, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth)
    store(to + i, (to_floats(load_bytes(from + i)) - zero) * scale);
  const int rest = static_cast<int>(n - i);
  if (rest)
    store_tail(to + i, (to_floats(widened(load_vb_tail(from + i, rest))) - zero) * scale, rest);
}

}  // namespace edet::cpu::EDET_ISA
