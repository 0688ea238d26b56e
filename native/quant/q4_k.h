#pragma once
// Q4_K, 144 bytes for 256 columns: 0 fp16 d | 2 fp16 dmin | 4 six-bit scales and mins[12] |
// 16 nibbles[128]: 32 bytes hold columns 64i .. 64i+31 low and 64i+32 .. 64i+63 high.
//
// w = d * scale[c / 32] * q - dmin * min[c / 32]

#include "quant/format.h"
#include "quant/planes.h"

namespace nomoat {
namespace {

struct Q4_K : SixBitScales {
  static constexpr Format id = Format::Q4_K;
  static constexpr bool integer = true, has_min = true;
  static constexpr int block_cols = 256, block_bytes = 144, plane_bytes = 256;
  static constexpr int zero = 0, top = 15, groups = 1;

  static void pack(const uint8_t* block, int row, const TileAt<uint8_t>& to) {
    const int tile = to.index;
    uint8_t codes[32];
    const uint8_t* bytes = block + 16 + 32 * (tile / 2);
    for (int j = 0; j < 32; j++) codes[j] = tile % 2 ? bytes[j] >> 4 : bytes[j] & 15;
    pack_nibbles(codes, row, to.plane);
    pack_scales(block, row, to);
  }

  template <class V, int G>
  static typename V::B granule(const uint8_t* plane, int lane) {
    return nibbles<V, G>(plane, lane);
  }
};

}  // namespace
}  // namespace nomoat
