// A block of pixels of the 1×1 + batch-norm projections of one map.
#pragma once

#include "../core/params.h"
#include "dispatch.h"
#include "fuse.h"
#include "pointwise.h"

namespace edet::cpu::EDET_ISA {

inline int64_t lateral_scratch(const LateralParams& p) {
  int64_t widest = 0;
  for (int i = 0; i < p.projections; i++)
    if (p.projection[i].c_out > widest) widest = p.projection[i].c_out;
  const int64_t op = padded(widest);
  return kLateralPixels * padded(p.c_in) + 2 * op + operand_scratch(p.c_in, op / kPanel);
}

template <class T>
void lateral_block_as(const LateralParams& p, int64_t begin, int64_t end, float* scratch) {
  using In = Operand<T>;
  const int64_t rows = end - begin, lda = operand_pitch<T>(p.c_in);
  const In* a =
      operand_rows(static_cast<const T*>(p.input) + begin * p.c_in, rows, p.c_in, scratch);
  for (int i = 0; i < p.projections; i++) {
    const Projection& q = p.projection[i];
    const int64_t op = padded(q.c_out);
    float* scale = scratch + kLateralPixels * padded(p.c_in);
    float* shift = scale + op;
    copy_padded(q.scale, q.c_out, op, scale);
    copy_padded(q.shift, q.c_out, op, shift);
    const PointwiseWeights<In> weights{operand_weights<In>(q.pw, p.c_in, op / kPanel, shift + op),
                                       scale,
                                       shift,
                                       whole_steps<In>(p.c_in),
                                       q.c_out,
                                       Activation::none};
    pointwise<T>(a, lda, rows, weights,
                 {static_cast<T*>(q.out) + begin * q.c_out, q.c_out, nullptr});
  }
}

inline void lateral_block(const LateralParams& p, int64_t begin, int64_t end, float* scratch) {
  switch (p.dtype) {
    case DType::f32: return lateral_block_as<float>(p, begin, end, scratch);
    case DType::f16: return lateral_block_as<f16>(p, begin, end, scratch);
    case DType::bf16: return lateral_block_as<bf16>(p, begin, end, scratch);
  }
}

}  // namespace edet::cpu::EDET_ISA
