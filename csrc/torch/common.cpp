// Checks, memory, threads and coefficients shared by the ops' glue.
#include "common.h"

#ifdef __linux__
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace edet::torch_ops {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

namespace {

bool poisoned() {
  static const bool on = [] {
    const char* value = std::getenv("EDET_POISON");
    return value && std::strcmp(value, "1") == 0;
  }();
  return on;
}

void poison(const Tensor& t) {
  // all bits set is a NaN in every float dtype
  if (poisoned() && t.is_cpu() && t.numel())
    std::memset(t.mutable_data_ptr(), 0xff, static_cast<size_t>(t.numel()) * t.element_size());
}

// Asks for large pages for large memory, which glibc may take from the system in each call and give
// back. A fault for every 4 KiB may take longer than the arithmetic: D0's heads at batch 8 spent 32
// of 52 ms on them.
void ask_for_large_pages(const Tensor& t) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kLarge = 4 << 20;
  const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
  if (!t.is_cpu() || bytes < kLarge) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t begin = (first + page - 1) / page * page;
  const uintptr_t end = (first + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a system may refuse
#endif
}

bool is_channels_last(const Tensor& t) {
  const int64_t order[4] = {1, 3, 2, 0};  // from the innermost
  int64_t expected = 1;
  for (int64_t d : order) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

}  // namespace

DType map_dtype(const Tensor& map) {
  switch (map.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default:
      STD_TORCH_CHECK(false, "maps must be float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(map.scalar_type()));
  }
}

Tensor channels_last(const Tensor& map) {
  STD_TORCH_CHECK(map.dim() == 4, "maps must be (N, C, H, W), got ", map.dim(), " dimensions");
  if (is_channels_last(map)) return map;
  return torch::stable::contiguous(map, MemoryFormat::ChannelsLast);
}

const Tensors& checked_maps(const Tensors& inputs) {
  STD_TORCH_CHECK(!inputs.empty(), "inputs must be a non-empty list of maps");
  for (const Tensor& x : inputs) {
    STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == inputs[0].size(0) &&
                        x.size(1) == inputs[0].size(1) &&
                        x.scalar_type() == inputs[0].scalar_type(),
                    "inputs must be maps (N, C, H, W) of one batch, channel count and dtype");
  }
  return inputs;
}

Tensors graph_inputs(const Tensors& inputs) {
  Tensors maps;
  for (const Tensor& x : checked_maps(inputs)) maps.push_back(channels_last(x));
  return maps;
}

Pair pair_of(const Ints& value, const char* name) {
  STD_TORCH_CHECK(value.size() == 2, name, " must be two numbers, got ", value.size());
  return {value[0], value[1]};
}

Tensor float_weight(const Tensor& weight, int64_t numel, const char* name) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, name, " must be float32, got ",
                  torch::headeronly::toString(weight.scalar_type()));
  STD_TORCH_CHECK(weight.numel() == numel, name, " must have ", numel, " elements, got ",
                  weight.numel());
  return torch::stable::contiguous(weight);
}

Tensor empty_map(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  return empty_map(like, {like.size(0), channels, height, width}, like.scalar_type());
}

