// training_moments, training_depthwise and training_project with their gradients, on the CPU: the
// steps of an inverted residual block in training.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "../cpu/block_dispatch.h"
#include "common.h"

namespace edet::torch_ops {

namespace {

using torch::headeronly::ScalarType;
using Floats = std::vector<float>;

// How many parts the pixels of a batch are cut into, at most: each has partial sums of its own, so
// that no sum depends on the number of threads. Partial sums together have this many floats.
constexpr int64_t kMostParts = 32, kPartialFloats = 4 << 20;
constexpr int64_t kPartPixels = 512;        // of a part, at least
constexpr int64_t kChunkFloats = 96 << 10;  // of the rows that a thread works on, to stay in L2
constexpr int64_t kStripFloats = 32 << 10;

Tensor zeros(const Ints& size) {
  Tensor t = torch::stable::empty({size.data(), size.size()}, ScalarType::Float);
  if (t.numel())  // an empty tensor has no memory
    std::memset(t.mutable_data_ptr(), 0, sizeof(float) * static_cast<size_t>(t.numel()));
  return t;
}

// `rows` rows of c floats, each filled up with zeros to whole panels.
Floats widened(const Tensor& t, int64_t rows, int64_t c, const char* name) {
  const Tensor given = float_weight(t, rows * c, name);
  Floats to(static_cast<size_t>(rows * padded(c)), 0.0f);
  for (int64_t r = 0; r < rows; r++)
    std::copy_n(given.const_data_ptr<float>() + r * c, c, &to[static_cast<size_t>(r * padded(c))]);
  return to;
}

Floats widened_or(const std::optional<Tensor>& t, int64_t c, const char* name, float value) {
  if (t) return widened(*t, 1, c, name);
  Floats to(static_cast<size_t>(padded(c)), 0.0f);
  std::fill_n(to.begin(), c, value);
  return to;
}

// A weight w(o, i) as the panels of 16 outputs that the kernels read.
template <class F>
void pack(int64_t c_out, int64_t c_in, const F& w, float* to) {
  std::memset(to, 0, sizeof(float) * static_cast<size_t>(padded(c_out) * c_in));
  for (int64_t o = 0; o < c_out; o++)
    for (int64_t i = 0; i < c_in; i++) to[(o / kPanel * c_in + i) * kPanel + o % kPanel] = w(o, i);
}

float packed_at(const float* packed, int64_t c_in, int64_t o, int64_t i) {
  return packed[(o / kPanel * c_in + i) * kPanel + o % kPanel];
}

// Memory for one call's parts, which are added before it is taken.
class Memory {
 public:
  int64_t add(int64_t floats) { return layout_.add(4 * floats); }
  void take() { workspace_ = std::make_unique<Workspace>(layout_.size()); }
  float* at(int64_t part) const { return reinterpret_cast<float*>(workspace_->data() + part); }

 private:
  Layout layout_;
  std::unique_ptr<Workspace> workspace_;
};

// Calls f(image, begin, end) for each image's part of rows [begin, end) of all images.
template <class F>
void each_image(int64_t begin, int64_t end, int64_t h, const F& f) {
  while (begin < end) {
    const int64_t image = begin / h, stop = std::min(end, (image + 1) * h);
    f(image, begin - image * h, stop - image * h);
    begin = stop;
  }
}

// The first of `parts` partial sums becomes the sum of them all, in order; zero when there is none.
void add_up(float* sums, int64_t parts, int64_t floats) {
  if (!parts) std::memset(sums, 0, sizeof(float) * static_cast<size_t>(floats));
  for (int64_t g = 1; g < parts; g++)
    for (int64_t i = 0; i < floats; i++) sums[i] += sums[g * floats + i];
}

// Pairs (mean, sum of squared deviations) of parts of a map, merged in order (Chan, Golub & LeVeque
// 1983). moments is as the kernels' Statistics have it, of channels padded to `pitch`.
class Merged {
 public:
  explicit Merged(int64_t c) : mean(static_cast<size_t>(c), 0.0), squares(mean) {}

  void add(const float* moments, int64_t first, int64_t c, int64_t pitch, double before,
           double pixels) {
    const double share = pixels / (before + pixels);
    for (int64_t i = 0; i < c; i++) {
      const auto at = static_cast<size_t>(first + i);
      const double step = double{moments[i]} + moments[pitch + i] - mean[at];
      squares[at] += moments[2 * pitch + i] + step * step * (before * share);
      mean[at] += step * share;
    }
  }

  Tensors tensors() const {
    Tensor a = zeros({static_cast<int64_t>(mean.size())}), b = zeros({a.numel()});
    std::copy(mean.begin(), mean.end(), a.mutable_data_ptr<float>());
    std::copy(squares.begin(), squares.end(), b.mutable_data_ptr<float>());
    return {a, b};
  }

  std::vector<double> mean, squares;
};

// The gradient of the mean and the squared deviations of a map of `pixels` pixels.
struct FromStatistics {
  Floats mean, slope, constant;

