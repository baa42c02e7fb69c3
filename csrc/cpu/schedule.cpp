// Queues and claiming of schedule.h.
#include "schedule.h"

#include <thread>

namespace edet::cpu {

namespace {

// Looks at its own queue before a thread looks at another's, and at all of them before it gives up
// its core: a task takes microseconds, a thread that lost its core would take milliseconds.
constexpr int kPatience = 64, kSpins = 2000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Schedule::Schedule(const std::vector<int64_t>& tasks_per_step) : first_{0} {
  for (int64_t n : tasks_per_step) first_.push_back(first_.back() + n);
  done_ = std::make_unique<std::atomic<bool>[]>(static_cast<size_t>(first_.back()));
}

void Schedule::run(const Runtime& runtime, const Ready& ready, const Body& body) {
  const int64_t total = first_.back();
  const int threads = runtime.threads > 1 && total > 1 ? runtime.threads : 1;
  queues_ = std::make_unique<Queue[]>(static_cast<size_t>(threads));
  for (size_t step = 0; step + 1 < first_.size(); step++) {
    const int64_t count = first_[step + 1] - first_[step];
    for (int64_t task = 0; task < count; task++)
      queues_[static_cast<size_t>(task * threads / count)].tasks.push_back(
          {static_cast<int64_t>(step), task});
  }
  struct Context {
    Schedule* schedule;
    const Ready* ready;
    const Body* body;
    int threads;
    std::atomic<int> entered{0};
  } context{this, &ready, &body, threads};
  const auto enter = [](void* opaque) {
    auto* c = static_cast<Context*>(opaque);
    return c->schedule->work(*c->ready, *c->body, c->entered.fetch_add(1), c->threads);
  };
  if (threads > 1)
    on_threads(runtime, enter, &context);
  else
    enter(&context);
  if (error_) std::rethrow_exception(error_);
}

bool Schedule::try_next(Queue& queue, const Ready& ready, const Body& body, int thread) {
  size_t n = queue.next.load(std::memory_order_relaxed);
  if (n >= queue.tasks.size()) return false;
  const Task t = queue.tasks[n];
  if (!ready(t.step, t.task) ||
      !queue.next.compare_exchange_strong(n, n + 1, std::memory_order_relaxed))
    return false;
  try {
    body(t.step, t.task, thread);
  } catch (...) {
    if (!failed_.exchange(true)) error_ = std::current_exception();
    return false;
  }
  done_[static_cast<size_t>(first_[static_cast<size_t>(t.step)] + t.task)].store(
      true, std::memory_order_release);
  return true;
}

int64_t Schedule::work(const Ready& ready, const Body& body, int thread, int threads) {
  const auto queue = [&](int i) -> Queue& { return queues_[static_cast<size_t>(i % threads)]; };
  const auto empty = [&] {
    for (int i = 0; i < threads; i++)
      if (queue(i).next.load(std::memory_order_relaxed) < queue(i).tasks.size()) return false;
    return true;
  };
  bool any = false;
  for (int spins = 0; !empty() && !failed_.load(std::memory_order_relaxed);) {
    bool ran = try_next(queue(thread), ready, body, thread);
    const bool own_left =
        queue(thread).next.load(std::memory_order_relaxed) < queue(thread).tasks.size();
    if (!ran && (!own_left || spins % kPatience == kPatience - 1))
      for (int i = 1; i < threads && !ran; i++)
        ran = try_next(queue(thread + i), ready, body, thread);
    if (ran) {
      any = true;
      spins = 0;
      continue;
    }
    if (++spins % kSpins == 0) std::this_thread::yield();
    pause();
  }
  return any ? now() : 0;
}

bool Schedule::done(int64_t step, int64_t begin, int64_t end) const {
  const int64_t base = first_[static_cast<size_t>(step)];
  for (int64_t n = base + begin; n < base + end; n++)
    if (!done_[static_cast<size_t>(n)].load(std::memory_order_acquire)) return false;
  return true;
}

}  // namespace edet::cpu
