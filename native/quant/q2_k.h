#pragma once
// Q2_K, 84 bytes for 256 columns: 0 scale (low nibble) and min (high nibble)[16] | 16 pairs[64] | 80 fp16 d | 82 fp16 dmin
// w = d * scale[c / 16] * q - dmin * min[c / 16]. In each half of 128 columns, bits 2s of byte j hold column 32s + j.
//
// Scales of a superblock: fp16 d[16] | fp16 dmin[16] | nibbles[4][16][4], for two tiles each: bytes 0, 1 of a row are the
// scales of a tile's halves, bytes 2, 3 their mins; low nibbles are the even tile's, high nibbles the odd one's.
// Packed, a row's 256 columns take 64 + 2 + 2 + 16 = 84 bytes, those of the file.

#include "quant/format.h"
#include "quant/planes.h"

namespace nomoat {
namespace {

struct Q2_K {
  static constexpr Format id = Format::Q2_K;
  static constexpr bool integer = true, has_min = true;
  static constexpr int block_cols = 256, block_bytes = 84, plane_bytes = 128, scale_bytes = 0, shared_bytes = 32 + 32 + 256;
  static constexpr int zero = 0, top = 3, groups = 2;

  static void pack(const uint8_t* block, int row, const TileAt<uint8_t>& to) {
    const int tile = to.index;
    uint8_t codes[32];
    for (int j = 0; j < 32; j++) codes[j] = (block[16 + 32 * (tile / 4) + j] >> (2 * (tile % 4))) & 3;
    pack_pairs<0>(codes, row, to.plane);
    copy_half(block + 80, row, to.shared);
    copy_half(block + 82, row, to.shared + 32);
    uint8_t* nibbles = to.shared + 64 + 64 * (tile / 2) + 4 * row;
    for (int h = 0; h < 2; h++) {
      nibbles[h] |= uint8_t((block[2 * tile + h] & 15) << (4 * (tile % 2)));
      nibbles[2 + h] |= uint8_t((block[2 * tile + h] >> 4) << (4 * (tile % 2)));
    }
  }

  template <class V, int G>
  static typename V::B granule(const uint8_t* plane, int lane) {
    return pairs<V, G, 0>(plane, lane);
  }

  template <class V>
  static typename V::F scale(const Tile& tile, int group, int lane) {
    const typename V::F d = V::from_f16(reinterpret_cast<const uint16_t*>(tile.shared) + lane);
    const typename V::B four = nibbles<V>(tile, lane);
    return V::mul(d, group ? V::template byte_to_f<1>(four) : V::template byte_to_f<0>(four));
  }

  template <class V>
  static typename V::F min(const Tile& tile, int group, int lane) {
    const typename V::F d = V::from_f16(reinterpret_cast<const uint16_t*>(tile.shared + 32) + lane);
    const typename V::B four = nibbles<V>(tile, lane);
    return V::sub(V::zero(), V::mul(d, group ? V::template byte_to_f<3>(four) : V::template byte_to_f<2>(four)));
  }

 private:
  // Scales, then mins of a tile's halves.
  template <class V>
  static typename V::B nibbles(const Tile& tile, int lane) {
    const typename V::B both = V::bytes(tile.shared + 64 + 64 * (tile.index / 2) + 4 * lane);
    return V::band(tile.index % 2 ? V::template shr<4>(both) : both, 0x0f);
  }
};

}  // namespace
}  // namespace nomoat
