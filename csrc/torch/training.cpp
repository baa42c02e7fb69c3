// The gradients of weighted_fusion, fusion_node and separable_conv, and training_node with its own,
// on the CPU.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../cpu/backward_graph.h"
#include "../cpu/dispatch.h"
#include "../cpu/node_graph.h"
#include "common.h"

namespace edet::torch_ops {

namespace {

using torch::headeronly::ScalarType;
using Floats = std::vector<float>;

Tensor zeros(const Ints& size) {
  Tensor t = torch::stable::empty({size.data(), size.size()}, ScalarType::Float);
  if (t.numel())  // an empty tensor has no memory
    std::memset(t.mutable_data_ptr(), 0, sizeof(float) * static_cast<size_t>(t.numel()));
  return t;
}

// Row-wise copy of (rows, c) floats to a pitch of `to_pitch`, the rest zero.
Floats widened(const float* from, int64_t rows, int64_t c, int64_t to_pitch) {
  Floats to(static_cast<size_t>(rows * to_pitch), 0.0f);
  for (int64_t r = 0; r < rows; r++) std::copy_n(from + r * c, c, &to[r * to_pitch]);
  return to;
}

// The nodes of one call. They share dw and pw; node i fuses edge_counts[i] of the inputs.
struct Nodes {
  Tensors inputs;
  std::optional<Tensor> edge_weights;     // (n[, C]); of one node only
  std::optional<Tensor> scales, offsets;  // (inputs, C): each input is scale·x + offset
  std::optional<Tensor> dw, pw;           // packed; none: fusions alone
  std::optional<Tensor> scale, shift;     // (nodes, c_out) or, shift, (c_out); none: 1 and 0
  int64_t c_out;
  Ints edge_counts, sizes;
  Fusion fusion;
  Pool pool;
  Activation pre, post;
};

// The fusion's factors with the inputs' batch norms in them: a·(scale·x + offset) is a factor times
// x and an offset. A max pool is taken of ±x, so that its factor may be |scale|.
struct Factors {
  int64_t c, cp, edges;
  bool affine;
  Floats weight, forward, backward, sign;  // (edges, cp)
  Floats offset;                           // (nodes, cp)

