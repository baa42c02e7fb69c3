// The CUDA kernels from head outputs to detections: the best logits of each image by counting,
// then sorting, decoding and suppression.
//
// Logits and their indices make keys, no two equal, whose larger is better. `count` counts an
// image's logits in steps of 1/32 from −32 to 32; its last block finds the step of the k-th
// largest. `collect` lists all keys from that step on. Where those are too many for the list (many
// logits are almost equal), its blocks first count the keys of that step by their next 11 bits,
// again until the list is enough: they take parts by tickets, and wait for a pass only when all its
// parts have been taken, so that nobody waits for a block that does not run. `take_best` sorts and
// suppresses, an image a block. Nobody waits for the host.
//
// Floors. Bytes: the logits twice (at 512×512 a batch of 1 lies in the second-level cache: 2 µs a
// pass on an H100; 64 images are 566 MB, 190 µs a pass). Instructions for a logit: 6 and a shared
// atomic to count it, 3 to see that it is not among the best.
// Budget: 128 registers.
#include "detect.h"

#include <algorithm>

#include "suppress.cuh"
#include "vectors.cuh"

namespace edet::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 4;  // 16-byte vectors of a thread, on their way together
template <class T>
constexpr int kPart = kLoads * kThreads * kVector<T>;    // logits that one block looks at at a time
constexpr int kWords = kBins + kCutWords<kThreads> + 1;  // of shared memory
constexpr int kMostParts = 8;                            // of a block, where there are many
constexpr int kBlocks = 32;                              // for each multiprocessor are many
constexpr int64_t kRoom = 1 << 15;              // of a list, beside twice the candidates, at most
constexpr uint64_t kPatience = 10'000'000'000;  // ns, for a pass that others count

// What is known of an image's best keys after a pass.
struct Known {
  uint64_t low, high;  // the k-th largest key is from low on and below high
  uint32_t above;      // keys from high on
  float least;         // a logit: keys from low on are of this one or of larger ones; NaN: too many
  uint32_t last;       // passes of `collect` after which they fit the list
};
struct Progress {
  Known counted, refined;  // by `count`, and by the passes of `collect` where there are any
  uint32_t largest;        // order that a key may have
  uint32_t blocks;         // of `count` that have ended
  uint32_t tickets, parts, passes;  // of `collect`: taken, counted, finished
};

struct SelectParams {
  DetectParams p;
  SuppressParams to;
  int64_t first_part[kMaxLevels + 1];  // of an image
  uint32_t first_index[kMaxLevels];
  int order_bits, index_bits;  // of a key: the logit, then the index from the end
  int parts_of_block;          // in `count`
  uint32_t counting;           // blocks of `count` for an image
  uint32_t* bins;              // (n, kBins)
  Progress* progress;          // (n)
  Overdue overdue;
};

// Digits are steps of 1/32 from −32 on; the first and the last have what is beyond, too.
constexpr int kMiddle = kBins / 2;
constexpr float kStep = 1.0f / 32;
constexpr float kMagic = 1.5f * (1 << 18);  // a sum with it is rounded to steps

// A number's digit, which is no less than that of any smaller number; of NaN 0.
EDET_DEVICE int digit_of(float x) {
  const float inside = smaller(larger(x, -kMiddle * kStep), (kMiddle - 1) * kStep);
  return int(float_bits(inside + kMagic)) - (int(float_bits(kMagic)) - kMiddle);
}
// The least number of a digit: half-way to the one before, of which the odd ones have that.
EDET_DEVICE float least_of(int digit) {
  if (digit <= 0) return -INFINITY;
  const int step = digit - kMiddle;
  const float half = (float(step) - 0.5f) * kStep;
  return step & 1 ? ordered(order_of(half) + 1) : half;
}
// The number that a key begins with, and the least key of those numbers that are not smaller than
// another of any precision: of what was cut off, a positive number's was zeros, a negative's ones.
EDET_DEVICE uint64_t key_of(const SelectParams& s, float x) {
  return uint64_t(order_of(x) >> (32 - s.order_bits)) << s.index_bits;
}
EDET_DEVICE uint64_t least_key_of(const SelectParams& s, float x) {
  const int below = 32 - s.order_bits;
  const uint64_t order = order_of(x), up = x > 0.0f ? (uint64_t(1) << below) - 1 : 0;
  return (order + up) >> below << s.index_bits;
}
// The number of a key, as a float.
EDET_DEVICE float number_of(const SelectParams& s, uint64_t key) {
  // the bits below the order's are zeros of the logit, which in a negative's order are ones
  const int below = 32 - s.order_bits;
  uint32_t order = uint32_t(key >> s.index_bits) << below;
  if (!(order & 0x80000000u)) order |= uint32_t((uint64_t(1) << below) - 1);
  return ordered(order);
}

