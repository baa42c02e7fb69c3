// Fibers of the blocks that run together, their schedule, and what is watched while they run.
#include "emulator.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <random>
#include <unordered_map>
#include <unordered_set>

#include "../core/params.h"

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
    forget_frames(bottom, bytes);
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

enum class State { ready, at_barrier, in_warp, at_flag, done };

// What is known of each block's writes, by the block's number: those before its barrier with this
// clock have been seen. Missing entries are 0.
using Knowledge = std::vector<int>;

void learn(Knowledge& known, const Knowledge& more) {
  if (known.size() < more.size()) known.resize(more.size(), 0);
  for (size_t i = 0; i < more.size(); i++) known[i] = std::max(known[i], more[i]);
}

struct Access {
  const char* at;
  int bytes;
};

struct Block;

// 16 bytes on their way to shared memory.
struct Copy {
  char* to;
  char bytes[16];
  int group;  // of its thread's
};

struct Fiber {
  Block* block;
  Thread index;
  Context context;
  State state;
  int line;                      // of what it waits at
  void* argument;                // that it brought to its warp
  std::vector<Access> accesses;  // of shared memory since it last waited
  const Flag* flag;              // that it waits for
  Knowledge known;               // beside the block's, from what it acquired since the barrier
  Knowledge unfenced;            // from atomics, to be known after a fence
  bool fenced;                   // since its last atomic
  bool awaited;                  // the launches before, where this one may overtake them
  std::vector<Copy> copies;      // that have not arrived
  int group;                     // of copies, that is not ended
};

// The last accesses of two bytes of shared memory.
struct Shadow {
  static constexpr int kNobody = -1, kWarpOf = 1 << 20, kSeveralWarps = 1 << 21;
  int writer = kNobody,
      reader = kNobody;                 // a thread, kWarpOf + a warp of several, or several warps
  int write_block = 0, write_warp = 0;  // the clocks then
  int read_block = 0, read_warp = 0;
};

// Who used two bytes of global memory last.
struct Trace {
  int launch = 0, block = 0, clock = 0;
};

struct Range {
  const char *begin, *end;
  bool writable;
  std::vector<Trace> writes, reads;  // of what is writable, once it was used
};

// A block that runs, beside others.
struct Block {
  int number;
  Extent at;
  std::vector<Fiber> fibers;
  std::vector<int> ready, next;  // threads to run, and to run after them
  std::vector<int> arrived;      // lanes of each warp that wait for the others
  int at_barrier, done;
  int clock;  // barriers so far
  std::vector<int> warp_clock;
  std::vector<char> memory;
  char* shared;
  std::vector<Shadow> shadow;
  std::unordered_set<int64_t> sectors_read, sectors_written;
  Knowledge known, acquired;  // by all its threads, and by some since the last barrier
};

class Machine {
 public:
  ~Machine() { free_stacks(); }

  // of the host thread
  uint64_t seed = 0;
  int processors = 4, most_shared = 227 * 1024, architecture = 90, resident = 1;
  bool counting = false, dry = false;
  std::vector<Launch> launches;
  std::string error;
  std::vector<Range> ranges;

  // of the launch that runs
  Fiber* now = nullptr;
  Extent block_extent{}, grid_extent{};

  cudaError_t run(const char* name, Extent grid, Extent block, size_t shared_bytes, bool pdl,
                  void (*body)(const void*, const void*), const void* kernel, const void* params,
                  size_t params_bytes);
  cudaError_t clear(void* data, size_t bytes);
  [[noreturn]] void fail(const std::string& what);
  void barrier(int line);
  void together(int line, void* mine, void (*meet)(void**, int));
  void global_access(const void* p, size_t bytes, Use use);
  void shared_access(const void* p, size_t bytes, bool write, bool atomic);
  void atomic(const void* p);
  void fence();
  void release(const void* p);
  void changed(const void* p);
  void await(const Flag& flag, int line);
  void await_launches() { now->awaited = true; }
  void copy_later(char* to, const char* bytes);
  void end_group() { now->group++; }
  void await_groups(int left);

 private:
  static void entry();
  void free_stacks();
  bool make_stacks(size_t count);
  void begin_block(Block& b, int64_t number);
  bool run_some(Block& b);
  void end_block(Block& b);
  void wait(State state, int line);
  void release_barrier(Block& b);
  void report_divergence(const Block& b);
  void report_deadlock();
  void count_conflicts(Block& b, int warp);
  bool sees(const Fiber& f, const Trace& use) const;
  Range& range_of(const char* at, size_t bytes, const char* what);
  int warp_threads(int warp) const { return std::min(kWarp, threads_ - warp * kWarp); }

