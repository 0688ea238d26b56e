#pragma once
// Q5_0, 22 bytes for 32 columns: 0 fp16 d | 2 fifth bits, u32, bit j = column j | 6 nibbles[16].  w = d * (q - 16)

#include "quant/format.h"
#include "quant/planes.h"

namespace nomoat {
namespace {

struct Q5_0 : HalfScales<32> {
  static constexpr Format id = Format::Q5_0;
  static constexpr bool integer = true, has_min = false;
  static constexpr int block_cols = 32, block_bytes = 22, plane_bytes = 256 + 64;
  static constexpr int zero = 16, top = 31, groups = 1;  // value = scale * (code - zero)

  static void pack(const uint8_t* block, int row, const TileAt<uint8_t>& to) {
    uint8_t codes[32];
    split_nibbles(block + 6, codes);
    for (int j = 0; j < 32; j++) codes[j] |= ((block[2 + j / 8] >> (j % 8)) & 1) << 4;
    pack_nibbles(codes, row, to.plane);
    pack_bits<4>(codes, row, to.plane + 256);
    copy_half(block, row, to.scales);
  }

  template <class V, int G>
  static typename V::B granule(const uint8_t* plane, int lane) {
    return V::bor(nibbles<V, G>(plane, lane), bits<V, G, 4>(plane + 256, lane));
  }
};

}  // namespace
}  // namespace nomoat
