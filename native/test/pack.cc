// Packed weights: the bytes of a strip, its padding, ranges of strips, bad arguments, the checksum.

#include <algorithm>
#include <cmath>
#include <utility>

#include "quant/format.h"
#include "quant/half.h"
#include "test/test.h"

namespace nomoat {

namespace {

// Ragged rows; columns that end inside a tile where the format allows it.
int ragged_cols(Format format) { return is_float(format) ? 77 : block_of(format) == 32 ? 96 : 512; }

TEST("pack: every format decodes to its definition, bit for bit, and pads with zeros") {
  for_levels([](const Kernels& k) {
    for (Format format : kFormats) {
      const int cols = ragged_cols(format);
      const Weights w = random_weights(format, 37, cols, 3);
      Floats row(size_t(w.matrix.tiles()) * 32, 7.0f);
      for (int r = 0; r < w.matrix.strips() * kStripRows; r++) {
        k.read_row(w.matrix, r, row.data());
        for (int c = 0; c < int(row.size()); c++)
          CHECK(row[size_t(c)] == w.at(r, c), "format %d, [%d, %d]: %g, expected %g", int(format), r, c, double(row[size_t(c)]),
                double(w.at(r, c)));
      }
    }
  });
}

TEST("pack: MXFP4 decodes with every scale, from subnormal to infinite") {
  Weights w = random_weights(Format::MXFP4, 256, 32, 9);
  std::vector<int> before(256);
  for (int row = 0; row < 256; row++) before[size_t(row)] = std::exchange(w.gguf[size_t(17 * row)], uint8_t(row));
  pack_strips(w.matrix, w.gguf.data(), 0, w.matrix.strips(), w.packed.data());
  for_levels([&](const Kernels& k) {
    Floats found(32);
    for (int row = 0; row < 256; row++) {
      k.read_row(w.matrix, row, found.data());
      for (int c = 0; c < 32; c++) {
        const float expected = std::ldexp(w.at(row, c), row - before[size_t(row)]);
        CHECK(found[size_t(c)] == expected, "[%d, %d]: %g, expected %g", row, c, double(found[size_t(c)]), double(expected));
      }
    }
  });
}

TEST("pack: ranges of strips give the bytes of the whole") {
  for (Format format : kFormats) {
    const Weights w = random_weights(format, 50, ragged_cols(format), 4);
    std::vector<uint8_t> parts(w.packed.size(), 0xee);
    for (int strip : {2, 0, 3, 1}) pack_strips(w.matrix, w.gguf.data(), strip, strip + 1, parts.data());
    CHECK(parts == w.packed, "format %d: strips packed one by one differ", int(format));
  }
}

TEST("pack: bytes of a Q4_1 strip stand where format.h says") {
  const Weights w = random_weights(Format::Q4_1, 21, 64, 5);
  const uint8_t* strip = w.matrix.strip(1);  // rows 16 .. 20
  CHECK(w.matrix.strip_bytes == 2 * (256 + 64), "strip of %zu bytes", w.matrix.strip_bytes);
  for (int row = 0; row < 16; row++)
    for (int tile = 0; tile < 2; tile++) {
      const uint8_t* block = w.gguf.data() + (size_t(16 + row) * 2 + size_t(tile)) * 20;
      const bool real = 16 + row < 21;
      for (int i = 0; i < 16; i++) {
        const uint8_t found = strip[320 * tile + 64 * (i / 4) + 4 * row + i % 4];
        CHECK(found == (real ? block[4 + i] : 0), "row %d, tile %d, byte %d: 0x%02x", row, tile, i, unsigned(found));
      }
      const uint8_t* scales = strip + 320 * tile + 256;
      for (int part = 0; part < 2; part++)  // scale, then min
        for (int byte = 0; byte < 2; byte++)
          CHECK(scales[32 * part + 2 * row + byte] == (real ? block[2 * part + byte] : 0), "row %d, tile %d: scales", row, tile);
    }
}

TEST("pack: bytes of a Q8_0 and of an F16 strip") {
  const Weights q = random_weights(Format::Q8_0, 16, 32, 6);
  for (int row = 0; row < 16; row++)
    for (int c = 0; c < 32; c++)
      CHECK(q.packed[size_t(64 * (c / 4) + 4 * row + c % 4)] == (q.gguf[size_t(34 * row + 2 + c)] ^ 0x80), "[%d, %d]", row, c);
  const Weights f = random_weights(Format::F16, 16, 32, 7);
  CHECK(f.matrix.strip_bytes == 16 * 32 * 2, "an F16 strip has no scales: %zu bytes", f.matrix.strip_bytes);
  for (int row = 0; row < 16; row++)
    for (int c = 0; c < 32; c++)
      CHECK(same_bits(&f.packed[size_t(2 * (16 * c + row))], &f.gguf[size_t(2 * (32 * row + c))], 2), "[%d, %d]", row, c);
}

TEST("pack: packed weights are within 5 % of the file, and strips are whole cache lines") {
  for (Format format : kFormats) {
    const Matrix m = packed_matrix(format, 1536, 512);
    const double file = double(gguf_row_bytes(format, 512)) * 1536;
    CHECK(double(packed_bytes(m)) <= 1.05 * file, "format %d: %zu bytes of %.0f", int(format), packed_bytes(m), file);
    CHECK(m.strip_bytes % 64 == 0, "format %d: strip of %zu bytes", int(format), m.strip_bytes);
  }
}

TEST("pack: unknown formats and bad dimensions are refused") {
  struct Bad {
    int format, rows, cols;
  };
  for (Bad bad : {Bad{99, 16, 32}, Bad{2, 16, 33}, Bad{12, 16, 128}, Bad{2, 0, 32}, Bad{2, 16, -32}, Bad{-1, 1, 1}}) {
    bool refused = false;
    try {
      packed_matrix(Format(bad.format), bad.rows, bad.cols);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused, "format %d, %d x %d was accepted", bad.format, bad.rows, bad.cols);
  }
  CHECK(gguf_row_bytes(Format(99), 32) == 0, "an unknown format has rows");
}

TEST("pack: the checksum sees every bit, length and order") {
  Random random(8);
  std::vector<uint8_t> data(1000);
  for (uint8_t& byte : data) byte = uint8_t(random());
  const uint64_t whole = checksum(data.data(), data.size());
  CHECK(checksum(data.data(), data.size()) == whole, "two readings differ");
  for (size_t i = 0; i < data.size(); i++)
    for (int bit = 0; bit < 8; bit++) {
      data[i] ^= uint8_t(1 << bit);
      CHECK(checksum(data.data(), data.size()) != whole, "byte %zu, bit %d is not seen", i, bit);
      data[i] ^= uint8_t(1 << bit);
    }
  for (size_t length = 0; length < data.size(); length++) CHECK(checksum(data.data(), length) != whole, "length %zu", length);
  std::swap_ranges(data.begin(), data.begin() + 64, data.begin() + 64);
  CHECK(checksum(data.data(), data.size()) != whole, "two blocks in another order are not seen");
}

}  // namespace

}  // namespace nomoat