  char* stacks_ = nullptr;
  size_t stack_bytes_ = 0;
  std::vector<Block> blocks_;   // places for blocks
  std::vector<Block*> active_;  // blocks that run
  int threads_ = 0;
  Context scheduler_;
  size_t shared_bytes_ = 0;
  bool pdl_ = false;  // it may run before the launches before it end
  int launch_number_ = 0;
  std::unordered_map<const void*, Knowledge> released_;  // by whoever wrote to an address
  std::mt19937_64 random_;
  bool late_copies_ = false;
  Launch launch_;
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
  m.now->block->done++;
  m.now->context.switch_to(m.scheduler_);
}

// Leaves the launch for good: fibers hold nothing that needs to be destroyed.
void Machine::fail(const std::string& what) {
  const Extent at = now->block->at;
  error = launch_.kernel + ", block (" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " +
          std::to_string(at.z) + "), " + text(now->index) + ": " + what;
  now->context.switch_to(scheduler_);
  __builtin_unreachable();
}

void Machine::wait(State state, int line) {
  now->state = state;
  now->line = line;
  now->context.switch_to(scheduler_);
}

void Machine::barrier(int line) {
  now->block->at_barrier++;
  wait(State::at_barrier, line);
}

void Machine::together(int line, void* mine, void (*meet)(void**, int)) {
  Block& b = *now->block;
  const int warp = now->index.linear / kWarp, count = warp_threads(warp);
  Fiber* lanes = &b.fibers[static_cast<size_t>(warp * kWarp)];
  now->argument = mine;
  if (++b.arrived[static_cast<size_t>(warp)] < count) return wait(State::in_warp, line);
  void* arguments[kWarp];
  for (int i = 0; i < count; i++) {
    if (&lanes[i] != now && lanes[i].line != line) {
      fail("meets its warp at line " + std::to_string(line) + ", " + text(lanes[i].index) +
           " at line " + std::to_string(lanes[i].line) + ": a divergent warp");
    }
    arguments[i] = lanes[i].argument;
  }
  meet(arguments, count);
  count_conflicts(b, warp);
  b.warp_clock[static_cast<size_t>(warp)]++;
  b.arrived[static_cast<size_t>(warp)] = 0;
  for (int i = 0; i < count; i++) {
    if (&lanes[i] == now) continue;
    lanes[i].state = State::ready;
    b.next.push_back(lanes[i].index.linear);
  }
}

void Machine::release_barrier(Block& b) {
  const int line = b.fibers[0].line;
  for (const Fiber& f : b.fibers)
    if (f.line != line) return;  // divergent
  b.at_barrier = 0;
  b.clock++;
  learn(b.known, b.acquired);
  b.acquired.clear();
  for (int w = 0; w * kWarp < threads_; w++) count_conflicts(b, w);
  for (Fiber& f : b.fibers) {
    f.state = State::ready;
    f.known.clear();
    b.next.push_back(f.index.linear);
  }
}

// No fiber of a block can go on though some wait, none of them for a flag: says who waits and where
// the others are.
void Machine::report_divergence(const Block& b) {
  const Fiber *waiting = nullptr, *other = nullptr;
  for (const Fiber& f : b.fibers)
    if (f.state != State::done && !waiting) waiting = &f;
  for (const Fiber& f : b.fibers)
    if (f.state != waiting->state || f.line != waiting->line) other = &f;
  const auto place = [](const Fiber& f) {
    if (f.state == State::done) return std::string(" has left the kernel");
    return std::string(f.state == State::at_barrier ? " waits at the barrier"
                                                    : " waits for its warp") +
           " of line " + std::to_string(f.line);
  };
  error = launch_.kernel + ": a divergent barrier: " + text(waiting->index) + place(*waiting) +
          ", " + (other ? text(other->index) + place(*other) : std::string("nobody comes"));
}

// No block can go on: says who waits for which flag.
void Machine::report_deadlock() {
  error = launch_.kernel + ": a deadlock of " + std::to_string(active_.size()) + " blocks";
  for (const Block* b : active_) {
    for (const Fiber& f : b->fibers) {
      if (f.state != State::at_flag) continue;
      error += "; block " + std::to_string(b->number) + ", " + text(f.index) + " in tile " +
               std::to_string(f.flag->tile) + " of node " + std::to_string(f.flag->node) +
               " waits for flag " + std::to_string(f.flag->number) + " to become " +
               std::to_string(f.flag->value) + ", it is " + std::to_string(*f.flag->at);
      break;
    }
  }
}