  explicit Factors(const Nodes& call) {
    c = call.inputs[0].size(1), cp = padded(c);
    edges = static_cast<int64_t>(call.inputs.size());
    affine = call.scales.has_value();
    const auto nodes = static_cast<int64_t>(call.edge_counts.size());
    STD_TORCH_CHECK(nodes == 1 || !call.edge_weights, "edge_weights must be those of one node");
    weight.resize(static_cast<size_t>(edges * cp));
    const bool per_channel = call.edge_weights && call.edge_weights->dim() == 2;
    Tensor given = call.inputs[0];
    if (call.edge_weights)
      given = float_weight(*call.edge_weights, per_channel ? edges * c : edges, "edge_weights");
    int64_t at = 0;
    for (int64_t count : call.edge_counts) {
      fill_coefficients(call.edge_weights ? given.const_data_ptr<float>() : nullptr, per_channel,
                        static_cast<int>(count), c, call.fusion, &weight[at * cp]);
      at += count;
    }
    forward = backward = weight;
    if (!affine) return;
    const Tensor scales = float_weight(*call.scales, edges * c, "scales");
    const Tensor offsets = float_weight(*call.offsets, edges * c, "offsets");
    const float* s = scales.const_data_ptr<float>();
    const float* o = offsets.const_data_ptr<float>();
    sign.assign(weight.size(), 0.0f);
    offset.assign(static_cast<size_t>(nodes * cp), 0.0f);
    at = 0;
    for (int64_t i = 0; i < nodes; i++)
      for (int64_t e = 0; e < call.edge_counts[i]; e++, at++) {
        const Tensor& x = call.inputs[at];
        const bool pooled = resize_kind(x.size(2), x.size(3), call.sizes[2 * i],
                                        call.sizes[2 * i + 1]) == Resize::max_pool;
        for (int64_t j = 0; j < c; j++) {
          const int64_t k = at * cp + j;
          const float scale = s[at * c + j];
          sign[k] = pooled && scale < 0.0f ? -1.0f : 1.0f;
          forward[k] = weight[k] * scale * sign[k];
          backward[k] = weight[k] * scale;
          offset[i * cp + j] += weight[k] * o[at * c + j];
        }
      }
  }
};

FusionParams fusion_params(const Nodes& call, const Tensors& maps, const Factors& factors,
                           int64_t node, int64_t first_edge) {
  FusionParams f{};
  f.dtype = map_dtype(maps[0]);
  f.n = maps[0].size(0), f.c = factors.c;
  f.h = call.sizes[2 * node], f.w = call.sizes[2 * node + 1];
  f.edges = static_cast<int>(call.edge_counts[node]);
  f.activation = call.pre;
  f.coefficients = &factors.forward[first_edge * factors.cp];
  if (factors.affine) {
    f.signs = &factors.sign[first_edge * factors.cp];
    f.offsets = &factors.offset[node * factors.cp];
  }
  for (int e = 0; e < f.edges; e++) {
    const Tensor& map = maps[first_edge + e];
    f.edge[e] = make_edge(map.const_data_ptr(), map.size(2), map.size(3), f.h, f.w, call.pool, -1);
  }
  return f;
}

Tensors checked_maps(const Nodes& call) {
  STD_TORCH_CHECK(!call.inputs.empty(), "inputs must be a non-empty list of maps");
  const Tensor& first = call.inputs[0];
  int64_t edges = 0;
  for (int64_t count : call.edge_counts) {
    STD_TORCH_CHECK(count >= 1 && count <= kMaxEdges, "a node must fuse 1 to ", kMaxEdges, " maps");
    edges += count;
  }
  STD_TORCH_CHECK(edges == static_cast<int64_t>(call.inputs.size()) &&
                      call.sizes.size() == 2 * call.edge_counts.size(),
                  "edge_counts and sizes must describe every input and node");
  STD_TORCH_CHECK(call.scales.has_value() == call.offsets.has_value(),
                  "scales and offsets must be given together");
  Tensors maps;
  for (const Tensor& x : call.inputs) {
    STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == first.size(0) && x.size(1) == first.size(1) &&
                        x.scalar_type() == first.scalar_type(),
                    "inputs must be maps (N, C, H, W) of one batch, channel count and dtype");
    maps.push_back(channels_last(x));
  }
  return maps;
}

// dw with its taps reversed, each padded to the pitch.
Floats reversed_taps(const float* dw, int64_t c) {
  const int64_t cp = padded(c);
  Floats reversed(static_cast<size_t>(9 * cp), 0.0f);
  for (int64_t k = 0; k < 9; k++) std::copy_n(dw + k * c, c, &reversed[(8 - k) * cp]);
  return reversed;
}

// Packed (c_out, c) times scale (c_out) as packed (c, c_out).
Floats transposed(const float* pw, const float* scale, int64_t c, int64_t c_out) {
  Floats t(static_cast<size_t>(padded(c) * c_out), 0.0f);
  for (int64_t o = 0; o < c_out; o++)
    for (int64_t i = 0; i < c; i++)
      t[(i / kPanel * c_out + o) * kPanel + i % kPanel] =
          scale[o] * pw[(o / kPanel * c + i) * kPanel + o % kPanel];
  return t;
}

// The gradient of the statistics (mean, m2) of each node's output, as NodeBackwardParams has it.
struct StatisticsGradient {
  Tensors outputs;
  Floats mean, slope, constant;  // (nodes, pitch of c_out)
};

struct Gradients {
  Tensors inputs;
  Tensor edge_weights, scales, offsets, dw, pw, scale, shift;  // empty where there is none
};

// From d coefficients (edges, cp) and d offset (cp) to d edge weights, in the weights' shape.
void edge_weight_gradient(const Nodes& call, const Factors& factors, const Floats& weight_grad,
                          Tensor& result) {
  const Tensor weights =
      float_weight(*call.edge_weights, call.edge_weights->numel(), "edge_weights");
  const bool per_channel = weights.dim() == 2;
  const float* w = weights.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  const int64_t c = factors.c, cp = factors.cp, edges = factors.edges;
  // in double: a lone positive edge's gradient is what is left of its sum after dividing by ε
  for (int64_t j = 0; j < (per_channel ? c : 1); j++) {
    double g[kMaxEdges], a[kMaxEdges], largest = w[j], total = 0.0, mean = 0.0;
    const auto at = [&](int64_t e) { return per_channel ? e * c + j : e; };
    for (int64_t e = 0; e < edges; e++) largest = std::max<double>(largest, w[at(e)]);
    for (int64_t e = 0; e < edges; e++) {
      g[e] = 0.0;
      for (int64_t i = per_channel ? j : 0; i < (per_channel ? j + 1 : c); i++)
        g[e] += weight_grad[e * cp + i];
      const double own = w[at(e)];
      // long double: glibc 2.29 has a new exp of double, which older systems lack
      a[e] = call.fusion == Fusion::softmax
                 ? static_cast<double>(std::exp(static_cast<long double>(own - largest)))
                 : (own < 0.0 ? 0.0 : own);
      total += a[e];
    }
    if (call.fusion == Fusion::fast) total += kFastEpsilon;
    for (int64_t e = 0; e < edges; e++) mean += g[e] * a[e] / total;
    for (int64_t e = 0; e < edges; e++) {
      double gradient = g[e];
      if (call.fusion == Fusion::fast) gradient = w[at(e)] <= 0.0f ? 0.0 : (g[e] - mean) / total;
      if (call.fusion == Fusion::softmax) gradient = a[e] / total * (g[e] - mean);
      out[at(e)] = static_cast<float>(gradient);
    }
  }
}

Gradients gradients(const Nodes& call, const Tensors& grads, const StatisticsGradient* statistics) {
  const Tensors maps = checked_maps(call);
  const Factors factors(call);
  const int64_t c = factors.c, cp = factors.cp, c_out = call.c_out, op = padded(c_out);
  const size_t count = call.edge_counts.size();
  const auto nodes = static_cast<int64_t>(count);
  STD_TORCH_CHECK(grads.size() == count, "there must be one gradient per output");
  const bool convolves = call.dw.has_value();

  Gradients result{{},         zeros({0}), zeros({0}), zeros({0}),
                   zeros({0}), zeros({0}), zeros({0}), zeros({0})};
  Tensor dw = maps[0], pw = maps[0];
  Floats taps, weights;
  Floats scale(static_cast<size_t>(nodes * c_out), 1.0f), shift(scale.size(), 0.0f);
  if (convolves) {
    dw = float_weight(*call.dw, 9 * c, "dw_weight");
    pw = float_weight(*call.pw, op * c, "pw_weight");
    taps = reversed_taps(dw.const_data_ptr<float>(), c);
    if (call.scale) {
      const Tensor t = float_weight(*call.scale, nodes * c_out, "scale");
      std::copy_n(t.const_data_ptr<float>(), nodes * c_out, scale.data());
    }
    if (call.shift) {
      const bool shared = call.shift->dim() == 1;
      const Tensor t = float_weight(*call.shift, shared ? c_out : nodes * c_out, "shift");
      for (int64_t i = 0; i < nodes; i++)
        std::copy_n(t.const_data_ptr<float>() + (shared ? 0 : i * c_out), c_out, &shift[i * c_out]);
    }
    for (int64_t i = 0; i < nodes; i++) {
      const Floats t = transposed(pw.const_data_ptr<float>(), &scale[i * c_out], c, c_out);
      weights.insert(weights.end(), t.begin(), t.end());
    }
  }

  int64_t widest = 0;
  for (int64_t i = 0; i < nodes; i++) widest = std::max(widest, call.sizes[2 * i + 1]);
  const Floats one(static_cast<size_t>(std::max(cp, op)), 1.0f);
  const Floats zero(static_cast<size_t>(std::max((widest + 2) * cp, op)), 0.0f);

  const cpu::Runtime threads = runtime();
  Layout layout;
  std::vector<NodeBackwardParams> params(count);
  Tensors held;
  Ints conv_sums, fusion_sums, conv_grads, fused_grads;
  int64_t edge = 0;
  for (int64_t i = 0; i < nodes; i++) {
    NodeBackwardParams& b = params[i];
    b.node.fusion = fusion_params(call, maps, factors, i, edge);
    const FusionParams& f = b.node.fusion;
    const Tensor& grad = grads[i];
    STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == f.n && grad.size(1) == c_out &&
                        grad.size(2) == f.h && grad.size(3) == f.w &&
                        grad.scalar_type() == maps[0].scalar_type(),
                    "a gradient must have the shape and dtype of its output");
    held.push_back(channels_last(grad));
    b.grad = held.back().const_data_ptr();
    b.ones = one.data(), b.zeros = zero.data();
    b.coefficients = &factors.backward[edge * cp];
    bool resized = false;
    for (int e = 0; e < f.edges; e++, edge++) {
      result.inputs.push_back(empty_map(maps[0], c, f.edge[e].h, f.edge[e].w));
      b.input_grad[e] = result.inputs.back().mutable_data_ptr();
      resized |= f.edge[e].resize != Resize::none;
    }
    const int64_t groups = std::max<int64_t>(cpu::row_groups(f.n, f.h, f.w).count, 1);
    if (convolves) {
      b.node.c_out = c_out;
      b.node.dw = dw.const_data_ptr<float>(), b.node.pw = pw.const_data_ptr<float>();
      b.node.scale = &scale[i * c_out], b.node.shift = &shift[i * c_out];
      b.node.activation = call.post;
      b.dw = taps.data(), b.pw = &weights[i * cp * c_out];
      if (statistics) {
        held.push_back(channels_last(statistics->outputs[i]));
        b.node.out = const_cast<void*>(held.back().const_data_ptr());
        b.mean = &statistics->mean[i * op], b.slope = &statistics->slope[i * op];
        b.constant = &statistics->constant[i * op];
      }
    }
    conv_grads.push_back(layout.add(convolves ? 4 * f.n * f.h * (f.w + 2) * cp : 0));
    conv_sums.push_back(layout.add(convolves ? 4 * groups * cpu::conv_partial_floats(b) : 0));
    fused_grads.push_back(resized ? layout.add(4 * f.n * f.h * f.w * cp) : -1);
    fusion_sums.push_back(layout.add(4 * groups * cpu::fusion_partial_floats(b)));
  }
  const int64_t scratch = layout.add(4 * cpu::backward_graph_scratch(params, threads));
  const Workspace workspace(layout.size());
  const auto at = [&](int64_t offset) {
    return reinterpret_cast<float*>(workspace.data() + offset);
  };
  std::vector<float*> conv, fusion;
  for (int64_t i = 0; i < nodes; i++) {
    params[i].conv_grad = at(conv_grads[i]);
    params[i].fused_grad = fused_grads[i] < 0 ? nullptr : at(fused_grads[i]);
    conv.push_back(at(conv_sums[i]));
    fusion.push_back(at(fusion_sums[i]));
  }
  cpu::run_backward_graph(params, conv, fusion, threads, at(scratch));

