// One SIMD register of floats as a C++ value, written with compiler vector extensions so that the
// same source serves SSE2, AVX2, AVX-512 and NEON; loads and stores of fp32, fp16 and bf16.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "../core/params.h"

#define EDET_INLINE inline __attribute__((always_inline))

namespace edet::cpu::EDET_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kWidth = 4;
constexpr int kRegisters = 32;
#else
constexpr int kWidth = 4;
constexpr int kRegisters = 16;
#endif

typedef float vf __attribute__((vector_size(kWidth * 4)));
typedef int32_t vi __attribute__((vector_size(kWidth * 4)));
typedef uint32_t vu __attribute__((vector_size(kWidth * 4)));
typedef uint16_t vh __attribute__((vector_size(kWidth * 2)));

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

EDET_INLINE vf set1(float x) { return x - vf{}; }  // x − 0 is x, −0 and NaN included
EDET_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }

EDET_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

EDET_INLINE vf bf16_to_float(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

EDET_INLINE vu rounded_to_bf16(vu bits) {  // to nearest, ties to even; of a number
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
#if defined(__AVX512BF16__)
EDET_INLINE vh float_to_bf16(vf v) {
  const __m256i h = (__m256i)_mm512_cvtneps_pbh((__m512)v);  // takes subnormal numbers as zero
  const __mmask16 subnormal = _mm512_fpclass_ps_mask((__m512)v, 0x20);  // that class
  if (__builtin_expect(subnormal == 0, 1)) return (vh)h;
  return (vh)_mm512_mask_cvtepi32_epi16(h, subnormal, (__m512i)rounded_to_bf16((vu)v));
}
#else
EDET_INLINE vh float_to_bf16(vf v) {
  const vu bits = (vu)v;
  const vu nan = (bits >> 16) | 0x40u;  // quiet, keeps the sign
  return __builtin_convertvector((v != v) ? nan : rounded_to_bf16(bits), vh);
}
#endif

#if defined(__AVX512F__)
EDET_INLINE vf f16_to_float(vh h) { return (vf)_mm512_cvtph_ps((__m256i)h); }
EDET_INLINE vh float_to_f16(vf v) { return (vh)_mm512_cvtps_ph((__m512)v, 0); }
#elif defined(__AVX2__)
EDET_INLINE vf f16_to_float(vh h) { return (vf)_mm256_cvtph_ps((__m128i)h); }
EDET_INLINE vh float_to_f16(vf v) { return (vh)_mm256_cvtps_ph((__m256)v, 0); }
#else
// Subnormals included: the exponent is rebased by a multiplication by 2^112 (and back by 2^-112).
EDET_INLINE vf f16_to_float(vh h) {
  const vu bits = __builtin_convertvector(h, vu);
  const vu magnitude = (bits & 0x7fffu) << 13;
  const vf scaled = (vf)magnitude * set1(0x1p112f);
  const vu special = magnitude | 0x7f800000u;  // inf and NaN keep their payload
  const vu value = (magnitude >= (vu{} + 0x0f800000u)) ? special : (vu)scaled;
  return (vf)(value | ((bits & 0x8000u) << 16));
}
EDET_INLINE vh float_to_f16(vf v) {
  const vu bits = (vu)v;
  const vu sign = (bits >> 16) & 0x8000u;
  const vu magnitude = bits & 0x7fffffffu;
  // below 2^-14 adding 0.5 leaves the rounded subnormal in the low bits
  const vu subnormal = (vu)((vf)magnitude + set1(0.5f)) - 0x3f000000u;
  const vu normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  vu value = (magnitude < (vu{} + 0x38800000u)) ? subnormal : normal;
  value = (magnitude >= (vu{} + 0x477ff000u)) ? (vu{} + 0x7c00u) : value;
  value = (magnitude > (vu{} + 0x7f800000u)) ? (vu{} + 0x7e00u) : value;
  return __builtin_convertvector(value | sign, vh);
}
#endif

EDET_INLINE vh load_half(const void* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return h;
}
EDET_INLINE vf load(const bf16* p) { return bf16_to_float(load_half(p)); }
EDET_INLINE vf load(const f16* p) { return f16_to_float(load_half(p)); }

EDET_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
EDET_INLINE void store(bf16* p, vf v) {
  const vh h = float_to_bf16(v);
  std::memcpy(p, &h, sizeof h);
}
EDET_INLINE void store(f16* p, vf v) {
  const vh h = float_to_f16(v);
  std::memcpy(p, &h, sizeof h);
}

// The first n < kWidth elements; the other lanes are zero and their memory is not touched.
template <class T>
EDET_INLINE vf load_tail(const T* p, int n) {
  T lanes[kWidth];
  std::memset(lanes, 0, sizeof lanes);
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(T));
  return load(lanes);
}
template <class T>
EDET_INLINE void store_tail(T* p, vf v, int n) {
  T lanes[kWidth];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(T));
}
#if defined(__AVX512F__)
EDET_INLINE vf load_tail(const float* p, int n) {
  return (vf)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
EDET_INLINE void store_tail(float* p, vf v, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
}
#endif

// to[0, whole) = from[0, n), then zeros.
EDET_INLINE void copy_padded(const float* from, int64_t n, int64_t whole, float* to) {
  std::memcpy(to, from, sizeof(float) * static_cast<size_t>(n));
  std::memset(to + n, 0, sizeof(float) * static_cast<size_t>(whole - n));
}

// Running maximum that, like torch's max pool, is NaN once a value was NaN.
#if defined(__AVX512F__)
class Maximum {
 public:
  EDET_INLINE void add(vf v) {
    best_ = (vf)_mm512_max_ps((__m512)v, (__m512)best_);  // the second operand when one is NaN
    nan_ |= _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  }
  EDET_INLINE vf value() const {
    return (vf)_mm512_mask_blend_ps(nan_, (__m512)best_, _mm512_set1_ps(__builtin_nanf("")));
  }

 private:
  vf best_ = set1(-__builtin_inff());
  __mmask16 nan_ = 0;
};
#else
class Maximum {
 public:
  EDET_INLINE void add(vf v) { best_ = select((v > best_) | (v != v), v, best_); }
  EDET_INLINE vf value() const { return best_; }  // a NaN is never replaced: v > NaN is false

 private:
  vf best_ = set1(-__builtin_inff());
};
#endif

EDET_INLINE vf clamp(vf x, float low, float high) {
  x = select(x < low, set1(low), x);  // NaN stays
  return select(x > high, set1(high), x);
}

// 1/(1 + e^−x), to a few units in the last place of x·σ(x) near its largest error (relatively 3e-6
// for x < −10, where the rounding of t shows). 2^t of t = −x·log2(e) is a polynomial of
// its fraction (minimax, 2e-9) times a power of two. It overflows to +inf for x < −88.7, so that
// x·σ(x) is −0 there and NaN for −inf, as in x/(1 + e^−x).
EDET_INLINE vf sigmoid(vf x) {
  const vf t = x * -1.44269504f;
#if defined(__AVX512F__)
  const vf f = (vf)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF);  // t − floor(t)
  vf p = set1(2.1702255e-4f);
  p = p * f + 1.24396884e-3f;
  p = p * f + 9.67884064e-3f;
  p = p * f + 5.54833412e-2f;
  p = p * f + 2.40229830e-1f;
  p = p * f + 6.93147004e-1f;
  p = p * f + 1.0f;
  const vf d = (vf)_mm512_scalef_ps((__m512)p, (__m512)t) + 1.0f;  // scales by 2^floor(t)
  const vf r = (vf)_mm512_rcp14_ps((__m512)d);
  const vf error = 1.0f - d * r;
  // one Newton step, but not for d = inf: inf·0 would be NaN
  const __mmask16 finite = _mm512_cmp_ps_mask((__m512)d, _mm512_set1_ps(0x1p127f), _CMP_NGE_UQ);
  return (vf)_mm512_mask_fmadd_ps((__m512)r, finite, (__m512)error, (__m512)r);
#else
  const vf bounded = clamp(t, -126.0f, 129.0f);
  const vf magic = set1(12582912.0f);  // 1.5·2^23: adding it rounds to an integer
  const vf n = (bounded + magic) - magic;
  const vf f = bounded - n;
  vf p = set1(1.53458124e-4f);
  p = p * f + 1.33999309e-3f;
  p = p * f + 9.61848907e-3f;
  p = p * f + 5.55032864e-2f;
  p = p * f + 2.40226462e-1f;
  p = p * f + 6.93147182e-1f;
  p = p * f + 1.0f;
  // 2^n in two halves, because 2^128 has no float
  const vi i = __builtin_convertvector(n, vi);
  const vi half = i >> 1;
  const vf low = (vf)((half + 127) << 23), high = (vf)((i - half + 127) << 23);
  return 1.0f / (1.0f + p * low * high);
#endif
}

