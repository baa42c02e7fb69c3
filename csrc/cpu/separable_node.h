// A band of rows of one fusion → depthwise → pointwise node, in one pass through the cache:
// three rolling rows of fused, activated pixels → a strip of depthwise sums → packed pointwise.
#pragma once

#include "../core/params.h"
#include "depthwise.h"
#include "fuse.h"
#include "pointwise.h"

namespace edet::cpu::EDET_ISA {

// Pixels of a strip: long enough that a panel of weights read from L2 serves several register
// tiles, short enough that the strip (C floats each) stays in L1.
constexpr int64_t kStripPixels = 48;

// Floats of scratch that one thread needs for a node.
inline int64_t node_scratch(const NodeParams& p) {
  const int64_t cp = padded(p.fusion.c), op = padded(p.c_out);
  return 3 * (p.fusion.w + 2) * cp + 9 * cp + 2 * op + kStripPixels * (cp + op) +
         operand_scratch(p.fusion.c, op / kPanel);
}

// The depthwise taps, scale and shift of a node, each filled up to whole panels.
inline void padded_weights(const NodeParams& p, float* dw, float* scale, float* shift) {
  const int64_t c = p.fusion.c, cp = padded(c), op = padded(p.c_out);
  for (int k = 0; k < 9; k++) copy_padded(p.dw + k * c, c, cp, dw + k * cp);
  copy_padded(p.scale, p.c_out, op, scale);
  copy_padded(p.shift, p.c_out, op, shift);
}

// A sum that carries what its additions rounded away (Kahan 1965); where that is not finite, the
// plain sum.
class CarefulSum {
 public:
  EDET_INLINE CarefulSum() = default;
  EDET_INLINE CarefulSum(vf sum, vf lost) : sum_(sum), lost_(lost), plain_(sum) {}
  EDET_INLINE void add(vf v) {
    const vf corrected = v - lost_, next = sum_ + corrected;
    lost_ = (next - sum_) - corrected;
    sum_ = next;
    plain_ += v;
  }
  EDET_INLINE vf value() const { return select(sum_ == sum_, sum_, plain_); }
  // What value() is too large by.
  EDET_INLINE vf lost() const { return select(lost_ == lost_, lost_, vf{}); }

 private:
  vf sum_ = vf{}, lost_ = vf{}, plain_ = vf{};
};

// Mean and sum of squared deviations of each channel, kept while rows of pixels come in. Everything
// is measured from the first strip's mean, so that a mean far from zero costs no precision, and the
// pairs of strips are merged (Chan, Golub & LeVeque 1983).
class Statistics {
 public:
  // moments: (3, channels): a value near the mean, what it lacks of the mean, and the squares;
  // channels is a multiple of kWidth.
  Statistics(float* moments, int64_t channels) : near_(moments), channels_(channels), seen_(0) {}

  void add(const float* rows, int64_t ld, int64_t count) {
    const auto n = static_cast<float>(count), before = static_cast<float>(seen_);
    const float share = n / (n + before);
    for (int64_t i = 0; i < channels_; i += kWidth) {
      float *near = near_ + i, *rest = near + channels_, *squares = rest + channels_;
      if (!seen_) {
        CarefulSum sum;
        for (int64_t r = 0; r < count; r++) sum.add(load(rows + r * ld + i));
        store(near, sum.value() * set1(1.0f / n));
        store(rest, vf{}), store(squares, vf{});
      }
      const vf origin = load(near);
      CarefulSum sum, total;
      for (int64_t r = 0; r < count; r++) sum.add(load(rows + r * ld + i) - origin);
      const vf mean = sum.value() * set1(1.0f / n);
      for (int64_t r = 0; r < count; r++) {
        const vf d = load(rows + r * ld + i) - origin - mean;
        total.add(d * d);
      }
      const vf step = mean - load(rest);
      store(rest, load(rest) + step * share);
      store(squares, load(squares) + total.value() + step * step * (share * before));
    }
    seen_ += count;
  }

