// The tiles of AMX: eight registers of up to 16 rows of 64 bytes, and the instructions that
// multiply pairs of bf16 and fours of bytes in them; EDET_EMULATED_TILES: the same in plain code,
// for tests on CPUs that have none. Written as assembly, because compilers name AMX's registers in
// macros only.
#pragma once

#include "vec.h"

#if defined(EDET_AMX) || defined(EDET_EMULATED_TILES)
#define EDET_TILES

namespace edet::cpu::EDET_ISA {

constexpr int kTileRows = 16;  // of a tile at most, and groups of a row at most

// Groups (pairs of bf16, fours of bytes: 32 bits) of a tile for rows of so many: as many as divide
// them, so that no tile is filled up.
constexpr int64_t tile_groups(int64_t groups) {
  int64_t step = groups < kTileRows ? groups : kTileRows;
  while (groups % step) step--;
  return step;
}

// The tiles of one product, configured while this lives: 0 to 3 hold sums, `rows` rows of 16; 4
// and 5 rows of `groups` groups of inputs, 6 and 7 the weights of as many groups for 16 outputs.
#if !defined(EDET_EMULATED_TILES)
class Tiles {
 public:
  EDET_INLINE Tiles(int64_t rows, int64_t groups) {
    static_assert(sizeof(Configuration) == 64);
    alignas(64) Configuration c{};
    c.palette = 1;
    for (int t = 0; t < 8; t++) {
      c.rows[t] = static_cast<uint8_t>(t < 6 ? rows : groups);
      c.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? 4 * groups : 64);
    }
    asm volatile("ldtilecfg %0" : : "m"(c));
  }
  EDET_INLINE ~Tiles() { asm volatile("tilerelease"); }  // else every switch of threads saves them
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int T>
  EDET_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>  // rows `pitch` bytes apart, as for store
  EDET_INLINE void load(const void* from, int64_t pitch) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(pitch), "i"(T) : "memory");
  }
  template <int T>
  EDET_INLINE void store(void* to, int64_t pitch) const {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(pitch), "i"(T) : "memory");
  }
  template <int C, int A, int B>  // C += A · B, of bf16
  EDET_INLINE void add_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
  template <int C, int A, int B>  // the same of unsigned bytes and signed weights
  EDET_INLINE void add_byte_product() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }

 private:
  struct Configuration {  // as ldtilecfg reads it
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};
#else
class Tiles {
 public:
  Tiles(int64_t rows, int64_t groups) : rows_(rows), groups_(groups) {}

  template <int T>
  void zero() {
    std::memset(tile_[T], 0, sizeof tile_[T]);
  }
  template <int T>
  void load(const void* from, int64_t pitch) {
    for (int64_t r = 0; r < (T < 6 ? rows_ : groups_); r++)
      std::memcpy(tile_[T][r], static_cast<const char*>(from) + r * pitch,
                  static_cast<size_t>(T == 4 || T == 5 ? 4 * groups_ : 64));
  }
  template <int T>
  void store(void* to, int64_t pitch) const {
    for (int64_t r = 0; r < rows_; r++)
      std::memcpy(static_cast<char*>(to) + r * pitch, tile_[T][r], 64);
  }
  // As the manual of tdpbf16ps has it: the first and the second numbers of the pairs are summed
  // each for themselves, every addition is rounded once, and subnormal numbers are zeros of their
  // sign, read or written.
  template <int C, int A, int B>
  void add_product() {
    for (int64_t m = 0; m < rows_; m++)
      for (int n = 0; n < 16; n++) {
        float low = 0.0f, high = 0.0f;
        for (int64_t k = 0; k < groups_; k++) {
          const uint32_t a = tile_[A][m][k], b = tile_[B][k][n];
          low = flushed(__builtin_fmaf(number(a << 16), number(b << 16), low));
          high = flushed(__builtin_fmaf(number(a & 0xffff0000u), number(b & 0xffff0000u), high));
        }
        const float sum = flushed(number(tile_[C][m][n]) + flushed(low + high));
        std::memcpy(&tile_[C][m][n], &sum, sizeof sum);
      }
  }

  template <int C, int A, int B>
  void add_byte_product() {
    for (int64_t m = 0; m < rows_; m++)
      for (int n = 0; n < 16; n++)
        for (int64_t k = 0; k < groups_; k++)
          for (int bits = 0; bits < 32; bits += 8) {
            const int weight = static_cast<int8_t>(tile_[B][k][n] >> bits);
            const int input = static_cast<uint8_t>(tile_[A][m][k] >> bits);
            tile_[C][m][n] += static_cast<uint32_t>(input * weight);
          }
  }

 private:
  static float number(uint32_t bits) {
    if (!(bits & 0x7f800000u)) bits &= 0x80000000u;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  static float flushed(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return number(bits);
  }

  int64_t rows_, groups_;
  uint32_t tile_[8][kTileRows][16];
};
#endif

}  // namespace edet::cpu::EDET_ISA
#endif
