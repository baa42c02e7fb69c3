// Claiming and waiting of schedule.h.
#include "schedule.h"

#include <thread>

namespace edet::cpu {

Schedule::Schedule(const std::vector<int64_t>& tasks_per_step) : first_{0} {
  for (int64_t n : tasks_per_step) first_.push_back(first_.back() + n);
  done_ = std::make_unique<std::atomic<bool>[]>(static_cast<size_t>(first_.back()));
}

void Schedule::run(const Runtime& runtime, const Body& body) {
  struct Context {
    Schedule* schedule;
    const Body* body;
    std::atomic<int> threads{0};
  } context{this, &body};
  const auto enter = [](void* opaque, int64_t, int64_t) {
    auto* c = static_cast<Context*>(opaque);
    c->schedule->work(*c->body, c->threads.fetch_add(1));
  };
  if (runtime.threads > 1 && first_.back() > 1)
    runtime.parallel(runtime.threads, enter, &context);
  else
    enter(&context, 0, 1);
}

void Schedule::work(const Body& body, int thread) {
  const int64_t total = first_.back();
  size_t step = 0;
  for (int64_t n; (n = next_.fetch_add(1, std::memory_order_relaxed)) < total;) {
    while (n >= first_[step + 1]) step++;
    body(static_cast<int64_t>(step), n - first_[step], thread);
    done_[static_cast<size_t>(n)].store(true, std::memory_order_release);
  }
}

void Schedule::wait(int64_t step, int64_t begin, int64_t end) const {
  const int64_t base = first_[static_cast<size_t>(step)];
  for (int64_t n = base + begin; n < base + end; n++) {
    int spins = 0;
    while (!done_[static_cast<size_t>(n)].load(std::memory_order_acquire)) {
      // A task takes microseconds; a thread that lost its core would take milliseconds.
      if (++spins > 2000) {
        std::this_thread::yield();
        spins = 0;
      }
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }
}

}  // namespace edet::cpu