  // What the sums over pixels say about the weights.
  if (convolves) {
    result.dw = zeros({9, c}), result.pw = zeros({op / kPanel, c, kPanel});
    result.scale = zeros({nodes, c_out}), result.shift = zeros({nodes, c_out});
    float* dw_grad = result.dw.mutable_data_ptr<float>();
    float* pw_grad = result.pw.mutable_data_ptr<float>();
    const float* w = pw.const_data_ptr<float>();
    for (int64_t i = 0; i < nodes; i++) {
      const float *g = conv[i], *taps_grad = g + op * c, *shift_grad = taps_grad + 9 * cp;
      float* scale_grad = result.scale.mutable_data_ptr<float>() + i * c_out;
      std::copy_n(shift_grad, c_out, result.shift.mutable_data_ptr<float>() + i * c_out);
      Floats dot(static_cast<size_t>(op), 0.0f);
      for (int64_t p = 0; p < op / kPanel; p++)
        for (int64_t k = 0; k < c * kPanel; k++) {
          const int64_t o = p * kPanel + k % kPanel, n = p * c * kPanel + k;
          dot[o] += g[n] * w[n];
          if (o < c_out) pw_grad[n] += g[n] * scale[i * c_out + o];
        }
      std::copy_n(dot.data(), c_out, scale_grad);
      for (int64_t k = 0; k < 9; k++)
        for (int64_t j = 0; j < c; j++) dw_grad[k * c + j] += taps_grad[k * cp + j];
    }
  }
  Floats weight_grad(factors.weight.size(), 0.0f);
  if (factors.affine) result.scales = zeros({edge, c}), result.offsets = zeros({edge, c});
  edge = 0;
  for (int64_t i = 0; i < nodes; i++) {
    const int64_t edges = call.edge_counts[i];
    const float* total = fusion[i] + edges * cp;
    for (int64_t e = 0; e < edges; e++, edge++)
      for (int64_t j = 0; j < c; j++) {
        const int64_t k = edge * cp + j;
        const float g = fusion[i][e * cp + j];
        if (!factors.affine) {
          weight_grad[k] = g;
          continue;
        }
        const float s = call.scales->const_data_ptr<float>()[edge * c + j] * factors.sign[k];
        const float o = call.offsets->const_data_ptr<float>()[edge * c + j];
        weight_grad[k] = g * s + total[j] * o;
        result.scales.mutable_data_ptr<float>()[edge * c + j] =
            factors.weight[k] * factors.sign[k] * g;
        result.offsets.mutable_data_ptr<float>()[edge * c + j] = factors.weight[k] * total[j];
      }
  }
  if (call.edge_weights) {
    Ints shape{factors.edges};
    if (call.edge_weights->dim() == 2) shape.push_back(c);
    result.edge_weights = zeros(shape);
    edge_weight_gradient(call, factors, weight_grad, result.edge_weights);
  }
  return result;
}

