// The only door to CUDA's dialect: indices, barriers, shared memory, vector accesses, tensor cores,
// atomics, number types and launches. A kernel includes this file and nothing else of CUDA's, so
// that the same source is compiled for the host, where emulation/device.h is the door.
#pragma once

#ifdef EDET_EMULATION
#include "../emulation/device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <mutex>
#include <type_traits>

#define EDET_DEVICE __device__ __forceinline__
#include "door.h"
#include "shared_limit.h"

// A kernel for blocks of at most `threads` threads, of which a multiprocessor holds at least
// `blocks`.
#define EDET_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// The blocks of EDET_KERNEL where a multiprocessor of sm_75, with its 64 KiB of shared memory,
// holds `turing` of them at most: asking for more would only take registers away.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define EDET_BLOCKS(blocks, turing) (turing)
#else
#define EDET_BLOCKS(blocks, turing) (blocks)
#endif
// Whether the code is for compute capability 10.x, where that must be known before a kernel begins.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1100
#define EDET_TEN true
#else
#define EDET_TEN false
#endif
// Parameter structs are read where the launch put them, in constant memory, instead of being
// copied.
#define EDET_PARAMS(type) const __grid_constant__ type
// The block's dynamic shared memory, aligned for 16-byte accesses.
#define EDET_SHARED(type, name)                      \
  extern __shared__ __align__(16) char name##_raw[]; \
  const Shared<type> name { reinterpret_cast<type*>(name##_raw) }
#define EDET_UNROLL _Pragma("unroll")
// Not unrolled, because registers are scarce.
#define EDET_LOOP _Pragma("unroll 1")

namespace edet::cuda {

using f16 = __half;
using bf16 = __nv_bfloat16;

EDET_DEVICE Index thread() { return {int(threadIdx.x), int(threadIdx.y), int(threadIdx.z)}; }
EDET_DEVICE Index block() { return {int(blockIdx.x), int(blockIdx.y), int(blockIdx.z)}; }
EDET_DEVICE Index block_size() { return {int(blockDim.x), int(blockDim.y), int(blockDim.z)}; }
EDET_DEVICE Index grid_size() { return {int(gridDim.x), int(gridDim.y), int(gridDim.z)}; }

// The same number, in which the compiler does not recognise it: what follows from it is computed
// here and not ahead of a loop, where it would hold registers for long.
EDET_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
// Of global memory, which the compiler would otherwise forget, too.
template <class T>
EDET_DEVICE const T* opaque(const T* p) {
  asm volatile("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
  return p;
}

// Waits until every thread of the block is here; shared memory written before is seen after.
EDET_DEVICE void sync_threads() { __syncthreads(); }
// The same for the threads of a warp.
EDET_DEVICE void sync_warp() { __syncwarp(); }
// What this thread wrote to global memory before is seen by whoever sees what it writes after.
EDET_DEVICE void global_fence() { __threadfence(); }

// Every lane of the warp calls these together.
template <class T>
EDET_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <class T>
EDET_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
EDET_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(kAllLanes, vote); }

EDET_DEVICE float to_float(float x) { return x; }
EDET_DEVICE float to_float(f16 x) { return __half2float(x); }
EDET_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
EDET_DEVICE float to_float(uint8_t x) { return x; }

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

// Rounds the mantissa to the 10 bits that tensor cores multiply, ties away from zero.
EDET_DEVICE float to_tf32(float x) {
#if __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
#else
  return x;
#endif
}

EDET_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
EDET_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }
EDET_DEVICE int first_set(uint32_t x) { return __ffs(int(x)) - 1; }  // of a number that is not 0
EDET_DEVICE int count_set(uint32_t x) { return __popc(x); }
EDET_DEVICE int bit_length(uint64_t x) { return 64 - __clzll(static_cast<long long>(x)); }

// The larger and the smaller of two; of a number and NaN the number.
EDET_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
EDET_DEVICE float smaller(float a, float b) { return fminf(a, b); }
// e^x to 2 units in the last place, infinities and NaN included.
EDET_DEVICE float exp(float x) { return expf(x); }
// 2^x and 1/x to 2 units in the last place, infinities and NaN included; subnormal numbers are
// zero.
EDET_DEVICE float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
EDET_DEVICE float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// tanh(x), off by 2⁻¹¹ of it, infinities and NaN included.
EDET_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two neighbouring 16-bit numbers, the first in the low half of a word, as floats.
template <class T>
EDET_DEVICE void unpack(uint32_t pair, float& first, float& second) {
  if constexpr (std::is_same_v<T, f16>) {
    __half2 halves;
    memcpy(&halves, &pair, 4);
    const float2 two = __half22float2(halves);
    first = two.x, second = two.y;
  } else {
    first = bits_float(pair << 16), second = bits_float(pair & 0xffff0000u);
  }
}
template <class T>
EDET_DEVICE uint32_t pack(float first, float second) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, f16>) {
    const __half2 halves = __floats2half2_rn(first, second);
    memcpy(&pair, &halves, 4);
  } else {
    const __nv_bfloat162 halves = __floats2bfloat162_rn(first, second);
    memcpy(&pair, &halves, 4);
  }
  return pair;
}
// What `of` makes of two pairs of 16-bit numbers: it is given pairs as sm_80 and newer compute with
// them, or before floats, one number of each after the other.
template <class T, class Of>
EDET_DEVICE uint32_t of_pairs(uint32_t a, uint32_t b, const Of& of) {
#if __CUDA_ARCH__ >= 800
  using Pair = std::conditional_t<std::is_same_v<T, f16>, __half2, __nv_bfloat162>;
  Pair x, y;
  memcpy(&x, &a, 4);
  memcpy(&y, &b, 4);
  x = of(x, y);
  memcpy(&a, &x, 4);
  return a;
#else
  float x[2], y[2];
  unpack<T>(a, x[0], x[1]);
  unpack<T>(b, y[0], y[1]);
  return pack<T>(of(x[0], y[0]), of(x[1], y[1]));
#endif
}
// The product of each two, rounded to T.
template <class T>
EDET_DEVICE uint32_t product(uint32_t a, uint32_t b) {
  return of_pairs<T>(a, b, [](auto x, auto y) { return x * y; });
}
// The larger of each two, NaN where either is.
template <class T>
EDET_DEVICE uint32_t max_nan(uint32_t a, uint32_t b) {
  return of_pairs<T>(a, b, [](auto x, auto y) {
    if constexpr (std::is_same_v<decltype(x), float>) {
      return y > x || y != y ? y : x;
    } else {
      return __hmax2_nan(x, y);
    }
  });
}