void Machine::free_stacks() {
  if (!stacks_) return;
  forget_frames(stacks_, stack_bytes_);  // others may be given this memory
  munmap(stacks_, stack_bytes_);
}

bool Machine::make_stacks(size_t count) {
  if (stack_bytes_ >= count * kStack) return true;
  free_stacks();
  stack_bytes_ = 0;
  void* p = mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  stacks_ = p == MAP_FAILED ? nullptr : static_cast<char*>(p);
  if (!stacks_) return false;
  stack_bytes_ = count * kStack;
  for (size_t i = 0; i < count; i++) mprotect(stacks_ + i * kStack, kGuard, PROT_NONE);
  return true;
}

void Machine::copy_later(char* to, const char* bytes) {
  if (!late_copies_) {
    shared_access(to, sizeof Copy::bytes, true, false);
    std::memcpy(to, bytes, sizeof Copy::bytes);
    return;
  }
  Copy copy{to, {}, now->group};
  std::memcpy(copy.bytes, bytes, sizeof copy.bytes);
  now->copies.push_back(copy);
}

void Machine::await_groups(int left) {
  std::vector<Copy> later;
  for (const Copy& copy : now->copies) {
    if (copy.group >= now->group - left) {
      later.push_back(copy);
      continue;
    }
    shared_access(copy.to, sizeof copy.bytes, true, false);
    std::memcpy(copy.to, copy.bytes, sizeof copy.bytes);
  }
  now->copies = std::move(later);
}

void Machine::begin_block(Block& b, int64_t number) {
  const auto warps = static_cast<size_t>(divide_up(threads_, kWarp));
  const auto place = static_cast<size_t>(&b - blocks_.data());
  b.number = static_cast<int>(number);
  b.at = {static_cast<int>(number % grid_extent.x),
          static_cast<int>(number / grid_extent.x % grid_extent.y),
          static_cast<int>(number / (int64_t(grid_extent.x) * grid_extent.y))};
  b.memory.assign(shared_bytes_ + 128, '\xff');  // NaN in every float type
  b.shared = b.memory.data() + (128 - reinterpret_cast<uintptr_t>(b.memory.data()) % 128);
  b.shadow.assign(shared_bytes_ / 2 + 1, Shadow{});
  b.arrived.assign(warps, 0);
  b.warp_clock.assign(warps, 0);
  b.at_barrier = b.done = b.clock = 0;
  b.known.clear();
  b.acquired.clear();
  b.ready.clear();
  b.next.clear();
  b.fibers.resize(static_cast<size_t>(threads_));
  for (int i = 0; i < threads_; i++) {
    Fiber& f = b.fibers[static_cast<size_t>(i)];
    f.block = &b;
    f.index = {i % block_extent.x, i / block_extent.x % block_extent.y,
               i / (block_extent.x * block_extent.y), i};
    f.state = State::ready;
    f.line = 0;
    f.accesses.clear();
    f.known.clear();
    f.unfenced.clear();
    f.fenced = false;
    f.awaited = !pdl_;
    f.copies.clear();
    f.group = 0;
    const size_t stack = place * static_cast<size_t>(threads_) + static_cast<size_t>(i);
    f.context.prepare(stacks_ + stack * kStack + kGuard, kStack - kGuard, entry);
    b.next.push_back(i);
  }
}

// Runs some fibers of a block until they wait, all that are ready where it is alone; false when
// none can run.
bool Machine::run_some(Block& b) {
  if (b.ready.empty()) {
    if (b.next.empty() && b.at_barrier == threads_) release_barrier(b);
    b.ready.swap(b.next);
    std::shuffle(b.ready.begin(), b.ready.end(), random_);
  }
  if (b.ready.empty()) return false;
  size_t count = b.ready.size();
  if (active_.size() > 1) count = 1 + random_() % count;
  for (; count && error.empty(); count--) {
    now = &b.fibers[static_cast<size_t>(b.ready.back())];
    b.ready.pop_back();
    scheduler_.switch_to(now->context);
  }
  return true;
}

void Machine::end_block(Block& b) {
  for (int w = 0; w * kWarp < threads_; w++) count_conflicts(b, w);
  launch_.sectors_read += static_cast<int64_t>(b.sectors_read.size());
  launch_.sectors_written += static_cast<int64_t>(b.sectors_written.size());
  b.sectors_read.clear();
  b.sectors_written.clear();
}