Tensors joined(Tensors maps, const Tensors& more) {
  maps.insert(maps.end(), more.begin(), more.end());
  return maps;
}

Nodes one_node(const Tensors& inputs, const std::optional<Tensor>& edge_weights, const Ints& size,
               int64_t fusion, int64_t pool, int64_t pre) {
  Nodes call{};
  call.inputs = inputs;
  call.edge_weights = edge_weights;
  call.edge_counts = {static_cast<int64_t>(inputs.size())};
  call.sizes = size;
  call.fusion = fusion_of(fusion), call.pool = pool_of(pool), call.pre = activation_of(pre);
  STD_TORCH_CHECK(!inputs.empty(), "inputs must be a non-empty list of maps");
  call.c_out = inputs[0].size(1);
  return call;
}

Tensors weighted_fusion_backward(const Tensor grad, const Tensors inputs,
                                 const std::optional<Tensor> edge_weights, const Ints size,
                                 int64_t fusion, int64_t pool, int64_t activation) {
  const Nodes call = one_node(inputs, edge_weights, size, fusion, pool, activation);
  const Gradients g = gradients(call, {grad}, nullptr);
  return joined(g.inputs, {g.edge_weights});
}

Tensors fusion_node_backward(const Tensor grad, const Tensors inputs,
                             const std::optional<Tensor> edge_weights, const Tensor dw_weight,
                             const Tensor pw_weight, const Tensor scale, const Tensor shift,
                             const Ints size, int64_t fusion, int64_t pool, int64_t pre_activation,
                             int64_t post_activation) {
  Nodes call = one_node(inputs, edge_weights, size, fusion, pool, pre_activation);
  call.dw = dw_weight, call.pw = pw_weight, call.scale = scale, call.shift = shift;
  call.c_out = scale.size(-1), call.post = activation_of(post_activation);
  const Gradients g = gradients(call, {grad}, nullptr);
  return joined(g.inputs, {g.edge_weights, g.dw, g.pw, torch::stable::select(g.scale, 0, 0),
                           torch::stable::select(g.shift, 0, 0)});
}

