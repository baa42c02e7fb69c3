// The CUDA kernels from head outputs to detections: the best logits of each image by a radix
// selection, then decoding, sorting and suppression.
//
// Floors. Bytes: the logits once for each of 4 to 6 passes (at 512×512 a batch of 1 lies in the
// second-level cache). Logits and their indices make keys, no two equal, whose larger is better;
// each pass counts the next 11 bits of those keys that begin like the k-th largest. No pass waits
// for the host: what a pass found is worked out again by every block of the next.
// Budget: 64 registers.
#include "detect.h"

#include <algorithm>

#include "nms.h"
#include "rank.cuh"

namespace edet::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kDigit = 11;  // bits of a pass
constexpr int kBins = 1 << kDigit;
constexpr int kBinsOfThread = kBins / kThreads;
constexpr int64_t kPart = 1 << 14;  // logits that one block looks at
constexpr int kMostPasses = 6;      // 63 bits

// The beginning of the k-th largest key as far as it is known, and its rank among those with it.
struct Found {
  uint64_t prefix;
  int64_t rank;
};

struct SelectParams {
  DetectParams p;
  Candidates c;
  int64_t first_part[kMaxLevels + 1];  // of an image
  int64_t first_index[kMaxLevels];
  int order_bits, index_bits;  // of a key: the logit, then the index from the end
  int pass, passes;
  uint32_t* bins;  // (passes, n, kBins)
  Found* found;    // (passes, n): before each pass
};

EDET_EVERYWHERE constexpr int bits_below(const SelectParams& s, int pass) {
  const int left = s.order_bits + s.index_bits - kDigit * (pass + 1);
  return left > 0 ? left : 0;
}
EDET_EVERYWHERE constexpr int bits_of(const SelectParams& s, int pass) {
  const int left = s.order_bits + s.index_bits - kDigit * pass;
  return left < kDigit ? left : kDigit;
}

// What is known after pass − 1, worked out from that pass's bins by the whole block.
EDET_DEVICE Found find(const SelectParams& s, int64_t image, int pass, Shared<uint32_t> memory) {
  if (pass == 0) return {0, s.p.candidates};
  const Shared<int64_t> result = as<int64_t>(memory + kThreads);
  const int t = thread().x;
  const uint32_t* bins = s.bins + ((pass - 1) * s.p.n + image) * kBins;
  const Found before{
      load_constant<uint64_t, 1>(&s.found[(pass - 1) * s.p.n + image].prefix).value[0],
      load_constant<int64_t, 1>(&s.found[(pass - 1) * s.p.n + image].rank).value[0]};
  uint32_t mine[kBinsOfThread], sum = 0;  // from the largest digit down
  EDET_UNROLL
  for (int i = 0; i < kBinsOfThread; i++) {
    mine[i] = load_constant<uint32_t, 1>(bins + (kBins - 1 - t * kBinsOfThread - i)).value[0];
    sum += mine[i];
  }
  if (t == 0) {  // fewer than k: the smallest key begins with zeros
    store(result, int64_t(0));
    store(result + 1, before.rank);
  }
  store(memory + t, sum);
  sync_threads();
  uint32_t until = sum;  // of this thread's bins and those before
  for (int step = 1; step < kThreads; step *= 2) {
    const uint32_t other = t >= step ? get(memory + (t - step)) : 0;
    sync_threads();
    until += other;
    store(memory + t, until);
    sync_threads();
  }
  int64_t rank = before.rank - (until - sum);
  if (rank > 0 && rank <= sum) {
    int digit = kBins - 1 - t * kBinsOfThread;
    EDET_UNROLL
    for (int i = 0; i < kBinsOfThread; i++) {
      if (rank <= 0) break;
      if (rank <= mine[i]) {
        store(result, int64_t(digit - i));
        store(result + 1, rank);
        break;
      }
      rank -= mine[i];
    }
  }
  sync_threads();
  const Found after{before.prefix << bits_of(s, pass - 1) | uint64_t(get(result)), get(result + 1)};
  sync_threads();
  return after;
}