  FromStatistics(const Tensor& saved, const Tensor& grad_mean, const Tensor& grad_squares,
                 int64_t c, int64_t pixels) {
    if (!saved.numel()) return;
    mean = widened(saved, 1, c, "mean");
    slope = widened(grad_squares, 1, c, "grad_squares");
    constant = widened(grad_mean, 1, c, "grad_mean");
    for (float& x : slope) x *= 2.0f;
    for (float& x : constant) x /= static_cast<float>(pixels);
  }

  StatisticsGradient params() const {
    if (mean.empty()) return {nullptr, nullptr, nullptr};
    return {mean.data(), slope.data(), constant.data()};
  }
};

Tensor checked_gradient(const Tensor& grad, const Tensor& like, int64_t c, int64_t h, int64_t w) {
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == like.size(0) && grad.size(1) == c &&
                      grad.size(2) == h && grad.size(3) == w &&
                      grad.scalar_type() == like.scalar_type(),
                  "a gradient must have the shape and dtype of its output");
  return channels_last(grad);
}

// training_moments ---------------------------------------------------------------------------

struct PixelParts {
  int64_t pixels, count;  // of a part; parts

  PixelParts(int64_t all, int64_t most)
      : pixels(std::max(kPartPixels, divide_up(all, std::max<int64_t>(most, 1)))),
        count(divide_up(all, pixels)) {}
};

MomentsParams moments_params(const Tensor& map) {
  MomentsParams p{};
  p.dtype = map_dtype(map);
  p.input = map.const_data_ptr();
  p.c = map.size(1);
  p.pixels = map.size(0) * map.size(2) * map.size(3);
  return p;
}

Tensors training_moments(const Tensor input, bool products) {
  const Tensor map = channels_last(input);
  MomentsParams p = moments_params(map);
  const int64_t c = p.c, cp = padded(c);
  const PixelParts parts(p.pixels, kMostParts);
  const cpu::BlockKernels& kernels = cpu::block_kernels();
  const cpu::Runtime threads = runtime();
  const int64_t floats = padded(kernels.moments_scratch(p));
  Memory memory;
  const int64_t scratch = memory.add(floats * threads.threads);
  const int64_t partial = memory.add(parts.count * 2 * cp);
  memory.take();
  const auto each_part = [&](const PixelParts& of, const auto& f) {
    cpu::Schedule schedule({of.count});
    schedule.run(threads, [&](int64_t, int64_t part, int thread) {
      const int64_t begin = part * of.pixels;
      f(part, begin, std::min(begin + of.pixels, p.pixels), memory.at(scratch) + thread * floats);
    });
  };
  const auto total = [&](double divisor) {
    each_part(parts, [&](int64_t part, int64_t begin, int64_t end, float* own) {
      kernels.moments_sums(p, begin, end, memory.at(partial) + part * 2 * cp, own);
    });
    Tensor result = zeros({c});
    for (int64_t i = 0; i < c; i++) {
      double sum = 0.0;
      for (int64_t part = 0; part < parts.count; part++) {
        const float* of_part = memory.at(partial) + part * 2 * cp;
        sum += double{of_part[i]} - of_part[cp + i];
      }
      result.mutable_data_ptr<float>()[i] = static_cast<float>(sum / divisor);
    }
    return result;
  };
  const Tensor average = total(static_cast<double>(std::max<int64_t>(p.pixels, 1)));
  const Floats mean = widened(average, 1, c, "mean");
  p.mean = mean.data();
  if (!products) return {average, total(1.0)};

  const PixelParts few(p.pixels, std::min(kMostParts, kPartialFloats / (cp * c)));
  Memory sums;
  const int64_t squares = sums.add(std::max<int64_t>(few.count, 1) * cp * c);
  sums.take();
  each_part(few, [&](int64_t part, int64_t begin, int64_t end, float* own) {
    float* to = sums.at(squares) + part * cp * c;
    std::memset(to, 0, sizeof(float) * static_cast<size_t>(cp * c));
    kernels.moments_products(p, begin, end, to, own);
  });
  Tensor result = zeros({c, c});
  for (int64_t o = 0; o < c; o++)
    for (int64_t i = 0; i < c; i++) {
      double sum = 0.0;
      for (int64_t part = 0; part < few.count; part++)
        sum += packed_at(sums.at(squares) + part * cp * c, c, o, i);
      result.mutable_data_ptr<float>()[o * c + i] = static_cast<float>(sum);
    }
  return {average, result};
}

Tensor training_moments_backward(const Tensor grad_mean, const Tensor grad_products,
                                 const Tensor mean, const Tensor input, bool products) {
  const Tensor map = channels_last(input);
  MomentsParams p = moments_params(map);
  const int64_t c = p.c, cp = padded(c);
  const Tensor means = float_weight(mean, c, "mean");
  const Tensor given = float_weight(grad_products, products ? c * c : c, "grad_products");
  const float *m = means.const_data_ptr<float>(), *g = given.const_data_ptr<float>();
  Floats constant = widened(grad_mean, 1, c, "grad_mean");
  Floats slope(static_cast<size_t>(cp), products ? 1.0f : 0.0f);
  Floats matrix(static_cast<size_t>(products ? cp * c : 0));
  for (int64_t j = 0; j < c; j++) {
    double lost = products ? 0.0 : 2.0 * m[j] * g[j];
    for (int64_t i = 0; products && i < c; i++)
      lost += m[i] * (double{g[i * c + j]} + g[j * c + i]);
    if (!products) slope[static_cast<size_t>(j)] = 2.0f * g[j];
    float& own = constant[static_cast<size_t>(j)];
    own = static_cast<float>(own / static_cast<double>(std::max<int64_t>(p.pixels, 1)) - lost);
  }
  if (products) {
    pack(c, c, [&](int64_t o, int64_t i) { return g[o * c + i] + g[i * c + o]; }, matrix.data());
    p.matrix = matrix.data();
  }
  p.slope = slope.data(), p.constant = constant.data();
  Tensor result = empty_map(map, c, map.size(2), map.size(3));
  p.input_grad = result.mutable_data_ptr();
  const PixelParts parts(p.pixels, kMostParts);
  const cpu::BlockKernels& kernels = cpu::block_kernels();
  const cpu::Runtime threads = runtime();
  const int64_t floats = padded(kernels.moments_scratch(p));
  Memory memory;
  const int64_t scratch = memory.add(floats * threads.threads);
  memory.take();
  cpu::Schedule schedule({parts.count});
  schedule.run(threads, [&](int64_t, int64_t part, int thread) {
    const int64_t begin = part * parts.pixels;
    kernels.moments_backward(p, begin, std::min(begin + parts.pixels, p.pixels),
                             memory.at(scratch) + thread * floats);
  });
  return result;
}

// training_depthwise -------------------------------------------------------------------------

// The arguments of a call, and what the kernels read of them.
struct DepthwiseCall {
  Tensor map;
  std::optional<Tensor> expand_weight;
  Tensor dw_weight;
  Floats expand, scale, offset, dw;
  BlockDepthwiseParams p{};

