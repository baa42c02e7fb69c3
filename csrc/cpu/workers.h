// Calls a function on several threads: torch's, or, while those are waited for in vain, our own.
//
// OpenMP waits until each of its threads has come and gone, although the queues of a schedule are
// emptied by whoever is there. Where another program has a thread's core, that takes as long as the
// system leaves it there, milliseconds, and OpenMP spins meanwhile: on a busy machine of two cores
// two threads took ten times as long as one. Threads of our own take part only if they come in
// time. They are not used always, since OpenMP's go on spinning for milliseconds after each of
// torch's own operators, on the cores that ours would need.
#pragma once

#include <cstdint>

namespace edet::cpu {

// The host's threads: parallel(n, f, context) calls f(context, begin, end) over [0, n).
struct Runtime {
  int threads;
  void (*parallel)(int64_t n, void (*f)(void* context, int64_t begin, int64_t end), void* context);
};

// Calls f(context) on this thread and, at the same time, on up to runtime.threads − 1 others, and
// returns when all that have begun are done. f must not throw, must do the work of threads that
// never come, and returns the time, by now(), when it last had something to do (0: nothing).
// EDET_CPU_THREADS: torch, own, or auto (by default).
void on_threads(const Runtime& runtime, int64_t (*f)(void* context), void* context);

// Nanoseconds of a steady clock.
int64_t now();

}  // namespace edet::cpu
