#pragma once
// Q8_0, 34 bytes for 32 columns: 0 fp16 d | 2 int8 q[32].  w = d * q; stored as q + 128 so that one unsigned dot serves all

#include "quant/format.h"
#include "quant/planes.h"

namespace nomoat {
namespace {

struct Q8_0 : HalfScales<32> {
  static constexpr Format id = Format::Q8_0;
  static constexpr bool integer = true, has_min = false;
  static constexpr int block_cols = 32, block_bytes = 34, plane_bytes = 512;
  static constexpr int zero = 128, top = 255, groups = 1;  // value = scale * (code - zero)

  static void pack(const uint8_t* block, int row, const TileAt<uint8_t>& to) {
    for (int c = 0; c < 32; c++) to.plane[64 * (c / 4) + 4 * row + c % 4] = block[2 + c] ^ 0x80;
    copy_half(block, row, to.scales);
  }

  template <class V, int G>
  static typename V::B granule(const uint8_t* plane, int lane) {
    return V::bytes(plane + 64 * G + 4 * lane);
  }
};

}  // namespace
}  // namespace nomoat