// Reads what nothing writes during the launch (through the read-only cache).
template <class T, int V>
EDET_DEVICE Vector<T, V> load_constant(const T* p) {
  Vector<T, V> v;
  if constexpr (sizeof(v) == 16) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(p));
    memcpy(&v, &bits, sizeof(v));
  } else if constexpr (sizeof(v) == 8) {
    const uint2 bits = __ldg(reinterpret_cast<const uint2*>(p));
    memcpy(&v, &bits, sizeof(v));
  } else if constexpr (sizeof(v) == 4) {
    const unsigned bits = __ldg(reinterpret_cast<const unsigned*>(p));
    memcpy(&v, &bits, sizeof(v));
  } else {
    static_assert(V == 1, "an access is 4, 8 or 16 bytes or one element");
    v.value[0] = __ldg(p);
  }
  return v;
}

// Reads what other blocks write during the launch, or launches that it may overtake, once a flag or
// a launch was awaited: through the first-level cache, which an acquire empties.
template <class T, int V>
EDET_DEVICE Vector<T, V> load_written(const T* p) {
  Vector<T, V> v;
  if constexpr (sizeof(v) == 16) {
    const uint4 bits = *reinterpret_cast<const uint4*>(p);
    memcpy(&v, &bits, sizeof(v));
  } else {
    static_assert(V == 1, "an access is 16 bytes or one element");
    v.value[0] = *p;
  }
  return v;
}

// The same of 16 bytes, or zeros, without a branch that other loads would wait for.
template <class T, int V>
EDET_DEVICE Vector<T, V> load_written_if(bool real, const T* p) {
  static_assert(sizeof(Vector<T, V>) == 16, "an access is 16 bytes");
  uint32_t bits[4] = {};
  asm volatile(
      "{\n.reg .pred real;\nsetp.ne.b32 real, %5, 0;\n"
      "@real ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(bits[0]), "+r"(bits[1]), "+r"(bits[2]), "+r"(bits[3])
      : "l"(p), "r"(int(real)));
  Vector<T, V> v;
  memcpy(&v, bits, sizeof(v));
  return v;
}