  DepthwiseCall(const Tensor& input, const std::optional<Tensor>& expand_given,
                const std::optional<Tensor>& scale_given, const std::optional<Tensor>& offset_given,
                const Tensor& dw_given, int64_t stride, const Ints& padding, const Ints& size,
                int64_t activation)
      : map(channels_last(input)), dw_weight(dw_given) {
    p.dtype = map_dtype(map);
    p.input = map.const_data_ptr();
    p.n = map.size(0), p.c_in = map.size(1), p.h = map.size(2), p.w = map.size(3);
    STD_TORCH_CHECK(dw_given.dim() == 4 && (dw_given.size(2) == 3 || dw_given.size(2) == 5),
                    "dw_weight must be (C, 1, k, k) with k 3 or 5");
    STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
    p.c = dw_given.size(0), p.kernel = static_cast<int>(dw_given.size(2));
    p.stride = static_cast<int>(stride);
    p.pad_top = pair_of(padding, "padding").y, p.pad_left = pair_of(padding, "padding").x;
    p.out_h = pair_of(size, "size").y, p.out_w = pair_of(size, "size").x;
    p.activation = activation_of(activation);
    STD_TORCH_CHECK(expand_given || p.c == p.c_in,
                    "dw_weight must have the input's channels without an expansion");
    const int64_t taps = p.kernel * p.kernel, pitch = padded(p.c);
    dw_weight = float_weight(dw_given, taps * p.c, "dw_weight");
    dw.assign(static_cast<size_t>(taps * pitch), 0.0f);
    for (int64_t i = 0; i < p.c; i++)
      for (int64_t t = 0; t < taps; t++)
        dw[static_cast<size_t>(t * pitch + i)] = dw_weight.const_data_ptr<float>()[i * taps + t];
    scale = widened_or(scale_given, p.c, "scale", 1.0f);
    offset = widened_or(offset_given, p.c, "offset", 0.0f);
    p.dw = dw.data(), p.scale = scale.data(), p.offset = offset.data();
    if (expand_given) {
      expand_weight = float_weight(*expand_given, p.c * p.c_in, "expand_weight");
      const float* w = expand_weight->const_data_ptr<float>();
      expand.resize(static_cast<size_t>(pitch * p.c_in));
      pack(p.c, p.c_in, [&](int64_t o, int64_t i) { return w[o * p.c_in + i]; }, expand.data());
      p.expand = expand.data();
    }
    p.chunk = kPanel;
    const int64_t most = kChunkFloats * kPanel / cpu::block_kernels().depthwise_scratch(p);
    const int64_t chunks = divide_up(pitch / kPanel, std::max<int64_t>(most, 1));
    p.chunk = divide_up(pitch / kPanel, chunks) * kPanel;
  }
};

Tensors training_depthwise(const Tensor input, const std::optional<Tensor> expand_weight,
                           const std::optional<Tensor> scale, const std::optional<Tensor> offset,
                           const Tensor dw_weight, int64_t stride, const Ints padding,
                           const Ints size, int64_t activation, bool statistics) {
  DepthwiseCall call(input, expand_weight, scale, offset, dw_weight, stride, padding, size,
                     activation);
  BlockDepthwiseParams& p = call.p;
  Tensor out = empty_map(call.map, p.c, p.out_h, p.out_w);
  p.out = out.mutable_data_ptr();
  const int64_t rows =
      std::min(p.out_h, std::max<int64_t>(4 * p.kernel, divide_up(p.n * p.out_h, kMostParts)));
  const int64_t bands = divide_up(p.out_h, rows), chunks = divide_up(p.c, p.chunk);
  const cpu::BlockKernels& kernels = cpu::block_kernels();
  const cpu::Runtime threads = runtime();
  const int64_t floats = padded(kernels.depthwise_scratch(p));
  const int64_t tasks = p.n * bands * chunks;
  Memory memory;
  const int64_t scratch = memory.add(floats * threads.threads);
  const int64_t moments = memory.add(statistics ? tasks * 3 * p.chunk : 0);
  memory.take();
  cpu::Schedule schedule({tasks});
  schedule.run(threads, [&](int64_t, int64_t task, int thread) {
    const int64_t band = task / chunks, begin = band % bands * rows;
    kernels.depthwise(p, band / bands, begin, std::min(begin + rows, p.out_h), task % chunks,
                      statistics ? memory.at(moments) + task * 3 * p.chunk : nullptr,
                      memory.at(scratch) + thread * floats);
  });
  Merged merged(statistics ? p.c : 0);
  double before = 0.0;
  for (int64_t band = 0; statistics && band < p.n * bands; band++) {
    const int64_t begin = band % bands * rows;
    const auto pixels = static_cast<double>((std::min(begin + rows, p.out_h) - begin) * p.out_w);
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const int64_t first = chunk * p.chunk, c = std::min(p.chunk, p.c - first);
      merged.add(memory.at(moments) + (band * chunks + chunk) * 3 * p.chunk, first, c, padded(c),
                 before, pixels);
    }
    before += pixels;
  }
  const Tensors found = merged.tensors();
  return {out, found[0], found[1]};
}

