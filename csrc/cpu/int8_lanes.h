// Arithmetic on maps of bytes, a register of 32-bit lanes at a time: four products of bytes added
// to each lane, and the way from a sum to the next byte. Compiled without contraction of float
// operations: every rounding is that of edet_kernels/int8_reference.py.
#pragma once

#include "../core/int8.h"
#include "vec.h"

namespace edet::cpu::EDET_ISA {

typedef uint8_t vb __attribute__((vector_size(kWidth)));

// sum + a₀w₀ + a₁w₁ + a₂w₂ + a₃w₃ in each lane; a unsigned, w signed bytes. Nothing saturates.
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
EDET_INLINE vi dot(vi sum, vi a, vi w) {
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)w);
}
#elif defined(__AVXVNNI__) && defined(__AVX2__)
EDET_INLINE vi dot(vi sum, vi a, vi w) {
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)w);
}
#else
#if defined(__AVX512F__)
EDET_INLINE vi add_pairs16(vi a, vi b) { return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
EDET_INLINE vi add_pairs16(vi a, vi b) { return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#elif defined(__SSE2__)
EDET_INLINE vi add_pairs16(vi a, vi b) { return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b); }
#else
EDET_INLINE vi add_pairs16(vi a, vi b) {
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
}
#endif
typedef int16_t vw __attribute__((vector_size(kWidth * 4)));
EDET_INLINE vi dot(vi sum, vi a, vi w) {
  const vi even = a & 0x00ff00ff, odd = (vi)((vu)a >> 8) & 0x00ff00ff;
  const vi w_even = (vi)(((vw)w << 8) >> 8), w_odd = (vi)((vw)w >> 8);
  return sum + add_pairs16(even, w_even) + add_pairs16(odd, w_odd);
}
#endif

template <class T>
EDET_INLINE vi load_lanes(const T* p) {
  vi v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
EDET_INLINE void store_lanes(uint32_t* p, vi v) { std::memcpy(p, &v, sizeof v); }

EDET_INLINE vb load_vb(const uint8_t* p) {
  vb b;
  std::memcpy(&b, p, sizeof b);
  return b;
}
EDET_INLINE vb load_vb_tail(const uint8_t* p, int n) {
  uint8_t lanes[kWidth] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n));
  return load_vb(lanes);
}
// Bytes as lanes, and lanes of 0 … 255 as bytes; GCC 12 converts such vectors byte by byte.
#if defined(__AVX512F__)
EDET_INLINE vi widened(vb b) { return (vi)_mm512_cvtepu8_epi32((__m128i)b); }
EDET_INLINE vb narrowed(vi v) { return (vb)_mm512_cvtepi32_epi8((__m512i)v); }
#elif defined(__AVX2__)
EDET_INLINE vi widened(vb b) {
  int64_t eight;
  std::memcpy(&eight, &b, sizeof eight);
  return (vi)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(eight));
}
EDET_INLINE vb narrowed(vi v) {
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  const int64_t eight = _mm_cvtsi128_si64(_mm_packus_epi16(words, words));
  vb b;
  std::memcpy(&b, &eight, sizeof b);
  return b;
}
#else
EDET_INLINE vi widened(vb b) { return __builtin_convertvector(b, vi); }
EDET_INLINE vb narrowed(vi v) { return __builtin_convertvector(v, vb); }
#endif
EDET_INLINE vi load_bytes(const uint8_t* p) { return widened(load_vb(p)); }

EDET_INLINE void store_bytes(uint8_t* p, vi v) {
  const vb b = narrowed(v);
  std::memcpy(p, &b, sizeof b);
}
EDET_INLINE void store_bytes_tail(uint8_t* p, vi v, int n) {  // the first n < kWidth
  const vb b = narrowed(v);
  std::memcpy(p, &b, static_cast<size_t>(n));
}

