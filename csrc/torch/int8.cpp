// The ops on maps of bytes on the CPU: quantize, dequantize, stem, mbconv, lateral and nodes.
#include <algorithm>
#include <cmath>

#include "../cpu/dispatch.h"
#include "../cpu/int8_plan.h"
#include "../cpu/node_graph.h"
#include "common.h"

namespace edet::torch_ops {

namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

constexpr int64_t kChunk = 1 << 15;  // elements of one task of a conversion

Tensor byte_map(const Tensor& map, const char* name) {
  STD_TORCH_CHECK(map.scalar_type() == ScalarType::Byte, name, " must be uint8, got ",
                  torch::headeronly::toString(map.scalar_type()));
  return channels_last(map);
}

// Reads weights, checked, and keeps contiguous copies alive.
class Weights {
 public:
  const float* floats(const Tensor& t, int64_t numel, const char* name) {
    return read<float>(t, numel, ScalarType::Float, name);
  }
  const int8_t* bytes(const Tensor& t, int64_t numel, const char* name) {
    return read<int8_t>(t, numel, ScalarType::Char, name);
  }
  template <class T>
  const T* read(const Tensor& t, int64_t numel, ScalarType dtype, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype),
                    ", got ", torch::headeronly::toString(t.scalar_type()));
    STD_TORCH_CHECK(t.numel() == numel, name, " must have ", numel, " elements, got ", t.numel());
    kept_.push_back(torch::stable::contiguous(t));
    return static_cast<const T*>(kept_.back().const_data_ptr());
  }

 private:
  Tensors kept_;
};

int64_t packed_pointwise(int64_t c_out, int64_t c_in) { return padded(c_out) * round_up(c_in, 4); }

template <class F>
void in_chunks(int64_t n, const F& f) {
  cpu::Schedule schedule({divide_up(n, kChunk)});
  schedule.run(runtime(), [&](int64_t, int64_t task, int) {
    const int64_t begin = task * kChunk;
    f(begin, std::min(kChunk, n - begin));
  });
}

}  // namespace

static Tensor int8_quantize(const Tensor input, double inverse, int64_t zero) {
  STD_TORCH_CHECK(map_dtype(input) == DType::f32, "input must be float32");
  const Tensor map = channels_last(input);
  Tensor out =
      empty_map(map, {map.size(0), map.size(1), map.size(2), map.size(3)}, ScalarType::Byte);
  const auto* from = static_cast<const float*>(map.const_data_ptr());
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  in_chunks(map.numel(), [&](int64_t at, int64_t count) {
    cpu::int8_kernels().quantize(from + at, count, static_cast<float>(inverse),
                                 static_cast<float>(zero), to + at);
  });
  return out;
}

static Tensor int8_dequantize(const Tensor input, double scale, int64_t zero) {
  const Tensor map = byte_map(input, "input");
  Tensor out =
      empty_map(map, {map.size(0), map.size(1), map.size(2), map.size(3)}, ScalarType::Float);
  const auto* from = static_cast<const uint8_t*>(map.const_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  in_chunks(map.numel(), [&](int64_t at, int64_t count) {
    cpu::int8_kernels().dequantize(from + at, count, static_cast<float>(scale),
                                   static_cast<float>(zero), to + at);
  });
  return out;
}

// The stem of maps of floats, a row at a time, which is rounded while it is in the cache.
static Tensor int8_stem(const Tensor image, const Tensor weight, const Tensor scale,
                        const Tensor shift, const std::optional<Tensor> mean,
                        const std::optional<Tensor> std, const Ints padding, const Ints size,
                        int64_t activation, double inverse, int64_t zero) {
  Tensors kept;
  Tensor floats;
  StemParams p = stem_params(
      image, weight, scale, shift, mean, std, padding, size, activation, ScalarType::Float,
      [&](const Tensor& t, int64_t numel, const char* name) {
        kept.push_back(float_weight(t, numel, name));
        return kept.back().const_data_ptr<float>();
      },
      &floats);
  for (int d = 0; d < 4; d++) p.stride[d] = image.stride(d);
  Tensor out = empty_map(floats, {floats.size(0), p.c_out, p.out_h, p.out_w}, ScalarType::Byte);
  auto* to = static_cast<uint8_t*>(out.mutable_data_ptr());

  const cpu::Runtime threads = runtime();
  const int64_t row = p.out_w * p.c_out, values = round_up(row, 16);
  const int64_t mine = values + round_up(cpu::kernels().stem_scratch(p), 16);
  const Workspace workspace(4 * mine * threads.threads);
  cpu::Schedule schedule({p.n * p.out_h});
  schedule.run(threads, [&](int64_t, int64_t task, int thread) {
    float* from = reinterpret_cast<float*>(workspace.data()) + thread * mine;
    const int64_t i = task / p.out_h, y = task % p.out_h;
    StemParams q = p;
    q.image = static_cast<const char*>(image.const_data_ptr()) +
              i * p.stride[0] * static_cast<int64_t>(image.element_size());
    // row y of an image lies y rows behind `out`: here it is the thread's only one
    q.out = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(from) -
                                    sizeof(float) * static_cast<uintptr_t>(y * row));
    cpu::kernels().stem_rows(q, 0, y, y + 1, from + values);
    cpu::int8_kernels().quantize(from, row, static_cast<float>(inverse), static_cast<float>(zero),
                                 to + task * row);
  });
  return out;
}