Tensors training_depthwise_backward(
    const Tensor grad, const Tensor grad_mean, const Tensor grad_squares, const Tensor output,
    const Tensor mean, const Tensor input, const std::optional<Tensor> expand_weight,
    const std::optional<Tensor> scale, const std::optional<Tensor> offset, const Tensor dw_weight,
    int64_t stride, const Ints padding, const Ints size, int64_t activation) {
  DepthwiseCall call(input, expand_weight, scale, offset, dw_weight, stride, padding, size,
                     activation);
  BlockDepthwiseParams& p = call.p;
  const int64_t c = p.c, c_in = p.c_in, pitch = padded(c);
  const Tensor grads = checked_gradient(grad, call.map, c, p.out_h, p.out_w);
  const Tensor saved = checked_gradient(output, call.map, c, p.out_h, p.out_w);
  const FromStatistics statistics(mean, grad_mean, grad_squares, c, p.n * p.out_h * p.out_w);
  p.grad = grads.const_data_ptr(), p.out = const_cast<void*>(saved.const_data_ptr());
  p.statistics = statistics.params();
  const Floats one(static_cast<size_t>(std::max(pitch, padded(c_in))), 1.0f);
  const Floats zero(one.size(), 0.0f);
  p.ones = one.data(), p.zeros = zero.data();
  Floats back(static_cast<size_t>(p.expand ? pitch * padded(c_in) : 0));
  const float* w = p.expand ? call.expand_weight->const_data_ptr<float>() : nullptr;
  for (int64_t first = 0; p.expand && first < c; first += p.chunk) {
    const int64_t width = padded(std::min(p.chunk, c - first));
    pack(
        c_in, width,
        [&](int64_t o, int64_t i) {
          return first + i < c ? p.scale[first + i] * w[(first + i) * c_in + o] : 0.0f;
        },
        &back[static_cast<size_t>(first * padded(c_in))]);
  }
  p.expand_back = back.data();
  Tensor input_grad = empty_map(call.map, c_in, p.h, p.w);
  p.input_grad = input_grad.mutable_data_ptr();

  const int64_t taps = p.kernel * p.kernel;
  BlockDepthwiseSums& at = p.at;
  at.dw = p.expand ? pitch * c_in : 0;
  at.offset = at.dw + taps * pitch, at.scale = at.offset + pitch, at.size = at.scale + pitch;
  const int64_t most = std::clamp<int64_t>(kPartialFloats / at.size, 4, kMostParts);
  const int64_t rows = std::max(divide_up(kPartPixels, p.w), divide_up(p.n * p.h, most));
  const int64_t parts = divide_up(p.n * p.h, rows);
  const cpu::BlockKernels& kernels = cpu::block_kernels();
  const cpu::Runtime threads = runtime();
  const int64_t floats = padded(kernels.depthwise_scratch(p));
  Memory memory;
  const int64_t scratch = memory.add(floats * threads.threads);
  const int64_t partial = memory.add(std::max<int64_t>(parts, 1) * at.size);
  memory.take();
  cpu::Schedule schedule({parts});
  schedule.run(threads, [&](int64_t, int64_t part, int thread) {
    float* sums = memory.at(partial) + part * at.size;
    std::memset(sums, 0, sizeof(float) * static_cast<size_t>(at.size));
    each_image(part * rows, std::min((part + 1) * rows, p.n * p.h), p.h,
               [&](int64_t image, int64_t begin, int64_t end) {
                 kernels.depthwise_backward(p, image, begin, end, sums,
                                            memory.at(scratch) + thread * floats);
               });
  });
  const float* sums = memory.at(partial);
  add_up(memory.at(partial), parts, at.size);

  Tensor expand_grad = zeros({0}), scale_grad = zeros({scale ? c : 0});
  Tensor offset_grad = zeros({offset ? c : 0}), dw_grad = zeros({c, 1, p.kernel, p.kernel});
  Floats from_scale(sums + at.scale, sums + at.scale + c);
  if (p.expand) {
    expand_grad = zeros({c, c_in, 1, 1});
    for (int64_t o = 0; o < c; o++) {
      double dot = 0.0;
      for (int64_t i = 0; i < c_in; i++) {
        const float g = packed_at(sums, c_in, o, i);
        dot += double{g} * w[o * c_in + i];
        expand_grad.mutable_data_ptr<float>()[o * c_in + i] = p.scale[o] * g;
      }
      from_scale[static_cast<size_t>(o)] = static_cast<float>(dot);
    }
  }
  if (scale) std::copy_n(from_scale.data(), c, scale_grad.mutable_data_ptr<float>());
  if (offset) std::copy_n(sums + at.offset, c, offset_grad.mutable_data_ptr<float>());
  for (int64_t i = 0; i < c; i++)
    for (int64_t t = 0; t < taps; t++)
      dw_grad.mutable_data_ptr<float>()[i * taps + t] = sums[at.dw + t * pitch + i];
  return {input_grad, expand_grad, scale_grad, offset_grad, dw_grad};
}

