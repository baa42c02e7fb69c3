// nms and detect on CUDA: no step waits for the device.
#include "../cuda/detect.h"

#include <tuple>

#include "../cuda/nms.h"
#include "cuda_common.h"

namespace edet::torch_ops {

using torch::headeronly::ScalarType;

namespace {

// A result of the given shape, which the call's kernels write.
template <class T>
Tensor result(CudaCall& call, const Tensor& like, const Ints& shape, ScalarType type, T** data) {
  Tensor t = torch::stable::empty({shape.data(), shape.size()}, type, std::nullopt, like.device());
  *data = static_cast<T*>(call.write(t));
  return t;
}

std::tuple<Tensor, Tensor, Tensor> nms_cuda(const Tensor boxes, const Tensor scores,
                                            const Tensor labels, int64_t method,
                                            double iou_threshold, double sigma,
                                            double score_threshold, int64_t max_detections,
                                            bool class_agnostic) {
  STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4, "boxes must be (B, N, 4)");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, "labels must be int64");
  const int64_t batch = boxes.size(0), n = boxes.size(1);
  STD_TORCH_CHECK(labels.numel() == batch * n, "labels must be (B, N)");
  CudaCall call("nms", boxes);
  NmsParams p{};
  p.boxes = call.floats(boxes, batch * n * 4, "boxes");
  p.scores = call.floats(scores, batch * n, "scores");
  p.labels = static_cast<const int64_t*>(call.read(torch::stable::contiguous(labels)));
  p.n = n;
  p.settings =
      nms_settings(method, iou_threshold, sigma, score_threshold, max_detections, class_agnostic);
  Tensor indices = result(call, boxes, {batch, max_detections}, ScalarType::Long, &p.indices);
  Tensor kept_scores =
      result(call, boxes, {batch, max_detections}, ScalarType::Float, &p.kept_scores);
  Tensor counts = result(call, boxes, {batch}, ScalarType::Long, &p.counts);
  void* memory = call.scratch(cuda::nms_bytes(batch, p));
  call.check(cuda::nms(batch, p, memory, call.stream()));
  return {indices, kept_scores, counts};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> detect_cuda(
    const Tensors class_outputs, const Tensors box_outputs, const Tensor anchors,
    const std::optional<Tensor> limits, int64_t method, double iou_threshold, double sigma,
    double score_threshold, int64_t max_detections, int64_t max_candidates, bool class_agnostic) {
  STD_TORCH_CHECK(!class_outputs.empty(), "class_outputs must be a non-empty list of maps");
  CudaCall call("detect", class_outputs[0]);
  DetectParams p = detect_params(
      class_outputs, box_outputs, anchors, limits, max_candidates,
      [&](const Tensor& map) { return call.map(map); },
      [&](const Tensor& t, int64_t numel, const char* name) {
        return call.floats(t, numel, name);
      });
  p.settings =
      nms_settings(method, iou_threshold, sigma, score_threshold, max_detections, class_agnostic);
  const Ints kept{p.n, max_detections};
  Tensor boxes = result(call, anchors, {p.n, max_detections, 4}, ScalarType::Float, &p.out_boxes);
  Tensor scores = result(call, anchors, kept, ScalarType::Float, &p.out_scores);
  Tensor labels = result(call, anchors, kept, ScalarType::Long, &p.out_labels);
  Tensor counts = result(call, anchors, {p.n}, ScalarType::Long, &p.out_counts);
  void* memory = call.scratch(cuda::detect_bytes(p));
  call.check(cuda::detect(p, memory, call.stream()));
  return {boxes, scores, labels, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EDET_OPS, EDET_CUDA_KEY, m) {
  m.impl("nms", TORCH_BOX(&nms_cuda));
  m.impl("detect", TORCH_BOX(&detect_cuda));
}

}  // namespace edet::torch_ops