// Some of an image's logits, those of a level that its blocks look at together.
template <class T>
struct Part {
  static constexpr int V = kVector<T>;
  const T* data;   // of the level
  int begin, end;  // of the part and of the level, in the level's logits
  uint32_t index;  // of the level's first logit
  bool aligned;    // so that vectors can be loaded

  EDET_DEVICE Part(const SelectParams& s, int64_t image, int number) {
    const DetectParams& p = s.p;
    int level = 0;
    while (number >= s.first_part[level + 1]) level++;
    const int64_t size = p.pixels[level] * p.cell_anchors * p.num_classes;
    data = static_cast<const T*>(p.classes[level]) + image * size;
    begin = (number - int(s.first_part[level])) * kPart<T>;
    end = int(size);
    index = s.first_index[level];
    aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }

  // Of the thread's i-th logit, in its level.
  EDET_DEVICE int place(int i) const {
    return begin + (i / V * kThreads + int(thread().x)) * V + i % V;
  }
  EDET_DEVICE uint64_t key(const SelectParams& s, float x, int i) const {
    const uint32_t last = (1u << s.index_bits) - 1;
    return key_of(s, x) | (last - (index + uint32_t(place(i))));
  }
  EDET_DEVICE Words load_aligned(int at) const {
    return load_constant<uint32_t, 4>(words(data + at));
  }
  // The thread's j-th vector, NaN where the level has no more logits.
  EDET_DEVICE Words load_vector(int j) const {
    const int at = place(j * V);
    if (aligned && at + V <= end) return load_aligned(at);
    float x[V];
    EDET_UNROLL
    for (int i = 0; i < V; i++) {
      x[i] = at + i < end ? to_float(load_constant<T, 1>(data + at + i).value[0]) : NAN;
    }
    return to_words<T>(x);
  }
  // All of them, on their way together.
  EDET_DEVICE void load_vectors(Words (&v)[kLoads]) const {
    if (aligned && begin + kPart<T> <= end) {
      EDET_UNROLL
      for (int j = 0; j < kLoads; j++) v[j] = load_aligned(place(j * V));
    } else {
      EDET_UNROLL
      for (int j = 0; j < kLoads; j++) v[j] = load_vector(j);
    }
  }
};
// Calls visit(logit, i) for a vector of logits, of which the first is the thread's i-th.
template <class T, class Visit>
EDET_DEVICE void visit_vector(const Words& v, int first, const Visit& visit) {
  float x[kVector<T>];
  to_floats<T>(v, x);
  EDET_UNROLL
  for (int i = 0; i < kVector<T>; i++) visit(x[i], first + i);
}

EDET_DEVICE void clear_bins(Shared<uint32_t> bins) {
  EDET_UNROLL
  for (int i = 4 * int(thread().x); i < kBins; i += 4 * kThreads) {
    store(bins + i, Vector<uint32_t, 4>{});
  }
}

// Adds the block's bins to the image's; whether it is the last block of `blocks` to do so, to which
// all of them are known.
EDET_DEVICE bool add_bins(Shared<uint32_t> bins, uint32_t* all, uint32_t* counter, uint32_t blocks,
                          Shared<uint32_t> word) {
  EDET_UNROLL
  for (int i = thread().x; i < kBins; i += kThreads) {
    const uint32_t sum = get(bins + i);
    if (sum) atomic_add(all + i, sum);
  }
  global_fence();
  sync_threads();
  if (thread().x == 0) {
    store(word, uint32_t(atomic_add(counter, 1u) + 1 == blocks));
    global_fence();
  }
  sync_threads();
  return get(word);
}

EDET_DEVICE Cut find_cut_of(uint32_t wanted, const uint32_t* all, Shared<uint32_t> memory) {
  return find_cut<kThreads>(wanted, memory,
                            [&](int i) { return load_written<uint32_t, 4>(all + i); });
}

