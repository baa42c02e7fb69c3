// The depthwise k×k convolution of a strip of pixels of one row.
#pragma once

#include "vec.h"

namespace edet::cpu::EDET_ISA {

// Outputs computed together, so that K·K weights and as many sums stay in registers.
constexpr int kStrip = kRegisters == 32 ? 8 : 4;

// v, which the compiler then keeps in a register instead of reading memory for each of its uses.
EDET_INLINE vf in_register(vf v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE2__)
  asm("" : "+x"(v));
#endif
  return v;
}

// emit(i, sums) with sums[x] = Σ rows[r][x·S + k, i…] · w[r·K + k, i…] for X outputs and each
// register of channels i of cp, a multiple of kWidth and the pitch of the rows.
template <int K, int S, int X, class Emit>
EDET_INLINE void depthwise_pixels(const float* const* rows, const float* w, int64_t cp,
                                  const Emit& emit) {
  for (int64_t i = 0; i < cp; i += kWidth) {
    vf sum[X];
#pragma GCC unroll 8
    for (int x = 0; x < X; x++) sum[x] = vf{};
#pragma GCC unroll 8
    for (int r = 0; r < K; r++) {
      vf tap[K];
#pragma GCC unroll 8
      for (int k = 0; k < K; k++) tap[k] = load(w + (r * K + k) * cp + i);
      const float* row = rows[r] + i;
#pragma GCC unroll 32
      for (int column = 0; column < (X - 1) * S + K; column++) {
        const vf v = in_register(load(row + column * cp));
#pragma GCC unroll 8
        for (int x = 0; x < X; x++) {
          const int k = column - x * S;
          if (k >= 0 && k < K) sum[x] += v * tap[k];
        }
      }
    }
    emit(i, sum);
  }
}

// `count` outputs; rows[r] points at the first column that the first output reads. emit(x, i, sums)
// is called for runs of outputs from x on and each register of channels i.
template <int K, int S, class Emit>
EDET_INLINE void depthwise_row(const float* const* rows, const float* w, int64_t cp, int64_t count,
                               const Emit& emit) {
  const float* at[K];
  for (int r = 0; r < K; r++) at[r] = rows[r];
  int64_t x = 0;
  const auto run = [&](auto outputs) {
    constexpr int X = decltype(outputs)::value;
    for (; count - x >= X; x += X) {
      depthwise_pixels<K, S, X>(at, w, cp, [&](int64_t i, const auto& sum) { emit(x, i, sum); });
      for (int r = 0; r < K; r++) at[r] += X * S * cp;
    }
  };
  run(Constant<kStrip>{});
  if constexpr (kStrip > 4) run(Constant<4>{});
  run(Constant<2>{});
  run(Constant<1>{});
}

}  // namespace edet::cpu::EDET_ISA
