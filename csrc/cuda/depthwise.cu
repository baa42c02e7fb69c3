// The CUDA kernel for a block's depthwise convolution of a map that is expanded already, with its
// pooled sums: the first kernel of a block that expands nothing.
//
// Floors. Bytes: the map and the result once. Operations: 2·k² for each of its numbers, which is
// nothing; but with what else it takes (22 instructions at k = 3 and stride 1, 45 at k = 5) a GPU
// issues for as long as half of the bytes take, or longer than they do.
// Budget: 168 registers.
//
// A thread owns a word of channels, two of 16 bits, of a strip of columns. It goes down the
// strip's rows: it adds a row of the map to all results that need it, while the next row is on its
// way. Nothing is shared but the sums, so that warps do not wait for each other.
#include "depthwise.h"

#include <algorithm>
#include <cmath>

#include "fusion.cuh"
#include "squeeze.cuh"

namespace edet::cuda {
namespace {

constexpr int kThreads = 128;  // of a block at most: a warp for each scheduler
// Of a multiprocessor: 5×5 taps are 50 registers, and what strips that are not whole need, some
// more; so does the compiler for compute capability 10.x.
EDET_EVERYWHERE constexpr int blocks_of(int kernel, int stride, bool whole, bool ten) {
  return kernel == 3 ? (whole ? 5 : 4) : whole && stride == 2 && !ten ? 4 : 3;
}
constexpr int kMostRows = 64, kLeastRows = 4;  // of a strip

// Columns of a strip's results: the more, the fewer of the map's are read twice, as far as
// registers go.
EDET_EVERYWHERE constexpr int columns_of(int stride) { return stride == 1 ? 4 : 2; }

constexpr int kMostColumns = 8;  // of the map, that a strip needs

struct Plan {
  MbconvParams p;
  const void* input;
  int words;                     // of channels, that a block has of a pixel
  int chunks;                    // of words
  int strips;                    // of a block
  int rows;                      // of a strip
  int across, of_image;          // strips
  int parts;                     // blocks of an image
  int64_t column[kMostColumns];  // bytes to the columns of a strip
  int64_t row, out_row;          // bytes of the map's rows and the result's
};

// What a thread does with its strip. kWhole: all results of all strips are on the map, and it is
// padded by no more than half a kernel, so that no more columns than that are outside the map.
template <class T, int kKernel, int kStride, bool kSwish, bool kWhole>
class Walk {
  static constexpr int kColumns = columns_of(kStride);
  static constexpr int kInputs = (kColumns - 1) * kStride + kKernel;  // columns of the map
  static_assert(kInputs <= kMostColumns, "the plan knows where they are");
  static constexpr int kAlive = (kKernel - 1) / kStride + 1;  // rows of results that a row adds to

 public:
  EDET_DEVICE Walk(const Plan& plan, int channel) : plan_(plan), channel_(channel) {
    const MbconvParams& p = plan.p;
    const Vector<float, 2> scale = load_constant<float, 2>(p.dw_scale + channel);
    shift_ = load_constant<float, 2>(p.dw_shift + channel);
    EDET_UNROLL
    for (int i = 0; i < kKernel * kKernel; i++) {
      w_[i] = load_constant<float, 2>(p.dw + i * int(p.c_mid) + channel);
    }
    EDET_UNROLL
    for (int i = 0; i < kKernel * kKernel; i++) {
      EDET_UNROLL
      for (int j = 0; j < 2; j++) w_[i].value[j] *= scale.value[j];
    }
  }

