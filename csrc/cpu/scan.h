// Finds the elements of an array that reach a threshold, a register at a time.
#pragma once

#include "vec.h"

namespace edet::cpu::EDET_ISA {

// Bit i is set when lane i of v is ≥ threshold; NaN is not.
EDET_INLINE uint32_t lanes_reaching(vf v, vf threshold) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, (__m512)threshold, _CMP_GE_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)(v >= threshold)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)(v >= threshold)));
#else
  uint32_t lanes = 0;
  for (int i = 0; i < kWidth; i++) lanes |= static_cast<uint32_t>(v[i] >= threshold[i]) << i;
  return lanes;
#endif
}

template <class T>
int64_t scan_as(const T* data, int64_t n, float threshold, int32_t* index, float* value) {
  const vf t = set1(threshold);
  int64_t found = 0;
  const auto collect = [&](vf v, int64_t at, uint32_t among) {
    float lane[kWidth];
    store(lane, v);
    for (uint32_t left = lanes_reaching(v, t) & among; left; left &= left - 1) {
      const int i = __builtin_ctz(left);
      index[found] = static_cast<int32_t>(at + i);
      value[found++] = lane[i];
    }
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const vf v = load(data + i);
    if (lanes_reaching(v, t)) collect(v, i, ~0u);
  }
  const int rest = static_cast<int>(n - i);
  if (rest) collect(load_tail(data + i, rest), i, (1u << rest) - 1);
  return found;
}

// Writes position and value of each element ≥ threshold, in order; returns how many there are.
inline int64_t scan(DType dtype, const void* data, int64_t n, float threshold, int32_t* index,
                    float* value) {
  switch (dtype) {
    case DType::f32: return scan_as(static_cast<const float*>(data), n, threshold, index, value);
    case DType::f16: return scan_as(static_cast<const f16*>(data), n, threshold, index, value);
    case DType::bf16: return scan_as(static_cast<const bf16*>(data), n, threshold, index, value);
  }
  return 0;
}

}  // namespace edet::cpu::EDET_ISA