// The larger and the smaller number; b when one is NaN.
#if defined(__AVX512F__)
EDET_INLINE vf larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
EDET_INLINE vf smaller(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
EDET_INLINE vi rounded(vf v) { return (vi)_mm512_cvtps_epi32((__m512)v); }
EDET_INLINE vi truncated(vf v) { return (vi)_mm512_cvttps_epi32((__m512)v); }
#elif defined(__AVX2__)
EDET_INLINE vf larger(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
EDET_INLINE vf smaller(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
EDET_INLINE vi rounded(vf v) { return (vi)_mm256_cvtps_epi32((__m256)v); }
EDET_INLINE vi truncated(vf v) { return (vi)_mm256_cvttps_epi32((__m256)v); }
#else
EDET_INLINE vf larger(vf a, vf b) { return select(a > b, a, b); }
EDET_INLINE vf smaller(vf a, vf b) { return select(a < b, a, b); }
EDET_INLINE vi truncated(vf v) { return __builtin_convertvector(v, vi); }
EDET_INLINE vi rounded(vf v) {  // of numbers below 2^22: 1.5·2^23 leaves no place for a fraction
  return truncated((v + 12582912.0f) - 12582912.0f);
}
#endif
EDET_INLINE vf to_floats(vi v) { return __builtin_convertvector(v, vf); }

// swish4(t) = t + a + |t|·(b + |t|·c) by segments of |t|; int8_reference.SWISH.
alignas(64) constexpr float kSwish[3][16] = {
    {0.0f, -0.0600142181f, -0.362237036f, -0.935192943f, -1.57537258f, -2.05652428f, -2.27779889f,
     -2.257797f, -2.07031488f, -1.79404557f, -1.49007571f, -1.19765186f, -0.937805235f,
     -0.718861163f, -0.541339099f, 0.0f},
    {0.00409554224f, 0.11595498f, 0.41624397f, 0.800170839f, 1.12311959f, 1.31776392f, 1.39276946f,
     1.38762128f, 1.34093428f, 1.27954471f, 1.2186867f, 1.16544032f, 1.12206173f, 1.08832121f,
     1.06291831f, 1.0f},
    {0.240989864f, 0.188274592f, 0.113300227f, 0.04883793f, 0.00805872027f, -0.0116406642f,
     -0.0179988761f, -0.0176715255f, -0.0147641245f, -0.0113529293f, -0.00830618851f,
     -0.00588191766f, -0.00407125847f, -0.00277120527f, -0.00186234189f, 0.0f}};

EDET_INLINE vf swish_part(int part, vi segment) {
#if defined(__AVX512F__)
  return (vf)_mm512_permutexvar_ps((__m512i)segment, _mm512_load_ps(kSwish[part]));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(kSwish[part]), (__m256i)segment);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(kSwish[part] + 8), (__m256i)segment);
  return (vf)_mm256_blendv_ps(low, high, (__m256)(segment << 28));  // by bit 3
#else
  vf v;
  for (int i = 0; i < kWidth; i++) v[i] = kSwish[part][segment[i]];
  return v;
#endif
}

EDET_INLINE vf swish4(vf t) {
  const vf size = (vf)((vi)t & 0x7fffffff);
  const vi segment = truncated(smaller(size, set1(15.0f)));
  const vf a = swish_part(0, segment), b = swish_part(1, segment), c = swish_part(2, segment);
  return t + (a + size * (b + size * c));
}

// Behind these the rows are a factor and a zero point, behind the others bounds.
constexpr bool is_scaled(Activation a) {
  return a == Activation::swish || a == Activation::hard_swish;
}

template <Activation A>
EDET_INLINE vf activate4(vf y) {
  if constexpr (A == Activation::swish) return swish4(y);
  if constexpr (A == Activation::hard_swish) return y * smaller(larger(y + 3.0f, vf{}), set1(6.0f));
  if constexpr (A == Activation::relu) return larger(y, vf{});
  if constexpr (A == Activation::relu6) return smaller(larger(y, vf{}), set1(6.0f));
  return y;
}

EDET_INLINE vi bounded_byte(vf y) { return rounded(smaller(larger(y, vf{}), set1(255.0f))); }

// A requantisation of a register of channels.
template <Activation A>
struct Requantise {
  vf scale, shift, third, fourth;

  EDET_INLINE Requantise(const float* rows, int64_t pitch, int64_t i)
      : scale(load(rows + i)),
        shift(load(rows + pitch + i)),
        third(load(rows + 2 * pitch + i)),
        fourth(load(rows + 3 * pitch + i)) {}

  EDET_INLINE vi operator()(vi sum) const {
    const vf y = to_floats(sum) * scale + shift;
    if constexpr (is_scaled(A)) return bounded_byte(activate4<A>(y) * third + fourth);
    return rounded(smaller(larger(y, third), fourth));
  }
};

// Calls f with the kind of requantisation behind an activation: none for all that are bounds.
template <class F>
EDET_INLINE void with_requantise(Activation a, F&& f) {
  if (a == Activation::swish) return f(Constant<Activation::swish>{});
  if (a == Activation::hard_swish) return f(Constant<Activation::hard_swish>{});
  f(Constant<Activation::none>{});
}

// Puts a byte into one of the four of each lane.
struct Slot {
  vu keep;
  int shift;

  EDET_INLINE explicit Slot(int64_t byte)
      : keep(~((vu{} + 0xffu) << static_cast<int>(8 * byte))), shift(static_cast<int>(8 * byte)) {}

  EDET_INLINE void put(uint32_t* at, vi bytes) const {
    const vu old = (vu)load_lanes(at);
    store_lanes(at, (vi)((old & keep) | ((vu)bytes << shift)));
  }
};

}  // namespace edet::cpu::EDET_ISA
