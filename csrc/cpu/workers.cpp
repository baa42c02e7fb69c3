// The threads of workers.h, by POSIX, which any system of the wheel has.
#include "workers.h"

#include <pthread.h>
#include <signal.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace edet::cpu {

namespace {

// How long a worker looks for the next call, and a caller for the last worker, before it sleeps.
constexpr int64_t kSpin = 50'000;
// OpenMP's threads were late if they kept the caller for so long after the last task.
constexpr int64_t kLate = 1'000'000;
// Calls on our own threads after one that was late; twice as many each time that it is late again.
constexpr int kFirst = 64, kMost = 4096;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// The rounding and the treatment of denormals of this thread, which its helpers take over.
unsigned float_mode() {
#if defined(__x86_64__)
  return __builtin_ia32_stmxcsr();
#else
  return 0;
#endif
}

void set_float_mode([[maybe_unused]] unsigned mode) {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(mode);
#endif
}

// Waits for a condition, at first awake.
template <typename Condition>
bool spin(const Condition& condition) {
  const int64_t end = now() + kSpin;
  do {
    for (int i = 0; i < 32; i++) {
      if (condition()) return true;
      pause();
    }
  } while (now() < end);
  return condition();
}

// Sleeping workers and one caller. Its state in one number: which call it is, how many may still
// join it, and how many are inside.
class Pool {
 public:
  // False when it serves another caller.
  bool run(int threads, int64_t (*f)(void*), void* context) {
    if (busy_.exchange(true, std::memory_order_acquire)) return false;
    hire(threads - 1);
    f_ = f;
    context_ = context;
    mode_ = float_mode();
    const int open = std::min(threads - 1, workers_);
    state_.store(((state_.load() >> 32) + 1) << 32 | static_cast<uint64_t>(open) << 16);
    if (open && sleeping_.load() > 0) {
      pthread_mutex_lock(&mutex_);
      pthread_cond_broadcast(&begin_);
      pthread_mutex_unlock(&mutex_);
    }
    f(context);
    state_.fetch_and(~kOpen);
    if (!spin([&] { return !inside(); })) {
      pthread_mutex_lock(&mutex_);
      waiting_.store(true);
      while (inside()) pthread_cond_wait(&end_, &mutex_);
      waiting_.store(false);
      pthread_mutex_unlock(&mutex_);
    }
    busy_.store(false, std::memory_order_release);
    return true;
  }

 private:
  static constexpr uint64_t kOne = 1 << 16, kOpen = 0xffff0000, kInside = 0xffff;

  bool inside() const { return state_.load() & kInside; }

  void hire(int count) {
    pthread_attr_t attributes;
    if (workers_ >= count || pthread_attr_init(&attributes)) return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigset_t all, before;  // signals are for the program's own threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    const auto enter = [](void* pool) -> void* { static_cast<Pool*>(pool)->work(); };
    while (workers_ < count && !pthread_create(&thread, &attributes, enter, this)) workers_++;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
  }

  [[noreturn]] void work() {
#if defined(__linux__)
    prctl(PR_SET_NAME, "edet-worker");
#endif
    for (uint64_t seen = 0;;) {
      const auto called = [&] { return state_.load() >> 32 != seen; };
      if (!spin(called)) {
        pthread_mutex_lock(&mutex_);
        sleeping_.fetch_add(1);
        while (!called()) pthread_cond_wait(&begin_, &mutex_);
        sleeping_.fetch_sub(1);
        pthread_mutex_unlock(&mutex_);
      }
      uint64_t state = state_.load();
      seen = state >> 32;
      while ((state & kOpen) && state >> 32 == seen)
        if (state_.compare_exchange_weak(state, state - kOne + 1)) {
          set_float_mode(mode_);
          f_(context_);
          if ((state_.fetch_sub(1) & kInside) == 1 && waiting_.load()) {
            pthread_mutex_lock(&mutex_);
            pthread_cond_signal(&end_);
            pthread_mutex_unlock(&mutex_);
          }
          break;
        }
    }
  }

  std::atomic<uint64_t> state_{0};
  std::atomic<bool> busy_{false}, waiting_{false};
  std::atomic<int> sleeping_{0};
  int workers_ = 0;
  int64_t (*f_)(void*) = nullptr;
  void* context_ = nullptr;
  unsigned mode_ = 0;
  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t begin_ = PTHREAD_COND_INITIALIZER, end_ = PTHREAD_COND_INITIALIZER;
};

std::atomic<Pool*> current{nullptr};

// Never destroyed: its threads wait in it. A forked process has none of them and takes a new one.
Pool& pool() {
  static const int forks =
      pthread_atfork(nullptr, nullptr, [] { current.store(new Pool, std::memory_order_release); });
  static_cast<void>(forks);
  Pool* found = current.load(std::memory_order_acquire);
  if (found) return *found;
  Pool* made = new Pool;
  if (current.compare_exchange_strong(found, made)) return *made;
  delete made;
  return *found;
}

enum class Choice { automatic, torch, own };

Choice choose() {
  const char* value = std::getenv("EDET_CPU_THREADS");
  const std::string asked = value ? value : "";
  if (asked.empty() || asked == "auto") return Choice::automatic;
  if (asked == "torch") return Choice::torch;
  if (asked == "own") return Choice::own;
  throw std::invalid_argument("EDET_CPU_THREADS must be auto, torch or own, got '" + asked + "'");
}

// Calls left for our own threads, and how many the next late one brings.
std::atomic<int> own_calls{0}, next_calls{kFirst};

// Whether our own threads serve this call.
bool own_turn(Choice choice) {
  if (choice != Choice::automatic) return choice == Choice::own;
  return own_calls.load(std::memory_order_relaxed) > 0 &&
         own_calls.fetch_sub(1, std::memory_order_relaxed) > 0;
}

}  // namespace

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void on_threads(const Runtime& runtime, int64_t (*f)(void*), void* context) {
  static const Choice choice = choose();
  if (own_turn(choice)) {
    if (!pool().run(runtime.threads, f, context)) f(context);
    return;
  }
  struct Call {
    int64_t (*f)(void*);
    void* context;
    std::atomic<int64_t> last{0};
  } call{f, context};
  const auto enter = [](void* opaque, int64_t begin, int64_t end) {
    auto* c = static_cast<Call*>(opaque);
    for (int64_t i = begin; i < end; i++) {  // one may stand for several threads
      const int64_t at = c->f(c->context);
      for (int64_t last = c->last.load(); last < at && !c->last.compare_exchange_weak(last, at);) {
      }
    }
  };
  runtime.parallel(runtime.threads, enter, &call);
  if (now() - call.last.load() < kLate) {
    next_calls.store(kFirst, std::memory_order_relaxed);
    return;
  }
  const int calls = next_calls.load(std::memory_order_relaxed);
  own_calls.store(calls, std::memory_order_relaxed);
  next_calls.store(std::min(2 * calls, kMost), std::memory_order_relaxed);
}

}  // namespace edet::cpu