// The k-th access of each lane since the last meeting counts as one instruction. 32 lanes move 128
// bytes at a time; accesses of another word of a bank that is taken wait for the next time.
void Machine::count_conflicts(Block& b, int warp) {
  if (!counting) return;
  Fiber* lanes = &b.fibers[static_cast<size_t>(warp * kWarp)];
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
        for (int64_t word = (a.at - b.shared) / 4; word * 4 < a.at - b.shared + a.bytes; word++) {
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

Range& Machine::range_of(const char* at, size_t bytes, const char* what) {
  const auto inside = [&](const Range& r) { return at >= r.begin && at + bytes <= r.end; };
  if (last_range_ >= ranges.size() || !inside(ranges[last_range_])) {
    last_range_ = 0;
    while (last_range_ < ranges.size() && !inside(ranges[last_range_])) last_range_++;
    if (last_range_ == ranges.size())
      fail(what + std::to_string(bytes) + " bytes of global memory outside every array");
  }
  return ranges[last_range_];
}

// Whether what another block did is ordered before what a fiber does now.
bool Machine::sees(const Fiber& f, const Trace& use) const {
  const auto in = [&](const Knowledge& known) {
    return static_cast<size_t>(use.block) < known.size() &&
           use.clock < known[static_cast<size_t>(use.block)];
  };
  return use.block == f.block->number || in(f.block->known) || in(f.known);
}

void Machine::global_access(const void* p, size_t bytes, Use use) {
  const char* at = static_cast<const char*>(p);
  const bool write = use == Use::write || use == Use::atomic;
  Range& range = range_of(at, bytes, write ? "writes " : "reads ");
  const auto report = [&](const std::string& what) {
    fail((write ? "writes " : "reads ") + std::to_string(bytes) + " bytes of global memory " +
         what);
  };
  if (write && !range.writable) report("of an input");
  if (reinterpret_cast<uintptr_t>(p) % bytes) report("at an address that is no multiple");
  if (range.writable && use != Use::atomic) {
    if (range.writes.empty()) {
      const size_t count = static_cast<size_t>(range.end - range.begin) / 2 + 1;
      range.writes.resize(count);
      range.reads.resize(count);
    }
    const Fiber& f = *now;
    const Trace mine{launch_number_, f.block->number, f.block->clock};
    const auto first = static_cast<size_t>(at - range.begin) / 2;
    for (size_t i = first; i <= first + (bytes - 1) / 2; i++) {
      const Trace written = range.writes[i], read = range.reads[i];
      if (!f.awaited && (write || (written.launch && written.launch != launch_number_)))
        report("that a launch before may still use: it was not awaited");
      if (written.launch == launch_number_) {
        if (use == Use::constant)
          report("through the read-only cache, which this launch has written");
        if (!sees(f, written))
          report("that block " + std::to_string(written.block) +
                 " wrote, without an acquire of its release: a race between blocks");
      }
      if (write && read.launch == launch_number_ && !sees(f, read))
        report("that block " + std::to_string(read.block) +
               " read, without an acquire of its release: a race between blocks");
      (write ? range.writes : range.reads)[i] = mine;
    }
  }
  if (!counting) return;
  (write ? launch_.bytes_written : launch_.bytes_read) += static_cast<int64_t>(bytes);
  (write ? now->block->sectors_written : now->block->sectors_read)
      .insert(static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)) / kSector);
}

// An atomic after a fence releases what the block wrote before its last barrier; a fence after an
// atomic acquires what those before it released.
void Machine::atomic(const void* p) {
  learn(now->unfenced, released_[p]);
  if (now->fenced) release(p);
  now->fenced = false;
}

void Machine::fence() {
  now->fenced = true;
  learn(now->known, now->unfenced);
  learn(now->block->acquired, now->unfenced);
  now->unfenced.clear();
}

void Machine::release(const void* p) {
  Block& b = *now->block;
  Knowledge& to = released_[p];
  learn(to, b.known);
  learn(to, now->known);
  const auto number = static_cast<size_t>(b.number);
  if (to.size() <= number) to.resize(number + 1, 0);
  to[number] = std::max(to[number], b.clock);
}

// Wakes who waits for a flag that has its value now.
void Machine::changed(const void* p) {
  for (Block* b : active_) {
    for (Fiber& f : b->fibers) {
      if (f.state != State::at_flag || f.flag->at != p || *f.flag->at < f.flag->value) continue;
      f.state = State::ready;
      b->next.push_back(f.index.linear);
    }
  }
}

