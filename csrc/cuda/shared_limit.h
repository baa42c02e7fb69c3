// Host: how much shared memory a kernel's blocks may have, which CUDA keeps for each kernel and
// device, and all threads of a process share.
#pragma once

#include <cstddef>
#include <mutex>
#include <set>
#include <utility>

namespace edet::cuda {

constexpr size_t kSharedWithoutAsking = 48 * 1024;

// Has set() called, which allows a kernel the most that the device gives a block, once for each
// kernel and device. Had every launch set its own size, a launch of another thread could come
// between, and fail with the smaller one.
template <class Set>
auto allow_most_shared(const void* kernel, int device, const Set& set) -> decltype(set()) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return {};
  const auto error = set();
  if (error == decltype(set()){}) allowed.insert({kernel, device});
  return error;
}

}  // namespace edet::cuda