// expand: [] or [packed, rows]; depthwise: [packed, rows, pad]; squeeze: [] or [reduce, rows,
// excite, rows, zeros]; project: [packed, rows], its weight of floats with squeeze-excite.
static Tensor int8_mbconv(const Tensor input, const Tensors expand, const Tensors depthwise,
                          const Tensors squeeze, const Tensors project, int64_t stride,
                          const Ints padding, const Ints size, int64_t activation,
                          double residual) {
  const Tensor map = byte_map(input, "input");
  STD_TORCH_CHECK(expand.size() == 0 || expand.size() == 2, "expand must be 0 or 2 tensors");
  STD_TORCH_CHECK(depthwise.size() == 3, "depthwise must be 3 tensors");
  STD_TORCH_CHECK(squeeze.size() == 0 || squeeze.size() == 5, "squeeze must be 0 or 5 tensors");
  STD_TORCH_CHECK(project.size() == 2, "project must be 2 tensors");
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  Weights weights;
  Int8MbconvParams p{};
  p.input = static_cast<const uint8_t*>(map.const_data_ptr());
  p.n = map.size(0), p.h = map.size(2), p.w = map.size(3), p.c_in = map.size(1);
  const Pair before = pair_of(padding, "padding"), out_size = pair_of(size, "size");
  p.pad_top = before.y, p.pad_left = before.x, p.out_h = out_size.y, p.out_w = out_size.x;
  p.kernel = static_cast<int>(depthwise[0].size(0)), p.stride = static_cast<int>(stride);
  STD_TORCH_CHECK(p.kernel == 3 || p.kernel == 5, "the depthwise kernel must be 3 or 5 wide, got ",
                  p.kernel);
  STD_TORCH_CHECK(p.h >= 1 && p.w >= 1 && p.out_h >= 1 && p.out_w >= 1 && p.pad_top >= 0 &&
                      p.pad_left >= 0 && p.pad_top < p.kernel && p.pad_left < p.kernel &&
                      (p.out_h - 1) * p.stride < p.h + p.pad_top &&
                      (p.out_w - 1) * p.stride < p.w + p.pad_left,
                  "padding and size must be those of a convolution of the map");
  p.c_mid = depthwise[2].numel();
  p.c_out = project[1].size(-1);
  p.activation = activation_of(activation);
  if (expand.size()) {
    p.expand = weights.bytes(expand[0], packed_pointwise(p.c_mid, p.c_in), "expand weight");
    p.expand_rows = weights.floats(expand[1], kRequantiseRows * p.c_mid, "expand rows");
  } else {
    STD_TORCH_CHECK(p.c_mid == p.c_in, "without expand the channels must be ", p.c_in, ", got ",
                    p.c_mid);
  }
  const int64_t taps = p.kernel == 3 ? 3 * 4 : 5 * 8;
  p.dw = weights.bytes(depthwise[0], taps * p.c_mid, "depthwise weight");
  p.dw_rows = weights.floats(depthwise[1], kRequantiseRows * p.c_mid, "depthwise rows");
  p.pad = weights.read<uint8_t>(depthwise[2], p.c_mid, ScalarType::Byte, "pad");
  p.project_rows = weights.floats(project[1], 2 * p.c_out, "project rows");
  if (squeeze.size()) {
    p.c_reduced = squeeze[1].size(-1);
    const int64_t both = p.c_reduced * p.c_mid;
    p.reduce = weights.read<int16_t>(squeeze[0], both, ScalarType::Short, "reduce weight");
    p.reduce_rows = weights.floats(squeeze[1], 2 * p.c_reduced, "reduce rows");
    p.excite = weights.read<int16_t>(squeeze[2], both, ScalarType::Short, "excite weight");
    p.excite_rows = weights.floats(squeeze[3], 2 * p.c_mid, "excite rows");
    p.zeros = weights.floats(squeeze[4], p.c_mid, "zeros");
    p.plain_project = weights.floats(project[0], padded(p.c_out) * p.c_mid, "project weight");
  } else {
    p.project = weights.bytes(project[0], packed_pointwise(p.c_out, p.c_mid), "project weight");
  }
  p.residual = static_cast<float>(residual);
  STD_TORCH_CHECK(residual == 0 || (p.c_out == p.c_in && p.out_h == p.h && p.out_w == p.w),
                  "residual must be 0 where the result is of another shape");
  Tensor out = empty_map(map, {map.size(0), p.c_out, p.out_h, p.out_w}, ScalarType::Byte);
  p.out = static_cast<uint8_t*>(out.mutable_data_ptr());
  const cpu::Runtime threads = runtime();
  const Workspace workspace(cpu::plan_int8_mbconv(p, threads.threads));
  cpu::run_int8_mbconv(p, threads, workspace.data());
  return out;
}

