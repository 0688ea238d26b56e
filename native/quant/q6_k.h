#pragma once
// Q6_K, 210 bytes for 256 columns: 0 low nibbles[128] | 128 top pairs[64] | 192 int8 scale[16] | 208 fp16 d
// w = d * scale[c / 16] * (q - 32). In each half of 128 columns, low byte 32 * (s % 2) + j holds columns 32s + j (s = 0, 1: low
// nibble; s = 2, 3: high nibble) and top byte j holds their top pairs at bits 2s.

#include "quant/format.h"
#include "quant/planes.h"

namespace nomoat {
namespace {

struct Q6_K : SignedScales<2> {
  static constexpr Format id = Format::Q6_K;
  static constexpr bool integer = true, has_min = false;
  static constexpr int block_cols = 256, block_bytes = 210, plane_bytes = 256 + 128;
  static constexpr int zero = 32, top = 63;

  static void pack(const uint8_t* block, int row, const TileAt<uint8_t>& to) {
    const int tile = to.index;
    uint8_t codes[32];
    const int half = tile / 4, s = tile % 4;
    const uint8_t *low = block + 64 * half + 32 * (s % 2), *top = block + 128 + 32 * half;
    for (int j = 0; j < 32; j++) codes[j] = uint8_t((s < 2 ? low[j] & 15 : low[j] >> 4) | ((top[j] >> (2 * s)) & 3) << 4);
    pack_nibbles(codes, row, to.plane);
    pack_pairs<4>(codes, row, to.plane + 256);
    copy_half(block + 208, row, to.shared);
    for (int group = 0; group < 2; group++) put_scale(block[192 + 2 * tile + group], row, group, to.scales);
  }

  template <class V, int G>
  static typename V::B granule(const uint8_t* plane, int lane) {
    return V::bor(nibbles<V, G>(plane, lane), pairs<V, G, 4>(plane + 256, lane));
  }
};

}  // namespace
}  // namespace nomoat