// Calls visit(key) for the block's logits that are numbers.
template <class T, class Visit>
EDET_DEVICE void visit_part(const SelectParams& s, int64_t image, const Visit& visit) {
  constexpr int V = 16 / int(sizeof(T));
  const DetectParams& p = s.p;
  int level = 0;
  while (block().x >= s.first_part[level + 1]) level++;
  const int64_t size = p.pixels[level] * p.cell_anchors * p.num_classes;
  const int64_t begin = (block().x - s.first_part[level]) * kPart;
  const int64_t end = begin + kPart < size ? begin + kPart : size;
  const T* data = static_cast<const T*>(p.classes[level]) + image * size;
  const uint64_t last = (uint64_t(1) << s.index_bits) - 1;
  const auto see = [&](T value, int64_t i) {
    const float x = to_float(value);
    if (x != x) return;
    const uint64_t order = order_of(x) >> (32 - s.order_bits);
    visit(order << s.index_bits | (last - uint64_t(s.first_index[level] + i)));
  };
  const bool aligned = reinterpret_cast<uintptr_t>(data + begin) % 16 == 0;
  const int64_t vectors = aligned ? (end - begin) / V : 0;
  for (int64_t i = thread().x; i < vectors; i += kThreads) {
    const Vector<T, V> v = load_constant<T, V>(data + begin + i * V);
    EDET_UNROLL
    for (int j = 0; j < V; j++) see(v.value[j], begin + i * V + j);
  }
  for (int64_t i = begin + vectors * V + thread().x; i < end; i += kThreads) {
    see(load_constant<T, 1>(data + i).value[0], i);
  }
}

// Counts the digits of one pass.
template <class T>
EDET_KERNEL(kThreads, 4)
count(EDET_PARAMS(SelectParams) s) {
  EDET_SHARED(uint32_t, bins);
  const int64_t image = block().y;
  const Found known = find(s, image, s.pass, bins);
  if (block().x == 0 && thread().x == 0) {
    Found* found = s.found + s.pass * s.p.n + image;
    store(&found->prefix, known.prefix);
    store(&found->rank, known.rank);
  }
  for (int i = thread().x; i < kBins; i += kThreads) store(bins + i, 0u);
  sync_threads();
  const int below = bits_below(s, s.pass), bits = bits_of(s, s.pass);
  visit_part<T>(s, image, [&](uint64_t key) {
    if (key >> below >> bits != known.prefix) return;
    atomic_add(bins + int(key >> below & ((1u << bits) - 1)), 1u);
  });
  sync_threads();
  uint32_t* const all = s.bins + (s.pass * s.p.n + image) * kBins;
  for (int i = thread().x; i < kBins; i += kThreads) {
    const uint32_t sum = get(bins + i);
    if (sum) atomic_add(all + i, sum);
  }
}

// Lists the keys from the k-th largest on.
template <class T>
EDET_KERNEL(kThreads, 4)
collect(EDET_PARAMS(SelectParams) s) {
  EDET_SHARED(uint32_t, memory);
  const int64_t image = block().y;
  const uint64_t least = find(s, image, s.passes, memory).prefix;
  visit_part<T>(s, image, [&](uint64_t key) {
    if (key < least) return;
    store(s.c.keys + image * s.c.most + atomic_add(s.c.count + image, 1), key);
  });
}