void Machine::await(const Flag& flag, int line) {
  range_of(reinterpret_cast<const char*>(flag.at), sizeof *flag.at, "waits for ");
  now->flag = &flag;
  if (*flag.at < flag.value) wait(State::at_flag, line);
  learn(now->known, released_[flag.at]);
  learn(now->block->acquired, released_[flag.at]);
}

void Machine::shared_access(const void* p, size_t bytes, bool write, bool atomic) {
  Block& b = *now->block;
  const char *at = static_cast<const char*>(p), *shared = b.shared;
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
  const int clock = b.warp_clock[static_cast<size_t>(warp)];
  const auto ordered = [&](int who, int block_time, int warp_time) {
    if (who == Shadow::kNobody || who == me || block_time != b.clock) return true;
    if (who == Shadow::kSeveralWarps) return false;
    const int other = who >= Shadow::kWarpOf ? who - Shadow::kWarpOf : who / kWarp;
    return other == warp && warp_time != clock;
  };
  const auto first = static_cast<size_t>(at - shared) / 2;
  for (size_t i = first; i <= first + (bytes - 1) / 2; i++) {
    Shadow& s = b.shadow[i];
    if (!ordered(s.writer, s.write_block, s.write_warp))
      fail(what() + ", which another thread wrote since the last barrier: a race");
    if (write) {
      if (!ordered(s.reader, s.read_block, s.read_warp))
        fail(what() + ", which another thread read since the last barrier: a race");
      s.writer = me, s.write_block = b.clock, s.write_warp = clock;
    } else if (s.reader == Shadow::kNobody || s.read_block != b.clock) {
      s.reader = me, s.read_block = b.clock, s.read_warp = clock;
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

std::mutex limits_mutex;
// Of each kernel on each device, which the most that it gives a block stands for.
std::map<std::pair<const void*, int>, size_t>& shared_limits() {
  static std::map<std::pair<const void*, int>, size_t> limits;
  return limits;
}
size_t shared_limit(const void* kernel, int device) {
  const std::lock_guard<std::mutex> lock(limits_mutex);
  const auto found = shared_limits().find({kernel, device});
  return found == shared_limits().end() ? 48 * 1024 : found->second;
}

// Of a kernel's code in the module's file.
size_t offset_of(const void* function) {
  Dl_info info{};
  if (!dladdr(function, &info)) return 0;
  return static_cast<size_t>(static_cast<const char*>(function) -
                             static_cast<const char*>(info.dli_fbase));
}

cudaError_t Machine::clear(void* data, size_t bytes) {
  if (!dry) std::memset(data, 0, bytes);
  if (dry && counting) {
    launches.emplace_back();
    launches.back().kernel = "memset";
    launches.back().bytes_written = static_cast<int64_t>(bytes);
  }
  return cudaSuccess;
}

cudaError_t Machine::run(const char* name, Extent grid, Extent block, size_t shared_bytes, bool pdl,
                         void (*body)(const void*, const void*), const void* kernel,
                         const void* params, size_t params_bytes) {
  error.clear();
  launch_ = {};
  launch_.kernel = kernel_name(name);
  threads_ = block.x * block.y * block.z;
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  launch_.blocks = blocks;
  launch_.shared_bytes = static_cast<int64_t>(shared_bytes);
  if (blocks < 1 || blocks > INT32_MAX || grid.y > 65535 || grid.z > 65535 || threads_ < 1 ||
      threads_ > kMostThreads || shared_bytes > static_cast<size_t>(most_shared)) {
    error = launch_.kernel + ": a launch of " + std::to_string(blocks) + " blocks of " +
            std::to_string(threads_) + " threads and " + std::to_string(shared_bytes) +
            " bytes of shared memory";
    return cudaErrorLaunchFailure;
  }
  const size_t limit = shared_limit(*static_cast<const void* const*>(kernel), most_shared);
  if (shared_bytes > limit) {
    error = launch_.kernel + ": " + std::to_string(shared_bytes) +
            " bytes of shared memory, but the kernel was allowed " + std::to_string(limit);
    return cudaErrorLaunchFailure;
  }
  if (counting) {
    launch_.function = offset_of(*static_cast<const void* const*>(kernel));
    launch_.params.assign(static_cast<const char*>(params), params_bytes);
    launch_.grid = grid, launch_.block = block, launch_.pdl = pdl;
  }
  if (dry) {
    if (counting) launches.push_back(launch_);
    return cudaSuccess;
  }
  const auto places = static_cast<size_t>(std::min<int64_t>(resident, blocks));
  if (!make_stacks(places * static_cast<size_t>(threads_))) {
    error = "no memory for the fibers' stacks";
    return cudaErrorLaunchFailure;
  }
  shared_bytes_ = shared_bytes;
  pdl_ = pdl;
  launch_number_++;
  released_.clear();
  random_.seed(seed);
  late_copies_ = seed % 2 == 1;
  body_ = body, kernel_ = kernel, params_ = params;
  block_extent = block, grid_extent = grid;
  last_range_ = 0;

  std::vector<int64_t> order(static_cast<size_t>(blocks));
  for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<int64_t>(i);
  std::shuffle(order.begin(), order.end(), random_);
  if (blocks_.size() < places) blocks_.resize(places);
  active_.clear();
  for (size_t i = 0; i < places; i++) {
    begin_block(blocks_[i], order.back());
    order.pop_back();
    active_.push_back(&blocks_[i]);
  }
  while (!active_.empty()) {
    // a block at random, or the next one that can go on
    const size_t first = random_() % active_.size();
    size_t tried = 0;
    while (tried < active_.size() && !run_some(*active_[(first + tried) % active_.size()])) tried++;
    if (tried == active_.size()) {
      const auto at_flag = [](const Fiber& f) { return f.state == State::at_flag; };
      report_deadlock();
      for (const Block* b : active_)
        if (std::none_of(b->fibers.begin(), b->fibers.end(), at_flag)) report_divergence(*b);
    }
    if (!error.empty()) return cudaErrorLaunchFailure;
    const auto at = active_.begin() + static_cast<std::ptrdiff_t>((first + tried) % active_.size());
    Block& b = **at;
    if (b.done < threads_) continue;
    end_block(b);
    if (order.empty()) {
      active_.erase(at);
    } else {
      begin_block(b, order.back());
      order.pop_back();
    }
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

void set_dry(bool on) { machine().dry = on; }
bool dry() { return machine().dry; }
void set_resident(int blocks) { machine().resident = std::max(blocks, 1); }

void know_memory(const void* data, size_t bytes, bool writable) {
  const char* at = static_cast<const char*>(data);
  machine().ranges.push_back({at, at + bytes, writable, {}, {}});
}
void forget_memory() { machine().ranges.clear(); }

const Thread& thread() { return machine().now->index; }
Extent block() { return machine().now->block->at; }
Extent block_size() { return machine().block_extent; }
Extent grid_size() { return machine().grid_extent; }
void barrier(int line) { machine().barrier(line); }
void together(int line, void* mine, void (*meet)(void**, int)) {
  machine().together(line, mine, meet);
}
void global_access(const void* p, size_t bytes, Use use) { machine().global_access(p, bytes, use); }
void atomic(const void* p) { machine().atomic(p); }
void fence() { machine().fence(); }
void release(const void* p) { machine().release(p); }
void changed(const void* p) { machine().changed(p); }
void await(const Flag& flag, int line) { machine().await(flag, line); }
void await_launches() { machine().await_launches(); }
void shared_access(const void* p, size_t bytes, bool write) {
  machine().shared_access(p, bytes, write, false);
}
void shared_atomic(const void* p, size_t bytes) { machine().shared_access(p, bytes, true, true); }
char* shared_memory() { return machine().now->block->shared; }
void copy_later(char* to, const char* bytes) { machine().copy_later(to, bytes); }
void end_group() { machine().end_group(); }
void await_groups(int left) { machine().await_groups(left); }
void fail(const std::string& what) { machine().fail(what); }
int architecture() { return machine().architecture; }
int multiprocessors() { return machine().processors; }
int most_shared_bytes() { return machine().most_shared; }

cudaError_t clear(void* data, size_t bytes) { return machine().clear(data, bytes); }
cudaError_t set_shared_limit(const void* kernel, size_t bytes) {
  const std::lock_guard<std::mutex> lock(limits_mutex);
  shared_limits()[{kernel, machine().most_shared}] = bytes;
  return cudaSuccess;
}

cudaError_t run(const char* name, Extent grid, Extent block, size_t shared_bytes, bool pdl,
                void (*body)(const void*, const void*), const void* kernel, const void* params,
                size_t params_bytes) {
  return machine().run(name, grid, block, shared_bytes, pdl, body, kernel, params, params_bytes);
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
