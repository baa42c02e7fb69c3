// Runs steps made of tasks on all threads without a barrier between steps: threads claim tasks in
// order and wait only for the tasks that theirs reads from.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace edet::cpu {

// The host's threads: parallel(n, f, context) calls f(context, begin, end) over [0, n).
struct Runtime {
  int threads;
  void (*parallel)(int64_t n, void (*f)(void* context, int64_t begin, int64_t end), void* context);
};

class Schedule {
 public:
  explicit Schedule(const std::vector<int64_t>& tasks_per_step);

  // Calls body(step, task, thread) for every task. A claimed task only ever waits for tasks that
  // were claimed before it, so any number of threads, one included, comes to the end.
  using Body = std::function<void(int64_t step, int64_t task, int thread)>;
  void run(const Runtime& runtime, const Body& body);

  // For the body: return when tasks [begin, end) of an earlier step, or all of it, are done.
  void wait(int64_t step, int64_t begin, int64_t end) const;
  void wait(int64_t step) const {
    wait(step, 0, first_[static_cast<size_t>(step) + 1] - first_[static_cast<size_t>(step)]);
  }

 private:
  void work(const Body& body, int thread);

  std::vector<int64_t> first_;  // number of each step's first task, and the total
  std::unique_ptr<std::atomic<bool>[]> done_;
  std::atomic<int64_t> next_{0};
};

}  // namespace edet::cpu