  // Computes a strip; adds its results to `total`.
  EDET_DEVICE void strip(int64_t image, int strip, float (&total)[2]) {
    const MbconvParams& p = plan_.p;
    const int y0 = strip / plan_.across * plan_.rows, x0 = strip % plan_.across * kColumns;
    const int left = x0 * kStride - int(p.pad_left);
    const int rows = min(plan_.rows, int(p.out_h) - y0);
    y_ = y0 * kStride - int(p.pad_top);
    const int complete = y_ + kAlive * kStride, end = y_ + (rows + kAlive - 1) * kStride;
    last_ = min(y_ + (rows - 1) * kStride + kKernel, int(p.h)) - 1;
    inside_ = 0;
    EDET_UNROLL
    for (int j = 0; j < kInputs; j++) {
      if (left + j >= 0 && left + j < p.w) inside_ |= 1u << j;
    }
    EDET_UNROLL
    for (int i = 0; i < kColumns; i++) {
      if (x0 + i < p.out_w) inside_ |= 1u << (kInputs + i);
    }
    from_ = static_cast<const char*>(plan_.input) + image * p.h * plan_.row +
            left * plan_.column[1] + channel_ * 2;
    char* to = reinterpret_cast<char*>(p.mid) +
               (image * p.out_h + y0 - (kAlive - 1)) * plan_.out_row + x0 * plan_.column[1] +
               channel_ * 2;
    float sum[kAlive][kColumns][2] = {};
    Rows next;
    load(next);
    while (y_ <= end) {
      EDET_UNROLL
      for (int phase = 0; phase < kAlive; phase++) {
        if (y_ > end) break;
        const Rows now = next;
        const int y = y_ - kStride;
        load(next);
        add(now, y, phase, sum);
        // the first rows complete none: a branch would wait for the next row
        const bool done = y_ > complete;
        finish(sum[(phase + 1) % kAlive], done, to, total);
        to += plan_.out_row;
      }
    }
  }

 private:
  // The map's rows that a step adds: zeros in columns outside it, anything in rows outside it.
  struct Rows {
    uint32_t word[kStride][kInputs];
  };

  // Reads the next step's.
  EDET_DEVICE void load(Rows& rows) {
    EDET_UNROLL
    for (int r = 0; r < kStride; r++) {
      const char* const row =
          opaque(from_ + uint64_t(uint32_t(max(0, min(y_ + r, last_)))) * uint32_t(plan_.row));
      EDET_UNROLL
      for (int j = 0; j < kInputs; j++) {
        const auto read = [&] {
          const char* const from = row + plan_.column[j];
          return load_written<uint32_t, 1>(reinterpret_cast<const uint32_t*>(from)).value[0];
        };
        if (kWhole && j >= kKernel / 2 && j < kInputs - kKernel / 2) {
          rows.word[r][j] = read();
        } else {
          rows.word[r][j] = 0;
          if (inside_ & 1u << j) rows.word[r][j] = read();
        }
      }
    }
    y_ += kStride;
  }

  // Adds rows, of which y is the first, to the results that need them. Those of the step's own row,
  // which begin, are at `phase`, the last to end after it.
  EDET_DEVICE void add(const Rows& rows, int y, int phase,
                       float (&sum)[kAlive][kColumns][2]) const {
    EDET_UNROLL
    for (int r = 0; r < kStride; r++) {
      const uint32_t real = y + r >= 0 && y + r < int(plan_.p.h) ? ~0u : 0u;
      EDET_UNROLL
      for (int j = 0; j < kInputs; j++) {
        float in[2];
        unpack<T>(rows.word[r][j] & real, in[0], in[1]);
        EDET_UNROLL
        for (int age = 0; age < kAlive; age++) {
          const int dy = age * kStride + r;
          if (dy >= kKernel) continue;
          EDET_UNROLL
          for (int x = 0; x < kColumns; x++) {
            const int dx = j - x * kStride;
            if (dx < 0 || dx >= kKernel) continue;
            float (&to)[2] = sum[(phase - age + kAlive) % kAlive][x];
            EDET_UNROLL
            for (int i = 0; i < 2; i++) {
              const float before = dy + dx == 0 ? shift_.value[i] : to[i];
              to[i] = before + w_[dy * kKernel + dx].value[i] * in[i];
            }
          }
        }
      }
    }
  }

