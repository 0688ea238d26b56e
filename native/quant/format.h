#pragma once
// Packed weights: the one copy that serves decode, prefill, backward and single-row reads.
//
// A matrix W[rows, cols] is cut into strips of 16 output rows, a strip into the blocks of its format, a block into tiles of 32
// columns. A tile is a plane of codes and, behind it, its scales; what the tiles of a block share stands in front of them. So
// memory is read in one sequence, and every load of a loop over tiles has one stride, which is what hardware prefetches best.
// Inside a plane a vector's 32-bit lane is a row and its four bytes are four neighbouring columns (a "granule"), so an integer
// dot needs no shuffle at any vector width:
//
//   byte 64 * g + 4 * row + b   holds column 4 * g + b in its low nibble and column 16 + 4 * g + b in its high nibble
//
// Rows are padded to 16 and columns to 32 with zeros.

#include <cstddef>
#include <cstdint>

namespace nomoat {

// Values are the type ids of the GGUF specification.
enum class Format : int {
  F32 = 0,
  F16 = 1,
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q2_K = 10,
  Q3_K = 11,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  IQ4_NL = 20,
  IQ4_XS = 23,
  BF16 = 30,
  MXFP4 = 39
};

constexpr int kStripRows = 16;
constexpr int kTileCols = 32;

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// A view of packed weights; whoever made it keeps the memory alive.
struct Matrix {
  Format format = Format::F32;
  int rows = 0, cols = 0;
  const uint8_t* data = nullptr;
  size_t strip_bytes = 0;

  int strips() const { return (rows + kStripRows - 1) / kStripRows; }
  int tiles() const { return (cols + kTileCols - 1) / kTileCols; }
  bool floating() const { return format == Format::F32 || format == Format::F16 || format == Format::BF16; }
  const uint8_t* strip(int index) const { return data + size_t(index) * strip_bytes; }
};

// A tile of a strip: its plane, its scales, and what it shares with its block, in which it is tile `index`.
template <class Byte>
struct TileAt {
  Byte *plane, *scales, *shared;
  int index;
};
using Tile = TileAt<const uint8_t>;

// Tiles of a block, and its bytes. Q: a format, see quant/all.h.
template <class Q>
constexpr int kBlockTiles = Q::block_cols < kTileCols ? 1 : Q::block_cols / kTileCols;
template <class Q>
constexpr size_t kPackedBytes = Q::shared_bytes + size_t(kBlockTiles<Q>) * (Q::plane_bytes + Q::scale_bytes);

template <class Q, class Byte>
inline TileAt<Byte> tile_of(Byte* strip, int tile) {
  constexpr size_t bytes = Q::plane_bytes + Q::scale_bytes;
  Byte* shared = strip + size_t(tile / kBlockTiles<Q>) * kPackedBytes<Q>;
  const int index = tile % kBlockTiles<Q>;
  Byte* plane = shared + Q::shared_bytes + size_t(index) * bytes;
  return {plane, plane + Q::plane_bytes, shared, index};
}

// One row of GGUF bytes; 0 when the format is unknown.
size_t gguf_row_bytes(Format format, int cols);

// Geometry of the packed form, data left null. Throws std::invalid_argument for an unknown format or bad dimensions.
Matrix packed_matrix(Format format, int rows, int cols);
size_t packed_bytes(const Matrix& matrix);

// Packs strips [first, last) of a row-major GGUF tensor into `packed` (the address of strip 0).
void pack_strips(const Matrix& matrix, const uint8_t* gguf, int first, int last, uint8_t* packed);

// All strips, on all threads.
void pack_matrix(const Matrix& matrix, const uint8_t* gguf, uint8_t* packed);

// Encodes rows[cols] that follow each other, all finite, as GGUF bytes: quant/encode.cc. The same bytes for any number of
// threads. Throws std::invalid_argument for an unknown format.
void encode_rows(Format format, const float* x, int rows, int cols, uint8_t* out);

// A 64-bit checksum that runs at memory speed: detects damage, not malice.
uint64_t checksum(const uint8_t* data, size_t bytes);

}  // namespace nomoat
