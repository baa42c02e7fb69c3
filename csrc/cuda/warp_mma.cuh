// d += a·b for one warp, by the instructions that the GPU's tensor cores have.
#pragma once

#include "device.cuh"

namespace edet::cuda {

// Operands and sums as in mma_m16n8k16; T is the type of a and b.
template <class T>
EDET_DEVICE void warp_mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if (!turing()) return mma_m16n8k16<T>(d, a, b0, b1);
  if constexpr (std::is_same_v<T, f16>) {
    mma_m16n8k8<T>(d, a[0], a[1], b0);
    mma_m16n8k8<T>(d, a[2], a[3], b1);
  } else {
    // Turing's tensor cores know no bf16: each lane gathers the rows of a and the columns of b that
    // its four sums need, from the lanes that hold them.
    const auto low = [](uint32_t pair) { return bits_float(pair << 16); };
    const auto high = [](uint32_t pair) { return bits_float(pair & 0xffff0000u); };
    const int lane = thread().x % kWarp, row = lane & ~3, column = lane % 4 * 8;
    EDET_LOOP
    for (int k = 0; k < 4; k++) {
      EDET_UNROLL
      for (int half = 0; half < 2; half++) {
        const uint32_t upper = shuffle(a[2 * half], row + k);
        const uint32_t lower = shuffle(a[2 * half + 1], row + k);
        const uint32_t b = half ? b1 : b0;
        const uint32_t first = shuffle(b, column + k), second = shuffle(b, column + 4 + k);
        d[0] += low(upper) * low(first) + high(upper) * high(first);
        d[1] += low(upper) * low(second) + high(upper) * high(second);
        d[2] += low(lower) * low(first) + high(lower) * high(first);
        d[3] += low(lower) * low(second) + high(lower) * high(second);
      }
    }
  }
}

}  // namespace edet::cuda