  // Activates and stores a row of results; nothing if it is not `done`: `total` is zero then.
  EDET_DEVICE void finish(const float (&sum)[kColumns][2], bool done, char* to,
                          float (&total)[2]) const {
    float x[2 * kColumns];
    EDET_UNROLL
    for (int i = 0; i < 2 * kColumns; i++) {
      x[i] = kSwish ? swish<T>(sum[i / 2][i % 2]) : sum[i / 2][i % 2];
    }
    if (!kSwish) activate<T>(x, plan_.p.activation);
    EDET_UNROLL
    for (int i = 0; i < kColumns; i++) {
      const bool real = kWhole || (inside_ & 1u << (kInputs + i));
      EDET_UNROLL
      for (int j = 0; j < 2; j++) total[j] += real ? x[2 * i + j] : 0.0f;
      const uint32_t word = pack<T>(x[2 * i], x[2 * i + 1]);
      if (done && real) store(reinterpret_cast<uint32_t*>(to + plan_.column[i]), word);
    }
    EDET_UNROLL
    for (int j = 0; j < 2; j++) total[j] = done ? total[j] : 0.0f;
  }

  const Plan& plan_;
  const int channel_;
  Vector<float, 2> w_[kKernel * kKernel], shift_;
  const char* from_;  // the image's first row, from the strip's first column on: maybe outside
  int y_, last_;      // the next row to read, and the last that there is and the strip needs
  uint32_t inside_;   // a bit for each column of the map and then of the result: it has it
};

template <class T, int kKernel, int kStride, bool kSwish, bool kWhole>
EDET_KERNEL(kThreads, blocks_of(kKernel, kStride, kWhole, EDET_TEN))
convolve_depthwise(EDET_PARAMS(Plan) plan) {
  const MbconvParams& p = plan.p;
  EDET_SHARED(float, sums);  // of channels; of each strip; then what reduce_part needs
  griddep_launch();
  const int word = thread().x % plan.words, own = thread().x / plan.words;
  const int rest = int(block().x) / plan.chunks, groups = plan.parts / plan.chunks;
  const int strip = rest % groups * plan.strips + own;
  const int channel = (int(block().x) % plan.chunks * plan.words + word) * 2;
  const bool real = own < plan.strips && strip < plan.of_image && channel < p.c_mid;
  Walk<T, kKernel, kStride, kSwish, kWhole> walk(plan, min(channel, int(p.c_mid) - 2));
  griddep_wait();
  float total[2] = {};
  if (real) walk.strip(rest / groups, strip, total);
  if (!p.c_reduced) return;

  // no register holds during the walk what can be computed here
  const int t = opaque(thread().x), number = opaque(block().x), threads = block_size().x;
  const int channels = 2 * plan.words;
  const Shared<float> of_strips = sums + channels;
  if (t < plan.words * plan.strips)
    store(of_strips + 2 * t, Vector<float, 2>{{total[0], total[1]}});
  sync_threads();
  EDET_LOOP
  for (int i = t; i < channels; i += threads) {
    float sum = 0.0f;
    EDET_LOOP
    for (int s = 0; s < plan.strips; s++) sum += get(of_strips + (s * channels + i));
    store(sums + i, sum);
  }
  sync_threads();
  reduce_part(p, number % plan.chunks * channels, channels, threads, sums, of_strips,
              p.sums + int64_t(number) * p.c_reduced);
}

// Whether there is a kernel without conditions for a map; see Walk.
bool is_whole(const MbconvParams& p) {
  const int64_t half = p.kernel / 2, right = (p.out_w - 1) * p.stride + p.kernel - p.pad_left - p.w;
  return p.activation == Activation::swish && p.out_w % columns_of(p.stride) == 0 &&
         p.pad_left <= half && right <= half;
}

// A plan with strips of so many rows.
Plan plan_of(const MbconvParams& p, int rows) {
  Plan plan{};
  plan.p = p;
  plan.rows = static_cast<int>(divide_up(p.out_h, divide_up(p.out_h, rows)));
  plan.across = static_cast<int>(divide_up(p.out_w, columns_of(p.stride)));
  plan.of_image = static_cast<int>(plan.across * divide_up(p.out_h, plan.rows));
  const int64_t words = p.c_mid / 2;
  // So many words that the fewest lanes are idle, in whole sectors of memory; of those the fewest,
  // because neighbouring strips share columns of the map.
  double best = 0.0;
  for (int64_t chunks = divide_up(words, kThreads); chunks <= divide_up(words, 32); chunks++) {
    const int own = static_cast<int>(
        chunks == 1 ? words : std::min<int64_t>(kThreads, round_up(divide_up(words, chunks), 8)));
    const int strips = std::min(kThreads / own, plan.of_image);
    const int64_t needed = divide_up(words, own);
    const double used = double(words * strips) / double(needed * kThreads);
    if (used < best) continue;
    best = used;
    plan.words = own, plan.strips = strips, plan.chunks = static_cast<int>(needed);
  }
  plan.parts = static_cast<int>(divide_up(plan.of_image, plan.strips)) * plan.chunks;
  return plan;
}

// Threads of a block: reduce_part needs 64.
int threads_of(const Plan& plan) {
  return std::max(2 * kWarp, round_up(plan.words * plan.strips, kWarp));
}

// Strips are as long as they can be for all multiprocessors to have blocks: so that, roughly, the
// last of them ends soonest. A block begins in the time of some rows; alone it takes half as long.
Plan plan_for(const MbconvParams& p, const Device& device) {
  constexpr double kBegin = 6.0;
  const int blocks = blocks_of(p.kernel, p.stride, is_whole(p), device.capability / 10 == 10);
  Plan best{};
  double least = INFINITY;
  for (int rows = kLeastRows; rows <= kMostRows; rows *= 2) {
    const Plan plan = plan_of(p, rows);
    const int resident = blocks * kThreads / threads_of(plan);
    const double waves = double(p.n * plan.parts) / (resident * device.multiprocessors);
    const double turns = waves < 1.0   ? 0.5 + 0.5 * waves
                         : waves < 4.0 ? std::ceil(waves)
                                       : waves + 0.5;
    const double time = (kBegin + plan.rows + (p.kernel - 1) / p.stride) * turns;
    if (time < least) best = plan, least = time;
  }
  return best;
}

template <class T, int kKernel, int kStride>
Error launch_activation(const Plan& plan, Stream stream, bool pdl) {
  const int threads = threads_of(plan);
  const int channels = 2 * plan.words;
  const int bytes = 4 * (channels + std::max(channels * plan.strips, reduce_floats(threads)));
  const auto start = [&](auto kernel) {
    return launch(kernel, Dim3(static_cast<unsigned>(plan.p.n * plan.parts)),
                  Dim3(static_cast<unsigned>(threads)), static_cast<size_t>(bytes), stream, plan,
                  pdl);
  };
  if (plan.p.activation != Activation::swish) {
    return start(convolve_depthwise<T, kKernel, kStride, false, false>);
  }
  return is_whole(plan.p) ? start(convolve_depthwise<T, kKernel, kStride, true, true>)
                          : start(convolve_depthwise<T, kKernel, kStride, true, false>);
}

template <class T>
Error launch_type(const Plan& plan, Stream stream, bool pdl) {
  if (plan.p.kernel == 3) {
    return plan.p.stride == 1 ? launch_activation<T, 3, 1>(plan, stream, pdl)
                              : launch_activation<T, 3, 2>(plan, stream, pdl);
  }
  return plan.p.stride == 1 ? launch_activation<T, 5, 1>(plan, stream, pdl)
                            : launch_activation<T, 5, 2>(plan, stream, pdl);
}

}  // namespace

int64_t depthwise_most_parts(const MbconvParams& p) {
  int64_t most = 0;
  if (p.c_mid < 2) return most;
  for (int rows = kLeastRows; rows <= kMostRows; rows *= 2) {
    most = std::max(most, int64_t(plan_of(p, rows).parts));
  }
  return most;
}

Error depthwise(const MbconvParams& p, const void* input, int64_t images, Stream stream, int* parts,
                bool pdl) {
  Device device;
  const Error error = current_device(&device);
  if (error != kSuccess) return error;
  Plan plan = plan_for(p, device);
  plan.input = input;
  for (int i = 0; i < kMostColumns; i++) plan.column[i] = 2 * p.c_mid * i;
  plan.row = 2 * p.c_mid * p.w, plan.out_row = 2 * p.c_mid * p.out_w;
  *parts = plan.parts;
  plan.p.n = images;
  if (images * plan.parts > INT32_MAX || plan.row > INT32_MAX) return kInvalidValue;
  return p.dtype == DType::f16 ? launch_type<f16>(plan, stream, pdl)
                               : launch_type<bf16>(plan, stream, pdl);
}

}  // namespace edet::cuda
