// Fibers, their schedule, and what is watched while they run.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <unordered_set>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
extern "C" void edet_switch_stack(void** from, void* to);
// Saves what a function must keep, and the stack pointer in *from; continues at `to`.
asm(R"(
.text
.local edet_switch_stack
.type edet_switch_stack, @function
edet_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size edet_switch_stack, .-edet_switch_stack
)");
#endif

namespace edet::emulation {

namespace {

constexpr int kMostThreads = 1024;
constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;
constexpr size_t kGuard = 4096;  // below each stack
constexpr int64_t kSector = 32;
constexpr int kBanks = 32;

// AddressSanitizer must know on which stack the program is.
struct Stack {
  const void* bottom = nullptr;
  size_t bytes = 0;
};
#if defined(__SANITIZE_ADDRESS__)
void leave_for(const Stack& other, void** kept) {
  __sanitizer_start_switch_fiber(kept, other.bottom, other.bytes);
}
void arrived(void* kept, Stack* from) {
  __sanitizer_finish_switch_fiber(kept, from ? &from->bottom : nullptr,
                                  from ? &from->bytes : nullptr);
}
// Frames that are left for good stay marked as in use.
void forget_frames(const char* stacks, size_t bytes) {
  __asan_unpoison_memory_region(stacks, bytes);
}
#else
void leave_for(const Stack&, void**) {}
void arrived(void*, Stack*) {}
void forget_frames(const char*, size_t) {}
#endif

class Context {
 public:
  Stack stack;

  void prepare(char* bottom, size_t bytes, void (*entry)()) {
    stack = {bottom, bytes};
#if defined(__x86_64__)
    auto* top = reinterpret_cast<void**>(bottom + bytes);
    *--top = nullptr;  // where entry would return to; keeps the stack aligned
    *--top = reinterpret_cast<void*>(entry);
    top -= 6;
    std::memset(top, 0, 6 * sizeof(void*));
    at_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  void switch_to(Context& other) {
    void* kept = nullptr;
    leave_for(other.stack, &kept);
#if defined(__x86_64__)
    edet_switch_stack(&at_, other.at_);
#else
    swapcontext(&context_, &other.context_);
#endif
    arrived(kept, nullptr);
  }

 private:
#if defined(__x86_64__)
  void* at_ = nullptr;
#else
  ucontext_t context_;
#endif
};

enum class State { ready, at_barrier, in_warp, done };

struct Access {
  const char* at;
  int bytes;
};

struct Fiber {
  Thread index;
  Context context;
  State state;
  int line;                      // of what it waits at
  void* argument;                // that it brought to its warp
  std::vector<Access> accesses;  // of shared memory since it last waited
};

// The last accesses of two bytes of shared memory.
struct Shadow {
  static constexpr int kNobody = -1, kWarpOf = 1 << 20, kSeveralWarps = 1 << 21;
  int writer = kNobody,
      reader = kNobody;                 // a thread, kWarpOf + a warp of several, or several warps
  int write_block = 0, write_warp = 0;  // the clocks then
  int read_block = 0, read_warp = 0;
};

struct Range {
  const char *begin, *end;
  bool writable;
};

class Machine {
 public:
  ~Machine() {
    if (stacks_) munmap(stacks_, kMostThreads * kStack);
  }

  // of the host thread
  uint64_t seed = 0;
  int processors = 4, most_shared = 227 * 1024, architecture = 90;
  bool counting = false;
  std::vector<Launch> launches;
  std::string error;
  std::vector<Range> ranges;

  // of the block that runs
  Fiber* now = nullptr;
  Extent block_at{}, block_extent{}, grid_extent{};
  char* shared = nullptr;

  cudaError_t run(const char* name, Extent grid, Extent block, size_t shared_bytes,
                  void (*body)(const void*, const void*), const void* kernel, const void* params);
  [[noreturn]] void fail(const std::string& what);
  void barrier(int line);
  void together(int line, void* mine, void (*meet)(void**, int));
  void global_access(const void* p, size_t bytes, bool write);
  void shared_access(const void* p, size_t bytes, bool write, bool atomic);

