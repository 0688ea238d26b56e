#pragma once
// Bit planes of a 16 x 32 tile: nibbles, pairs and single bits of codes. `codes` are the 32 unsigned codes of one row, in column
// order.

#include <cstdint>

#include "quant/half.h"

namespace nomoat {
namespace {

// 256 bytes of nibbles, layout in quant/format.h.
inline void pack_nibbles(const uint8_t* codes, int row, uint8_t* plane) {
  for (int g = 0; g < 4; g++)
    for (int b = 0; b < 4; b++)
      plane[64 * g + 4 * row + b] = uint8_t((codes[4 * g + b] & 15) | (codes[16 + 4 * g + b] & 15) << 4);
}

template <class V, int G>
inline typename V::B nibbles(const uint8_t* plane, int lane) {
  const typename V::B both = V::bytes(plane + 64 * (G % 4) + 4 * lane);
  return V::band(G < 4 ? both : V::template shr<4>(both), 0x0f);
}

// Bits `From` and up of every byte, moved to bit `To`; `mask` keeps those that are meant.
template <class V, int From, int To>
inline typename V::B move_bits(typename V::B x, uint8_t mask) {
  if constexpr (From < To) x = V::template shl<To - From>(x);
  if constexpr (From > To) x = V::template shr<From - To>(x);
  return V::band(x, mask);
}

// 64 bytes: bit g of byte 4 * row + b is bit `At` of column 4 * g + b.
template <int At>
inline void pack_bits(const uint8_t* codes, int row, uint8_t* plane) {
  for (int b = 0; b < 4; b++) {
    int bits = 0;
    for (int g = 0; g < 8; g++) bits |= ((codes[4 * g + b] >> At) & 1) << g;
    plane[4 * row + b] = uint8_t(bits);
  }
}

template <class V, int G, int At>
inline typename V::B bits(const uint8_t* plane, int lane) {
  return move_bits<V, G, At>(V::bytes(plane + 4 * lane), 1 << At);
}

// 128 bytes: bits 2j, 2j+1 of byte 64 * h + 4 * row + b are bits `At`, `At` + 1 of column 16 * h + 4 * j + b.
template <int At>
inline void pack_pairs(const uint8_t* codes, int row, uint8_t* plane) {
  for (int h = 0; h < 2; h++)
    for (int b = 0; b < 4; b++) {
      int bits = 0;
      for (int j = 0; j < 4; j++) bits |= ((codes[16 * h + 4 * j + b] >> At) & 3) << (2 * j);
      plane[64 * h + 4 * row + b] = uint8_t(bits);
    }
}

template <class V, int G, int At>
inline typename V::B pairs(const uint8_t* plane, int lane) {
  return move_bits<V, 2 * (G % 4), At>(V::bytes(plane + 64 * (G / 4) + 4 * lane), 3 << At);
}

inline void copy_half(const uint8_t* from, int row, uint8_t* to) {
  to[2 * row] = from[0];
  to[2 * row + 1] = from[1];
}

// Low nibble j is column j, high nibble j is column 16 + j: how the formats with blocks of 32, and IQ4_XS, store 32 columns in
// 16 bytes.
inline void split_nibbles(const uint8_t* bytes, uint8_t* codes) {
  for (int j = 0; j < 16; j++) {
    codes[j] = bytes[j] & 15;
    codes[16 + j] = bytes[j] >> 4;
  }
}

// Q4_K and Q5_K: eight 6-bit scales and eight 6-bit mins in 12 bytes.
inline uint8_t k_scale(const uint8_t* packed, int j) {
  return j < 4 ? packed[j] & 63 : uint8_t((packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4));
}

inline uint8_t k_min(const uint8_t* packed, int j) {
  return j < 4 ? packed[j + 4] & 63 : uint8_t((packed[j + 4] >> 4) | ((packed[j] >> 6) << 4));
}

// Scales of the 32-column formats, a tile: fp16 d[16], behind it fp16 m[16] where there are mins.
template <int Bytes>
struct HalfScales {
  static constexpr int scale_bytes = Bytes, shared_bytes = 0;

  template <class V>
  static typename V::F scale(const Tile& tile, int, int lane) {
    return V::from_f16(reinterpret_cast<const uint16_t*>(tile.scales) + lane);
  }

  template <class V>
  static typename V::F min(const Tile& tile, int, int lane) {
    return V::from_f16(reinterpret_cast<const uint16_t*>(tile.scales + 32) + lane);
  }
};

// Scales of Q4_K and Q5_K. A tile: u8 scale[16] | u8 min[16], six bits widened, which adds 2.8 % to the size of Q4_K.
// A superblock: fp16 d[16] | fp16 dmin[16].
struct SixBitScales {
  static constexpr int scale_bytes = 32, shared_bytes = 64;

  // block: 0 fp16 d | 2 fp16 dmin | 4 six-bit scales and mins[12]
  static void pack_scales(const uint8_t* block, int row, const TileAt<uint8_t>& to) {
    copy_half(block, row, to.shared);
    copy_half(block + 2, row, to.shared + 32);
    to.scales[row] = k_scale(block + 4, to.index);
    to.scales[16 + row] = k_min(block + 4, to.index);
  }

  template <class V>
  static typename V::F scale(const Tile& tile, int, int lane) {
    const typename V::F d = V::from_f16(reinterpret_cast<const uint16_t*>(tile.shared) + lane);
    return V::mul(d, V::from_u8(tile.scales + lane));
  }

  template <class V>
  static typename V::F min(const Tile& tile, int, int lane) {
    const typename V::F d = V::from_f16(reinterpret_cast<const uint16_t*>(tile.shared + 32) + lane);
    return V::sub(V::zero(), V::mul(d, V::from_u8(tile.scales + 16 + lane)));
  }
};

// Scales of Q3_K, Q6_K and IQ4_XS. A tile: int8 scale[Groups][16]. A superblock: fp16 d[16].
template <int Groups>
struct SignedScales {
  static constexpr int groups = Groups, scale_bytes = 16 * Groups, shared_bytes = 32;

  static void put_scale(int scale, int row, int group, uint8_t* scales) { scales[16 * group + row] = uint8_t(scale); }

  template <class V>
  static typename V::F scale(const Tile& tile, int group, int lane) {
    const typename V::F d = V::from_f16(reinterpret_cast<const uint16_t*>(tile.shared) + lane);
    return V::mul(d, V::from_s8(reinterpret_cast<const int8_t*>(tile.scales) + 16 * group + lane));
  }
};

}  // namespace
}  // namespace nomoat
