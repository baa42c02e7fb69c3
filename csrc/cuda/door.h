// What both doors to a device's dialect share, CUDA's (device.cuh) and the emulation's
// (emulation/device.h): plain types. The door that includes this file has defined EDET_DEVICE.
#pragma once

#include <cstdint>

namespace edet::cuda {

struct Index {
  int x, y, z;
};

// V neighbours, accessed at once: 16 bytes must be aligned to 16.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  static_assert(sizeof(T) * V <= 16, "the widest access is 16 bytes");
  T value[V];
};

// A place in the block's shared memory; it is read and written by the door's functions only.
template <class T>
struct Shared {
  T* at;
};
template <class T>
EDET_DEVICE Shared<T> operator+(Shared<T> s, int offset) {
  return {s.at + offset};
}
// The same place, and what follows it, as another type.
template <class T, class U>
EDET_DEVICE Shared<T> as(Shared<U> s) {
  return {reinterpret_cast<T*>(s.at)};
}

// Where await_flag leaves its report when a flag does not come in time: memory of the host that the
// device can write, zero before.
struct OverdueReport {
  int32_t reported, tile, node, flag, value, found;
};
struct Overdue {
  OverdueReport* report;
  uint64_t nanoseconds;  // to wait at most
};

constexpr int kWarp = 32;  // threads that run in step
constexpr uint32_t kAllLanes = ~0u;

EDET_DEVICE int min(int a, int b) { return a < b ? a : b; }
EDET_DEVICE int max(int a, int b) { return a > b ? a : b; }

}  // namespace edet::cuda