// Nodes of one input each: the levels of a head.
void set_levels(Nodes& call, const Tensors& inputs) {
  call.inputs = inputs;
  call.fusion = Fusion::sum;
  for (const Tensor& x : inputs) {
    call.edge_counts.push_back(1);
    call.sizes.push_back(x.size(2)), call.sizes.push_back(x.size(3));
  }
}

Tensors separable_conv_backward(const Tensors grads, const Tensors inputs, const Tensor dw_weight,
                                const Tensor pw_weight, const Tensor scale, const Tensor shift,
                                int64_t activation) {
  Nodes call{};
  set_levels(call, inputs);
  call.dw = dw_weight, call.pw = pw_weight, call.scale = scale, call.shift = shift;
  call.c_out = scale.size(-1), call.post = activation_of(activation);
  const Gradients g = gradients(call, grads, nullptr);
  return joined(g.inputs, {g.dw, g.pw, g.scale, g.shift});
}

Nodes training_nodes(const Tensors& inputs, const std::optional<Tensor>& scales,
                     const std::optional<Tensor>& offsets,
                     const std::optional<Tensor>& edge_weights, const Tensor& dw_weight,
                     const Tensor& pw_weight, const Tensor& shift, const Ints& edge_counts,
                     const Ints& sizes, int64_t fusion, int64_t pool, int64_t activation) {
  Nodes call{};
  call.inputs = inputs;
  call.edge_weights = edge_weights;
  if (scales) call.scales = torch::stable::contiguous(*scales);
  if (offsets) call.offsets = torch::stable::contiguous(*offsets);
  call.dw = dw_weight, call.pw = pw_weight, call.shift = shift;
  call.c_out = shift.size(0);
  call.edge_counts = edge_counts, call.sizes = sizes;
  call.fusion = fusion_of(fusion), call.pool = pool_of(pool), call.pre = activation_of(activation);
  return call;
}

