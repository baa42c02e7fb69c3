// The door of cuda/device.cuh, implemented on the host: the same functions, so that the same
// kernels compile, but every thread is a fiber and every access is checked and counted.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_runtime_api.h"
#include "emulator.h"
#include "number.h"

#define EDET_DEVICE inline
#include "../cuda/door.h"
#include "../cuda/shared_limit.h"

#define EDET_KERNEL(threads, blocks) void
#define EDET_PARAMS(type) const type&
#define EDET_SHARED(type, name) \
  const Shared<type> name { reinterpret_cast<type*>(emulation::shared_memory()) }
#define EDET_UNROLL
#define EDET_LOOP

namespace edet::cuda {

inline Index thread() {
  const emulation::Thread& t = emulation::thread();
  return {t.x, t.y, t.z};
}
inline Index index_of(emulation::Extent e) { return {e.x, e.y, e.z}; }
inline Index block() { return index_of(emulation::block()); }
inline Index block_size() { return index_of(emulation::block_size()); }
inline Index grid_size() { return index_of(emulation::grid_size()); }
inline int opaque(int x) { return x; }
template <class T>
const T* opaque(const T* p) {
  return p;
}
inline int lane() { return emulation::thread().linear % kWarp; }

inline void sync_threads(int line = __builtin_LINE()) { emulation::barrier(line); }
inline void sync_warp(int line = __builtin_LINE()) {
  emulation::together(line, nullptr, [](void**, int) {});
}
inline void global_fence() { emulation::fence(); }

template <class T>
T shuffle(T value, int from, int line = __builtin_LINE()) {
  struct Lane {
    T value, result;
    int from;
  } mine{value, value, from};
  emulation::together(line, &mine, [](void** lanes, int count) {
    for (int i = 0; i < count; i++) {
      auto& lane = *static_cast<Lane*>(lanes[i]);
      lane.result = static_cast<Lane*>(lanes[(lane.from % kWarp + kWarp) % kWarp % count])->value;
    }
  });
  return mine.result;
}
template <class T>
T shuffle_xor(T value, int mask, int line = __builtin_LINE()) {
  return shuffle(value, lane() ^ mask, line);
}
inline uint32_t ballot(bool vote, int line = __builtin_LINE()) {
  struct Lane {
    bool vote;
    uint32_t result;
  } mine{vote, 0};
  emulation::together(line, &mine, [](void** lanes, int count) {
    uint32_t votes = 0;
    for (int i = 0; i < count; i++) votes |= uint32_t(static_cast<Lane*>(lanes[i])->vote) << i;
    for (int i = 0; i < count; i++) static_cast<Lane*>(lanes[i])->result = votes;
  });
  return mine.result;
}

inline int first_set(uint32_t x) { return __builtin_ctz(x); }
inline int count_set(uint32_t x) { return __builtin_popcount(x); }
inline int bit_length(uint64_t x) { return x ? 64 - __builtin_clzll(x) : 0; }
// The host's fmax gives NaN for a signalling one.
inline float larger(float a, float b) { return b != b || a > b ? a : b; }
inline float smaller(float a, float b) { return b != b || a < b ? a : b; }
inline float exp(float x) { return std::exp(x); }

inline float ex2_approx(float x) { return std::exp2(x); }
// As far off as it may be, towards zero.
inline float tanh_approx(float x) {
  const float y = std::tanh(x);
  return y == y ? bits_float(float_bits(y) & ~0xfffu) : y;
}
inline float rcp_approx(float x) {
  const float y = 1.0f / x;
  return std::fpclassify(y) == FP_SUBNORMAL ? std::copysign(0.0f, y) : y;
}

template <class T>
void unpack(uint32_t pair, float& first, float& second) {
  first = to_float(T{uint16_t(pair)}), second = to_float(T{uint16_t(pair >> 16)});
}
template <class T>
uint32_t pack(float first, float second) {
  const T two[2] = {from_float<T>(first), from_float<T>(second)};
  uint32_t pair;
  std::memcpy(&pair, two, sizeof pair);
  return pair;
}
template <class T>
uint32_t product(uint32_t a, uint32_t b) {
  float x[2], y[2];
  unpack<T>(a, x[0], x[1]);
  unpack<T>(b, y[0], y[1]);
  return pack<T>(x[0] * y[0], x[1] * y[1]);
}
template <class T>
uint32_t max_nan(uint32_t a, uint32_t b) {
  float x[2], y[2];
  unpack<T>(a, x[0], x[1]);
  unpack<T>(b, y[0], y[1]);
  for (int i = 0; i < 2; i++) x[i] = y[i] > x[i] || y[i] != y[i] ? y[i] : x[i];
  return pack<T>(x[0], x[1]);
}

template <class T, int V>
Vector<T, V> load_constant(const T* p) {
  static_assert(sizeof(Vector<T, V>) == 16 || sizeof(Vector<T, V>) == 8 ||
                    sizeof(Vector<T, V>) == 4 || V == 1,
                "an access is 4, 8 or 16 bytes or one element");
  emulation::global_access(p, sizeof(Vector<T, V>), emulation::Use::constant);
  Vector<T, V> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T, int V>
Vector<T, V> load_written(const T* p) {
  static_assert(sizeof(Vector<T, V>) == 16 || V == 1, "an access is 16 bytes or one element");
  emulation::global_access(p, sizeof(Vector<T, V>), emulation::Use::read);
  Vector<T, V> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T, int V>
Vector<T, V> load_written_if(bool real, const T* p) {
  return real ? load_written<T, V>(p) : Vector<T, V>{};
}
template <class T>
T load_shared_by_blocks(const T* p) {
  return load_written<T, 1>(p).value[0];
}
template <class T, int V>
void store(T* p, const Vector<T, V>& v) {
  emulation::global_access(p, sizeof v, emulation::Use::write);
  std::memcpy(p, &v, sizeof v);
}
template <class T>
void store(T* p, T v) {
  store<T, 1>(p, {{v}});
}

template <int V = 1, class T>
Vector<T, V> load(Shared<T> s) {
  emulation::shared_access(s.at, sizeof(Vector<T, V>), false);
  Vector<T, V> v;
  std::memcpy(&v, s.at, sizeof v);
  return v;
}
template <class T>
T get(Shared<T> s) {
  return load<1>(s).value[0];
}
template <class T, int V>
void store(Shared<T> s, const Vector<T, V>& v) {
  emulation::shared_access(s.at, sizeof v, true);
  std::memcpy(s.at, &v, sizeof v);
}
template <class T>
void store(Shared<T> s, T v) {
  store<T, 1>(s, {{v}});
}

template <class T>
T atomic_add(T* p, T v) {
  emulation::global_access(p, sizeof v, emulation::Use::atomic);
  emulation::atomic(p);
  const T before = *p;
  *p = static_cast<T>(before + v);
  emulation::changed(p);
  return before;
}

using Flag = emulation::Flag;
inline void add_release(uint32_t* p, uint32_t v) {
  emulation::global_access(p, sizeof v, emulation::Use::atomic);
  emulation::release(p);
  *p += v;
  emulation::changed(p);
}
// Its thread runs again when the flag has the value; when no thread can, that is reported at once.
inline void await_flag(const Flag& flag, const Overdue&, int line = __builtin_LINE()) {
  emulation::await(flag, line);
}
inline void griddep_wait() { emulation::await_launches(); }
inline void griddep_launch() {}

template <class T>
T atomic_add(Shared<T> s, T v) {
  emulation::shared_atomic(s.at, sizeof v);
  const T before = *s.at;
  *s.at = static_cast<T>(before + v);
  return before;
}

template <class T>
void cp_async_16(Shared<T> to, const T* from, bool real) {
  Vector<T, 16 / sizeof(T)> v{};
  if (real) v = load_written<T, 16 / sizeof(T)>(from);
  emulation::copy_later(reinterpret_cast<char*>(to.at), reinterpret_cast<const char*>(&v));
}
inline void cp_async_commit() { emulation::end_group(); }
template <int kLeft>
void cp_async_wait() {
  emulation::await_groups(kLeft);
}

namespace detail {

struct Matrices {
  const uint16_t* row;
  uint32_t* result;
};

template <bool kTransposed>
void give_matrices(void** lanes, int count) {
  for (int i = 0; i < count; i++) {
    for (int m = 0; m < 4; m++) {
      const auto element = [&](int row, int column) -> uint32_t {
        return static_cast<Matrices*>(lanes[(8 * m + row) % count])->row[column];
      };
      const int g = i / 4, t = i % 4;
      static_cast<Matrices*>(lanes[i])->result[m] =
          kTransposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                      : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
    }
  }
}

// A lane's part of a product on the tensor cores.
struct Mma {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <class T>
float half_of(uint32_t pair, int half) {
  return to_float(T{uint16_t(pair >> 16 * half)});
}

// d += a·b of a warp; Left()(lanes, row, k) and Right()(lanes, k, column) find the operands'
// elements.
template <int kK, class Left, class Right>
void mma_together(int line, Mma mine) {
  emulation::together(line, &mine, [](void** arguments, int count) {
    const auto lanes = reinterpret_cast<const Mma* const*>(arguments);
    float left[16][kK], right[kK][8];
    for (int row = 0; row < 16; row++)
      for (int k = 0; k < kK; k++) left[row][k] = Left()(lanes, row, k);
    for (int k = 0; k < kK; k++)
      for (int column = 0; column < 8; column++) right[k][column] = Right()(lanes, k, column);
    for (int i = 0; i < count; i++) {
      for (int j = 0; j < 4; j++) {
        const int row = i / 4 + j / 2 * 8, column = i % 4 * 2 + j % 2;
        float sum = 0.0f;
        for (int k = 0; k < kK; k++) sum += left[row][k] * right[k][column];
        lanes[i]->d[j] += sum;
      }
    }
  });
}

}  // namespace detail

template <class T>
void ldmatrix_x4(Shared<T> row, uint32_t (&r)[4], int line = __builtin_LINE()) {
  emulation::shared_access(row.at, 16, false);
  detail::Matrices mine{reinterpret_cast<const uint16_t*>(row.at), r};
  emulation::together(line, &mine, detail::give_matrices<false>);
}
template <class T>
void ldmatrix_x4_trans(Shared<T> row, uint32_t (&r)[4], int line = __builtin_LINE()) {
  emulation::shared_access(row.at, 16, false);
  detail::Matrices mine{reinterpret_cast<const uint16_t*>(row.at), r};
  emulation::together(line, &mine, detail::give_matrices<true>);
}

inline bool turing() { return emulation::architecture() < 80; }
inline bool blackwell() { return emulation::architecture() >= 100; }
inline void need_sm_80() {
  if (turing()) emulation::fail("this product on tensor cores needs sm_80");
}

// The elements that a lane gives: see the table of each instruction in CUDA's PTX manual.
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  int line = __builtin_LINE()) {
  need_sm_80();
  struct Left {
    float operator()(const detail::Mma* const* lanes, int row, int k) const {
      return detail::half_of<T>(lanes[row % 8 * 4 + k % 8 / 2]->a[row / 8 + k / 8 * 2], k % 2);
    }
  };
  struct Right {
    float operator()(const detail::Mma* const* lanes, int k, int column) const {
      return detail::half_of<T>(lanes[column * 4 + k % 8 / 2]->b[k / 8], k % 2);
    }
  };
  detail::mma_together<16, Left, Right>(line, {d, a, {b0, b1}});
}
template <class T>
void mma_m16n8k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b, int line = __builtin_LINE()) {
  if (!std::is_same_v<T, f16>) need_sm_80();
  struct Left {
    float operator()(const detail::Mma* const* lanes, int row, int k) const {
      return detail::half_of<T>(lanes[row % 8 * 4 + k / 2]->a[row / 8], k % 2);
    }
  };
  struct Right {
    float operator()(const detail::Mma* const* lanes, int k, int column) const {
      return detail::half_of<T>(lanes[column * 4 + k / 2]->b[0], k % 2);
    }
  };
  const uint32_t a[2] = {a0, a1};
  detail::mma_together<8, Left, Right>(line, {d, a, {b, 0}});
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             int line = __builtin_LINE()) {
  need_sm_80();
  struct Left {
    float operator()(const detail::Mma* const* lanes, int row, int k) const {
      return bits_float(lanes[row % 8 * 4 + k % 4]->a[row / 8 + k / 4 * 2]);
    }
  };
  struct Right {
    float operator()(const detail::Mma* const* lanes, int k, int column) const {
      return bits_float(lanes[column * 4 + k % 4]->b[k / 4]);
    }
  };
  for (uint32_t x : {a[0], a[1], a[2], a[3], b0, b1}) {
    if (bits_float(x) == bits_float(x) && x % (1 << 13))
      emulation::fail("multiplies a float that is not rounded to tf32");
  }
  detail::mma_together<8, Left, Right>(line, {d, a, {b0, b1}});
}

// ---- host ----

using Stream = cudaStream_t;
using Error = cudaError_t;
struct Dim3 {
  unsigned x, y, z;
  Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
constexpr Error kSuccess = cudaSuccess;
constexpr Error kInvalidValue = cudaErrorInvalidValue;

struct Device {
  int id, capability;
  int multiprocessors;
  int shared_bytes;
  int multiprocessor_bytes;
};
inline Error current_device(Device* device) {
  *device = {0, emulation::architecture(), emulation::multiprocessors(),
             emulation::most_shared_bytes(), emulation::most_shared_bytes() + 1024};
  return kSuccess;
}

inline Error overdue_report(OverdueReport** report) {
  static OverdueReport memory{};  // nothing is ever overdue: a deadlock is found at once
  *report = &memory;
  return kSuccess;
}

inline Error clear(void* data, size_t bytes, Stream) { return emulation::clear(data, bytes); }

template <class Params>
Error launch(void (*kernel)(const Params&), Dim3 grid, Dim3 block, size_t shared_bytes, Stream,
             const Params& params, bool pdl = false) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kSharedWithoutAsking) {
    // a device is known by what it gives a block: tests change it
    const int most = emulation::most_shared_bytes();
    const Error error = allow_most_shared(
        function, most, [&] { return emulation::set_shared_limit(function, size_t(most)); });
    if (error != kSuccess) return error;
  }
  const auto extent = [](Dim3 d) { return emulation::Extent{int(d.x), int(d.y), int(d.z)}; };
  return emulation::run(
      __PRETTY_FUNCTION__, extent(grid), extent(block), shared_bytes, pdl,
      [](const void* kernel, const void* params) {
        (*static_cast<void (*const*)(const Params&)>(kernel))(*static_cast<const Params*>(params));
      },
      &kernel, &params, sizeof(Params));
}

}  // namespace edet::cuda