static Tensors int8_lateral(const Tensor input, const Tensors pw_weights, const Tensors rows,
                            int64_t pooled, int64_t pool) {
  const Tensor map = byte_map(input, "input");
  const int64_t n = map.size(0), h = map.size(2), w = map.size(3), c_in = map.size(1);
  STD_TORCH_CHECK(!pw_weights.empty() && pw_weights.size() == rows.size(),
                  "pw_weights and rows must be non-empty lists of one length");
  const cpu::Int8Kernels& k = cpu::int8_kernels();
  const cpu::Runtime threads = runtime();
  Weights weights;
  Tensors results;
  std::vector<Int8Projection> projections;
  int64_t scratch = 64;
  for (size_t i = 0; i < rows.size(); i++) {
    const int64_t c_out = rows[i].size(-1);
    results.push_back(empty_map(map, {map.size(0), c_out, h, w}, ScalarType::Byte));
    projections.push_back({static_cast<const uint8_t*>(map.const_data_ptr()), c_in, c_out,
                           weights.bytes(pw_weights[i], packed_pointwise(c_out, c_in), "weight"),
                           weights.floats(rows[i], 2 * c_out, "rows"),
                           static_cast<uint8_t*>(results.back().mutable_data_ptr())});
    scratch = std::max(scratch, k.projection_scratch(projections.back()));
  }
  const int64_t pixels = n * h * w;
  const cpu::PixelBlocks blocks(pixels, 1, threads.threads);
  Ints tasks{blocks.count()};
  struct PoolStep {
    FusionParams params;
    uint8_t* out;
    int64_t rows, bands;
  };
  std::vector<PoolStep> pools;
  Tensors chain{results.back()};
  for (int64_t i = 0; i < pooled; i++) {
    const Tensor from = chain.back();
    PoolStep s{};
    s.params.n = n, s.params.c = from.size(1);
    s.params.h = (from.size(2) + 1) / 2, s.params.w = (from.size(3) + 1) / 2;
    s.params.edge[0] = make_edge(from.const_data_ptr(), from.size(2), from.size(3), s.params.h,
                                 s.params.w, pool_of(pool), -1);
    if (s.params.edge[0].resize != Resize::max_pool)  // one pixel stays what it is
      s.params.edge[0].rows = s.params.edge[0].columns = {1, 1, 0};
    chain.push_back(
        empty_map(map, {map.size(0), s.params.c, s.params.h, s.params.w}, ScalarType::Byte));
    s.out = static_cast<uint8_t*>(chain.back().mutable_data_ptr());
    s.rows = cpu::band_rows(s.params.h, s.params.w, threads.threads);
    s.bands = divide_up(s.params.h, s.rows);
    tasks.push_back(n * s.bands);
    pools.push_back(s);
  }
  scratch = round_up(scratch, 64);
  const Workspace workspace(scratch * threads.threads);
  cpu::Schedule schedule(tasks);
  const auto ready = [&](int64_t step, int64_t) { return step == 0 || schedule.done(step - 1); };
  schedule.run(threads, ready, [&](int64_t step, int64_t task, int thread) {
    if (step == 0) {
      for (const Int8Projection& p : projections)
        k.projection(p, blocks.begin(task), blocks.end(task), workspace.data() + thread * scratch);
      return;
    }
    const PoolStep& s = pools[static_cast<size_t>(step) - 1];
    const int64_t begin = task % s.bands * s.rows;
    k.pool(s.params, s.out, task / s.bands, begin, std::min(begin + s.rows, s.params.h));
  });
  if (pooled) {
    results.pop_back();
    results.insert(results.end(), chain.begin() + 1, chain.end());
  }
  return results;
}