 private:
  float* near_;
  int64_t channels_, seen_;
};

// moments: where to put the statistics of the band's output before it is rounded to T; null: none.
template <class T>
void separable_node_as(const NodeParams& p, int64_t image, int64_t y_begin, int64_t y_end,
                       float* scratch, float* moments) {
  const FusionParams& f = p.fusion;
  const int64_t cp = padded(f.c), op = padded(p.c_out);
  const int64_t pitch = (f.w + 2) * cp;
  float* ring = scratch;  // (3, w + 2, cp)
  float* dw = ring + 3 * pitch;
  float* scale = dw + 9 * cp;
  float* shift = scale + op;
  float* tile = shift + op;  // (kStripPixels, op), for the statistics
  using In = Operand<T>;
  In* strip = reinterpret_cast<In*>(tile + kStripPixels * op);  // (kStripPixels, cp)
  float* operands = tile + kStripPixels * (op + cp);

  padded_weights(p, dw, scale, shift);
  const PointwiseWeights<In> weights{operand_weights<In>(p.pw, f.c, op / kPanel, operands),
                                     scale,
                                     shift,
                                     whole_steps<In>(f.c),
                                     p.c_out,
                                     p.activation};

  // Row y of the map lives in ring row (y + 1) % 3; the columns −1 and w are zero.
  const auto ring_row = [&](int64_t y) { return ring + (y + 1) % 3 * pitch; };
  for (int r = 0; r < 3; r++) {
    std::memset(ring + r * pitch, 0, sizeof(float) * static_cast<size_t>(cp));
    std::memset(ring + (r + 1) * pitch - cp, 0, sizeof(float) * static_cast<size_t>(cp));
  }
  const auto fuse = [&](int64_t y) {
    float* row = ring_row(y) + cp;
    if (y < 0 || y >= f.h)  // outside the image the activated map is zero
      std::memset(row, 0, sizeof(float) * static_cast<size_t>(f.w * cp));
    else
      fuse_row<T>(f, image, y, 0, f.w, row);
  };

  T* out = static_cast<T*>(p.out) + (image * f.h + y_begin) * f.w * p.c_out;
  int64_t filled = 0;
  Statistics statistics(moments, op);
  const auto flush = [&] {
    if (moments) {
      PointwiseWeights<In> padded = weights;  // whole panels, as the statistics are kept
      padded.c_out = op;
      pointwise<float>(strip, cp, filled, padded, {tile, op, nullptr});
      statistics.add(tile, op, filled);
      convert(tile, op, filled, p.c_out, out);
    } else {
      pointwise<T>(strip, cp, filled, weights, {out, p.c_out, nullptr});
    }
    out += filled * p.c_out;
    filled = 0;
  };

  fuse(y_begin - 1);
  fuse(y_begin);
  for (int64_t y = y_begin; y < y_end; y++) {
    fuse(y + 1);
    const float *above = ring_row(y - 1), *here = ring_row(y), *below = ring_row(y + 1);
    for (int64_t x = 0; x < f.w;) {
      const int64_t count = f.w - x < kStripPixels - filled ? f.w - x : kStripPixels - filled;
      const float* rows[3] = {above + x * cp, here + x * cp, below + x * cp};
      In* to = strip + filled * cp;
      depthwise_row<3, 1>(rows, dw, cp, count, [to, cp](int64_t at, int64_t i, const auto& sum) {
        for (const vf& s : sum) store(to + at++ * cp + i, s);
      });
      x += count;
      filled += count;
      if (filled == kStripPixels) flush();
    }
  }
  if (filled) flush();
}

inline void separable_node(const NodeParams& p, int64_t image, int64_t y_begin, int64_t y_end,
                           float* scratch, float* moments) {
  switch (p.fusion.dtype) {
    case DType::f32: return separable_node_as<float>(p, image, y_begin, y_end, scratch, moments);
    case DType::f16: return separable_node_as<f16>(p, image, y_begin, y_end, scratch, moments);
    case DType::bf16: return separable_node_as<bf16>(p, image, y_begin, y_end, scratch, moments);
  }
}

// The fusion alone, for the same band.
template <class T>
void fusion_band_as(const FusionParams& p, T* out, int64_t image, int64_t y_begin, int64_t y_end,
                    float* scratch) {
  const int64_t cp = padded(p.c);
  for (int64_t y = y_begin; y < y_end; y++) {
    fuse_row<T>(p, image, y, 0, p.w, scratch);
    convert(scratch, cp, p.w, p.c, out + (image * p.h + y) * p.w * p.c);
  }
}

inline void fusion_band(const FusionParams& p, void* out, int64_t image, int64_t y_begin,
                        int64_t y_end, float* scratch) {
  switch (p.dtype) {
    case DType::f32:
      return fusion_band_as(p, static_cast<float*>(out), image, y_begin, y_end, scratch);
    case DType::f16:
      return fusion_band_as(p, static_cast<f16*>(out), image, y_begin, y_end, scratch);
    case DType::bf16:
      return fusion_band_as(p, static_cast<bf16*>(out), image, y_begin, y_end, scratch);
  }
}

}  // namespace edet::cpu::EDET_ISA
