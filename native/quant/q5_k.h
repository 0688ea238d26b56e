#pragma once
// Q5_K, 176 bytes for 256 columns: 0 fp16 d | 2 fp16 dmin | 4 six-bit scales and mins[12] |
// 16 fifth bits[32]: bit t of byte j = column 32t+j | 48 nibbles[128] as in Q4_K.
//
// w = d * scale[c / 32] * q - dmin * min[c / 32]

#include "quant/format.h"
#include "quant/planes.h"

namespace nomoat {
namespace {

struct Q5_K : SixBitScales {
  static constexpr Format id = Format::Q5_K;
  static constexpr bool integer = true, has_min = true;
  static constexpr int block_cols = 256, block_bytes = 176, plane_bytes = 256 + 64;
  static constexpr int zero = 0, top = 31, groups = 1;

  static void pack(const uint8_t* block, int row, const TileAt<uint8_t>& to) {
    const int tile = to.index;
    uint8_t codes[32];
    const uint8_t* bytes = block + 48 + 32 * (tile / 2);
    for (int j = 0; j < 32; j++)
      codes[j] = uint8_t((tile % 2 ? bytes[j] >> 4 : bytes[j] & 15) | ((block[16 + j] >> tile) & 1) << 4);
    pack_nibbles(codes, row, to.plane);
    pack_bits<4>(codes, row, to.plane + 256);
    pack_scales(block, row, to);
  }

  template <class V, int G>
  static typename V::B granule(const uint8_t* plane, int lane) {
    return V::bor(nibbles<V, G>(plane, lane), bits<V, G, 4>(plane + 256, lane));
  }
};

}  // namespace
}  // namespace nomoat
