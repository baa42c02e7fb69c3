// The inverted residual block on bytes, in the two phases of mbconv.h; with squeeze-excite its gate
// goes into the projection's weights, which are rounded for each image.
#pragma once

#include "dispatch.h"
#include "int8_layers.h"

namespace edet::cpu::EDET_ISA {

inline int64_t int8_columns(const Int8MbconvParams& p) {
  const int64_t read = (p.out_w - 1) * p.stride + p.kernel;
  return read > p.w + p.kernel ? read : p.w + p.kernel;
}

// Bytes of scratch of one thread.
inline int64_t int8_mbconv_scratch(const Int8MbconvParams& p) {
  const int64_t cp = p.chunk_panels * kPanel, groups = p.kernel == 3 ? 1 : 2;
  const int64_t expand = 4 * (int8_columns(p) + p.kernel) * groups * cp +
                         4 * (2 * kRequantiseRows + 1) * cp + p.w * round_up(p.c_in, 4);
  const int64_t project = 4 * 2 * padded(p.c_out);
  const int64_t squeeze = 8 * (p.c_mid + p.c_reduced);
  const int64_t most = expand > project ? expand : project;
  return (most > squeeze ? most : squeeze) + 64;
}

// Row y of the input, expanded or as it is, into byte `slot` of the ring from column pad_left on.
template <int K, Activation A>
EDET_INLINE void int8_ring_row(const Int8MbconvParams& p, int64_t image, int64_t y, int64_t first,
                               int64_t c, int64_t cp, const float* rows, uint8_t* pixels,
                               int64_t slot, uint32_t* ring) {
  constexpr int G = kGroups<K>;
  const Slot byte(slot & 3);
  uint32_t* to = ring + (p.pad_left * G + (slot >> 2)) * cp;
  const uint8_t* from = p.input + (image * p.h + y) * p.w * p.c_in;
  if (p.expand) {
    const int64_t k = round_up(p.c_in, 4);
    byte_pointwise(whole_rows(from, p.w, p.c_in, pixels), k, p.w, k, p.expand + first * k,
                   cp / kPanel, [&](int64_t x, int64_t i, const auto& acc) {
                     const Requantise<A> requantise(rows, cp, i);
                     for (const vi& sum : acc) byte.put(to + x++ * G * cp + i, requantise(sum));
                   });
    return;
  }
  const int64_t whole = c / kWidth * kWidth;
  for (int64_t x = 0; x < p.w; x++, from += p.c_in, to += G * cp) {
    for (int64_t i = 0; i < whole; i += kWidth) byte.put(to + i, load_bytes(from + first + i));
    if (whole < c)
      byte.put(to + whole,
               widened(load_vb_tail(from + first + whole, static_cast<int>(c - whole))));
  }
}

template <int K, int S, Activation A>
void int8_expand_as(const Int8MbconvParams& p, int64_t image, int64_t band, int64_t chunk,
                    char* scratch) {
  constexpr int G = kGroups<K>, kSlots = 4 * G;
  const int64_t pitch = padded(p.c_mid), first = chunk * p.chunk_panels * kPanel;
  const int64_t left = p.c_mid - first, most = p.chunk_panels * kPanel;
  const int64_t c = left < most ? left : most, cp = padded(c), columns = int8_columns(p);
  auto* ring = reinterpret_cast<uint32_t*>(scratch);  // (columns, G, cp)
  uint32_t* taps = ring + columns * G * cp;           // (K, G, cp)
  uint32_t* pad = taps + K * G * cp;                  // (cp)
  auto* expand_rows = reinterpret_cast<float*>(pad + cp);
  float* rows = expand_rows + kRequantiseRows * cp;
  auto* pixels = reinterpret_cast<uint8_t*>(rows + kRequantiseRows * cp);
  padded_rows(p.dw_rows, kRequantiseRows, p.c_mid, first, c, cp, rows);
  if (p.expand) padded_rows(p.expand_rows, kRequantiseRows, p.c_mid, first, c, cp, expand_rows);
  for (int64_t i = 0; i < cp; i++) pad[i] = i < c ? p.pad[first + i] : 0;
  for (int64_t x = 0; x < columns * G; x++)
    for (int64_t i = 0; i < cp; i++) ring[x * cp + i] = pad[i] * 0x01010101u;

  const int64_t y_begin = band * p.band_rows;
  const int64_t y_end = y_begin + p.band_rows < p.out_h ? y_begin + p.band_rows : p.out_h;
  const auto slot_of = [](int64_t y) { return (y + kSlots) & (kSlots - 1); };
  int64_t next = y_begin * S - p.pad_top;  // first input row not yet in the ring
  for (int64_t y = y_begin; y < y_end; y++) {
    const int64_t top = y * S - p.pad_top;
    for (; next < top + K; next++) {
      const int64_t slot = slot_of(next);
      if (next >= 0 && next < p.h) {
        int8_ring_row<K, A>(p, image, next, first, c, cp, expand_rows, pixels, slot, ring);
        continue;
      }
      const Slot byte(slot & 3);
      uint32_t* to = ring + (p.pad_left * G + (slot >> 2)) * cp;
      for (int64_t x = 0; x < p.w; x++, to += G * cp)
        for (int64_t i = 0; i < cp; i += kWidth) byte.put(to + i, load_lanes(pad + i));
    }
    turned_taps<K>(p.dw + first * kSlots, p.c_mid, c, cp, static_cast<int>(slot_of(top)), taps);
    uint8_t* out = p.mid + ((image * p.out_h + y) * p.out_w) * pitch + first;
    int32_t* sums = p.sums + (image * p.out_h + y) * pitch + first;
    if (p.c_reduced) std::memset(sums, 0, sizeof(int32_t) * static_cast<size_t>(cp));
    byte_depthwise<K, S>(ring, taps, cp, p.out_w, [&](int64_t x, int64_t i, const auto& acc) {
      const Requantise<A> requantise(rows, cp, i);
      vi total = vi{};
      for (const vi& sum : acc) {
        const vi u = requantise(sum);
        total += u;
        store_bytes(out + x++ * pitch + i, u);
      }
      if (p.c_reduced)
        store_lanes(reinterpret_cast<uint32_t*>(sums + i), load_lanes(sums + i) + total);
    });
  }
}

inline void int8_mbconv_expand(const Int8MbconvParams& p, int64_t image, int64_t band,
                               int64_t chunk, char* scratch) {
  with_requantise(p.activation, [&](auto tag) {
    constexpr Activation A = decltype(tag)::value;
    if (p.kernel == 3)
      return p.stride == 1 ? int8_expand_as<3, 1, A>(p, image, band, chunk, scratch)
                           : int8_expand_as<3, 2, A>(p, image, band, chunk, scratch);
    return p.stride == 1 ? int8_expand_as<5, 1, A>(p, image, band, chunk, scratch)
                         : int8_expand_as<5, 2, A>(p, image, band, chunk, scratch);
  });
}

// int8_reference.sigmoid of one number.
inline float sigmoid_once(float x) {
  const float t = smaller(larger(set1(x * -1.44269504f), set1(-126.0f)), set1(126.0f))[0];
  const float n = __builtin_rintf(t), f = t - n;
  constexpr float kFactors[] = {1.33999309e-3f, 9.61848907e-3f, 5.55032864e-2f,
                                2.40226462e-1f, 6.93147182e-1f, 1.0f};
  float p = 1.53458124e-4f;
  for (float factor : kFactors) p = p * f + factor;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return 1.0f / (p * power + 1.0f);
}

// An activated value in steps of 2^−16.
EDET_INLINE int64_t fixed_point(float y, Activation activation) {
  double v = y;
  with_activation(activation, [&](auto tag) {
    constexpr Activation A = decltype(tag)::value;
    constexpr double kUnit = A == Activation::swish        ? 16384.0
                             : A == Activation::hard_swish ? 65536.0 / 6
                                                           : 65536.0;
    v = static_cast<double>(activate4<A>(set1(y))[0]) * kUnit;
  });
  constexpr double kMost = 2147483647.0;
  v = v > -kMost ? v : -kMost;
  return static_cast<int64_t>(__builtin_rint(v < kMost ? v : kMost));
}

EDET_INLINE float excited(const int64_t* values, const int16_t* weight, int64_t count, float scale,
                          float shift) {
  int64_t sum = 0;
  for (int64_t k = 0; k < count; k++) sum += values[k] * weight[k];
  return static_cast<float>(static_cast<double>(sum) * static_cast<double>(scale) +
                            static_cast<double>(shift));
}

inline void int8_mbconv_squeeze(const Int8MbconvParams& p, int64_t image, char* scratch) {
  const int64_t pitch = padded(p.c_mid), n = p.out_h * p.out_w;
  auto* mean = reinterpret_cast<int64_t*>(scratch);
  int64_t* reduced = mean + p.c_mid;
  for (int64_t k = 0; k < p.c_mid; k++) mean[k] = -n * static_cast<int64_t>(p.zeros[k]);
  for (int64_t y = 0; y < p.out_h; y++) {
    const int32_t* row = p.sums + (image * p.out_h + y) * pitch;
    for (int64_t k = 0; k < p.c_mid; k++) mean[k] += row[k];
  }
  for (int64_t k = 0; k < p.c_mid; k++)
    mean[k] = static_cast<int64_t>(
        __builtin_rint(static_cast<double>(mean[k]) * 65536.0 / static_cast<double>(n)));
  for (int64_t j = 0; j < p.c_reduced; j++)
    reduced[j] = fixed_point(excited(mean, p.reduce + j * p.c_mid, p.c_mid, p.reduce_rows[j],
                                     p.reduce_rows[p.c_reduced + j]),
                             p.activation);
  float* gate = p.gate + image * pitch;
  for (int64_t k = 0; k < p.c_mid; k++)
    gate[k] = sigmoid_once(excited(reduced, p.excite + k * p.c_reduced, p.c_reduced,
                                   p.excite_rows[k], p.excite_rows[p.c_mid + k]));
}

// One panel of the projection times the gate of an image, rounded to int8, with its rows.
inline void int8_mbconv_gate(const Int8MbconvParams& p, int64_t image, int64_t panel) {
  const int64_t op = padded(p.c_out), k4 = round_up(p.c_mid, 4);
  const float* gate = p.gate + image * padded(p.c_mid);
  const float* from = p.plain_project + panel * p.c_mid * kPanel;
  int8_t* to = p.gated + (image * (op / kPanel) + panel) * k4 * kPanel;
  for (int64_t v = 0; v < kPanel; v += kWidth) {
    vf most = vf{};
    for (int64_t k = 0; k < p.c_mid; k++) {
      const vf w = load(from + k * kPanel + v) * gate[k];
      most = larger((vf)((vi)w & 0x7fffffff), most);
    }
    const vf inverse = select(most > 0.0f, 127.0f / most, vf{});
    vi correction = vi{};
    for (int64_t k = 0; k < k4; k += 4) {
      vu lanes = vu{};
      for (int64_t j = k; j < k + 4 && j < p.c_mid; j++) {
        const vf w = load(from + j * kPanel + v) * gate[j] * inverse;
        const vf bounded = smaller(larger(w, set1(-127.0f)), set1(127.0f));
        const vi q = rounded(bounded);
        correction += q * static_cast<int32_t>(p.zeros[j]);
        lanes |= ((vu)q & 0xffu) << static_cast<int>(8 * (j - k));
      }
      std::memcpy(to + (k / 4 * kPanel + v) * 4, &lanes, sizeof lanes);
    }
    float lanes[2][kWidth];
    const int64_t first = panel * kPanel + v;
    for (int r = 0; r < 2; r++)
      for (int64_t i = 0; i < kWidth; i++)
        lanes[r][i] = first + i < p.c_out ? p.project_rows[r * p.c_out + first + i] : 0.0f;
    const vf scale = (most / 127.0f) * load(lanes[0]);
    float* rows = p.gated_rows + image * 2 * op + first;
    store(rows, scale);
    store(rows + op, load(lanes[1]) - scale * to_floats(correction));
  }
}

inline void int8_mbconv_project(const Int8MbconvParams& p, int64_t image, int64_t begin,
                                int64_t end, char* scratch) {
  const int64_t mp = padded(p.c_mid), op = padded(p.c_out), k4 = round_up(p.c_mid, 4);
  const int64_t area = p.out_h * p.out_w, at = (image * area + begin) * p.c_out;
  auto* mine = reinterpret_cast<float*>(scratch);
  const float* rows = mine;
  const int8_t* weight = p.project;
  if (p.c_reduced) {
    rows = p.gated_rows + image * 2 * op;
    weight = p.gated + image * op * k4;
  } else {
    padded_rows(p.project_rows, 2, p.c_out, 0, p.c_out, op, mine);
  }
  const uint8_t* added = p.residual != 0.0f ? p.input + at : nullptr;
  uint8_t* out = p.out + at;
  byte_pointwise(p.mid + (image * area + begin) * mp, mp, end - begin, k4, weight, op / kPanel,
                 [&](int64_t x, int64_t i, const auto& acc) {
                   const vf scale = load(rows + i), shift = load(rows + op + i);
                   const int64_t left = p.c_out - i;
                   const int n = static_cast<int>(left < kWidth ? left : kWidth);
                   for (const vi& sum : acc) {
                     const int64_t place = x++ * p.c_out + i;
                     vf y = to_floats(sum) * scale + shift;
                     if (n == kWidth) {
                       if (added) y += to_floats(load_bytes(added + place)) * p.residual;
                       store_bytes(out + place, bounded_byte(y));
                     } else if (n > 0) {
                       if (added)
                         y += to_floats(widened(load_vb_tail(added + place, n))) * p.residual;
                       store_bytes_tail(out + place, bounded_byte(y), n);
                     }
                   }
                 });
}

}  // namespace edet::cpu::EDET_ISA