void fill_coefficients(const float* edge_weights, bool per_channel, int edges, int64_t channels,
                       Fusion fusion, float* coefficients) {
  STD_TORCH_CHECK(edge_weights || fusion == Fusion::sum, "edge_weights must be given, got None");
  const int64_t pitch = padded(channels);
  std::memset(coefficients, 0, sizeof(float) * static_cast<size_t>(edges * pitch));
  const int64_t distinct = per_channel ? channels : 1;
  for (int64_t c = 0; c < distinct; c++) {
    const auto weight = [&](int e) { return edge_weights[per_channel ? e * channels + c : e]; };
    float a[kMaxEdges];
    if (fusion == Fusion::sum) {
      for (int e = 0; e < edges; e++) a[e] = 1.0f;
    } else if (fusion == Fusion::unbounded) {
      for (int e = 0; e < edges; e++) a[e] = weight(e);
    } else {
      float largest = weight(0), total = 0.0f;
      for (int e = 1; e < edges; e++) largest = weight(e) > largest ? weight(e) : largest;
      for (int e = 0; e < edges; e++) {
        const float w = weight(e);
        a[e] = fusion == Fusion::softmax ? std::exp(w - largest) : (w < 0.0f ? 0.0f : w);
        total += a[e];
      }
      if (fusion == Fusion::fast) total += kFastEpsilon;
      for (int e = 0; e < edges; e++) a[e] /= total;
    }
    for (int e = 0; e < edges; e++)
      for (int64_t i = c; i < (per_channel ? c + 1 : channels); i++)
        coefficients[e * pitch + i] = a[e];
  }
}

Edge make_edge(const void* data, int64_t in_h, int64_t in_w, int64_t h, int64_t w, Pool pool,
               int source) {
  STD_TORCH_CHECK(in_h > 0 && in_w > 0 && h > 0 && w > 0, "maps must have at least one pixel");
  const Resize kind = resize_kind(in_h, in_w, h, w);
  STD_TORCH_CHECK(kind != Resize::max_pool || (in_h >= h && in_w >= w),
                  "a map must grow or shrink along both axes, got (", in_h, ", ", in_w, ") for (",
                  h, ", ", w, ")");
  return {data, in_h, in_w, kind, pool_window(in_h, h, pool), pool_window(in_w, w, pool), source};
}

MbconvParams mbconv_params(const Tensor& input, const Tensors& expand, const Tensors& depthwise,
                           const Tensors& squeeze, const Tensors& project, int64_t stride,
                           const Ints& padding, const Ints& size, int64_t activation, bool residual,
                           const WeightReader& weight) {
  // AOTInductor's packages hand an empty list on as None, so that one empty tensor means none too
  const auto none = [](const Tensors& parts) {
    return parts.empty() || (parts.size() == 1 && parts[0].numel() == 0);
  };
  const bool expands = !none(expand), squeezes = !none(squeeze);
  STD_TORCH_CHECK(!expands || expand.size() == 3, "expand must be [] or three tensors");
  STD_TORCH_CHECK(depthwise.size() == 3 && project.size() == 3,
                  "depthwise and project must be three tensors each");
  STD_TORCH_CHECK(!squeezes || squeeze.size() == 4, "squeeze must be [] or four tensors");
  MbconvParams p{};
  p.dtype = map_dtype(input);
  p.n = input.size(0), p.c_in = input.size(1), p.h = input.size(2), p.w = input.size(3);
  p.c_mid = depthwise[1].numel();
  p.c_out = project[1].numel();
  STD_TORCH_CHECK(p.c_mid >= 1 && p.c_out >= 1, "depthwise and project must have channels");
  STD_TORCH_CHECK(expands || p.c_mid == p.c_in, "depthwise must have ", p.c_in, " channels");
  const int64_t taps = depthwise[0].numel() / p.c_mid;
  STD_TORCH_CHECK(taps == 9 || taps == 25, "the depthwise kernel must be 3×3 or 5×5, got ", taps,
                  " taps");
  p.kernel = taps == 9 ? 3 : 5;
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride must be 1 or 2, got ", stride);
  p.stride = static_cast<int>(stride);
  const Pair pad = pair_of(padding, "padding"), out = pair_of(size, "size");
  p.pad_top = pad.y, p.pad_left = pad.x;
  p.out_h = out.y, p.out_w = out.x;
  STD_TORCH_CHECK(
      p.pad_top >= 0 && p.pad_top < p.kernel && p.pad_left >= 0 && p.pad_left < p.kernel,
      "padding must be 0 to ", p.kernel - 1);
  const auto reaches = [&](int64_t out, int64_t pad, int64_t in) {
    const int64_t last = (out - 1) * p.stride - pad;  // first input of the last output
    return out > 0 && last < in;
  };
  STD_TORCH_CHECK(reaches(p.out_h, p.pad_top, p.h) && reaches(p.out_w, p.pad_left, p.w),
                  "size does not fit the input");
  p.activation = activation_of(activation);
  p.residual = residual;
  STD_TORCH_CHECK(!residual || (p.c_in == p.c_out && p.h == p.out_h && p.w == p.out_w),
                  "a residual needs an output of the input's shape");

  const auto packed = [](int64_t out, int64_t in) { return padded(out) * in; };
  if (expands) {
    p.expand = weight(expand[0], packed(p.c_mid, p.c_in), "expand[0]");
    p.expand_scale = weight(expand[1], p.c_mid, "expand[1]");
    p.expand_shift = weight(expand[2], p.c_mid, "expand[2]");
  }
  p.dw = weight(depthwise[0], taps * p.c_mid, "depthwise[0]");
  p.dw_scale = weight(depthwise[1], p.c_mid, "depthwise[1]");
  p.dw_shift = weight(depthwise[2], p.c_mid, "depthwise[2]");
  if (squeezes) {
    p.c_reduced = squeeze[1].numel();
    p.reduce = weight(squeeze[0], packed(p.c_reduced, p.c_mid), "squeeze[0]");
    p.reduce_bias = weight(squeeze[1], p.c_reduced, "squeeze[1]");
    p.excite = weight(squeeze[2], packed(p.c_mid, p.c_reduced), "squeeze[2]");
    p.excite_bias = weight(squeeze[3], p.c_mid, "squeeze[3]");
  }
  p.project = weight(project[0], packed(p.c_out, p.c_mid), "project[0]");
  p.project_scale = weight(project[1], p.c_out, "project[1]");
  p.project_shift = weight(project[2], p.c_out, "project[2]");
  return p;
}

