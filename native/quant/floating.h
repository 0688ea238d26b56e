#pragma once
// F32, F16, BF16: a plane is [32 columns][16 rows] of elements, without scales.

#include <cstring>

#include "quant/format.h"
#include "quant/planes.h"

namespace nomoat {
namespace {

template <Format F, int Bytes>
struct Floating {
  static constexpr Format id = F;
  static constexpr bool integer = false;
  static constexpr int block_cols = 1, block_bytes = Bytes, plane_bytes = 16 * 32 * Bytes, scale_bytes = 0, shared_bytes = 0;

  static void pack_tile(const uint8_t* row_bytes, int tile, int columns, int row, uint8_t* plane) {
    for (int c = 0; c < columns; c++) std::memcpy(plane + Bytes * (16 * c + row), row_bytes + Bytes * (32 * tile + c), Bytes);
  }

  template <class V>
  static typename V::F column(const uint8_t* plane, int column, int lane) {
    const uint8_t* at = plane + Bytes * (16 * column + lane);
    if constexpr (F == Format::F32)
      return V::load(reinterpret_cast<const float*>(at));
    else if constexpr (F == Format::F16)
      return V::from_f16(reinterpret_cast<const uint16_t*>(at));
    else
      return V::from_bf16(reinterpret_cast<const uint16_t*>(at));
  }
};

using F32 = Floating<Format::F32, 4>;
using F16 = Floating<Format::F16, 2>;
using BF16 = Floating<Format::BF16, 2>;

}  // namespace
}  // namespace nomoat
