// The schema of every op: one line an op; kernels for them are registered beside their glue.
#include "common.h"

// Enumerations are integers, numbered in core/params.h. Weights are packed
// (edet_kernels/packing.py). Numbers that follow from an image's size are SymInt, so that a traced
// graph serves every size; a kernel gets them as integers.
static void define_products(torch::stable::detail::StableLibrary& m) {
  m.def(
      "fusion_node(Tensor[] inputs, Tensor? edge_weights, Tensor dw_weight, Tensor pw_weight, "
      "Tensor scale, Tensor shift, SymInt[] size, int fusion, int pool, int pre_activation, "
      "int post_activation) -> Tensor");
  m.def(
      "bifpn(Tensor[] inputs, Tensor? edge_weights, Tensor dw_weight, Tensor pw_weight, "
      "Tensor scale, Tensor shift, int[] edges, int[] edge_counts, SymInt[] sizes, int[] outputs, "
      "int fusion, int pool, int pre_activation, int post_activation) -> Tensor[]");
  m.def(
      "separable_conv(Tensor[] inputs, Tensor dw_weight, Tensor pw_weight, Tensor scale, "
      "Tensor shift, int activation) -> Tensor[]");
  m.def(
      "head(Tensor[] inputs, Tensor[] dw_weights, Tensor[] pw_weights, Tensor[] scales, "
      "Tensor[] shifts, int activation) -> Tensor[]");
  m.def(
      "lateral(Tensor input, Tensor[] pw_weights, Tensor[] scales, Tensor[] shifts, int pooled, "
      "int pool) -> Tensor[]");
  m.def(
      "mbconv(Tensor input, Tensor[] expand, Tensor[] depthwise, Tensor[] squeeze, Tensor[] "
      "project, "
      "int stride, SymInt[] padding, SymInt[] size, int activation, bool residual) -> Tensor");
}

STABLE_TORCH_LIBRARY(EDET_OPS, m) {
  define_products(m);
  m.def(
      "weighted_fusion(Tensor[] inputs, Tensor? edge_weights, SymInt[] size, int fusion, int pool, "
      "int activation) -> Tensor");
  m.def(
      "stem(Tensor image, Tensor weight, Tensor scale, Tensor shift, Tensor? mean, Tensor? std, "
      "SymInt[] padding, SymInt[] size, int activation, ScalarType dtype) -> Tensor");
  m.def(
      "nms(Tensor boxes, Tensor scores, Tensor labels, int method, float iou_threshold, "
      "float sigma, float score_threshold, int max_detections, bool class_agnostic=False) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "detect(Tensor[] class_outputs, Tensor[] box_outputs, Tensor anchors, Tensor? limits, "
      "int method, float iou_threshold, float sigma, float score_threshold, int max_detections, "
      "int max_candidates, bool class_agnostic=False) -> (Tensor, Tensor, Tensor, Tensor)");
  // On maps of bytes: edet_kernels/int8.py.
  m.def("int8_quantize(Tensor input, float inverse, int zero) -> Tensor");
  m.def("int8_dequantize(Tensor input, float scale, int zero) -> Tensor");
  m.def(
      "int8_stem(Tensor image, Tensor weight, Tensor scale, Tensor shift, Tensor? mean, "
      "Tensor? std, SymInt[] padding, SymInt[] size, int activation, float inverse, int zero) -> "
      "Tensor");
  m.def(
      "int8_mbconv(Tensor input, Tensor[] expand, Tensor[] depthwise, Tensor[] squeeze, "
      "Tensor[] project, int stride, SymInt[] padding, SymInt[] size, int activation, "
      "float residual) -> Tensor");
  m.def(
      "int8_lateral(Tensor input, Tensor[] pw_weights, Tensor[] rows, int pooled, int pool) -> "
      "Tensor[]");
  m.def(
      "int8_nodes(Tensor[] inputs, Tensor[] fuse_rows, Tensor[] dw_weights, Tensor[] mid_rows, "
      "Tensor[] pw_weights, Tensor[] out_rows, int[] layers, int[] edges, int[] edge_counts, "
      "SymInt[] sizes, int[] outputs, int pool, int pre_activation, int post_activation) -> "
      "Tensor[]");
  // The maps, then mean and sum of squared deviations, (nodes, c_out) each; (0, c_out) without
  // statistics.
  m.def(
      "training_node(Tensor[] inputs, Tensor? scales, Tensor? offsets, Tensor? edge_weights, "
      "Tensor dw_weight, Tensor pw_weight, Tensor shift, int[] edge_counts, SymInt[] sizes, "
      "int fusion, int pool, int activation, bool statistics) -> Tensor[]");
  // An inverted residual block in training. Weights are those of convolutions, not packed; squeeze
  // is one empty tensor for none. Mean and squares are empty without statistics.
  m.def("training_moments(Tensor input, bool products) -> Tensor[]");
  m.def(
      "training_depthwise(Tensor input, Tensor? expand_weight, Tensor? scale, Tensor? offset, "
      "Tensor dw_weight, int stride, SymInt[] padding, SymInt[] size, int activation, "
      "bool statistics) -> Tensor[]");
  m.def(
      "training_project(Tensor input, Tensor scale, Tensor offset, Tensor[] squeeze, "
      "Tensor project_weight, int activation, bool statistics) -> Tensor[]");
  m.def(
      "training_moments_backward(Tensor grad_mean, Tensor grad_products, Tensor mean, "
      "Tensor input, bool products) -> Tensor");
  m.def(
      "training_depthwise_backward(Tensor grad, Tensor grad_mean, Tensor grad_squares, "
      "Tensor output, Tensor mean, Tensor input, Tensor? expand_weight, Tensor? scale, "
      "Tensor? offset, Tensor dw_weight, int stride, SymInt[] padding, SymInt[] size, "
      "int activation) -> Tensor[]");
  m.def(
      "training_project_backward(Tensor grad, Tensor grad_mean, Tensor grad_squares, "
      "Tensor output, Tensor mean, Tensor pooled, Tensor input, Tensor scale, Tensor offset, "
      "Tensor[] squeeze, Tensor project_weight, int activation) -> Tensor[]");
  // Gradients of the inputs, then of the other tensors in the forward op's order; empty where the
  // tensor is None.
  m.def(
      "weighted_fusion_backward(Tensor grad, Tensor[] inputs, Tensor? edge_weights, SymInt[] size, "
      "int fusion, int pool, int activation) -> Tensor[]");
  m.def(
      "fusion_node_backward(Tensor grad, Tensor[] inputs, Tensor? edge_weights, Tensor dw_weight, "
      "Tensor pw_weight, Tensor scale, Tensor shift, SymInt[] size, int fusion, int pool, "
      "int pre_activation, int post_activation) -> Tensor[]");
  m.def(
      "separable_conv_backward(Tensor[] grads, Tensor[] inputs, Tensor dw_weight, "
      "Tensor pw_weight, Tensor scale, Tensor shift, int activation) -> Tensor[]");
  m.def(
      "training_node_backward(Tensor[] grads, Tensor grad_mean, Tensor grad_m2, Tensor[] outputs, "
      "Tensor? mean, Tensor[] inputs, Tensor? scales, Tensor? offsets, Tensor? edge_weights, "
      "Tensor dw_weight, Tensor pw_weight, Tensor shift, int[] edge_counts, SymInt[] sizes, "
      "int fusion, int pool, int activation) -> Tensor[]");
}

// The ops that multiply, with products of floats rounded to tf32: on CUDA only, where
// edet_kernels/backend.py asks for it.
STABLE_TORCH_LIBRARY(EDET_TF32_OPS, m) { define_products(m); }
