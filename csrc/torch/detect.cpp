// nms and detect on the CPU.
#include "../cpu/detect.h"

#include <tuple>

#include "../cpu/nms.h"
#include "common.h"

namespace edet::torch_ops {

using torch::headeronly::ScalarType;

static NmsSettings settings(int64_t method, double iou_threshold, double sigma,
                            double score_threshold, int64_t max_detections) {
  STD_TORCH_CHECK(max_detections >= 1, "max_detections must be at least 1, got ", max_detections);
  return {enumerator<NmsMethod>(method, 2, "method"), static_cast<float>(iou_threshold),
          static_cast<float>(sigma), static_cast<float>(score_threshold), max_detections};
}

static std::tuple<Tensor, Tensor, Tensor> nms(const Tensor boxes, const Tensor scores,
                                              const Tensor labels, int64_t method,
                                              double iou_threshold, double sigma,
                                              double score_threshold, int64_t max_detections) {
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
  const NmsParams p{box.const_data_ptr<float>(),
                    score.const_data_ptr<float>(),
                    label.const_data_ptr<int64_t>(),
                    n,
                    settings(method, iou_threshold, sigma, score_threshold, max_detections),
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
    double score_threshold, int64_t max_detections, int64_t max_candidates) {
  const size_t levels = class_outputs.size();
  STD_TORCH_CHECK(levels >= 1 && levels <= kMaxLevels && box_outputs.size() == levels,
                  "class_outputs and box_outputs must be 1 to ", kMaxLevels, " maps each");
  STD_TORCH_CHECK(max_candidates >= 1, "max_candidates must be at least 1, got ", max_candidates);
  DetectParams p{};
  p.dtype = map_dtype(class_outputs[0]);
  p.levels = static_cast<int>(levels);
  p.n = class_outputs[0].size(0);
  p.cell_anchors = box_outputs[0].size(1) / 4;
  STD_TORCH_CHECK(p.cell_anchors >= 1 && class_outputs[0].size(1) % p.cell_anchors == 0,
                  "class_outputs and box_outputs must have A·classes and A·4 channels");
  p.num_classes = class_outputs[0].size(1) / p.cell_anchors;
  Tensors maps;
  int64_t total = 0;
  for (size_t l = 0; l < levels; l++) {
    const Tensor &c = class_outputs[l], &b = box_outputs[l];
    STD_TORCH_CHECK(c.dim() == 4 && b.dim() == 4 && c.size(0) == p.n && b.size(0) == p.n &&
                        c.size(1) == p.cell_anchors * p.num_classes &&
                        b.size(1) == p.cell_anchors * 4 && c.size(2) == b.size(2) &&
                        c.size(3) == b.size(3) && map_dtype(c) == p.dtype &&
                        map_dtype(b) == p.dtype,
                    "class_outputs and box_outputs must agree in batch, size, channels and dtype");
    maps.push_back(channels_last(c));
    p.classes[l] = maps.back().const_data_ptr();
    maps.push_back(channels_last(b));
    p.boxes[l] = maps.back().const_data_ptr();
    p.pixels[l] = c.size(2) * c.size(3);
    total += p.pixels[l] * p.cell_anchors;
  }
  const Tensor corners = float_weight(anchors, total * 4, "anchors");
  p.anchors = corners.const_data_ptr<float>();
  Tensor ends = corners;
  if (limits) {
    ends = float_weight(*limits, p.n * 2, "limits");
    p.limits = ends.const_data_ptr<float>();
  }
  p.candidates = std::min(max_candidates, total * p.num_classes);
  p.settings = settings(method, iou_threshold, sigma, score_threshold, max_detections);

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