 private:
  static void entry();
  void run_block();
  void wait(State state, int line);
  void release_barrier();
  void report_divergence();
  void count_conflicts(int warp);
  int warp_threads(int warp) const { return std::min(kWarp, threads_ - warp * kWarp); }

  char* stacks_ = nullptr;
  std::vector<Fiber> fibers_;
  int threads_ = 0;
  Context scheduler_;
  std::vector<int> ready_, next_;
  std::vector<int> arrived_;  // lanes of each warp that wait for the others
  int at_barrier_ = 0, done_ = 0;
  int block_clock_ = 0;  // counts on from barrier to barrier and from block to block
  std::vector<int> warp_clock_;
  std::vector<char> memory_;
  size_t shared_bytes_ = 0;
  std::vector<Shadow> shadow_;
  std::mt19937_64 random_;
  Launch launch_;
  std::unordered_set<int64_t> read_, written_;
  size_t last_range_ = 0;
  void (*body_)(const void*, const void*) = nullptr;
  const void *kernel_ = nullptr, *params_ = nullptr;
};

Machine& machine() {
  thread_local Machine m;
  return m;
}

std::string text(const Thread& t) {
  return "thread (" + std::to_string(t.x) + ", " + std::to_string(t.y) + ", " +
         std::to_string(t.z) + ")";
}

void Machine::entry() {
  Machine& m = machine();
  arrived(nullptr, &m.scheduler_.stack);
  m.body_(m.kernel_, m.params_);
  m.now->state = State::done;
  m.done_++;
  m.now->context.switch_to(m.scheduler_);
}

// Leaves the block for good: fibers hold nothing that needs to be destroyed.
void Machine::fail(const std::string& what) {
  error = launch_.kernel + ", block (" + std::to_string(block_at.x) + ", " +
          std::to_string(block_at.y) + ", " + std::to_string(block_at.z) + "), " +
          (now ? text(now->index) + ": " : "") + what;
  Context abandoned;
  (now ? now->context : abandoned).switch_to(scheduler_);
  __builtin_unreachable();
}

void Machine::wait(State state, int line) {
  now->state = state;
  now->line = line;
  now->context.switch_to(scheduler_);
}

void Machine::barrier(int line) {
  at_barrier_++;
  wait(State::at_barrier, line);
}

void Machine::together(int line, void* mine, void (*meet)(void**, int)) {
  const int warp = now->index.linear / kWarp, count = warp_threads(warp);
  Fiber* lanes = &fibers_[static_cast<size_t>(warp * kWarp)];
  now->argument = mine;
  if (++arrived_[static_cast<size_t>(warp)] < count) return wait(State::in_warp, line);
  void* arguments[kWarp];
  for (int i = 0; i < count; i++) {
    if (&lanes[i] != now && lanes[i].line != line) {
      fail("meets its warp at line " + std::to_string(line) + ", " + text(lanes[i].index) +
           " at line " + std::to_string(lanes[i].line) + ": a divergent warp");
    }
    arguments[i] = lanes[i].argument;
  }
  meet(arguments, count);
  count_conflicts(warp);
  warp_clock_[static_cast<size_t>(warp)]++;
  arrived_[static_cast<size_t>(warp)] = 0;
  for (int i = 0; i < count; i++) {
    if (&lanes[i] == now) continue;
    lanes[i].state = State::ready;
    next_.push_back(lanes[i].index.linear);
  }
}

void Machine::release_barrier() {
  const int line = fibers_[0].line;
  for (int i = 0; i < threads_; i++)
    if (fibers_[static_cast<size_t>(i)].line != line) return;  // divergent
  at_barrier_ = 0;
  block_clock_++;
  for (int w = 0; w * kWarp < threads_; w++) count_conflicts(w);
  for (int i = 0; i < threads_; i++) {
    fibers_[static_cast<size_t>(i)].state = State::ready;
    next_.push_back(i);
  }
}

// No fiber can go on though some wait: says who waits and where the others are.
void Machine::report_divergence() {
  const Fiber *waiting = nullptr, *other = nullptr;
  for (int i = 0; i < threads_; i++) {
    const Fiber& f = fibers_[static_cast<size_t>(i)];
    if (f.state != State::done && !waiting) waiting = &f;
  }
  for (int i = 0; i < threads_; i++) {
    const Fiber& f = fibers_[static_cast<size_t>(i)];
    if (f.state != waiting->state || f.line != waiting->line) other = &f;
  }
  const auto place = [](const Fiber& f) {
    if (f.state == State::done) return std::string(" has left the kernel");
    return std::string(f.state == State::at_barrier ? " waits at the barrier"
                                                    : " waits for its warp") +
           " of line " + std::to_string(f.line);
  };
  error = launch_.kernel + ": a divergent barrier: " + text(waiting->index) + place(*waiting) +
          ", " + (other ? text(other->index) + place(*other) : std::string("nobody comes"));
}

void Machine::run_block() {
  const int warps = (threads_ + kWarp - 1) / kWarp;
  std::fill(memory_.begin(), memory_.end(), '\xff');  // NaN in every float type
  // of the block before, nothing is remembered
  block_clock_++;
  arrived_.assign(static_cast<size_t>(warps), 0);
  warp_clock_.assign(static_cast<size_t>(warps), 0);
  at_barrier_ = done_ = 0;
  next_.clear();
  for (int i = 0; i < threads_; i++) {
    Fiber& f = fibers_[static_cast<size_t>(i)];
    f.index = {i % block_extent.x, i / block_extent.x % block_extent.y,
               i / (block_extent.x * block_extent.y), i};
    f.state = State::ready;
    f.accesses.clear();
    f.context.prepare(stacks_ + static_cast<size_t>(i) * kStack + kGuard, kStack - kGuard, entry);
    next_.push_back(i);
  }
  while (done_ < threads_) {
    if (next_.empty()) {
      if (at_barrier_ == threads_) release_barrier();
      if (next_.empty()) return report_divergence();
    }
    ready_.swap(next_);
    next_.clear();
    std::shuffle(ready_.begin(), ready_.end(), random_);
    for (int i : ready_) {
      now = &fibers_[static_cast<size_t>(i)];
      scheduler_.switch_to(now->context);
      if (!error.empty()) return forget_frames(stacks_, kMostThreads * kStack);
    }
  }
  for (int w = 0; w < warps; w++) count_conflicts(w);
  launch_.sectors_read += static_cast<int64_t>(read_.size());
  launch_.sectors_written += static_cast<int64_t>(written_.size());
  read_.clear();
  written_.clear();
}

// The k-th access of each lane since the last meeting counts as one instruction. 32 lanes move 128
// bytes at a time; accesses of another word of a bank that is taken wait for the next time.
void Machine::count_conflicts(int warp) {
  if (!counting) return;
  Fiber* lanes = &fibers_[static_cast<size_t>(warp * kWarp)];
  size_t most = 0;
  for (int i = 0; i < warp_threads(warp); i++) most = std::max(most, lanes[i].accesses.size());
  for (size_t k = 0; k < most; k++) {
    int widest = 4;
    for (int i = 0; i < warp_threads(warp); i++)
      if (k < lanes[i].accesses.size()) widest = std::max(widest, lanes[i].accesses[k].bytes);
    const int at_once = kWarp * 4 / widest;
    for (int first = 0; first < warp_threads(warp); first += at_once) {
      std::vector<int64_t> words[kBanks];
      for (int i = first; i < std::min(first + at_once, warp_threads(warp)); i++) {
        if (k >= lanes[i].accesses.size()) continue;
        const Access& a = lanes[i].accesses[k];
        for (int64_t word = (a.at - shared) / 4; word * 4 < a.at - shared + a.bytes; word++) {
          auto& bank = words[word % kBanks];
          if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
        }
      }
      size_t cycles = 1;
      for (const auto& bank : words) cycles = std::max(cycles, bank.size());
      launch_.bank_conflicts += static_cast<int64_t>(cycles) - 1;
    }
  }
  for (int i = 0; i < warp_threads(warp); i++) lanes[i].accesses.clear();
}

void Machine::global_access(const void* p, size_t bytes, bool write) {
  const char* at = static_cast<const char*>(p);
  const auto what = [&] {
    return std::string(write ? "writes " : "reads ") + std::to_string(bytes) +
           " bytes of global memory ";
  };
  const auto inside = [&](const Range& r) { return at >= r.begin && at + bytes <= r.end; };
  if (last_range_ >= ranges.size() || !inside(ranges[last_range_])) {
    last_range_ = 0;
    while (last_range_ < ranges.size() && !inside(ranges[last_range_])) last_range_++;
    if (last_range_ == ranges.size()) fail(what() + "outside every array");
  }
  if (write && !ranges[last_range_].writable) fail(what() + "of an input");
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail(what() + "at an address that is no multiple");
  if (!counting) return;
  (write ? launch_.bytes_written : launch_.bytes_read) += static_cast<int64_t>(bytes);
  (write ? written_ : read_).insert(static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)) / kSector);
}

void Machine::shared_access(const void* p, size_t bytes, bool write, bool atomic) {
  const char* at = static_cast<const char*>(p);
  const auto what = [&] {
    return std::string(write ? "writes " : "reads ") + std::to_string(bytes) +
           " bytes of shared memory at " + std::to_string(at - shared);
  };
  if (at < shared || at + bytes > shared + shared_bytes_)
    fail(what() + ", outside its " + std::to_string(shared_bytes_));
  if (static_cast<size_t>(at - shared) % bytes) fail(what() + ", which is no multiple");
  if (counting) now->accesses.push_back({at, static_cast<int>(bytes)});
  if (atomic) return;
  const int me = now->index.linear, warp = me / kWarp;
  const int clock = warp_clock_[static_cast<size_t>(warp)];
  const auto ordered = [&](int who, int block_time, int warp_time) {
    if (who == Shadow::kNobody || who == me || block_time != block_clock_) return true;
    if (who == Shadow::kSeveralWarps) return false;
    const int other = who >= Shadow::kWarpOf ? who - Shadow::kWarpOf : who / kWarp;
    return other == warp && warp_time != clock;
  };
  const auto first = static_cast<size_t>(at - shared) / 2;
  for (size_t i = first; i <= first + (bytes - 1) / 2; i++) {
    Shadow& s = shadow_[i];
    if (!ordered(s.writer, s.write_block, s.write_warp))
      fail(what() + ", which another thread wrote since the last barrier: a race");
    if (write) {
      if (!ordered(s.reader, s.read_block, s.read_warp))
        fail(what() + ", which another thread read since the last barrier: a race");
      s.writer = me, s.write_block = block_clock_, s.write_warp = clock;
    } else if (s.reader == Shadow::kNobody || s.read_block != block_clock_) {
      s.reader = me, s.read_block = block_clock_, s.read_warp = clock;
    } else if (s.reader != me && s.reader != Shadow::kSeveralWarps) {
      const int other = s.reader >= Shadow::kWarpOf ? s.reader - Shadow::kWarpOf : s.reader / kWarp;
      s.reader = other == warp ? Shadow::kWarpOf + warp : Shadow::kSeveralWarps;
      s.read_warp = clock;
    } else {
      s.read_warp = clock;
    }
  }
}

// "launch(… [with Params = X])" says more about the caller than about the kernel: its X remains.
std::string kernel_name(const char* function) {
  std::string name = function;
  const size_t at = name.find("Params = ");
  if (at == std::string::npos) return name;
  name = name.substr(at + 9);
  name = name.substr(0, name.find_first_of(";]"));
  const size_t last = name.rfind("::");
  return last == std::string::npos ? name : name.substr(last + 2);
}

cudaError_t Machine::run(const char* name, Extent grid, Extent block, size_t shared_bytes,
                         void (*body)(const void*, const void*), const void* kernel,
                         const void* params) {
  error.clear();
  now = nullptr;
  launch_ = {};
  launch_.kernel = kernel_name(name);
  threads_ = block.x * block.y * block.z;
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  launch_.blocks = blocks;
  launch_.shared_bytes = static_cast<int64_t>(shared_bytes);
  if (blocks < 1 || grid.y > 65535 || grid.z > 65535 || threads_ < 1 || threads_ > kMostThreads ||
      shared_bytes > static_cast<size_t>(most_shared)) {
    error = launch_.kernel + ": a launch of " + std::to_string(blocks) + " blocks of " +
            std::to_string(threads_) + " threads and " + std::to_string(shared_bytes) +
            " bytes of shared memory";
    return cudaErrorLaunchFailure;
  }
  if (!stacks_) {
    void* p = mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      error = "no memory for the fibers' stacks";
      return cudaErrorLaunchFailure;
    }
    stacks_ = static_cast<char*>(p);
    for (size_t i = 0; i < kMostThreads; i++) mprotect(stacks_ + i * kStack, kGuard, PROT_NONE);
    fibers_.resize(kMostThreads);
  }
  shared_bytes_ = shared_bytes;
  memory_.resize(shared_bytes + 128);
  shared = memory_.data() + (128 - reinterpret_cast<uintptr_t>(memory_.data()) % 128);
  shadow_.resize(shared_bytes / 2 + 1);
  random_.seed(seed);
  body_ = body, kernel_ = kernel, params_ = params;
  block_extent = block, grid_extent = grid;
  last_range_ = 0;
  read_.clear();
  written_.clear();