StemParams stem_params(const Tensor& image, const Tensor& weight, const Tensor& scale,
                       const Tensor& shift, const std::optional<Tensor>& mean,
                       const std::optional<Tensor>& std, const Ints& padding, const Ints& size,
                       int64_t activation, ScalarType dtype, const WeightReader& floats,
                       Tensor* out) {
  STD_TORCH_CHECK(image.dim() == 4 && image.size(1) == 3, "image must be (N, 3, H, W)");
  StemParams p{};
  p.is_uint8 = image.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(p.is_uint8 || image.scalar_type() == dtype, "image must be uint8 or of dtype");
  STD_TORCH_CHECK(mean.has_value() == std.has_value(), "mean and std go together");
  p.n = image.size(0), p.h = image.size(2), p.w = image.size(3);
  p.c_out = scale.numel();
  const Pair out_size = pair_of(size, "size"), pad = pair_of(padding, "padding");
  p.out_h = out_size.y, p.out_w = out_size.x;
  p.pad_top = pad.y, p.pad_left = pad.x;
  STD_TORCH_CHECK(p.pad_top >= 0 && p.pad_top <= 2 && p.pad_left >= 0 && p.pad_left <= 2,
                  "padding must be 0 to 2");
  STD_TORCH_CHECK(p.out_h > 0 && p.out_w > 0 && 2 * (p.out_h - 1) - p.pad_top < p.h &&
                      2 * (p.out_w - 1) - p.pad_left < p.w,
                  "size does not fit the image");
  p.activation = activation_of(activation);
  p.weight = floats(weight, padded(p.c_out) * 27, "weight");
  p.scale = floats(scale, p.c_out, "scale");
  p.shift = floats(shift, p.c_out, "shift");
  if (mean) {
    p.mean = floats(*mean, 3, "mean");
    p.std = floats(*std, 3, "std");
  }
  *out = empty_map(image, {p.n, p.c_out, p.out_h, p.out_w}, dtype);
  p.dtype = map_dtype(*out);
  return p;
}