// Reads what another block may have written during the launch.
template <class T>
EDET_DEVICE T load_shared_by_blocks(const T* p) {
  return __ldcg(p);
}

template <class T, int V>
EDET_DEVICE void store(T* p, const Vector<T, V>& v) {
  *reinterpret_cast<Vector<T, V>*>(p) = v;
}
template <class T>
EDET_DEVICE void store(T* p, T v) {
  *p = v;
}

template <int V = 1, class T>
EDET_DEVICE Vector<T, V> load(Shared<T> s) {
  return *reinterpret_cast<const Vector<T, V>*>(s.at);
}
template <class T>
EDET_DEVICE T get(Shared<T> s) {
  return *s.at;
}
template <class T, int V>
EDET_DEVICE void store(Shared<T> s, const Vector<T, V>& v) {
  *reinterpret_cast<Vector<T, V>*>(s.at) = v;
}
template <class T>
EDET_DEVICE void store(Shared<T> s, T v) {
  *s.at = v;
}

// Adds and returns what was there before.
template <class T>
EDET_DEVICE T atomic_add(T* p, T v) {
  return atomicAdd(p, v);
}
template <class T>
EDET_DEVICE T atomic_add(Shared<T> s, T v) {
  return atomicAdd(s.at, v);
}

// What a thread waits for: a word of global memory to become `value` or more; and of which tile it
// is, for the report.
struct Flag {
  const uint32_t* at;
  uint32_t value;
  int tile, node, number;
};
// Adds to a flag: what this thread wrote before, and what its block wrote before the last barrier,
// is seen by whoever awaits the sum.
EDET_DEVICE void add_release(uint32_t* p, uint32_t v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
EDET_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
EDET_DEVICE uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}
// Returns when the flag has its value; this thread, and after a barrier its block, then sees what
// was released with it. A flag that does not come is a mistake: the first one that is overdue is
// reported, and the launch fails.
EDET_DEVICE void await_flag(const Flag& flag, const Overdue& overdue) {
  if (load_acquire(flag.at) >= flag.value) return;
  const uint64_t start = nanoseconds();
  for (;;) {
    const uint32_t found = load_acquire(flag.at);
    if (found >= flag.value) return;
    const uint64_t waited = nanoseconds() - start;
    if (waited > overdue.nanoseconds) {
      OverdueReport* const r = overdue.report;
      const bool first = atomicCAS_system(&r->reported, 0, 1) == 0;
      if (first) {
        r->tile = flag.tile, r->node = flag.node, r->flag = flag.number;
        r->value = int(flag.value), r->found = int(found);
        __threadfence_system();
      }
      if (first || waited > 2 * overdue.nanoseconds) __trap();  // the others leave it time to write
    }
    __nanosleep(20);
  }
}

// Where a launch may begin while the one before it runs (programmatic dependent launch, from
// sm_90): waits for the end of that one, whose writes are then seen; what comes before the call
// must touch nothing that earlier launches write, or read, other than constants.
EDET_DEVICE void griddep_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The launch after this one may begin when all blocks have called this or ended.
EDET_DEVICE void griddep_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Copies 16 bytes of global memory, or zeros, past the registers (from sm_80; through them before).
// They are there after a wait for them and a barrier.
template <class T>
EDET_DEVICE void cp_async_16(Shared<T> to, const T* from, bool real) {
#if __CUDA_ARCH__ >= 800
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to.at));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(real ? 16 : 0));
#else
  *reinterpret_cast<uint4*>(to.at) =
      real ? __ldg(reinterpret_cast<const uint4*>(from)) : uint4{0, 0, 0, 0};
#endif
}
// Ends a group of the thread's copies.
EDET_DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for all groups but the last kLeft.
template <int kLeft>
EDET_DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

// Four 8×8 matrices of 16-bit numbers. Lane i points at row i % 8 of matrix i / 8; result r holds
// of matrix r, with g = lane / 4 and t = lane % 4, the elements (g, 2t) and (g, 2t + 1).
template <class T>
EDET_DEVICE void ldmatrix_x4(Shared<T> row, uint32_t (&r)[4]) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row.at));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// The same, but the elements (2t, g) and (2t + 1, g).
template <class T>
EDET_DEVICE void ldmatrix_x4_trans(Shared<T> row, uint32_t (&r)[4]) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row.at));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Whether this is sm_75, whose tensor cores are older: no bf16, no tf32, products of half the
// depth.
EDET_DEVICE constexpr bool turing() {
#if __CUDA_ARCH__ >= 800
  return false;
#else
  return true;
#endif
}
// Whether this is sm_100 or newer, for which the compiler takes some registers more.
EDET_DEVICE constexpr bool blackwell() {
#if __CUDA_ARCH__ >= 1000
  return true;
#else
  return false;
#endif
}

