// Random GGUF rows in every format, and their values by the definition of the format, independent of native/quant.

#include <cmath>

#include "quant/half.h"
#include "test/test.h"

namespace nomoat {

namespace {

double half_at(const uint8_t* bytes) { return double(half_to_float(uint16_t(bytes[0] | bytes[1] << 8))); }
int nibble(const uint8_t* bytes, int index) { return (bytes[index / 2] >> (4 * (index % 2))) & 15; }
int bit(const uint8_t* bytes, int index) { return (bytes[index / 8] >> (index % 8)) & 1; }

// Blocks of 32: column c < 16 is the low nibble of byte c, column 16 + c its high nibble.
int code32(const uint8_t* nibbles, int column) { return nibble(nibbles, 2 * (column % 16) + column / 16); }

// Q4_K, Q5_K: six-bit scale and min of the eight runs of 32 columns in 12 bytes.
void six_bits(const uint8_t* packed, int run, int* scale, int* least) {
  if (run < 4) {
    *scale = packed[run] & 63;
    *least = packed[4 + run] & 63;
  } else {
    *scale = (packed[4 + run] & 15) | (packed[run - 4] >> 6) << 4;
    *least = (packed[4 + run] >> 4) | (packed[run] >> 6) << 4;
  }
}

// A weight is the sum of the two.
struct Value {
  double product, least = 0;
};

Value k_value(const uint8_t* b, int column, int code) {
  int scale, least;
  six_bits(b + 4, column / 32, &scale, &least);
  return {half_at(b) * scale * code, -half_at(b + 2) * least};
}

// Columns 64i .. 64i+31 are the low nibbles of 32 bytes, 64i+32 .. 64i+63 their high nibbles.
int code256(const uint8_t* nibbles, int column) {
  return nibble(nibbles + 32 * (column / 64), 2 * (column % 32) + column / 32 % 2);
}

// In each half of 128 columns, bits 2s of byte j are column 32s + j.
int pair256(const uint8_t* pairs, int column) {
  return (pairs[32 * (column / 128) + column % 32] >> (2 * (column % 128 / 32))) & 3;
}

// The 16 values of IQ4_NL and IQ4_XS, and those of MXFP4 (E2M1, doubled).
constexpr int kFine[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int kE2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Q3_K: sixteen six-bit scales, the low nibbles in 8 bytes, the top pairs in 4.
int q3_scale(const uint8_t* packed, int group) {
  const int low = group < 8 ? packed[group] & 15 : packed[group - 8] >> 4;
  return (low | ((packed[8 + group % 4] >> (group / 4 * 2)) & 3) << 4) - 32;
}

Value value_of(Format format, const uint8_t* b, int c) {
  float whole;
  switch (format) {
    case Format::F32:
      std::memcpy(&whole, b, 4);
      return {whole};
    case Format::F16:
      return {half_at(b)};
    case Format::BF16:
      return {bits_to_float(uint32_t(b[0] | b[1] << 8) << 16)};
    case Format::Q4_0:
      return {half_at(b) * (code32(b + 2, c) - 8)};
    case Format::Q4_1:
      return {half_at(b) * code32(b + 4, c), half_at(b + 2)};
    case Format::Q5_0:
      return {half_at(b) * ((code32(b + 6, c) | bit(b + 2, c) << 4) - 16)};
    case Format::Q5_1:
      return {half_at(b) * (code32(b + 8, c) | bit(b + 4, c) << 4), half_at(b + 2)};
    case Format::Q8_0:
      return {half_at(b) * int8_t(b[2 + c])};
    case Format::Q2_K:
      return {half_at(b + 80) * (b[c / 16] & 15) * pair256(b + 16, c), -half_at(b + 82) * (b[c / 16] >> 4)};
    case Format::Q3_K:
      return {half_at(b + 108) * q3_scale(b + 96, c / 16) * (pair256(b + 32, c) - (bit(b + c % 32, c / 32) ? 0 : 4))};
    case Format::IQ4_NL:
      return {half_at(b) * kFine[code32(b + 2, c)]};
    case Format::IQ4_XS: {
      const int run = c / 32, scale = nibble(b + 4, run) | (((b[2] | b[3] << 8) >> (2 * run)) & 3) << 4;
      return {half_at(b) * (scale - 32) * kFine[code32(b + 8 + 16 * run, c % 32)]};
    }
    case Format::MXFP4:
      return {std::ldexp(kE2M1[code32(b + 1, c)], b[0] - 128)};
    case Format::Q4_K:
      return k_value(b, c, code256(b + 16, c));
    case Format::Q5_K:
      return k_value(b, c, code256(b + 48, c) | bit(b + 16 + c % 32, c / 32) << 4);
    case Format::Q6_K: {
      const int half = c / 128, run = c % 128 / 32, j = c % 32;
      const int low = nibble(b + 64 * half, 2 * (32 * (run % 2) + j) + run / 2);
      const int top = (b[128 + 32 * half + j] >> (2 * run)) & 3;
      return {half_at(b + 208) * int8_t(b[192 + c / 16]) * ((low | top << 4) - 32)};
    }
  }
  return {0};
}

// Where a block's fp16 scales stand.
std::vector<int> scale_offsets(Format format) {
  switch (format) {
    case Format::F32:
    case Format::F16:
    case Format::BF16:
    case Format::MXFP4:
      return {};
    case Format::Q4_1:
    case Format::Q5_1:
    case Format::Q4_K:
    case Format::Q5_K:
      return {0, 2};
    case Format::Q2_K:
      return {80, 82};
    case Format::Q3_K:
      return {108};
    case Format::Q6_K:
      return {208};
    default:
      return {0};
  }
}

void put_half(Random& random, uint8_t* to) {
  const uint16_t bits = float_to_half(random.below(16) ? random.uniform(-0.02f, 0.02f) : random.uniform(-6e-5f, 6e-5f));
  to[0] = uint8_t(bits);
  to[1] = uint8_t(bits >> 8);
}

void put_float(Random& random, Format format, uint8_t* to) {
  const float value = random.uniform(-1, 1);
  const uint32_t bits = format == Format::F32   ? float_to_bits(value)
                        : format == Format::F16 ? float_to_half(value)
                                                : float_to_bf16(value);
  for (int i = 0; i < (format == Format::F32 ? 4 : 2); i++) to[i] = uint8_t(bits >> (8 * i));
}

}  // namespace

Weights random_weights(Format format, int rows, int cols, uint64_t seed) {
  Random random(seed);
  const size_t count = size_t(rows) * size_t(cols);
  Weights w{format, rows, cols, {}, {}, Floats(count), Floats(count), packed_matrix(format, rows, cols)};
  const size_t row_bytes = gguf_row_bytes(format, cols), blocks = size_t(cols / block_of(format)), bytes = row_bytes / blocks;
  w.gguf.resize(size_t(rows) * row_bytes);
  for (uint8_t& byte : w.gguf) byte = uint8_t(random());
  const std::vector<int> offsets = scale_offsets(format);
  for (size_t b = 0; b < size_t(rows) * blocks; b++) {
    uint8_t* block = w.gguf.data() + b * bytes;
    if (is_float(format)) put_float(random, format, block);
    for (int offset : offsets) put_half(random, block + offset);
    if (format == Format::MXFP4) block[0] = uint8_t(116 + random.below(8));
    for (int c = 0; c < block_of(format); c++) {
      const Value value = value_of(format, block, c);
      w.values[b * block_of(format) + c] = float(value.product + value.least);
      w.sizes[b * block_of(format) + c] = float(std::fabs(value.product) + std::fabs(value.least));
    }
  }
  w.packed.resize(packed_bytes(w.matrix));
  pack_strips(w.matrix, w.gguf.data(), 0, w.matrix.strips(), w.packed.data());
  w.matrix.data = w.packed.data();
  return w;
}

}  // namespace nomoat