// Counts logits; the last block of an image finds from which on they are listed.
template <class T>
EDET_KERNEL(kThreads, 5)
count(EDET_PARAMS(SelectParams) s) {
  EDET_SHARED(uint32_t, bins);
  griddep_launch();
  const Shared<uint32_t> words = bins + kBins;
  const int64_t image = block().y;
  clear_bins(bins);
  sync_threads();
  const int first = block().x * s.parts_of_block;
  const int end = min(first + s.parts_of_block, int(s.first_part[s.p.levels]));
  EDET_LOOP
  for (int number = first; number < end; number++) {
    Words v[kLoads];
    Part<T>(s, image, number).load_vectors(v);
    EDET_UNROLL
    for (int j = 0; j < kLoads; j++) {
      visit_vector<T>(v[j], 0, [&](float x, int) { atomic_add(bins + digit_of(x), 1u); });
    }
  }
  sync_threads();
  uint32_t* const all = s.bins + image * kBins;
  Progress* const progress = s.progress + image;
  if (!add_bins(bins, all, &progress->blocks, s.counting, words + kCutWords<kThreads>)) return;

  const Cut cut = find_cut_of(uint32_t(s.p.candidates), all, words);
  const int digit = max(cut.bin, 0);  // fewer than k: all
  const bool enough = cut.above + cut.inside <= s.to.c.capacity;
  Known* const known = &progress->counted;
  if (thread().x == 0) {
    const float least = least_of(digit);
    const auto end_of = [&](int of) {  // its keys
      return of + 1 < kBins ? least_key_of(s, least_of(of + 1))
                            : uint64_t(1) << (s.order_bits + s.index_bits);
    };
    store(&known->low, least_key_of(s, least));
    store(&known->high, end_of(digit));
    store(&known->above, cut.above);
    store(&progress->largest, uint32_t((end_of(cut.top) - 1) >> s.index_bits));
    store(&known->least, enough ? least : NAN);
  }
  if (enough) return;
  for (int i = thread().x; i < kBins; i += kThreads) store(all + i, 0u);
}

EDET_DEVICE const Known* known_before(const SelectParams& s, int64_t image, uint32_t pass) {
  const Progress* const progress = s.progress + image;
  return pass ? &progress->refined : &progress->counted;
}
EDET_DEVICE Range range_of(const Known* known) {
  return {load_shared_by_blocks(&known->low), load_shared_by_blocks(&known->high)};
}

// How a range's keys are counted, without numbers of 64 bits: a range begins at a multiple of its
// digits' steps, and ends at one of them or at the first key of an order.
struct Counting {
  uint32_t first, orders;  // the first key's order, and how many more orders its keys have
  uint32_t last, origin;   // the largest rest of a key, and the first key's, in steps
  uint32_t digits;
  int up, down;  // from orders and from rests to digits

  EDET_DEVICE Counting(const SelectParams& s, const Range& range) {
    const int shift = shift_of(range);
    last = (1u << s.index_bits) - 1;
    first = uint32_t(range.low >> s.index_bits);
    orders = uint32_t((range.high - 1) >> s.index_bits) - first;
    digits = uint32_t((range.high - 1 - range.low) >> shift) + 1;
    up = s.index_bits - shift;
    down = shift;
    origin = up < 0 ? 0 : (uint32_t(range.low) & last) >> down;
  }
  // The digit of a key with an order and an index, or `digits` and more outside the range.
  EDET_DEVICE uint32_t digit(uint32_t order, uint32_t index) const {
    const uint32_t after = order - first;
    if (after > orders) return ~0u;
    return up < 0 ? after >> -up : (after << up) + ((last - index) >> down) - origin;
  }
};

