#pragma once
// Tile registers (AMX): eight of 16 rows x 64 bytes. A product of two adds A[16 rows][64 bytes] times B[16 fours of int8 or pairs
// of bf16 of the contraction][16 columns] to C[16][16], int32 or float32. Intel SDM volume 1, chapter 18.

#include "kernel/avx512.h"

namespace nomoat {
namespace {

constexpr int kTileRows = 16;

// The shapes of the eight tile registers. Their contents are gone at the end of the scope: a core that holds none saves power.
class TileShapes {
 public:
  TileShapes() = default;
  TileShapes(const TileShapes&) = delete;
  ~TileShapes() { _tile_release(); }

  void set(int tile, int rows, int row_bytes) {
    config_.rows[tile] = uint8_t(rows);
    config_.row_bytes[tile] = uint16_t(row_bytes);
  }
  // Not the intrinsic: GCC's says that it reads eight bytes of the 64, and what is written to the others may never be.
  void use() { __asm__ volatile("ldtilecfg %0" ::"m"(config_)); }

 private:
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config_;
};

// Not the intrinsics: GCC's take literals only. A load or store does not tell the compiler what memory it means, which would
// cost the sums their registers: settled() stands where memory written before is read by what follows.
template <int T>
inline void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void load_tile(const void* from, int row_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(int64_t(row_bytes)), "i"(T));
}
template <int T>
inline void store_tile(void* to, int row_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(int64_t(row_bytes)), "i"(T));
}
template <int T>
inline void store_dots(int32_t (&to)[kTileRows][16]) {
  __asm__ volatile("tilestored %%tmm%c3, (%1,%2,1)" : "=m"(to) : "r"(&to), "r"(int64_t(sizeof(to[0]))), "i"(T));
}
// C += A B of int8
template <int C, int A, int B>
inline void multiply_int8() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
inline void multiply_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace
}  // namespace nomoat
