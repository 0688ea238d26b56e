#pragma once
// Q5_1, 24 bytes for 32 columns: 0 fp16 d | 2 fp16 m | 4 fifth bits, u32, bit j = column j | 8 nibbles[16].  w = d * q + m

#include "quant/format.h"
#include "quant/planes.h"

namespace nomoat {
namespace {

struct Q5_1 : HalfScales<64> {
  static constexpr Format id = Format::Q5_1;
  static constexpr bool integer = true, has_min = true;
  static constexpr int block_cols = 32, block_bytes = 24, plane_bytes = 256 + 64;
  static constexpr int zero = 0, top = 31, groups = 1;  // value = scale * (code - zero) + min

  static void pack(const uint8_t* block, int row, const TileAt<uint8_t>& to) {
    uint8_t codes[32];
    split_nibbles(block + 8, codes);
    for (int j = 0; j < 32; j++) codes[j] |= ((block[4 + j / 8] >> (j % 8)) & 1) << 4;
    pack_nibbles(codes, row, to.plane);
    pack_bits<4>(codes, row, to.plane + 256);
    copy_half(block, row, to.scales);
    copy_half(block + 2, row, to.scales + 32);
  }

  template <class V, int G>
  static typename V::B granule(const uint8_t* plane, int lane) {
    return V::bor(nibbles<V, G>(plane, lane), bits<V, G, 4>(plane + 256, lane));
  }
};

}  // namespace
}  // namespace nomoat
