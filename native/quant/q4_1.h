#pragma once
// Q4_1, 20 bytes for 32 columns: 0 fp16 d | 2 fp16 m | 4 nibbles[16].  w = d * q + m

#include "quant/format.h"
#include "quant/planes.h"

namespace nomoat {
namespace {

struct Q4_1 : HalfScales<64> {
  static constexpr Format id = Format::Q4_1;
  static constexpr bool integer = true, has_min = true;
  static constexpr int block_cols = 32, block_bytes = 20, plane_bytes = 256;
  static constexpr int zero = 0, top = 15, groups = 1;  // value = scale * (code - zero) + min

  static void pack(const uint8_t* block, int row, const TileAt<uint8_t>& to) {
    uint8_t codes[32];
    split_nibbles(block + 4, codes);
    pack_nibbles(codes, row, to.plane);
    copy_half(block, row, to.scales);
    copy_half(block + 2, row, to.scales + 32);
  }

  template <class V, int G>
  static typename V::B granule(const uint8_t* plane, int lane) {
    return nibbles<V, G>(plane, lane);
  }
};

}  // namespace
}  // namespace nomoat