Tensors training_node(const Tensors inputs, const std::optional<Tensor> scales,
                      const std::optional<Tensor> offsets, const std::optional<Tensor> edge_weights,
                      const Tensor dw_weight, const Tensor pw_weight, const Tensor shift,
                      const Ints edge_counts, const Ints sizes, int64_t fusion, int64_t pool,
                      int64_t activation, bool with_statistics) {
  const Nodes call = training_nodes(inputs, scales, offsets, edge_weights, dw_weight, pw_weight,
                                    shift, edge_counts, sizes, fusion, pool, activation);
  const Tensors maps = checked_maps(call);
  const Factors factors(call);
  const int64_t c = factors.c, c_out = call.c_out, op = padded(c_out);
  const auto nodes = static_cast<int64_t>(edge_counts.size());
  const Tensor dw = float_weight(dw_weight, 9 * c, "dw_weight");
  const Tensor pw = float_weight(pw_weight, op * c, "pw_weight");
  const Tensor bias = float_weight(shift, c_out, "shift");
  const Floats ones(static_cast<size_t>(c_out), 1.0f);

  const cpu::Runtime threads = runtime();
  const cpu::Kernels& kernels = cpu::kernels();
  Layout layout;
  Tensors results;
  std::vector<NodeParams> params(edge_counts.size());
  std::vector<cpu::RowGroups> bands;  // of one image: the statistics must not depend on threads
  Ints moments, tasks;
  int64_t edge = 0, floats = 0;
  for (int64_t i = 0; i < nodes; i++) {
    NodeParams& p = params[i];
    p.fusion = fusion_params(call, maps, factors, i, edge);
    edge += edge_counts[i];
    p.c_out = c_out;
    p.dw = dw.const_data_ptr<float>(), p.pw = pw.const_data_ptr<float>();
    p.scale = ones.data(), p.shift = bias.const_data_ptr<float>();
    results.push_back(empty_map(maps[0], c_out, p.fusion.h, p.fusion.w));
    p.out = results.back().mutable_data_ptr();
    bands.push_back(cpu::row_groups(1, p.fusion.h, p.fusion.w));
    tasks.push_back(p.fusion.n * bands.back().count);
    moments.push_back(layout.add(with_statistics ? 4 * tasks.back() * 3 * op : 0));
    floats = std::max(floats, padded(kernels.node_scratch(p)));
  }
  const int64_t scratch = layout.add(4 * floats * threads.threads);
  const Workspace workspace(layout.size());
  const auto at = [&](int64_t offset) {
    return reinterpret_cast<float*>(workspace.data() + offset);
  };
  cpu::Schedule schedule(tasks);
  schedule.run(threads, [&](int64_t i, int64_t task, int thread) {
    const NodeParams& p = params[i];
    const cpu::RowGroups& band = bands[i];
    const int64_t begin = task % band.count * band.rows;
    kernels.separable_node(p, task / band.count, begin, std::min(begin + band.rows, p.fusion.h),
                           at(scratch) + thread * floats,
                           with_statistics ? at(moments[i]) + task * 3 * op : nullptr);
  });

  // Pairs (mean, sum of squared deviations) of the bands merged in order.
  const int64_t rows = with_statistics ? nodes : 0;
  Tensor mean = zeros({rows, c_out}), m2 = zeros({rows, c_out});
  for (int64_t i = 0; i < rows; i++) {
    double n = 0.0;
    std::vector<double> average(static_cast<size_t>(c_out), 0.0), squares = average;
    for (int64_t t = 0; t < tasks[i]; t++) {
      const cpu::RowGroups& band = bands[i];
      const int64_t begin = t % band.count * band.rows;
      const auto pixels = static_cast<double>(
          (std::min(begin + band.rows, params[i].fusion.h) - begin) * params[i].fusion.w);
      const double share = pixels / (n + pixels);
      const float* moment = at(moments[i]) + t * 3 * op;
      for (int64_t o = 0; o < c_out; o++) {
        const double step = double{moment[o]} + moment[op + o] - average[o];
        squares[o] += moment[2 * op + o] + step * step * (n * share);
        average[o] += step * share;
      }
      n += pixels;
    }
    std::copy(average.begin(), average.end(), mean.mutable_data_ptr<float>() + i * c_out);
    std::copy(squares.begin(), squares.end(), m2.mutable_data_ptr<float>() + i * c_out);
  }
  return joined(results, {mean, m2});
}