// Counts the keys of a part of the logits by their next digits; whether it is the last to do so.
template <class T>
EDET_DEVICE bool count_part(const SelectParams& s, int64_t image, int number, uint32_t pass,
                            Shared<uint32_t> bins) {
  const Counting counting(s, range_of(known_before(s, image, pass)));
  clear_bins(bins);
  sync_threads();
  const Part<T> part(s, image, number);
  EDET_LOOP
  for (int j = 0; j < kLoads; j++) {
    const uint32_t index = part.index + uint32_t(part.place(j * kVector<T>));
    visit_vector<T>(part.load_vector(j), 0, [&](float x, int i) {
      const uint32_t digit =
          counting.digit(order_of(x) >> (32 - s.order_bits), index + uint32_t(i));
      if (x == x && digit < counting.digits) atomic_add(bins + int(digit), 1u);
    });
  }
  sync_threads();
  const uint32_t parts = uint32_t(s.first_part[s.p.levels]);
  return add_bins(bins, s.bins + image * kBins, &s.progress[image].parts, parts * (pass + 1),
                  bins + (kBins + kCutWords<kThreads>));
}

// Finds, when all parts are counted, from which key on they are listed.
EDET_DEVICE void refine(const SelectParams& s, int64_t image, uint32_t pass,
                        Shared<uint32_t> memory) {
  uint32_t* const all = s.bins + image * kBins;
  const Known* const before = known_before(s, image, pass);
  const uint32_t above = load_shared_by_blocks(&before->above);
  const Cut cut = find_cut_of(uint32_t(s.p.candidates) - above, all, memory);
  for (int i = thread().x; i < kBins; i += kThreads) store(all + i, 0u);
  const bool enough = above + cut.above + cut.inside <= s.to.c.capacity;
  if (thread().x == 0) {
    // fewer than k: NaN were counted before, and all that are numbers are listed
    const Range range = range_of(before), inside = cut.bin < 0 ? range : range_of(range, cut.bin);
    Known* const known = &s.progress[image].refined;
    store(&known->low, inside.low);
    store(&known->high, inside.high);
    store(&known->above, above + cut.above);
    store(&known->least, enough ? number_of(s, inside.low) : NAN);
    store(&known->last, pass + 1);
  }
  sync_threads();
  if (thread().x == 0) {
    global_fence();
    // nobody waits for a pass after the last
    add_release(&s.progress[image].passes, enough ? 1u << 30 : 1u);
  }
}

// Which of a thread's logits have keys from one on, in bits.
template <class T>
EDET_DEVICE uint32_t find_keys(const SelectParams& s, const Part<T>& part, uint64_t low) {
  const uint32_t last = (1u << s.index_bits) - 1;
  const uint32_t least = uint32_t(low >> s.index_bits), rest = uint32_t(low) & last;
  uint32_t all = 0;
  EDET_LOOP
  for (int j = 0; j < kLoads; j++) {
    const uint32_t index = part.index + uint32_t(part.place(j * kVector<T>));
    uint32_t found = 0;
    visit_vector<T>(part.load_vector(j), 0, [&](float x, int i) {
      const uint32_t order = order_of(x) >> (32 - s.order_bits);
      const bool reaches = order > least || (order == least && last - index - uint32_t(i) >= rest);
      if (x == x && reaches) found |= 1u << i;
    });
    all |= found << j * kVector<T>;
  }
  return all;
}

// Lists the keys of those of a part's logits that each thread has found.
template <class T>
EDET_DEVICE void list(const SelectParams& s, int64_t image, const Part<T>& part, uint32_t found,
                      Shared<int> words) {
  if (thread().x == 0) store(words, 0);
  sync_threads();
  int at = found ? atomic_add(words, count_set(found)) : 0;
  sync_threads();
  const int all = get(words);
  if (!all) return;
  if (thread().x == 0) store(words + 1, atomic_add(s.to.c.count + image, all));
  sync_threads();
  at += get(words + 1);
  for (; found; found &= found - 1) {
    const int i = first_set(found);  // loaded again: registers have no addresses
    const float x = to_float(load_constant<T, 1>(part.data + part.place(i)).value[0]);
    store(s.to.c.keys + image * s.to.c.capacity + at++, part.key(s, x, i));
  }
}