// training_project ---------------------------------------------------------------------------

// long double: glibc 2.29 has a new exp of double, which older systems lack
double sigmoid(double x) {
  return 1.0 / (1.0 + static_cast<double>(std::exp(static_cast<long double>(-x))));
}

double activated(Activation a, double x) {
  switch (a) {
    case Activation::none: return x;
    case Activation::swish: return x * sigmoid(x);
    case Activation::relu: return x < 0.0 ? 0.0 : x;
    case Activation::relu6: return x < 0.0 ? 0.0 : x > 6.0 ? 6.0 : x;
    case Activation::hard_swish: return x * std::clamp(x + 3.0, 0.0, 6.0) / 6.0;
  }
  return x;
}

double activation_slope(Activation a, double x) {  // torch's at the corners
  switch (a) {
    case Activation::none: return 1.0;
    case Activation::swish: {
      const double s = sigmoid(x);
      return s * (1.0 + x * (1.0 - s));
    }
    case Activation::relu: return x <= 0.0 ? 0.0 : 1.0;
    case Activation::relu6: return x <= 0.0 || x >= 6.0 ? 0.0 : 1.0;
    case Activation::hard_swish: return x <= -3.0 ? 0.0 : x < 3.0 ? x / 3.0 + 0.5 : 1.0;
  }
  return 1.0;
}

// Squeeze-excite of one batch: gate = σ(excite · activation(reduce · pooled + bias) + bias).
struct Squeeze {
  Tensor reduce, reduce_bias, excite, excite_bias;
  int64_t c, r;
  Activation activation;
  const float *w1, *b1, *w2, *b2;  // (r, c), (r), (c, r), (c)

  Squeeze(const Tensors& given, int64_t channels, Activation a)
      : reduce(given[0]),
        reduce_bias(given[1]),
        excite(given[2]),
        excite_bias(given[3]),
        c(channels),
        r(given[1].numel()),
        activation(a) {
    reduce = float_weight(reduce, r * c, "reduce_weight");
    reduce_bias = float_weight(reduce_bias, r, "reduce_bias");
    excite = float_weight(excite, r * c, "excite_weight");
    excite_bias = float_weight(excite_bias, c, "excite_bias");
    w1 = reduce.const_data_ptr<float>(), b1 = reduce_bias.const_data_ptr<float>();
    w2 = excite.const_data_ptr<float>(), b2 = excite_bias.const_data_ptr<float>();
  }

  // What enters the activation, (r).
  std::vector<double> reduced(const float* pooled) const {
    std::vector<double> z(static_cast<size_t>(r));
    for (int64_t k = 0; k < r; k++) {
      double sum = b1[k];
      for (int64_t i = 0; i < c; i++) sum += double{w1[k * c + i]} * pooled[i];
      z[static_cast<size_t>(k)] = sum;
    }
    return z;
  }

  void gate(const float* pooled, float* to) const {
    std::vector<double> a = reduced(pooled);
    for (double& x : a) x = activated(activation, x);
    for (int64_t i = 0; i < c; i++) {
      double sum = b2[i];
      for (int64_t k = 0; k < r; k++) sum += w2[i * r + k] * a[static_cast<size_t>(k)];
      to[i] = static_cast<float>(sigmoid(sum));
    }
  }