// The same for a result that is rounded to T: for bf16, whose rounding is 2e-3, to 2e-4.
template <class T>
EDET_INLINE vf sigmoid_for(vf x) {
  return sigmoid(x);
}
#if defined(__AVX512F__)
template <>
EDET_INLINE vf sigmoid_for<bf16>(vf x) {
  // the bound keeps t − n a number for x = inf; it is the first operand, so that a NaN stays
  const __m512 t = _mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)(x * -1.44269504f));
  const __m512 n = _mm512_roundscale_ps(t, 0);
  const vf f = (vf)t - (vf)n;
  vf p = set1(0.0551716685f);
  p = p * f + 0.242611125f;
  p = p * f + 0.693260968f;
  p = p * f + 0.999928057f;
  const vf d = (vf)_mm512_scalef_ps((__m512)p, n) + 1.0f;
  return (vf)_mm512_rcp14_ps((__m512)d);
}
#endif

// The activation of a value that is rounded to T.
template <Activation A, class T = float>
EDET_INLINE vf activate(vf x) {
  if constexpr (A == Activation::swish) return x * sigmoid_for<T>(x);
  if constexpr (A == Activation::relu) return select(x < 0.0f, vf{}, x);
  if constexpr (A == Activation::relu6) return clamp(x, 0.0f, 6.0f);
  if constexpr (A == Activation::hard_swish)
    return x * (clamp(x + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f));
  return x;
}

template <auto V>
struct Constant {
  static constexpr auto value = V;
};

// Calls f with the activation as a compile-time constant.
template <class F>
EDET_INLINE void with_activation(Activation a, F&& f) {
  switch (a) {
    case Activation::none: return f(Constant<Activation::none>{});
    case Activation::swish: return f(Constant<Activation::swish>{});
    case Activation::relu: return f(Constant<Activation::relu>{});
    case Activation::relu6: return f(Constant<Activation::relu6>{});
    case Activation::hard_swish: return f(Constant<Activation::hard_swish>{});
  }
}

}  // namespace edet::cpu::EDET_ISA
