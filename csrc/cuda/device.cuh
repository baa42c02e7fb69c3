// The only door to CUDA's dialect: indices, barriers, shared memory, vector accesses, number types
// and launches. A kernel includes this file and nothing else of CUDA's, so that the same source can
// be compiled for another implementation of the door.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define EDET_DEVICE __device__ __forceinline__
// A kernel for blocks of at most `threads` threads, of which a multiprocessor holds at least
// `blocks`.
#define EDET_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// Parameter structs are read where the launch put them, in constant memory, instead of being
// copied.
#define EDET_PARAMS(type) const __grid_constant__ type
// The block's dynamic shared memory as an array, aligned for 16-byte accesses.
#define EDET_SHARED(type, name)                      \
  extern __shared__ __align__(16) char name##_raw[]; \
  type* const name = reinterpret_cast<type*>(name##_raw)

namespace edet::cuda {

using f16 = __half;
using bf16 = __nv_bfloat16;

struct Index {
  int x, y, z;
};

EDET_DEVICE Index thread() { return {int(threadIdx.x), int(threadIdx.y), int(threadIdx.z)}; }
EDET_DEVICE Index block() { return {int(blockIdx.x), int(blockIdx.y), int(blockIdx.z)}; }
EDET_DEVICE Index block_size() { return {int(blockDim.x), int(blockDim.y), int(blockDim.z)}; }
EDET_DEVICE Index grid_size() { return {int(gridDim.x), int(gridDim.y), int(gridDim.z)}; }

// Waits until every thread of the block is here; shared memory written before is seen after.
EDET_DEVICE void block_barrier() { __syncthreads(); }

EDET_DEVICE float to_float(float x) { return x; }
EDET_DEVICE float to_float(f16 x) { return __half2float(x); }
EDET_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }

// Rounds to nearest, ties to even.
template <class T>
EDET_DEVICE T from_float(float x);
template <>
EDET_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
EDET_DEVICE f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}
template <>
EDET_DEVICE bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

// e^x to 2 units in the last place, infinities and NaN included.
EDET_DEVICE float exp(float x) { return expf(x); }

// V neighbours, accessed at once: 16 bytes must be aligned to 16.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  static_assert(sizeof(T) * V <= 16, "the widest access is 16 bytes");
  T value[V];
};

// Reads what nothing writes during the launch (through the read-only cache).
template <class T, int V>
EDET_DEVICE Vector<T, V> load_constant(const T* p) {
  Vector<T, V> v;
  if constexpr (sizeof(v) == 16) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(p));
    memcpy(&v, &bits, sizeof(v));
  } else {
    static_assert(V == 1, "an access is 16 bytes or one element");
    v.value[0] = __ldg(p);
  }
  return v;
}

template <class T, int V>
EDET_DEVICE void store(T* p, const Vector<T, V>& v) {
  *reinterpret_cast<Vector<T, V>*>(p) = v;
}

// ---- host ----

using Stream = cudaStream_t;
using Error = cudaError_t;
constexpr Error kSuccess = cudaSuccess;

// Streaming multiprocessors of the current device.
inline Error multiprocessors(int* count) {
  int device = 0;
  const Error error = cudaGetDevice(&device);
  return error == kSuccess ? cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device)
                           : error;
}

// Starts kernel(params) on `stream`; returns the launch's own error, not the kernel's.
template <class Params>
Error launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
             const Params& params) {
  kernel<<<grid, block, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace edet::cuda
