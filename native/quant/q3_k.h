#pragma once
// Q3_K, 110 bytes for 256 columns: 0 top bits[32]: bit t of byte j = column 32t + j | 32 low pairs[64] as in Q2_K |
// 96 six-bit scales[12] | 108 fp16 d
//
// w = d * (scale[c / 16] - 32) * (q - 4). Scale g < 8 has its low nibble in the low half of byte g, scale 8 + g in the high half;
// bits 2 (g / 4) of byte 8 + g % 4 are the top bits of scale g.
// Packed, a row's 256 columns take 64 + 32 + 2 + 16 = 114 bytes, 3.6 % more than in the file: the scales are widened.

#include "quant/format.h"
#include "quant/planes.h"

namespace nomoat {
namespace {

struct Q3_K : SignedScales<2> {
  static constexpr Format id = Format::Q3_K;
  static constexpr bool integer = true, has_min = false;
  static constexpr int block_cols = 256, block_bytes = 110, plane_bytes = 128 + 64;
  static constexpr int zero = 4, top = 7;

  static void pack(const uint8_t* block, int row, const TileAt<uint8_t>& to) {
    const int tile = to.index;
    uint8_t codes[32];
    const uint8_t* low = block + 32 + 32 * (tile / 4);
    for (int j = 0; j < 32; j++) codes[j] = uint8_t(((low[j] >> (2 * (tile % 4))) & 3) | ((block[j] >> tile) & 1) << 2);
    pack_pairs<0>(codes, row, to.plane);
    pack_bits<2>(codes, row, to.plane + 128);
    copy_half(block + 108, row, to.shared);
    const uint8_t* six = block + 96;
    for (int half = 0; half < 2; half++) {
      const int g = 2 * tile + half;
      const int nibble = (six[g % 8] >> (4 * (g / 8))) & 15, top = (six[8 + g % 4] >> (2 * (g / 4))) & 3;
      put_scale((nibble | top << 4) - 32, row, half, to.scales);
    }
  }

  template <class V, int G>
  static typename V::B granule(const uint8_t* plane, int lane) {
    return V::bor(pairs<V, G, 0>(plane, lane), bits<V, G, 2>(plane + 128, lane));
  }
};

}  // namespace
}  // namespace nomoat
