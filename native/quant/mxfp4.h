#pragma once
// MXFP4 (OCP Microscaling), 17 bytes for 32 columns: 0 E8M0 e | 1 nibbles[16].  w = 2^(e - 128) * value[q]
//
// The values are those of E2M1, doubled to be whole and halved again by the scale: 0, 1, 2, 3, 4, 6, 8, 12, then their negatives.
// They come out of the table as value + 12. Packed, 32 columns take 16 + 1 bytes, those of the file.

#include "quant/format.h"
#include "quant/planes.h"

namespace nomoat {
namespace {

struct MXFP4 {
  static constexpr Format id = Format::MXFP4;
  static constexpr bool integer = true, has_min = false;
  static constexpr int block_cols = 32, block_bytes = 17, plane_bytes = 256, scale_bytes = 16, shared_bytes = 0;
  static constexpr int zero = 12, top = 24, groups = 1;
  static constexpr uint8_t codes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

  static void pack(const uint8_t* block, int row, const TileAt<uint8_t>& to) {
    uint8_t indexes[32];
    split_nibbles(block + 1, indexes);
    pack_nibbles(indexes, row, to.plane);
    to.scales[row] = block[0];
  }

  template <class V, int G>
  static typename V::B granule(const uint8_t* plane, int lane) {
    return V::look_up(codes, nibbles<V, G>(plane, lane));
  }

  // In two steps: 2^-128 and 2^-127 are subnormal, and the power of one step is normal.
  template <class V>
  static typename V::F scale(const Tile& tile, int, int lane) {
    using F = typename V::F;
    const F power = V::sub(V::from_u8(tile.scales + lane), V::set1(128));
    const F normal = V::max(power, V::set1(-126));
    return V::scale_by_power(V::scale_by_power(V::set1(1), normal), V::sub(power, normal));
  }
};

}  // namespace
}  // namespace nomoat
