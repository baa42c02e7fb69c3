// What every op's glue shares: checks, memory, threads and the reading of tensors and schema
// integers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <functional>
#include <optional>
#include <vector>

#include "../core/params.h"
#include "../cpu/schedule.h"

// The namespaces of the ops in torch.ops: as they are, and those that multiply floats as tf32; the
// emulation has its own.
#ifndef EDET_OPS
#define EDET_OPS edet_kernels
#define EDET_TF32_OPS edet_kernels_tf32
#endif

namespace edet::torch_ops {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

DType map_dtype(const Tensor& map);

// The map with NHWC bytes: itself, or a copy when its strides are others.
Tensor channels_last(const Tensor& map);

// The maps, one at least, checked to agree in batch, channels and dtype.
const Tensors& checked_maps(const Tensors& inputs);
// The same, laid out so.
Tensors graph_inputs(const Tensors& inputs);

// The (height, width) or (top, left) that `value` must be.
struct Pair {
  int64_t y, x;
};
Pair pair_of(const Ints& value, const char* name);

// A contiguous float tensor of `numel` elements, or an error that names it.
Tensor float_weight(const Tensor& weight, int64_t numel, const char* name);

// An uninitialised channels_last map like `like` (NaN when EDET_POISON=1).
Tensor empty_map(const Tensor& like, int64_t channels, int64_t height, int64_t width);
// The same of any size and dtype on the device of `like`.
Tensor empty_map(const Tensor& like, const std::array<int64_t, 4>& size,
                 torch::headeronly::ScalarType dtype);

// `value` of an enumeration with `count` members.
template <class E>
E enumerator(int64_t value, int64_t count, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value < count, name, " must be 0 to ", count - 1, ", got ", value);
  return static_cast<E>(value);
}
inline Fusion fusion_of(int64_t v) { return enumerator<Fusion>(v, 4, "fusion"); }
inline Pool pool_of(int64_t v) { return enumerator<Pool>(v, 2, "pool"); }
inline Activation activation_of(int64_t v) { return enumerator<Activation>(v, 5, "activation"); }

// Factors of the edges, (edges, C rounded up to kPanel), from edge weights (edges[, C]); null for
// a sum.
void fill_coefficients(const float* edge_weights, bool per_channel, int edges, int64_t channels,
                       Fusion fusion, float* coefficients);

// An edge that brings a map of (in_h, in_w) to (h, w).
Edge make_edge(const void* data, int64_t in_h, int64_t in_w, int64_t h, int64_t w, Pool pool,
               int source);

// Gives the floats of a weight of `numel` elements; an error names it.
using WeightReader = std::function<const float*(const Tensor&, int64_t numel, const char* name)>;

// Checks an inverted residual block's arguments and describes it, but for the memory.
// expand: [] or [packed, scale, shift]; depthwise: [packed, scale, shift];
// squeeze: [] or [reduce, reduce_bias, excite, excite_bias]; project: [packed, scale, shift].
MbconvParams mbconv_params(const Tensor& input, const Tensors& expand, const Tensors& depthwise,
                           const Tensors& squeeze, const Tensors& project, int64_t stride,
                           const Ints& padding, const Ints& size, int64_t activation, bool residual,
                           const WeightReader& weight);

// Checks the first layer's arguments, makes its result and describes it, but for the image's
// memory.
StemParams stem_params(const Tensor& image, const Tensor& weight, const Tensor& scale,
                       const Tensor& shift, const std::optional<Tensor>& mean,
                       const std::optional<Tensor>& std, const Ints& padding, const Ints& size,
                       int64_t activation, torch::headeronly::ScalarType dtype,
                       const WeightReader& floats, Tensor* out);

NmsSettings nms_settings(int64_t method, double iou_threshold, double sigma, double score_threshold,
                         int64_t max_detections, bool class_agnostic);

// Gives the NHWC bytes of a map.
using MapReader = std::function<const void*(const Tensor&)>;

// Checks the head outputs and describes them, but for settings and results.
DetectParams detect_params(const Tensors& class_outputs, const Tensors& box_outputs,
                           const Tensor& anchors, const std::optional<Tensor>& limits,
                           int64_t max_candidates, const MapReader& map,
                           const WeightReader& weight);

// torch's threads, which cpu/workers.h may do without.
cpu::Runtime runtime();

// Memory for one call, taken from a pool that keeps it for the next call.
class Workspace {
 public:
  explicit Workspace(int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* data() const { return static_cast<char*>(buffer_.mutable_data_ptr()); }

 private:
  Tensor buffer_;
};

// Lays out parts of a workspace, each aligned to a cache line.
class Layout {
 public:
  int64_t add(int64_t bytes) {
    const int64_t at = size_;
    size_ += round_up(bytes, 64);
    return at;
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
};

}  // namespace edet::torch_ops
