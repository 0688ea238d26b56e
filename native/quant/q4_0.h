#pragma once
// Q4_0, 18 bytes for 32 columns: 0 fp16 d | 2 nibbles[16].  w = d * (q - 8)

#include "quant/format.h"
#include "quant/planes.h"

namespace nomoat {
namespace {

struct Q4_0 : HalfScales<32> {
  static constexpr Format id = Format::Q4_0;
  static constexpr bool integer = true, has_min = false;
  static constexpr int block_cols = 32, block_bytes = 18, plane_bytes = 256;
  static constexpr int zero = 8, top = 15, groups = 1;  // value = scale * (code - zero)

  static void pack(const uint8_t* block, int row, const TileAt<uint8_t>& to) {
    uint8_t codes[32];
    split_nibbles(block + 2, codes);
    pack_nibbles(codes, row, to.plane);
    copy_half(block, row, to.scales);
  }

  template <class V, int G>
  static typename V::B granule(const uint8_t* plane, int lane) {
    return nibbles<V, G>(plane, lane);
  }
};

}  // namespace
}  // namespace nomoat