// Lists the best keys of an image.
template <class T>
EDET_KERNEL(kThreads, 4)
collect(EDET_PARAMS(SelectParams) s) {
  EDET_SHARED(uint32_t, bins);
  griddep_launch();
  const Shared<uint32_t> words = bins + kBins;
  const int64_t image = block().y;
  Progress* const progress = s.progress + image;
  {
    const Part<T> part(s, image, block().x);
    Words v[kLoads];
    part.load_vectors(v);  // while the launch before ends
    griddep_wait();
    const Known* const known = &progress->counted;
    const float least = load_shared_by_blocks(&known->least);
    if (least == least) {
      uint32_t found = 0;
      EDET_UNROLL
      for (int j = 0; j < kLoads; j++) {
        visit_vector<T>(v[j], j * kVector<T>, [&](float x, int i) {
          if (x >= least) found |= 1u << i;
        });
      }
      list(s, image, part, found, as<int>(words));
      return;
    }
  }
  const uint32_t parts = uint32_t(s.first_part[s.p.levels]);
  EDET_LOOP
  for (;;) {
    if (thread().x == 0) {
      const uint32_t ticket = atomic_add(&progress->tickets, 1u);
      store(words, ticket);
      const int pass = int(ticket / parts);
      await_flag({&progress->passes, uint32_t(pass), int(ticket % parts), pass, int(image)},
                 s.overdue);
    }
    sync_threads();
    const uint32_t ticket = get(words), pass = ticket / parts, number = ticket % parts;
    sync_threads();
    const Known* const known = &progress->refined;
    const float least = pass ? load_shared_by_blocks(&known->least) : NAN;
    if (least != least) {
      if (count_part<T>(s, image, int(number), pass, bins)) refine(s, image, pass, words);
    } else if (pass == load_shared_by_blocks(&known->last)) {
      const Part<T> part(s, image, int(number));
      list(s, image, part, find_keys(s, part, load_shared_by_blocks(&known->low)), as<int>(words));
    } else {
      return;
    }
    sync_threads();
  }
}

// One block per image: sorts, decodes (the box of an anchor in centre form, without variance
// scaling), and keeps detections or writes all candidates.
template <class T, bool kHard>
EDET_KERNEL(kTake, 1)
take_best(EDET_PARAMS(SelectParams) s) {
  const DetectParams& p = s.p;
  EDET_SHARED(char, memory);
  griddep_wait();
  const Progress& progress = s.progress[block().x];
  const float least = load_written<float, 1>(&progress.counted.least).value[0];
  const Known* const known = least == least ? &progress.counted : &progress.refined;
  Range all{load_written<uint64_t, 1>(&known->low).value[0],
            load_written<uint64_t, 1>(&known->high).value[0]};
  if (load_written<uint32_t, 1>(&known->above).value[0]) {
    const uint64_t largest = load_written<uint32_t, 1>(&progress.largest).value[0];
    all.high = (largest + 1) << s.index_bits;
  }
  take<kHard>(
      s.to, block().x, all, take_memory(memory),
      [&](int64_t image, uint64_t key, Vector<float, 4>& box, int64_t& label, int& source) {
        const uint32_t last = (1u << s.index_bits) - 1;
        // of 31 bits: a quotient of 64 would be a call
        const uint32_t index = last - (uint32_t(key) & last), classes = uint32_t(p.num_classes);
        const int64_t anchor = index / classes;
        label = index % classes;
        source = int(anchor);
        int64_t local = anchor;
        int level = 0;
        while (local >= p.pixels[level] * p.cell_anchors)
          local -= p.pixels[level++] * p.cell_anchors;
        const T* t = static_cast<const T*>(p.boxes[level]) +
                     (image * p.pixels[level] * p.cell_anchors + local) * 4;
        EDET_UNROLL
        for (int axis = 0; axis < 2; axis++) {  // y, then x
          const float low = load_constant<float, 1>(p.anchors + anchor * 4 + axis).value[0];
          const float high = load_constant<float, 1>(p.anchors + anchor * 4 + axis + 2).value[0];
          const float size = high - low;
          const float centre =
              to_float(load_constant<T, 1>(t + axis).value[0]) * size + (low + high) / 2;
          const float half = exp(to_float(load_constant<T, 1>(t + axis + 2).value[0])) * size / 2;
          float ends[2] = {centre - half, centre + half};
          if (p.limits) {
            const float limit = load_constant<float, 1>(p.limits + image * 2 + (1 - axis)).value[0];
            EDET_UNROLL
            for (int i = 0; i < 2; i++)
              ends[i] = ends[i] < 0.0f ? 0.0f : ends[i] > limit ? limit : ends[i];
          }
          box.value[1 - axis] = ends[0];
          box.value[3 - axis] = ends[1];
        }
        return 1.0f / (1.0f + exp(-number_of(s, key)));
      });
}