Tensors training_node_backward(const Tensors grads, const Tensor grad_mean, const Tensor grad_m2,
                               const Tensors outputs, const std::optional<Tensor> mean,
                               const Tensors inputs, const std::optional<Tensor> scales,
                               const std::optional<Tensor> offsets,
                               const std::optional<Tensor> edge_weights, const Tensor dw_weight,
                               const Tensor pw_weight, const Tensor shift, const Ints edge_counts,
                               const Ints sizes, int64_t fusion, int64_t pool, int64_t activation) {
  const Nodes call = training_nodes(inputs, scales, offsets, edge_weights, dw_weight, pw_weight,
                                    shift, edge_counts, sizes, fusion, pool, activation);
  const auto nodes = static_cast<int64_t>(edge_counts.size());
  const int64_t c_out = call.c_out, op = padded(c_out);
  StatisticsGradient statistics;
  if (mean) {
    STD_TORCH_CHECK(outputs.size() == edge_counts.size(), "there must be one output per node");
    const auto rows = [&](const Tensor& t, const char* name) {
      const Tensor given = float_weight(t, nodes * c_out, name);
      return widened(given.const_data_ptr<float>(), nodes, c_out, op);
    };
    statistics = {outputs, rows(*mean, "mean"), rows(grad_m2, "grad_m2"),
                  rows(grad_mean, "grad_mean")};
    for (int64_t i = 0; i < nodes; i++) {
      const auto pixels =
          static_cast<float>(inputs[0].size(0) * call.sizes[2 * i] * call.sizes[2 * i + 1]);
      for (int64_t k = i * op; k < (i + 1) * op; k++)
        statistics.slope[k] *= 2.0f, statistics.constant[k] /= pixels;
    }
  }
  const Gradients g = gradients(call, grads, mean ? &statistics : nullptr);
  Tensor shift_grad = zeros({c_out});
  for (int64_t i = 0; i < nodes * c_out; i++)
    shift_grad.mutable_data_ptr<float>()[i % c_out] += g.shift.const_data_ptr<float>()[i];
  return joined(g.inputs, {g.scales, g.offsets, g.edge_weights, g.dw, g.pw, shift_grad});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(edet_kernels, CPU, m) {
  m.impl("weighted_fusion_backward", TORCH_BOX(&weighted_fusion_backward));
  m.impl("fusion_node_backward", TORCH_BOX(&fusion_node_backward));
  m.impl("separable_conv_backward", TORCH_BOX(&separable_conv_backward));
  m.impl("training_node", TORCH_BOX(&training_node));
  m.impl("training_node_backward", TORCH_BOX(&training_node_backward));
}

}  // namespace edet::torch_ops
