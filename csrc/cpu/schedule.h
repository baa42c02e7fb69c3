// Runs steps made of tasks on all threads without a barrier between steps: a task starts when what
// it reads is done, on the thread that ran the tasks beside it in the steps before, if it can.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <vector>

#include "workers.h"

namespace edet::cpu {

class Schedule {
 public:
  explicit Schedule(const std::vector<int64_t>& tasks_per_step);

  // ready(step, task): whether the tasks of earlier steps that this one needs are done.
  using Ready = std::function<bool(int64_t step, int64_t task)>;
  using Body = std::function<void(int64_t step, int64_t task, int thread)>;

  // Calls body for every task once it is ready. Each thread owns the same part of every step, so
  // that what it wrote is still in its cache when the next step reads it; a thread whose next task
  // is not ready takes one of another thread. The first task not yet begun of all is always ready
  // as soon as the running ones end, so any number of threads, one included, comes to the end.
  // When body throws, no task is begun any more, and run throws the first exception.
  void run(const Runtime& runtime, const Ready& ready, const Body& body);
  // The same for tasks that are always ready.
  void run(const Runtime& runtime, const Body& body) {
    run(runtime, [](int64_t, int64_t) { return true; }, body);
  }

  // For ready: whether tasks [begin, end) of a step, or all of it, are done.
  bool done(int64_t step, int64_t begin, int64_t end) const;
  bool done(int64_t step) const {
    return done(step, 0, first_[static_cast<size_t>(step) + 1] - first_[static_cast<size_t>(step)]);
  }

 private:
  struct Task {
    int64_t step, task;
  };
  struct alignas(64) Queue {  // one thread's tasks in the order of the steps
    std::vector<Task> tasks;
    std::atomic<size_t> next{0};
  };

  // Runs tasks until none is left; gives the time when it had run its last, 0 when it ran none.
  int64_t work(const Ready& ready, const Body& body, int thread, int threads);
  // Runs the next task of a queue if it is ready; false when there is none.
  bool try_next(Queue& queue, const Ready& ready, const Body& body, int thread);

  std::vector<int64_t> first_;  // number of each step's first task, and the total
  std::unique_ptr<std::atomic<bool>[]> done_;
  std::unique_ptr<Queue[]> queues_;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // written by the thread that set failed_
};

}  // namespace edet::cpu