  // From the gradient of an image's gate: of what enters the sigmoid (c) and the activation (r),
  // and of pooled (c).
  void backward(const float* pooled, const float* gate, const float* gate_grad, double* excited,
                double* reduced_grad, double* pooled_grad) const {
    const std::vector<double> z = reduced(pooled);
    std::fill_n(reduced_grad, r, 0.0), std::fill_n(pooled_grad, c, 0.0);
    for (int64_t i = 0; i < c; i++) {
      excited[i] = double{gate_grad[i]} * gate[i] * (1.0 - gate[i]);
      for (int64_t k = 0; k < r; k++) reduced_grad[k] += w2[i * r + k] * excited[i];
    }
    for (int64_t k = 0; k < r; k++) {
      reduced_grad[k] *= activation_slope(activation, z[static_cast<size_t>(k)]);
      for (int64_t i = 0; i < c; i++) pooled_grad[i] += w1[k * c + i] * reduced_grad[k];
    }
  }
};

struct ProjectCall {
  Tensor map, weight;
  Floats scale, offset, project, one, zero;
  std::optional<Squeeze> squeeze;
  BlockProjectParams p{};

  ProjectCall(const Tensor& input, const Tensor& scale_given, const Tensor& offset_given,
              const Tensors& squeeze_given, const Tensor& project_given, int64_t activation)
      : map(channels_last(input)), weight(project_given) {
    p.dtype = map_dtype(map);
    p.input = map.const_data_ptr();
    p.n = map.size(0), p.c = map.size(1), p.area = map.size(2) * map.size(3);
    p.c_out = project_given.size(0);
    p.activation = activation_of(activation);
    weight = float_weight(project_given, p.c * p.c_out, "project_weight");
    scale = widened(scale_given, 1, p.c, "scale");
    offset = widened(offset_given, 1, p.c, "offset");
    const float* w = weight.const_data_ptr<float>();
    project.resize(static_cast<size_t>(padded(p.c_out) * p.c));
    pack(p.c_out, p.c, [&](int64_t o, int64_t i) { return w[o * p.c + i]; }, project.data());
    one.assign(static_cast<size_t>(std::max(padded(p.c), padded(p.c_out))), 1.0f);
    zero.assign(one.size(), 0.0f);
    p.scale = scale.data(), p.offset = offset.data(), p.project = project.data();
    p.ones = one.data(), p.zeros = zero.data();
    p.strip = std::clamp<int64_t>(kStripFloats / padded(p.c) / 24 * 24, 24, 96);
    STD_TORCH_CHECK(squeeze_given.empty() || squeeze_given.size() == 4 ||
                        (squeeze_given.size() == 1 && squeeze_given[0].numel() == 0),
                    "squeeze must be four tensors, or one empty tensor for none");
    if (squeeze_given.size() == 4) squeeze.emplace(squeeze_given, p.c, p.activation);
  }
};

// Images that are done one after the other, each in bands of pixels.
struct Units {
  int64_t images, count, bands, pixels;  // images of a unit; units; bands of an image; their pixels

  Units(int64_t n, int64_t area, int64_t most)
      : images(std::max<int64_t>(divide_up(n, most), 1)),
        count(divide_up(n, images)),
        bands(n ? std::min(std::max<int64_t>(most / n, 1), divide_up(area, kPartPixels)) : 1),
        pixels(divide_up(area, bands)) {
    bands = divide_up(area, pixels);
  }
};

Tensors training_project(const Tensor input, const Tensor scale, const Tensor offset,
                         const Tensors squeeze, const Tensor project_weight, int64_t activation,
                         bool statistics) {
  ProjectCall call(input, scale, offset, squeeze, project_weight, activation);
  BlockProjectParams& p = call.p;
  const int64_t cp = padded(p.c), op = padded(p.c_out);
  Tensor out = empty_map(call.map, p.c_out, call.map.size(2), call.map.size(3));
  p.out = out.mutable_data_ptr();
  Tensor pooled = zeros({call.squeeze ? p.n : 0, p.c});
  float* pools = pooled.numel() ? pooled.mutable_data_ptr<float>() : nullptr;
  const Units units(p.n, p.area, kMostParts);
  const cpu::BlockKernels& kernels = cpu::block_kernels();
  const cpu::Runtime threads = runtime();
  const int64_t floats = padded(kernels.project_scratch(p));
  const int64_t bands = p.n * units.bands;
  Memory memory;
  const int64_t scratch = memory.add(floats * threads.threads);
  const int64_t moments = memory.add(statistics ? bands * 3 * op : 0);
  const int64_t sums = memory.add(call.squeeze ? bands * cp : 0);
  const int64_t gates = memory.add(call.squeeze ? p.n * cp : 0);
  memory.take();
  if (call.squeeze) p.gate = memory.at(gates);

  // for each image: its sums, its gate, its projection
  const int64_t steps = call.squeeze ? 3 : 1;
  Ints tasks;
  for (int64_t image = 0; image < p.n; image++) {
    if (call.squeeze) tasks.push_back(units.bands), tasks.push_back(1);
    tasks.push_back(units.bands);
  }
  cpu::Schedule schedule(tasks);
  const auto ready = [&](int64_t step, int64_t) {
    return step % steps == 0 || schedule.done(step - 1);
  };
  schedule.run(threads, ready, [&](int64_t step, int64_t task, int thread) {
    const int64_t image = step / steps, band = image * units.bands + task;
    const int64_t begin = task * units.pixels, end = std::min(begin + units.pixels, p.area);
    float* own = memory.at(scratch) + thread * floats;
    if (step % steps == steps - 1) {
      kernels.project(p, image, begin, end,
                      statistics ? memory.at(moments) + band * 3 * op : nullptr, own);
    } else if (step % steps == 0) {
      float* to = memory.at(sums) + band * cp;
      std::memset(to, 0, sizeof(float) * static_cast<size_t>(cp));
      kernels.pool(p, image, begin, end, to, own);
    } else {
      float* gate = memory.at(gates) + image * cp;
      std::fill_n(gate, cp, 0.0f);
      for (int64_t i = 0; i < p.c; i++) {
        double sum = 0.0;
        for (int64_t b = 0; b < units.bands; b++)
          sum += memory.at(sums)[(image * units.bands + b) * cp + i];
        pools[image * p.c + i] = static_cast<float>(sum / static_cast<double>(p.area));
      }
      call.squeeze->gate(pools + image * p.c, gate);
    }
  });
  Merged merged(statistics ? p.c_out : 0);
  double before = 0.0;
  for (int64_t band = 0; statistics && band < bands; band++) {
    const int64_t begin = band % units.bands * units.pixels;
    const auto pixels = static_cast<double>(std::min(units.pixels, p.area - begin));
    merged.add(memory.at(moments) + band * 3 * op, 0, p.c_out, op, before, pixels);
    before += pixels;
  }
  const Tensors found = merged.tensors();
  return {out, found[0], found[1], pooled};
}