namespace {

// One layer: weights of one row for all its nodes, or of one row each.
struct ByteLayer {
  int64_t c, c_out, rows, weights, fuse_rows, out_rows;
  const float *fuse, *mid, *out;
  const int8_t *dw, *pw;
};

ByteLayer byte_layer(Weights& weights, const Tensor& fuse, const Tensor& dw, const Tensor& mid,
                     const Tensor& pw, const Tensor& out) {
  STD_TORCH_CHECK(
      fuse.dim() == 3 && mid.dim() == 3 && out.dim() == 3 && dw.dim() == 4 && pw.dim() == 5,
      "fuse_rows, mid_rows and out_rows must have 3 dimensions, dw_weights 4 and "
      "pw_weights 5");
  ByteLayer l{};
  l.c = fuse.size(2), l.c_out = out.size(2), l.rows = fuse.size(0), l.weights = dw.size(0);
  l.fuse_rows = fuse.size(1), l.out_rows = out.size(1);
  STD_TORCH_CHECK(l.weights == 1 || l.weights == l.rows, "dw_weights must have 1 or ", l.rows,
                  " rows, got ", l.weights);
  STD_TORCH_CHECK(l.fuse_rows == 1 || l.fuse_rows >= 4, "fuse_rows must have 1 or n + 3 rows, got ",
                  l.fuse_rows);
  STD_TORCH_CHECK(l.out_rows == 2 || l.out_rows == kRequantiseRows, "out_rows must be 2 or 4 rows");
  l.fuse = weights.floats(fuse, l.rows * l.fuse_rows * l.c, "fuse_rows");
  l.dw = weights.bytes(dw, l.weights * 12 * l.c, "dw_weights");
  l.mid = weights.floats(mid, l.rows * 2 * l.c, "mid_rows");
  l.pw = weights.bytes(pw, l.weights * packed_pointwise(l.c_out, l.c), "pw_weights");
  l.out = weights.floats(out, l.rows * l.out_rows * l.c_out, "out_rows");
  return l;
}

}  // namespace

