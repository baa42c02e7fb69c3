// Runs the blocks of a kernel on the host, some of them together: each thread of a block is a
// fiber. Watches memory, barriers and races; docs/cuda.md explains what is and is not checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

namespace edet::emulation {

struct Extent {
  int x, y, z;
};

// What one launch was and did. A kernel is named by its source; sectors are 32 bytes long, each
// counted once per block, as if every block had a first-level cache of its own.
struct Launch {
  std::string kernel;
  std::size_t function = 0;  // where the module has the kernel's code, for `nm`
  std::string params;        // the bytes of its parameters
  Extent grid{}, block{};
  bool pdl = false;
  int64_t blocks = 0, shared_bytes = 0;
  int64_t bytes_read = 0, bytes_written = 0;      // that threads asked for
  int64_t sectors_read = 0, sectors_written = 0;  // that blocks asked for
  int64_t bank_conflicts = 0;                     // extra cycles of shared memory accesses
};

// ---- for tests; everything here is per host thread ----

void set_seed(uint64_t seed);  // of the order in which fibers and blocks run
// The device launchers believe in.
void set_device(int multiprocessors, int shared_bytes, int architecture);
// How many blocks run together, in turns; those of a launch follow each other where it is 1.
void set_resident(int blocks);
void count_launches(bool on);  // begins a new list, or ends counting
// Whether launches are listed but not run, and no memory is touched: for shapes that no host could
// compute.
void set_dry(bool on);
bool dry();
const std::vector<Launch>& launches();
const std::string& last_error();

// Memory that kernels may touch until forget_memory().
void know_memory(const void* data, size_t bytes, bool writable);
void forget_memory();

// ---- for the door, device.h ----

struct Thread {
  int x, y, z, linear;
};
const Thread& thread();
Extent block();
Extent block_size();
Extent grid_size();

// `line` is the call's, which must be the same for all threads that meet.
void barrier(int line);
// All lanes of the warp bring an argument; when the last is here, `meet` is called with all of
// them, in order of lanes.
void together(int line, void* mine, void (*meet)(void** lanes, int count));

// A read through the read-only cache, a read, a write or an atomic.
enum class Use { constant, read, write, atomic };
void global_access(const void* p, size_t bytes, Use use);
void shared_access(const void* p, size_t bytes, bool write);
void shared_atomic(const void* p, size_t bytes);
char* shared_memory();

// A copy of 16 bytes to shared memory that has begun: arrives at once or when its thread waits for
// its group, as the seed says, for a GPU may do either. Waits for all groups but the last `left`.
void copy_later(char* to, const char* bytes);
void end_group();
void await_groups(int left);

// Ends the launch with an error.
[[noreturn]] void fail(const std::string& what);

// What a thread waits for: a word of global memory to become `value` or more; and of which tile it
// is, for the report of a deadlock.
struct Flag {
  const uint32_t* at;
  uint32_t value;
  int tile, node, number;
};
void await(const Flag& flag, int line);
void release(const void* p);  // by who wrote to p
void atomic(const void* p);   // is executed there
void changed(const void* p);  // by an atomic
void fence();
void await_launches();  // before this one

int multiprocessors();
int architecture();
int most_shared_bytes();
// As CUDA's runtime keeps it for all threads of a process: the most dynamic shared memory that a
// kernel's blocks may have; without it 48 KiB.
cudaError_t set_shared_limit(const void* kernel, size_t bytes);
cudaError_t clear(void* data, size_t bytes);
// `pdl`: it may begin while the launches before it run, which kernels must await.
cudaError_t run(const char* name, Extent grid, Extent block, size_t shared_bytes, bool pdl,
                void (*body)(const void* kernel, const void* params), const void* kernel,
                const void* params, size_t params_bytes);

}  // namespace edet::emulation
