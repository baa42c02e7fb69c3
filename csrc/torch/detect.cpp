// nms and detect on the CPU.
#include "../cpu/detect.h"

#include <tuple>

#include "../cpu/nms.h"
#include "common.h"

namespace edet::torch_ops {

using torch::headeronly::ScalarType;

static std::tuple<Tensor, Tensor, Tensor> nms(const Tensor boxes, const Tensor scores,
                                              const Tensor labels, int64_t method,
                                              double iou_threshold, double sigma,
                                              double score_threshold, int64_t max_detections,
                                              bool class_agnostic) {
  STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4, "boxes must be (B, N, 4)");
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, "labels must be int64");
  const int64_t batch = boxes.size(0), n = boxes.size(1);
  const Tensor box = float_weight(boxes, batch * n * 4, "boxes");
  const Tensor score = float_weight(scores, batch * n, "scores");
  STD_TORCH_CHECK(labels.numel() == batch * n, "labels must be (B, N)");
  const Tensor label = torch::stable::contiguous(labels);

  const int64_t kept[2] = {batch, max_detections};
  Tensor indices = torch::stable::empty({kept, 2}, ScalarType::Long);
  Tensor kept_scores = torch::stable::empty({kept, 2}, ScalarType::Float);
  Tensor counts = torch::stable::empty({kept, 1}, ScalarType::Long);
  const NmsParams p{
      box.const_data_ptr<float>(),
      score.const_data_ptr<float>(),
      label.const_data_ptr<int64_t>(),
      n,
      nms_settings(method, iou_threshold, sigma, score_threshold, max_detections, class_agnostic),
      indices.mutable_data_ptr<int64_t>(),
      kept_scores.mutable_data_ptr<float>(),
      counts.mutable_data_ptr<int64_t>()};
  cpu::Schedule schedule({batch});
  schedule.run(runtime(), [&](int64_t, int64_t image, int) { cpu::nms_image(p, image); });
  return {indices, kept_scores, counts};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> detect(
    const Tensors class_outputs, const Tensors box_outputs, const Tensor anchors,
    const std::optional<Tensor> limits, int64_t method, double iou_threshold, double sigma,
    double score_threshold, int64_t max_detections, int64_t max_candidates, bool class_agnostic) {
  Tensors kept;
  DetectParams p = detect_params(
      class_outputs, box_outputs, anchors, limits, max_candidates,
      [&](const Tensor& map) {
        kept.push_back(channels_last(map));
        return kept.back().const_data_ptr();
      },
      [&](const Tensor& t, int64_t numel, const char* name) {
        kept.push_back(float_weight(t, numel, name));
        return kept.back().const_data_ptr<float>();
      });
  p.settings =
      nms_settings(method, iou_threshold, sigma, score_threshold, max_detections, class_agnostic);

  const int64_t shape[3] = {p.n, max_detections, 4};
  Tensor boxes = torch::stable::empty({shape, 3}, ScalarType::Float);
  Tensor scores = torch::stable::empty({shape, 2}, ScalarType::Float);
  Tensor labels = torch::stable::empty({shape, 2}, ScalarType::Long);
  Tensor counts = torch::stable::empty({shape, 1}, ScalarType::Long);
  p.out_boxes = boxes.mutable_data_ptr<float>();
  p.out_scores = scores.mutable_data_ptr<float>();
  p.out_labels = labels.mutable_data_ptr<int64_t>();
  p.out_counts = counts.mutable_data_ptr<int64_t>();
  cpu::run_detect(p, runtime());
  return {boxes, scores, labels, counts};
}

STABLE_TORCH_LIBRARY_IMPL(edet_kernels, CPU, m) {
  m.impl("nms", TORCH_BOX(&nms));
  m.impl("detect", TORCH_BOX(&detect));
}

}  // namespace edet::torch_ops
