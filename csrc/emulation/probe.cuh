// Small kernels that try the emulation itself: correct ones, and one for each fault it must catch.
#pragma once

#include "../cuda/warp_mma.cuh"

namespace edet::cuda {

enum class Fault : int {
  none,
  missing_barrier,
  missing_warp_barrier,
  missing_last_barrier,
  divergent_barrier,
  early_exit,
  divergent_warp,
  global_overrun,
  global_misaligned,
  input_written,
  shared_overrun,
  local_overrun,  // of an array of a thread's own: only sanitizers see it
};

struct ReverseParams {
  Fault fault;
  const float* from;  // (blocks, threads)
  float* to;
};

// Turns the numbers of each block around, twice over, through shared memory; commits `fault`.
EDET_KERNEL(1024, 1)
reverse(EDET_PARAMS(ReverseParams) p) {
  EDET_SHARED(float, tile);
  const int threads = block_size().x, t = thread().x;
  const int64_t at = int64_t(block().x) * threads + t;
  // so far that it is in no other array
  const int over = p.fault == Fault::global_overrun && t == threads - 1 ? 1 << 28 : 0;
  if (p.fault == Fault::global_misaligned) load_constant<float, 4>(p.from + 1);
  if (p.fault == Fault::input_written) store(const_cast<float*>(p.from) + at, 1.0f);
  if (p.fault == Fault::early_exit && t == 5) return;
  float x = load_constant<float, 1>(p.from + at + over).value[0];
  for (int round = 0; round < 2; round++) {
    store(tile + t + (p.fault == Fault::shared_overrun && t == 0 ? threads : 0), x);
    if (p.fault == Fault::divergent_barrier && t == 3) {
      sync_threads();
    } else if (p.fault != Fault::missing_barrier) {
      sync_threads();
    }
    x = get(tile + (threads - 1 - t));
    if (p.fault != Fault::missing_last_barrier) sync_threads();
  }
  if (p.fault == Fault::local_overrun) {
    volatile float own[4] = {};
    x += own[threads];
  }
  if (p.fault == Fault::divergent_warp && t % 2) x = shuffle(x, 0);
  if (p.fault == Fault::missing_warp_barrier) {
    store(tile + t, x);
    x = get(tile + (t ^ 1));
  }
  store(p.to + at, x);
}

struct ProductParams {
  int type;       // f16, bf16 or tf32
  const void* a;  // (16, 16); tf32: (16, 8) floats
  const void* b;  // (16, 8); tf32: (8, 8)
  float* d;       // (16, 8), added to
};

template <class T>
EDET_DEVICE void product_as(const ProductParams& p) {
  constexpr int V = 16 / int(sizeof(T));  // a has 2·V columns, b has 2·V rows
  constexpr bool kTf32 = sizeof(T) == 4;
  EDET_SHARED(T, tile);
  const Shared<T> a = tile, b = tile + 16 * 2 * V;
  const int lane = thread().x, g = lane / 4, t = lane % 4;
  cp_async_16(a + lane * V, static_cast<const T*>(p.a) + lane * V, true);
  cp_async_16(b + lane * V, static_cast<const T*>(p.b) + lane % 16 * V, lane < 16);
  cp_async_commit();
  cp_async_wait<0>();
  sync_warp();
  uint32_t left[4], right[4];
  ldmatrix_x4(a + (lane % 16 * 2 * V + lane / 16 * V), left);
  float d[4];
  for (int i = 0; i < 4; i++) d[i] = p.d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  if constexpr (kTf32) {
    mma_m16n8k8_tf32(d, left, float_bits(get(b + (t * 8 + g))),
                     float_bits(get(b + ((t + 4) * 8 + g))));
  } else {
    ldmatrix_x4_trans(b + lane * 8, right);
    warp_mma<T>(d, left, right[0], right[1]);
  }
  for (int i = 0; i < 4; i++) store(p.d + (g + i / 2 * 8) * 8 + 2 * t + i % 2, d[i]);
}

EDET_KERNEL(32, 1)
product(EDET_PARAMS(ProductParams) p) {
  if (p.type == 0) return product_as<f16>(p);
  if (p.type == 1) return product_as<bf16>(p);
  product_as<float>(p);
}

struct WarpParams {
  const int* from;  // (threads)
  int* shuffled;    // of lane (lane + 1) % 32
  int* exchanged;   // of lane lane ^ 5
  int* votes;       // one bit for each odd number of the warp
  int* sums;        // (2): of all numbers, by global and by shared atomics
};

EDET_KERNEL(1024, 1)
warp(EDET_PARAMS(WarpParams) p) {
  EDET_SHARED(int, sum);
  const int t = thread().x;
  if (t == 0) store(sum, 0);
  sync_threads();
  const int x = load_constant<int, 1>(p.from + t).value[0];
  store(p.shuffled + t, shuffle(x, (t + 1) % kWarp));
  store(p.exchanged + t, shuffle_xor(x, 5));
  store(p.votes + t, static_cast<int>(ballot(x % 2 != 0)));
  atomic_add(p.sums, x);
  atomic_add(sum, x);
  sync_threads();
  if (t == 0) store(p.sums + 1, get(sum));
}

enum class PassFault : int {
  none,
  no_await,
  no_release,
  no_barrier,
  constant_read,
  wrong_flag,
  deadlock,
};

struct PassParams {
  PassFault fault;
  const int* from;  // (threads)
  int* to;          // (blocks, threads)
  uint32_t* flags;  // (blocks + 1), zero; the last one counts claims
};

// Blocks claim rows: the first is `from`, each other the row before, turned around, plus one.
// Commits `fault`.
EDET_KERNEL(1024, 1)
pass(EDET_PARAMS(PassParams) p) {
  EDET_SHARED(int, claimed);
  const int t = thread().x, threads = block_size().x, blocks = grid_size().x;
  if (t == 0) store(claimed, int(atomic_add(p.flags + blocks, 1u)));
  sync_threads();
  // a block that is claimed first and needs the last one never ends
  const int row = get(claimed);
  const bool forward = p.fault == PassFault::deadlock && row == 0;
  const int before = forward ? blocks - 1 : row - 1;
  int x = 0;
  if (before < 0) {
    x = load_constant<int, 1>(p.from + t).value[0];
  } else {
    const int flag = p.fault == PassFault::wrong_flag ? max(before - 1, 0) : before;
    if (t == 0 && p.fault != PassFault::no_await) {
      await_flag(Flag{p.flags + flag, 1, row, 0, flag}, Overdue{});
    }
    if (p.fault != PassFault::no_barrier) sync_threads();
    const int* from = p.to + before * threads + (threads - 1 - t);
    x = p.fault == PassFault::constant_read ? load_constant<int, 1>(from).value[0]
                                            : load_written<int, 1>(from).value[0];
    x++;
  }
  store(p.to + row * threads + t, x);
  sync_threads();
  if (t == 0 && p.fault == PassFault::no_release) {
    atomic_add(p.flags + row, 1u);  // relaxed: nobody learns what was written before
  } else if (t == 0) {
    add_release(p.flags + row, 1u);
  }
}

struct OvertakeParams {
  bool awaits;
  const int* from;  // (threads)
  int* to;
};

EDET_KERNEL(1024, 1)
overtake(EDET_PARAMS(OvertakeParams) p) {
  if (p.awaits) griddep_wait();
  const int t = thread().x;
  store(p.to + t, load_written<int, 1>(p.from + t).value[0] + 1);
}

struct StrideParams {
  int stride;  // between the words of neighbouring lanes
  int vector;  // words at once: 1 or 4
};

// Touches 32 places of shared memory, one instruction.
EDET_KERNEL(32, 1)
touch(EDET_PARAMS(StrideParams) p) {
  EDET_SHARED(float, tile);
  const Shared<float> at = tile + thread().x * p.stride;
  if (p.vector == 4) {
    store(at, Vector<float, 4>{});
  } else {
    store(at, 0.0f);
  }
}

}  // namespace edet::cuda