// Products of a warp on the tensor cores, d += a·b; d is 16×8, with g = lane / 4 and t = lane % 4
// the elements (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). csrc/cuda/warp_mma.cuh chooses.
//
// From sm_80: a is 16×16, four results of ldmatrix_x4 (rows 0–7 and 8–15 of columns 0–7, then of
// columns 8–15), b is 16×8, two transposed matrices (rows 0–7 and 8–15).
template <class T>
EDET_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, f16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}
// The first half of that depth, a is 16×8 and b 8×8; f16 on sm_75 too.
template <class T>
EDET_DEVICE void mma_m16n8k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  if constexpr (std::is_same_v<T, f16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
  } else {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
#endif
  }
}
// From sm_80, of floats that to_tf32 has rounded: a is 16×8, the elements (g, t), (g + 8, t),
// (g, t + 4), (g + 8, t + 4), which ldmatrix_x4 finds if its 16-bit numbers are halves of floats;
// b is 8×8, (t, g) and (t + 4, g).
EDET_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// ---- host ----

using Stream = cudaStream_t;
using Error = cudaError_t;
using Dim3 = dim3;
constexpr Error kSuccess = cudaSuccess;
constexpr Error kInvalidValue = cudaErrorInvalidValue;

// What launchers ask of the current device.
struct Device {
  int id, capability;  // capability: 90 for 9.0
  int multiprocessors;
  int shared_bytes;          // that one block may have
  int multiprocessor_bytes;  // of shared memory, of all blocks that it holds
};
inline Error current_device(Device* device) {
  int major = 0, minor = 0;
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, device->id);
  };
  Error error = cudaGetDevice(&device->id);
  if (error == kSuccess) error = get(&major, cudaDevAttrComputeCapabilityMajor);
  if (error == kSuccess) error = get(&minor, cudaDevAttrComputeCapabilityMinor);
  if (error == kSuccess) error = get(&device->multiprocessors, cudaDevAttrMultiProcessorCount);
  if (error == kSuccess) {
    error = get(&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  }
  if (error == kSuccess) {
    error = get(&device->multiprocessor_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  }
  device->capability = 10 * major + minor;
  return error;
}

// Where this process's kernels report flags that do not come: pinned memory, which lives as long as
// the process and outlives a failed launch.
inline Error overdue_report(OverdueReport** report) {
  static std::mutex mutex;
  static OverdueReport* memory = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  Error error = kSuccess;
  if (!memory) {
    // allowed while a graph is captured: it is no work of the stream
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    void* data = nullptr;
    error =
        cudaHostAlloc(&data, sizeof(OverdueReport), cudaHostAllocMapped | cudaHostAllocPortable);
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (error != kSuccess) return error;
    memset(data, 0, sizeof(OverdueReport));
    memory = static_cast<OverdueReport*>(data);
  }
  *report = memory;
  return error;
}

// Sets bytes of the device's memory to zero, in the stream's order.
inline Error clear(void* data, size_t bytes, Stream stream) {
  return cudaMemsetAsync(data, 0, bytes, stream);
}

// Starts kernel(params) on `stream`; returns the launch's own error, not the kernel's. `pdl`:
// it may begin before the launch before it has ended, which the kernel awaits.
template <class Params>
Error launch(void (*kernel)(Params), Dim3 grid, Dim3 block, size_t shared_bytes, Stream stream,
             const Params& params, bool pdl = false) {
  if (shared_bytes > kSharedWithoutAsking) {
    int device = 0, most = 0;
    Error error = cudaGetDevice(&device);
    if (error == kSuccess) {
      error = allow_most_shared(reinterpret_cast<const void*>(kernel), device, [&] {
        const Error unknown =
            cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (unknown != kSuccess) return unknown;
        return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
      });
    }
    if (error != kSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = pdl ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace edet::cuda

#endif
