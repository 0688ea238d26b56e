#pragma once
// IQ4_NL, 18 bytes for 32 columns: 0 fp16 d | 2 nibbles[16].  w = d * value[q]
//
// The values are finer around zero, where most weights lie; they come out of the table as value + 128, like the codes of Q8_0.
// Packed, 32 columns take 16 + 2 bytes, those of the file.

#include "quant/format.h"
#include "quant/planes.h"

namespace nomoat {
namespace {

struct IQ4_NL : HalfScales<32> {
  static constexpr Format id = Format::IQ4_NL;
  static constexpr bool integer = true, has_min = false;
  static constexpr int block_cols = 32, block_bytes = 18, plane_bytes = 256;
  static constexpr int zero = 128, top = 255, groups = 1;
  static constexpr uint8_t codes[16] = {128 - 127, 128 - 104, 128 - 83, 128 - 65, 128 - 49, 128 - 35, 128 - 22, 128 - 10,
                                        128 + 1,   128 + 13,  128 + 25, 128 + 38, 128 + 53, 128 + 69, 128 + 89, 128 + 113};

  static void pack(const uint8_t* block, int row, const TileAt<uint8_t>& to) {
    uint8_t indexes[32];
    split_nibbles(block + 2, indexes);
    pack_nibbles(indexes, row, to.plane);
    copy_half(block, row, to.scales);
  }

  template <class V, int G>
  static typename V::B granule(const uint8_t* plane, int lane) {
    return V::look_up(codes, nibbles<V, G>(plane, lane));
  }
};

}  // namespace
}  // namespace nomoat