// Gradients of squeeze-excite's weights, one after the other: (r, c), (r), (c, r), (c).
Tensors squeeze_gradients(const Squeeze& s, int64_t n, const float* pooled,
                          const std::vector<double>& excited, const std::vector<double>& reduced) {
  const int64_t c = s.c, r = s.r;
  std::vector<double> w1(static_cast<size_t>(r * c), 0.0), b1(static_cast<size_t>(r), 0.0);
  std::vector<double> w2(w1.size(), 0.0), b2(static_cast<size_t>(c), 0.0);
  for (int64_t image = 0; image < n; image++) {
    const double* de = &excited[static_cast<size_t>(image * c)];
    const double* dz = &reduced[static_cast<size_t>(image * r)];
    std::vector<double> a = s.reduced(pooled + image * c);
    for (double& x : a) x = activated(s.activation, x);
    for (int64_t i = 0; i < c; i++) b2[i] += de[i];
    for (int64_t k = 0; k < r; k++) {
      b1[k] += dz[k];
      for (int64_t i = 0; i < c; i++) w1[k * c + i] += dz[k] * pooled[image * c + i];
    }
    for (int64_t i = 0; i < c; i++)
      for (int64_t k = 0; k < r; k++) w2[i * r + k] += de[i] * a[k];
  }
  Tensors found{zeros({r, c, 1, 1}), zeros({r}), zeros({c, r, 1, 1}), zeros({c})};
  const std::vector<double>* sums[4] = {&w1, &b1, &w2, &b2};
  for (size_t t = 0; t < 4; t++)
    std::copy(sums[t]->begin(), sums[t]->end(), found[t].mutable_data_ptr<float>());
  return found;
}