  std::vector<int64_t> order(static_cast<size_t>(blocks));
  for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<int64_t>(i);
  std::shuffle(order.begin(), order.end(), random_);
  for (int64_t i : order) {
    block_at = {static_cast<int>(i % grid.x), static_cast<int>(i / grid.x % grid.y),
                static_cast<int>(i / (int64_t(grid.x) * grid.y))};
    run_block();
    if (!error.empty()) return cudaErrorLaunchFailure;
  }
  if (counting) launches.push_back(launch_);
  return cudaSuccess;
}

}  // namespace

void set_seed(uint64_t seed) { machine().seed = seed; }
void set_device(int multiprocessors, int shared_bytes, int architecture) {
  machine().processors = multiprocessors;
  machine().most_shared = shared_bytes;
  machine().architecture = architecture;
}
void count_launches(bool on) {
  if (on) machine().launches.clear();
  machine().counting = on;
}
const std::vector<Launch>& launches() { return machine().launches; }
const std::string& last_error() { return machine().error; }

void know_memory(const void* data, size_t bytes, bool writable) {
  const char* at = static_cast<const char*>(data);
  machine().ranges.push_back({at, at + bytes, writable});
}
void forget_memory() { machine().ranges.clear(); }

const Thread& thread() { return machine().now->index; }
Extent block() { return machine().block_at; }
Extent block_size() { return machine().block_extent; }
Extent grid_size() { return machine().grid_extent; }
void barrier(int line) { machine().barrier(line); }
void together(int line, void* mine, void (*meet)(void**, int)) {
  machine().together(line, mine, meet);
}
void global_access(const void* p, size_t bytes, bool write) {
  machine().global_access(p, bytes, write);
}
void shared_access(const void* p, size_t bytes, bool write) {
  machine().shared_access(p, bytes, write, false);
}
void shared_atomic(const void* p, size_t bytes) { machine().shared_access(p, bytes, true, true); }
char* shared_memory() { return machine().shared; }
void fail(const std::string& what) { machine().fail(what); }
int architecture() { return machine().architecture; }
int multiprocessors() { return machine().processors; }
int most_shared_bytes() { return machine().most_shared; }

cudaError_t clear(void* data, size_t bytes) {
  std::memset(data, 0, bytes);
  return cudaSuccess;
}

cudaError_t run(const char* name, Extent grid, Extent block, size_t shared_bytes,
                void (*body)(const void*, const void*), const void* kernel, const void* params) {
  return machine().run(name, grid, block, shared_bytes, body, kernel, params);
}

}  // namespace edet::emulation

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorNoKernelImageForDevice: return "no kernel image is available for the device";
    case cudaErrorLaunchFailure: return edet::emulation::last_error().c_str();
  }
  return "unknown error";
}