static Tensors int8_nodes(const Tensors inputs, const Tensors fuse_rows, const Tensors dw_weights,
                          const Tensors mid_rows, const Tensors pw_weights, const Tensors out_rows,
                          const Ints layers, const Ints edges, const Ints edge_counts,
                          const Ints sizes, const Ints outputs, int64_t pool,
                          int64_t pre_activation, int64_t post_activation) {
  const size_t count = layers.size(), kinds = dw_weights.size();
  STD_TORCH_CHECK(count >= 1 && edge_counts.size() == count && sizes.size() == 2 * count,
                  "layers, edge_counts and sizes must name the same nodes");
  STD_TORCH_CHECK(fuse_rows.size() == kinds && mid_rows.size() == kinds &&
                      pw_weights.size() == kinds && out_rows.size() == kinds,
                  "weights and rows must be lists of one length");
  Weights weights;
  Tensors maps;
  NodeGraph graph{};
  graph.pool = pool_of(pool), graph.bytes = true;
  struct Known {
    int64_t c, h, w;
    bool bytes;
  };
  std::vector<Known> known;
  for (const Tensor& x : checked_maps(inputs)) {
    maps.push_back(byte_map(x, "inputs"));
    graph.inputs.push_back({maps.back().const_data_ptr(), x.size(2), x.size(3)});
    known.push_back({x.size(1), x.size(2), x.size(3), true});
  }
  std::vector<ByteLayer> parts;
  for (size_t l = 0; l < kinds; l++)
    parts.push_back(
        byte_layer(weights, fuse_rows[l], dw_weights[l], mid_rows[l], pw_weights[l], out_rows[l]));
  Ints row(kinds, 0);
  std::vector<Int8NodeParams> nodes;
  const auto given = static_cast<int64_t>(inputs.size());
  size_t at = 0;
  for (size_t i = 0; i < count; i++) {
    STD_TORCH_CHECK(layers[i] >= 0 && layers[i] < static_cast<int64_t>(kinds),
                    "layers must name a layer, got ", layers[i]);
    const auto kind = static_cast<size_t>(layers[i]);
    const ByteLayer& l = parts[kind];
    const int64_t r = row[kind]++, part = l.weights == 1 ? 0 : r, n = edge_counts[i];
    STD_TORCH_CHECK(r < l.rows, "a layer has more nodes than rows");
    STD_TORCH_CHECK(n >= 1 && n <= kMaxEdges && at + static_cast<size_t>(n) <= edges.size(),
                    "edges must name inputs or earlier nodes");
    Int8NodeParams q{};
    q.fused = l.fuse_rows > 1;
    STD_TORCH_CHECK(n == (q.fused ? l.fuse_rows - 3 : 1), "fuse_rows must have ", n,
                    " + 3 rows, got ", l.fuse_rows);
    FusionParams& f = q.node.fusion;
    f.dtype = DType::f32;
    f.n = inputs[0].size(0), f.c = l.c, f.h = sizes[2 * i], f.w = sizes[2 * i + 1];
    f.edges = static_cast<int>(n);
    for (int64_t e = 0; e < n; e++) {
      const int64_t id = edges[at++];
      STD_TORCH_CHECK(id >= 0 && id < static_cast<int64_t>(known.size()),
                      "edges must name inputs or earlier nodes");
      const Known& from = known[static_cast<size_t>(id)];
      STD_TORCH_CHECK(from.c == l.c && from.bytes, "a node of ", l.c,
                      " channels must read maps of bytes with as many, got ", from.c);
      STD_TORCH_CHECK(q.fused || (from.h == f.h && from.w == f.w),
                      "a map that is not fused must have the node's size");
      f.edge[e] = make_edge(id < given ? graph.inputs[static_cast<size_t>(id)].data : nullptr,
                            from.h, from.w, f.h, f.w, graph.pool,
                            static_cast<int>(id < given ? -1 - id : id - given));
    }
    f.activation = activation_of(pre_activation);
    q.node.activation = activation_of(post_activation);
    q.node.c_out = l.c_out;
    q.fuse = l.fuse + r * l.fuse_rows * l.c;
    q.dw = l.dw + part * 12 * l.c;
    q.mid = l.mid + r * 2 * l.c;
    q.pw = l.pw + part * packed_pointwise(l.c_out, l.c);
    q.out_rows = l.out + r * l.out_rows * l.c_out;
    q.float_out = l.out_rows == 2;
    known.push_back({l.c_out, f.h, f.w, !q.float_out});
    graph.nodes.push_back(q.node);
    nodes.push_back(q);
  }
  std::vector<bool> is_output(count, false);
  Tensors results;
  for (int64_t id : outputs) {
    const auto i = static_cast<size_t>(id - given);
    STD_TORCH_CHECK(id >= given && i < count, "outputs must be ids of nodes, got ", id);
    STD_TORCH_CHECK(!is_output[i], "outputs must be different nodes");
    is_output[i] = true;
    const NodeParams& p = graph.nodes[i];
    results.push_back(empty_map(inputs[0], {inputs[0].size(0), p.c_out, p.fusion.h, p.fusion.w},
                                nodes[i].float_out ? ScalarType::Float : ScalarType::Byte));
    graph.nodes[i].out = results.back().mutable_data_ptr();
  }
  for (size_t i = 0; i < count; i++)
    STD_TORCH_CHECK(is_output[i] || !nodes[i].float_out, "a map of floats must be an output");
  const cpu::Int8Kernels& k = cpu::int8_kernels();
  const cpu::Runtime threads = runtime();
  int64_t scratch = 64;
  for (const Int8NodeParams& q : nodes) scratch = std::max(scratch, k.node_scratch(q));
  scratch = round_up(scratch, 64);
  int64_t bytes = scratch * threads.threads;
  const Ints offsets = place_maps(graph, is_output, true, &bytes);
  const Workspace workspace(bytes);
  for (size_t i = 0; i < count; i++) {
    NodeParams& p = graph.nodes[i];
    if (!is_output[i]) p.out = workspace.data() + offsets[i];
    for (int e = 0; e < p.fusion.edges; e++) {
      Edge& edge = p.fusion.edge[e];
      if (edge.source >= 0) edge.data = graph.nodes[static_cast<size_t>(edge.source)].out;
    }
    nodes[i].node = p;
  }
  cpu::run_node_graph(graph, threads,
                      [&](size_t i, int64_t image, int64_t begin, int64_t end, int thread) {
                        k.node(nodes[i], image, begin, end, workspace.data() + thread * scratch);
                      });
  return results;
}

STABLE_TORCH_LIBRARY_IMPL(edet_kernels, CPU, m) {
  m.impl("int8_quantize", TORCH_BOX(&int8_quantize));
  m.impl("int8_dequantize", TORCH_BOX(&int8_dequantize));
  m.impl("int8_stem", TORCH_BOX(&int8_stem));
  m.impl("int8_mbconv", TORCH_BOX(&int8_mbconv));
  m.impl("int8_lateral", TORCH_BOX(&int8_lateral));
  m.impl("int8_nodes", TORCH_BOX(&int8_nodes));
}

}  // namespace edet::torch_ops