// Sorts, and decodes: the box of an anchor in centre form, without variance scaling.
template <class T>
EDET_KERNEL(kRankThreads, 4)
rank(EDET_PARAMS(SelectParams) s) {
  const DetectParams& p = s.p;
  rank_candidates(
      s.c, [&](int64_t image, uint64_t key, Vector<float, 4>& box, int64_t& label, int& source) {
        const uint64_t last = (uint64_t(1) << s.index_bits) - 1;
        // of 31 bits: a quotient of 64 would be a call
        const uint32_t index = uint32_t(last - (key & last)), classes = uint32_t(p.num_classes);
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
        // the bits below the order's are zeros of the logit, which in a negative's order are ones
        const int below = 32 - s.order_bits;
        uint32_t order = uint32_t(key >> s.index_bits) << below;
        if (!(order & 0x80000000u)) order |= uint32_t((uint64_t(1) << below) - 1);
        const float logit = ordered(order);
        return 1.0f / (1.0f + exp(-logit));
      });
}

template <class T>
Error launch_type(SelectParams s, Stream stream) {
  const DetectParams& p = s.p;
  const Dim3 grid(static_cast<unsigned>(s.first_part[p.levels]), static_cast<unsigned>(p.n));
  const size_t bytes = kBins * sizeof(uint32_t);
  for (s.pass = 0; s.pass < s.passes; s.pass++) {
    const Error error = launch(count<T>, grid, Dim3(kThreads), bytes, stream, s);
    if (error != kSuccess) return error;
  }
  Error error = launch(collect<T>, grid, Dim3(kThreads), bytes, stream, s);
  if (error != kSuccess) return error;
  const Dim3 ranks(static_cast<unsigned>(divide_up(s.c.most, kRanked)), static_cast<unsigned>(p.n));
  error = launch(rank<T>, ranks, Dim3(kRankThreads), kRankKeys * sizeof(uint64_t), stream, s);
  if (error != kSuccess) return error;
  return suppress(s.c, p.settings, {nullptr, p.out_boxes, p.out_scores, p.out_labels, p.out_counts},
                  stream);
}

int64_t select_bytes(const DetectParams& p) {
  return kMostPasses * p.n * (int64_t(kBins * sizeof(uint32_t)) + int64_t(sizeof(Found)));
}

}  // namespace

int64_t detect_bytes(const DetectParams& p) {
  return select_bytes(p) + candidates_bytes(p.n, p.candidates, p.settings.most);
}

Error detect(const DetectParams& p, void* memory, Stream stream) {
  if (p.n == 0) return kSuccess;
  SelectParams s{};
  s.p = p;
  int64_t index = 0;
  for (int l = 0; l < p.levels; l++) {
    const int64_t size = p.pixels[l] * p.cell_anchors * p.num_classes;
    s.first_index[l] = index;
    s.first_part[l + 1] = s.first_part[l] + divide_up(size, kPart);
    index += size;
  }
  // a float16's order is in the first 19 bits of the float's, a bfloat16's in 16
  s.order_bits = p.dtype == DType::f32 ? 32 : p.dtype == DType::f16 ? 19 : 16;
  while ((int64_t(1) << s.index_bits) < index) s.index_bits++;
  s.passes = divide_up(s.order_bits + s.index_bits, kDigit);
  if (p.n > 65535 || s.passes > kMostPasses || index > INT32_MAX) return kInvalidValue;
  s.bins = static_cast<uint32_t*>(memory);
  s.found = reinterpret_cast<Found*>(s.bins + kMostPasses * p.n * kBins);
  s.c = place_candidates(static_cast<char*>(memory) + select_bytes(p), p.n, p.candidates,
                         p.settings.most);
  Error error =
      clear(s.bins, sizeof(uint32_t) * static_cast<size_t>(s.passes * p.n * kBins), stream);
  if (error == kSuccess) {
    error = clear(s.c.count, sizeof(int) * static_cast<size_t>(p.n), stream);
  }
  if (error != kSuccess) return error;
  switch (p.dtype) {
    case DType::f32: return launch_type<float>(s, stream);
    case DType::f16: return launch_type<f16>(s, stream);
    case DType::bf16: return launch_type<bf16>(s, stream);
  }
  return kInvalidValue;
}

}  // namespace edet::cuda
