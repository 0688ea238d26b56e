#pragma once
// IQ4_XS, 136 bytes for 256 columns: 0 fp16 d | 2 top pairs of the scales, u16 | 4 low nibbles of the scales[4] |
// 8 nibbles[8][16], each 16 bytes as in IQ4_NL
//
// w = d * (scale[c / 32] - 32) * value[q], the values of IQ4_NL. Scale t has its low nibble in byte t / 2 (odd t: the high half)
// and its top bits at bits 2t.
// Packed, a row's 256 columns take 128 + 2 + 8 = 138 bytes, 1.5 % more than in the file: the scales are widened.

#include "quant/format.h"
#include "quant/iq4_nl.h"
#include "quant/planes.h"

namespace nomoat {
namespace {

struct IQ4_XS : SignedScales<1> {
  static constexpr Format id = Format::IQ4_XS;
  static constexpr bool integer = true, has_min = false;
  static constexpr int block_cols = 256, block_bytes = 136, plane_bytes = 256;
  static constexpr int zero = IQ4_NL::zero, top = IQ4_NL::top;

  static void pack(const uint8_t* block, int row, const TileAt<uint8_t>& to) {
    const int tile = to.index;
    uint8_t indexes[32];
    split_nibbles(block + 8 + 16 * tile, indexes);
    pack_nibbles(indexes, row, to.plane);
    copy_half(block, row, to.shared);
    const int nibble = (block[4 + tile / 2] >> (4 * (tile % 2))) & 15, top = (block[2 + tile / 4] >> (2 * (tile % 4))) & 3;
    put_scale((nibble | top << 4) - 32, row, 0, to.scales);
  }

  template <class V, int G>
  static typename V::B granule(const uint8_t* plane, int lane) {
    return IQ4_NL::granule<V, G>(plane, lane);
  }
};

}  // namespace
}  // namespace nomoat
