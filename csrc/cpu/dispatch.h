// The kernels of one instruction set as a table of functions, and the choice of the table.
#pragma once

#include "../core/int8.h"
#include "../core/params.h"

namespace edet::cpu {

constexpr int64_t kLateralPixels = 96;  // of one block of a projection, at most
constexpr int64_t kTileRows = 12;       // of most register tiles a multiple of the height

// The pixels of each of n images in blocks for a projection, as many of about the same size for
// each thread. A small map in blocks of kLateralPixels would leave a few pixels to one thread.
class PixelBlocks {
 public:
  PixelBlocks(int64_t pixels, int64_t n, int threads)
      : pixels_(pixels),
        tiles_(divide_up(pixels, kTileRows)),
        count_(divide_up(tiles_, kLateralPixels / kTileRows)) {
    while (count_ < tiles_ && n * count_ % threads) count_++;
  }
  int64_t count() const { return count_; }
  int64_t begin(int64_t block) const {
    return block == count_ ? pixels_ : block * tiles_ / count_ * kTileRows;
  }
  int64_t end(int64_t block) const { return begin(block + 1); }

 private:
  int64_t pixels_, tiles_, count_;
};

constexpr int64_t kResizeRows = 8;  // of one resize_backward task, at most

struct Kernels {
  const char* isa;
  int64_t (*node_scratch)(const NodeParams&);  // floats of scratch per thread
  void (*separable_node)(const NodeParams&, int64_t image, int64_t y_begin, int64_t y_end,
                         float* scratch, float* moments);
  int64_t (*node_backward_scratch)(const NodeBackwardParams&);  // floats of scratch per thread
  void (*conv_backward)(const NodeBackwardParams&, int64_t image, int64_t y_begin, int64_t y_end,
                        float* partial, float* scratch);
  void (*fusion_backward)(const NodeBackwardParams&, int64_t image, int64_t y_begin, int64_t y_end,
                          float* partial, float* scratch);
  void (*resize_backward)(const NodeBackwardParams&, int edge, int64_t image, int64_t y_begin,
                          int64_t y_end, float* scratch);
  void (*fusion_band)(const FusionParams&, void* out, int64_t image, int64_t y_begin, int64_t y_end,
                      float* scratch);
  int64_t (*lateral_scratch)(const LateralParams&);
  void (*lateral_block)(const LateralParams&, int64_t begin, int64_t end, float* scratch);
  int64_t (*mbconv_scratch)(const MbconvParams&);
  void (*mbconv_expand)(const MbconvParams&, int64_t image, int64_t band, int64_t chunk,
                        float* scratch);
  void (*mbconv_squeeze)(const MbconvParams&, int64_t image, float* scratch);
  void (*mbconv_gate)(const MbconvParams&, int64_t image, int64_t panel);
  void (*mbconv_project)(const MbconvParams&, int64_t image, int64_t begin, int64_t end,
                         float* scratch);
  int64_t (*stem_scratch)(const StemParams&);
  void (*stem_rows)(const StemParams&, int64_t image, int64_t y_begin, int64_t y_end,
                    float* scratch);
  int64_t (*scan)(DType dtype, const void* data, int64_t n, float threshold, int32_t* index,
                  float* value);
};

// The same for maps of bytes.
struct Int8Kernels {
  int64_t (*mbconv_scratch)(const Int8MbconvParams&);  // bytes of scratch per thread
  void (*mbconv_expand)(const Int8MbconvParams&, int64_t image, int64_t band, int64_t chunk,
                        char* scratch);
  void (*mbconv_squeeze)(const Int8MbconvParams&, int64_t image, char* scratch);
  void (*mbconv_gate)(const Int8MbconvParams&, int64_t image, int64_t panel);
  void (*mbconv_project)(const Int8MbconvParams&, int64_t image, int64_t begin, int64_t end,
                         char* scratch);
  int64_t (*node_scratch)(const Int8NodeParams&);  // bytes
  void (*node)(const Int8NodeParams&, int64_t image, int64_t y_begin, int64_t y_end, char* scratch);
  int64_t (*projection_scratch)(const Int8Projection&);  // bytes
  void (*projection)(const Int8Projection&, int64_t begin, int64_t end, char* scratch);
  void (*pool)(const FusionParams&, uint8_t* out, int64_t image, int64_t y_begin, int64_t y_end);
  void (*quantize)(const float* from, int64_t n, float inverse, float zero, uint8_t* to);
  void (*dequantize)(const uint8_t* from, int64_t n, float scale, float zero, float* to);
};

// The best table that this CPU can run, or the one EDET_CPU_ISA names. Throws
// std::invalid_argument when EDET_CPU_ISA names none that was built and that this CPU can run.
const Kernels& kernels();

// The table for maps of bytes that goes with it.
const Int8Kernels& int8_kernels();

}  // namespace edet::cpu