Tensors training_project_backward(const Tensor grad, const Tensor grad_mean,
                                  const Tensor grad_squares, const Tensor output, const Tensor mean,
                                  const Tensor pooled, const Tensor input, const Tensor scale,
                                  const Tensor offset, const Tensors squeeze,
                                  const Tensor project_weight, int64_t activation) {
  ProjectCall call(input, scale, offset, squeeze, project_weight, activation);
  BlockProjectParams& p = call.p;
  const int64_t c = p.c, c_out = p.c_out, cp = padded(c), op = padded(c_out);
  const int64_t h = call.map.size(2), w = call.map.size(3);
  const Tensor grads = checked_gradient(grad, call.map, c_out, h, w);
  const Tensor saved = checked_gradient(output, call.map, c_out, h, w);
  const FromStatistics statistics(mean, grad_mean, grad_squares, c_out, p.n * p.area);
  p.grad = grads.const_data_ptr(), p.out = const_cast<void*>(saved.const_data_ptr());
  p.statistics = statistics.params();
  const float* weight = call.weight.const_data_ptr<float>();
  Floats back(static_cast<size_t>(cp * c_out));
  pack(c, c_out, [&](int64_t o, int64_t i) { return weight[i * c + o]; }, back.data());
  p.project_back = back.data();
  Tensor input_grad = empty_map(call.map, c, h, w);
  p.input_grad = input_grad.mutable_data_ptr();
  const bool gated = call.squeeze.has_value();
  const int64_t r = gated ? call.squeeze->r : 0;
  Tensor means = pooled;
  if (gated) means = float_weight(pooled, p.n * c, "pooled");
  const float* pools = gated && p.n ? means.const_data_ptr<float>() : nullptr;

  const int64_t size = op * c + 2 * cp;  // of a partial sum: weights, scale and offset
  const Units units(p.n, p.area, std::clamp<int64_t>(kPartialFloats / size, 4, kMostParts));
  const cpu::BlockKernels& kernels = cpu::block_kernels();
  const cpu::Runtime threads = runtime();
  const int64_t floats = padded(kernels.project_scratch(p));
  const int64_t parts = units.count * units.bands;
  Memory memory;
  const int64_t scratch = memory.add(floats * threads.threads);
  const int64_t partial = memory.add(std::max<int64_t>(parts, 1) * size);
  const int64_t gate_sums = memory.add(gated ? p.n * units.bands * cp : 0);
  const int64_t gates = memory.add(gated ? p.n * cp : 0);
  const int64_t pool_grads = memory.add(gated ? p.n * cp : 0);
  memory.take();
  std::vector<double> excited(static_cast<size_t>(gated ? p.n * c : 0));
  std::vector<double> reduced(static_cast<size_t>(p.n * r));
  if (gated) {
    p.gate = memory.at(gates), p.pooled_grad = memory.at(pool_grads);
    std::memset(memory.at(gates), 0, sizeof(float) * static_cast<size_t>(p.n * cp));
    std::memset(memory.at(pool_grads), 0, sizeof(float) * static_cast<size_t>(p.n * cp));
    for (int64_t image = 0; image < p.n; image++)
      call.squeeze->gate(pools + image * c, memory.at(gates) + image * cp);
  }
  const auto squeeze_backward = [&](int64_t image) {
    Floats sum(static_cast<size_t>(c), 0.0f);
    for (int64_t b = 0; b < units.bands; b++)
      for (int64_t i = 0; i < c; i++)
        sum[static_cast<size_t>(i)] += memory.at(gate_sums)[(image * units.bands + b) * cp + i];
    std::vector<double> pool_grad(static_cast<size_t>(c));
    call.squeeze->backward(pools + image * c, memory.at(gates) + image * cp, sum.data(),
                           &excited[static_cast<size_t>(image * c)],
                           &reduced[static_cast<size_t>(image * r)], pool_grad.data());
    for (int64_t i = 0; i < c; i++)
      memory.at(pool_grads)[image * cp + i] =
          static_cast<float>(pool_grad[static_cast<size_t>(i)] / static_cast<double>(p.area));
  };

  // for each unit: its projections, its gates, and with these the rest
  Ints tasks;
  for (int64_t unit = 0; unit < units.count; unit++)
    for (int64_t t : {units.bands, int64_t{1}, units.bands}) tasks.push_back(t);
  cpu::Schedule schedule(tasks);
  const auto ready = [&](int64_t step, int64_t) {
    return step % 3 == 0 || schedule.done(step - 1);
  };
  schedule.run(threads, ready, [&](int64_t step, int64_t task, int thread) {
    const int64_t unit = step / 3, first = unit * units.images;
    const int64_t begin = task * units.pixels, end = std::min(begin + units.pixels, p.area);
    float* own = memory.at(scratch) + thread * floats;
    float* sums = memory.at(partial) + (unit * units.bands + task) * size;
    if (step % 3 == 0) std::memset(sums, 0, sizeof(float) * static_cast<size_t>(size));
    for (int64_t image = first; image < std::min(first + units.images, p.n); image++) {
      if (step % 3 == 0) {
        float* gate_grad = memory.at(gate_sums) + (image * units.bands + task) * cp;
        if (gated) std::memset(gate_grad, 0, sizeof(float) * static_cast<size_t>(cp));
        kernels.project_backward(p, image, begin, end, sums, gate_grad, own);
      } else if (step % 3 == 1) {
        if (gated) squeeze_backward(image);
      } else {
        kernels.project_finish(p, image, begin, end, sums + op * c, own);
      }
    }
  });
  const float* sums = memory.at(partial);
  add_up(memory.at(partial), parts, size);
  Tensor scale_grad = zeros({c}), offset_grad = zeros({c}), project_grad = zeros({c_out, c, 1, 1});
  std::copy_n(sums + op * c, c, scale_grad.mutable_data_ptr<float>());
  std::copy_n(sums + op * c + cp, c, offset_grad.mutable_data_ptr<float>());
  for (int64_t o = 0; o < c_out; o++)
    for (int64_t i = 0; i < c; i++)
      project_grad.mutable_data_ptr<float>()[o * c + i] = packed_at(sums, c, o, i);
  Tensors result{input_grad, scale_grad, offset_grad};
  const Tensors squeezes = gated ? squeeze_gradients(*call.squeeze, p.n, pools, excited, reduced)
                                 : Tensors(squeeze.size(), zeros({0}));
  result.insert(result.end(), squeezes.begin(), squeezes.end());
  result.push_back(project_grad);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edet_kernels, CPU, m) {
  m.impl("training_moments", TORCH_BOX(&training_moments));
  m.impl("training_moments_backward", TORCH_BOX(&training_moments_backward));
  m.impl("training_depthwise", TORCH_BOX(&training_depthwise));
  m.impl("training_depthwise_backward", TORCH_BOX(&training_depthwise_backward));
  m.impl("training_project", TORCH_BOX(&training_project));
  m.impl("training_project_backward", TORCH_BOX(&training_project_backward));
}

}  // namespace edet::torch_ops