NmsSettings nms_settings(int64_t method, double iou_threshold, double sigma, double score_threshold,
                         int64_t max_detections, bool class_agnostic) {
  STD_TORCH_CHECK(max_detections >= 1, "max_detections must be at least 1, got ", max_detections);
  return {enumerator<NmsMethod>(method, 2, "method"),
          static_cast<float>(iou_threshold),
          static_cast<float>(sigma),
          static_cast<float>(score_threshold),
          max_detections,
          class_agnostic};
}

DetectParams detect_params(const Tensors& class_outputs, const Tensors& box_outputs,
                           const Tensor& anchors, const std::optional<Tensor>& limits,
                           int64_t max_candidates, const MapReader& map,
                           const WeightReader& weight) {
  const size_t levels = class_outputs.size();
  STD_TORCH_CHECK(levels >= 1 && levels <= kMaxLevels && box_outputs.size() == levels,
                  "class_outputs and box_outputs must be 1 to ", kMaxLevels, " maps each");
  STD_TORCH_CHECK(max_candidates >= 1, "max_candidates must be at least 1, got ", max_candidates);
  DetectParams p{};
  p.dtype = map_dtype(class_outputs[0]);
  p.levels = static_cast<int>(levels);
  p.n = class_outputs[0].size(0);
  p.cell_anchors = box_outputs[0].size(1) / 4;
  STD_TORCH_CHECK(p.cell_anchors >= 1 && class_outputs[0].size(1) >= p.cell_anchors &&
                      class_outputs[0].size(1) % p.cell_anchors == 0,
                  "class_outputs and box_outputs must have A·classes and A·4 channels");
  p.num_classes = class_outputs[0].size(1) / p.cell_anchors;
  int64_t total = 0;
  for (size_t l = 0; l < levels; l++) {
    const Tensor &c = class_outputs[l], &b = box_outputs[l];
    STD_TORCH_CHECK(c.dim() == 4 && b.dim() == 4 && c.size(0) == p.n && b.size(0) == p.n &&
                        c.size(1) == p.cell_anchors * p.num_classes &&
                        b.size(1) == p.cell_anchors * 4 && c.size(2) == b.size(2) &&
                        c.size(3) == b.size(3) && map_dtype(c) == p.dtype &&
                        map_dtype(b) == p.dtype,
                    "class_outputs and box_outputs must agree in batch, size, channels and dtype");
    p.classes[l] = map(c);
    p.boxes[l] = map(b);
    p.pixels[l] = c.size(2) * c.size(3);
    total += p.pixels[l] * p.cell_anchors;
  }
  p.anchors = weight(anchors, total * 4, "anchors");
  if (limits) p.limits = weight(*limits, p.n * 2, "limits");
  p.candidates = std::min(max_candidates, total * p.num_classes);
  return p;
}

cpu::Runtime runtime() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return {static_cast<int>(threads),
          [](int64_t n, void (*f)(void*, int64_t, int64_t), void* context) {
            torch::stable::parallel_for(
                0, n, 1, [&](int64_t begin, int64_t end) { f(context, begin, end); });
          }};
}

