#include <stdexcept>
#include <string>

#include "base/threads.h"
#include "quant/all.h"

namespace nomoat {

size_t gguf_row_bytes(Format format, int cols) {
  size_t bytes = 0;
  with_format(format, [&](auto q) { bytes = size_t(cols / q.block_cols) * q.block_bytes; });
  return bytes;
}

Matrix packed_matrix(Format format, int rows, int cols) {
  Matrix m;
  m.format = format;
  m.rows = rows;
  m.cols = cols;
  if (rows <= 0 || cols <= 0)
    throw std::invalid_argument("matrix of " + std::to_string(rows) + " x " + std::to_string(cols) + ": both must be positive");
  const bool known = with_format(format, [&](auto q) {
    if (cols % q.block_cols)
      throw std::invalid_argument("row of " + std::to_string(cols) + " columns is not a multiple of the format's block of " +
                                  std::to_string(q.block_cols));
    using Q = decltype(q);
    m.strip_bytes = (size_t(m.tiles() / kBlockTiles<Q>) * kPackedBytes<Q> + 63) / 64 * 64;
  });
  if (!known) throw std::invalid_argument("weight format " + std::to_string(int(format)) + " is not supported");
  return m;
}

size_t packed_bytes(const Matrix& m) { return m.strip_bytes * size_t(m.strips()); }

void pack_strips(const Matrix& m, const uint8_t* gguf, int first, int last, uint8_t* packed) {
  const size_t row_bytes = gguf_row_bytes(m.format, m.cols);
  with_format(m.format, [&](auto q) {
    using Q = decltype(q);
    for (int s = first; s < last; s++) {
      uint8_t* strip = packed + size_t(s) * m.strip_bytes;
      std::memset(strip, 0, m.strip_bytes);
      for (int r = 0; r < kStripRows && s * kStripRows + r < m.rows; r++) {
        const uint8_t* row = gguf + size_t(s * kStripRows + r) * row_bytes;
        for (int t = 0; t < m.tiles(); t++) {
          const TileAt<uint8_t> tile = tile_of<Q>(strip, t);
          if constexpr (Q::integer)
            Q::pack(row + size_t(t / kBlockTiles<Q>) * Q::block_bytes, r, tile);
          else
            Q::pack_tile(row, t, m.cols - kTileCols * t < kTileCols ? m.cols - kTileCols * t : kTileCols, r, tile.plane);
        }
      }
    }
  });
}

void pack_matrix(const Matrix& m, const uint8_t* gguf, uint8_t* packed) {
  const int tasks = m.strips() < 64 ? m.strips() : 64;
  parallel_for(tasks, [&](int task, int) {
    pack_strips(m, gguf, int(int64_t(m.strips()) * task / tasks), int(int64_t(m.strips()) * (task + 1) / tasks), packed);
  });
}

uint64_t checksum(const uint8_t* data, size_t bytes) {
  constexpr uint64_t prime = 0x9e3779b97f4a7c15ull;
  uint64_t lanes[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  size_t i = 0;
  for (; i + 64 <= bytes; i += 64)
    for (int j = 0; j < 8; j++) {
      uint64_t word;
      std::memcpy(&word, data + i + 8 * size_t(j), 8);
      lanes[j] = (lanes[j] ^ word) * prime;
    }
  uint64_t sum = bytes;
  for (uint64_t lane : lanes) sum = (sum ^ lane ^ (lane >> 29)) * prime;
  for (; i < bytes; i++) sum = (sum ^ data[i]) * prime;
  return sum;
}

}  // namespace nomoat
