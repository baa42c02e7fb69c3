// Vectors of a map's numbers as floats and back; 16-bit numbers two at a time, in words, because
// the compiler would take a register for each half of one that it sees.
#pragma once

#include "device.cuh"

namespace edet::cuda {

template <class T>
constexpr int kVector = 16 / int(sizeof(T));  // channels of a 16-byte access

// A 16-byte vector of numbers of any type.
using Words = Vector<uint32_t, 4>;

template <class T, int V>
EDET_DEVICE void to_floats(const Words& v, float (&x)[V]) {
  static_assert(V == kVector<T>, "all of them");
  EDET_UNROLL
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 2) {
      unpack<T>(v.value[i], x[2 * i], x[2 * i + 1]);
    } else {
      x[i] = bits_float(v.value[i]);
    }
  }
}
template <class T, int V>
EDET_DEVICE Words to_words(const float (&x)[V]) {
  static_assert(V == kVector<T>, "all of them");
  Words v;
  EDET_UNROLL
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(T) == 2) {
      v.value[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    } else {
      v.value[i] = float_bits(x[i]);
    }
  }
  return v;
}
template <class T>
EDET_DEVICE Words max_nan(const Words& a, const Words& b) {
  Words v;
  EDET_UNROLL
  for (int i = 0; i < 4; i++) v.value[i] = max_nan<T>(a.value[i], b.value[i]);
  return v;
}
// Memory of a map as words.
template <class T>
EDET_DEVICE const uint32_t* words(const T* p) {
  return reinterpret_cast<const uint32_t*>(p);
}

// Any V, of any type.
template <class T, int V>
EDET_DEVICE void to_floats(const Vector<T, V>& v, float (&x)[V]) {
  if constexpr (sizeof(T) == 2 && V % 2 == 0) {
    EDET_UNROLL
    for (int i = 0; i < V; i += 2) {
      uint32_t pair;
      memcpy(&pair, &v.value[i], 4);
      unpack<T>(pair, x[i], x[i + 1]);
    }
  } else {
    EDET_UNROLL
    for (int i = 0; i < V; i++) x[i] = to_float(v.value[i]);
  }
}
template <class T, int V>
EDET_DEVICE Vector<T, V> from_floats(const float (&x)[V]) {
  Vector<T, V> v;
  if constexpr (sizeof(T) == 2 && V % 2 == 0) {
    EDET_UNROLL
    for (int i = 0; i < V; i += 2) {
      const uint32_t pair = pack<T>(x[i], x[i + 1]);
      memcpy(&v.value[i], &pair, 4);
    }
  } else {
    EDET_UNROLL
    for (int i = 0; i < V; i++) v.value[i] = from_float<T>(x[i]);
  }
  return v;
}

// The sum of two vectors, rounded once.
template <class T, int V>
EDET_DEVICE Vector<T, V> sum_of(const Vector<T, V>& a, const Vector<T, V>& b) {
  if constexpr (V == 1) {
    return {{from_float<T>(to_float(a.value[0]) + to_float(b.value[0]))}};
  } else {
    float x[V], y[V];
    to_floats(a, x);
    to_floats(b, y);
    EDET_UNROLL
    for (int i = 0; i < V; i++) x[i] += y[i];
    return from_floats<T>(x);
  }
}

}  // namespace edet::cuda