// Of each list: with so much room one more pass is enough even for logits that are all equal.
int64_t capacity_of(const DetectParams& p) {
  int64_t logits = 0;
  for (int l = 0; l < p.levels; l++) logits += p.pixels[l] * p.cell_anchors * p.num_classes;
  return round_up(2 * p.candidates + std::min(logits / 4, kRoom), 2);
}

// What is cleared before the first launch: bins, progress and, right after them, the lists' counts.
int64_t select_bytes(const DetectParams& p) {
  return round_up(p.n * int64_t(kBins * sizeof(uint32_t) + sizeof(Progress)), 256);
}

template <class T>
Error launch_type(SelectParams s, Stream stream) {
  const DetectParams& p = s.p;
  for (int l = 0; l < p.levels; l++) {
    const int64_t size = p.pixels[l] * p.cell_anchors * p.num_classes;
    s.first_part[l + 1] = s.first_part[l] + divide_up(size, kPart<T>);
  }
  Device device{};
  Error error = current_device(&device);
  if (error == kSuccess) error = overdue_report(&s.overdue.report);
  if (error != kSuccess) return error;
  const int64_t parts = s.first_part[p.levels];
  const int64_t many = int64_t(device.multiprocessors) * kBlocks;
  s.parts_of_block = static_cast<int>(std::clamp<int64_t>(parts * p.n / many, 1, kMostParts));
  s.counting = static_cast<uint32_t>(divide_up(parts, s.parts_of_block));
  const bool pdl = device.capability >= 90;
  const auto grid = [&](int64_t blocks) {
    return Dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(p.n));
  };
  const size_t bytes = kWords * sizeof(uint32_t);
  error = clear(s.bins, static_cast<size_t>(select_bytes(p) + p.n * int64_t(sizeof(int))), stream);
  if (error == kSuccess) {
    error = launch(count<T>, grid(s.counting), Dim3(kThreads), bytes, stream, s);
  }
  if (error == kSuccess) {
    error = launch(collect<T>, grid(parts), Dim3(kThreads), bytes, stream, s, pdl);
  }
  const bool hard = p.settings.method == NmsMethod::hard;
  if (error == kSuccess) {
    error = launch(hard ? take_best<T, true> : take_best<T, false>,
                   Dim3(static_cast<unsigned>(p.n)), Dim3(kTake), kTakeBytes, stream, s, pdl);
  }
  if (error != kSuccess || hard) return error;
  return suppress_sorted(s.to.c, p.settings, s.to.out, stream);
}

}  // namespace

int64_t detect_bytes(const DetectParams& p) {
  return select_bytes(p) + candidates_bytes(p.n, capacity_of(p), p.candidates);
}

Error detect(const DetectParams& p, void* memory, Stream stream) {
  if (p.n == 0) return kSuccess;
  SelectParams s{};
  s.p = p;
  int64_t index = 0;
  for (int l = 0; l < p.levels; l++) {
    s.first_index[l] = static_cast<uint32_t>(index);
    index += p.pixels[l] * p.cell_anchors * p.num_classes;
  }
  // a float16's order is in the first 19 bits of the float's, a bfloat16's in 16
  s.order_bits = p.dtype == DType::f32 ? 32 : p.dtype == DType::f16 ? 19 : 16;
  while ((int64_t(1) << s.index_bits) < index) s.index_bits++;
  // places are int, also those of a part that has fewer logits
  if (p.n > 65535 || index > INT32_MAX - kPart<f16>) return kInvalidValue;
  s.overdue.nanoseconds = kPatience;
  s.bins = static_cast<uint32_t*>(memory);
  s.progress = reinterpret_cast<Progress*>(s.bins + p.n * kBins);
  s.to = {place_candidates(static_cast<char*>(memory) + select_bytes(p), p.n, capacity_of(p),
                           p.candidates),
          p.settings,
          {nullptr, p.out_boxes, p.out_scores, p.out_labels, p.out_counts}};
  switch (p.dtype) {
    case DType::f32: return launch_type<float>(s, stream);
    case DType::f16: return launch_type<f16>(s, stream);
    case DType::bf16: return launch_type<bf16>(s, stream);
  }
  return kInvalidValue;
}

}  // namespace edet::cuda
