// Finds the elements of an array that reach a threshold, a register at a time.
#pragma once

#include "vec.h"

namespace edet::cpu::EDET_ISA {

// Whether any lane of v is ≥ threshold; NaN is not.
EDET_INLINE bool any_reaches(vf v, vf threshold) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, (__m512)threshold, _CMP_GE_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)(v >= threshold)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)(v >= threshold)) != 0;
#else
  const vi mask = v >= threshold;
  int32_t any = 0;
  for (int i = 0; i < kWidth; i++) any |= mask[i];
  return any != 0;
#endif
}

template <class T>
int64_t scan_as(const T* data, int64_t n, float threshold, int32_t* index, float* value) {
  const vf t = set1(threshold);
  int64_t found = 0;
  const auto collect = [&](vf v, int64_t at, int lanes) {
    for (int i = 0; i < lanes; i++)
      if (v[i] >= threshold) {
        index[found] = static_cast<int32_t>(at + i);
        value[found++] = v[i];
      }
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const vf v = load(data + i);
    if (any_reaches(v, t)) collect(v, i, kWidth);
  }
  if (i < n) collect(load_tail(data + i, static_cast<int>(n - i)), i, static_cast<int>(n - i));
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