namespace {

// Buffers between calls. One that nobody took for kMostAge calls is given back, and none is taken
// for a call that needs kMostExcess times less: a training step's memory does not stay for ever.
constexpr int64_t kMostAge = 256, kMostExcess = 8, kSmall = 1 << 20;

// Maps from this size on are taken from these buffers too. glibc takes memory of more than 32 MiB
// from the system at every call, which zeroes it: 8 of the 29 ms of D0's heads at batch 8.
constexpr int64_t kMapped = 32 << 20;

struct Pooled {
  struct Buffer {
    Tensor tensor;
    int64_t call;  // the last one it served
  };
  std::mutex mutex;
  std::vector<Buffer> free;
  int64_t calls = 0;
};
// Never destroyed: torch may be gone when static objects are.
Pooled& pooled() {
  static Pooled* p = new Pooled;
  return *p;
}

Tensor take(int64_t bytes) {
  Pooled& p = pooled();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.calls++;
  const auto old = [&](const Pooled::Buffer& b) { return p.calls - b.call > kMostAge; };
  p.free.erase(std::remove_if(p.free.begin(), p.free.end(), old), p.free.end());
  auto best = p.free.end(), outgrown = p.free.end();  // the smallest that fits; one too small
  for (auto b = p.free.begin(); b != p.free.end(); b++) {
    const int64_t size = b->tensor.numel();
    if (size < bytes && bytes / kMostExcess <= size) outgrown = b;
    if (size >= bytes && (size <= kSmall || size / kMostExcess <= bytes) &&
        (best == p.free.end() || size < best->tensor.numel()))
      best = b;
  }
  if (best == p.free.end()) {
    if (outgrown != p.free.end()) p.free.erase(outgrown);  // the new one serves its calls too
    Tensor t = torch::stable::empty({&bytes, 1}, ScalarType::Byte);
    ask_for_large_pages(t);
    return t;
  }
  Tensor t = best->tensor;
  p.free.erase(best);
  return t;
}

void give_back(const Tensor& buffer) {
  Pooled& p = pooled();
  const std::lock_guard<std::mutex> lock(p.mutex);
  p.free.push_back({buffer, p.calls});
}

}  // namespace

Workspace::Workspace(int64_t bytes) : buffer_(take(bytes > 0 ? bytes : 1)) { poison(buffer_); }

Workspace::~Workspace() { give_back(buffer_); }

namespace {

// torch_from_blob of libtorch, which is there from 2.11 on.
using FromBlob = AOTITorchError (*)(void*, int64_t, const int64_t*, const int64_t*, int64_t,
                                    int32_t, int32_t, int32_t, AtenTensorHandle*, int32_t,
                                    const uint8_t*, int64_t, void (*)(void*, void*), void*);

FromBlob from_blob() {
#ifdef __linux__
  static const auto found = [] {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch ? reinterpret_cast<FromBlob>(dlsym(torch, "torch_from_blob")) : nullptr;
  }();
  return found;
#else
  return nullptr;
#endif
}

int64_t element_bytes(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    case ScalarType::Byte: return 1;
    default: return 0;  // no map that an op returns
  }
}

// A channels_last map on the CPU in a buffer that goes back to the others when the map is freed.
Tensor pooled_map(const std::array<int64_t, 4>& size, ScalarType dtype, int64_t bytes) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const int64_t c = size[1], h = size[2], w = size[3];
  const int64_t strides[4] = {c * h * w, 1, w * c, c};
  auto* buffer = new Tensor(take(bytes));
  AtenTensorHandle map;
  const AOTITorchError error = from_blob()(
      buffer->mutable_data_ptr(), 4, size.data(), strides, 0, to<int32_t>(from(dtype)),
      aoti_torch_device_type_cpu(), -1, &map, to<int32_t>(from(torch::headeronly::Layout::Strided)),
      nullptr, 0,
      [](void*, void* context) {
        auto* freed = static_cast<Tensor*>(context);
        give_back(*freed);
        delete freed;
      },
      buffer);
  STABLE_TORCH_ERROR_CODE_CHECK(error);
  return Tensor(map);
}

}  // namespace

Tensor empty_map(const Tensor& like, const std::array<int64_t, 4>& size, ScalarType dtype) {
  const int64_t bytes = size[0] * size[1] * size[2] * size[3] * element_bytes(dtype);
  if (like.is_cpu() && bytes >= kMapped && from_blob()) {
    Tensor t = pooled_map(size, dtype, bytes);
    poison(t);
    return t;
  }
  Tensor t = torch::stable::empty({size.data(), 4}, dtype, std::nullopt, like.device(),
                                  std::nullopt, MemoryFormat::ChannelsLast);
  ask_for_large_pages(t);
  poison(t);
  return t;
}

}  // namespace edet::torch_ops
