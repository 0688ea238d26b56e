#include <stdexcept>
#include <string>

#include "base/threads.h"
#include "quant/all.h"
#include "quant/search.h"

// One encoder a format: it fits scales by quant/search.h and puts codes where the format's own header says they lie.

namespace nomoat {
namespace {

struct Iq4Values {
  static constexpr int sorted[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  static constexpr uint8_t index[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};
struct Fp4Values {
  static constexpr int sorted[15] = {-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12};
  static constexpr uint8_t index[15] = {15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7};
};

void put_half(uint8_t* out, uint16_t half) { std::memcpy(out, &half, 2); }

// 16 bytes: columns 0 .. 15 low, 16 .. 31 high.
void put_nibbles(const uint8_t* codes, uint8_t* out) {
  for (int j = 0; j < 16; j++) out[j] = uint8_t((codes[j] & 15) | (codes[16 + j] & 15) << 4);
}

void put_fifth_bits(const uint8_t* codes, uint8_t* out) {
  for (int j = 0; j < 32; j++) out[j / 8] = uint8_t(out[j / 8] | (codes[j] >> 4) << (j % 8));
}

template <class Code>
void choose(const float* x, float scale, float min, uint8_t* codes) {
  for (int i = 0; i < 32; i += 4) {
    const F4 code = Code::nearest((load(x + i) - splat(min)) * splat(inverse(scale)));
    for (int j = 0; j < 4; j++) codes[i + j] = Code::index(code[j]);
  }
}

template <class Code>
void scaled(const float* x, uint8_t* out, uint8_t* codes) {
  float w[32];
  importance<32>(x, w);
  const uint16_t d = float_to_half(fit_scale<Code, 32>(x, w));
  put_half(out, d);
  choose<Code>(x, half_to_float(d), 0, codes);
}

template <int High>
void lined(const float* x, uint8_t* out, uint8_t* codes) {
  float w[32];
  importance<32>(x, w);
  const Line line = fit_line<High, 32, true>(x, w);
  const uint16_t d = float_to_half(line.scale), min = float_to_half(line.min);
  put_half(out, d);
  put_half(out + 2, min);
  choose<Whole<0, High>>(x, half_to_float(d), half_to_float(min), codes);
}

void encode_block(Q4_0, const float* x, uint8_t* out) {
  uint8_t codes[32];
  scaled<Whole<-8, 7>>(x, out, codes);
  put_nibbles(codes, out + 2);
}

void encode_block(IQ4_NL, const float* x, uint8_t* out) {
  uint8_t codes[32];
  scaled<Listed<Iq4Values>>(x, out, codes);
  put_nibbles(codes, out + 2);
}

void encode_block(Q5_0, const float* x, uint8_t* out) {
  uint8_t codes[32];
  scaled<Whole<-16, 15>>(x, out, codes);
  put_fifth_bits(codes, out + 2);
  put_nibbles(codes, out + 6);
}

void encode_block(Q4_1, const float* x, uint8_t* out) {
  uint8_t codes[32];
  lined<15>(x, out, codes);
  put_nibbles(codes, out + 4);
}

void encode_block(Q5_1, const float* x, uint8_t* out) {
  uint8_t codes[32];
  lined<31>(x, out, codes);
  put_fifth_bits(codes, out + 4);
  put_nibbles(codes, out + 8);
}

// By the largest magnitude alone, halves away from zero: at 8 bits a search gains nothing, and these are the bytes of gguf.
void encode_block(Q8_0, const float* x, uint8_t* out) {
  float most = 0;
  for (int i = 0; i < 32; i++) most = magnitude(x[i]) > most ? magnitude(x[i]) : most;
  const float d = most / 127, by = d != 0 ? 1 / d : 0;
  put_half(out, float_to_half(d));
  for (int i = 0; i < 32; i++) {
    const float scaled = magnitude(x[i] * by), floor = float(int(scaled));
    const int code = int(floor + float(int(2 * (scaled - floor))));
    out[2 + i] = uint8_t(x[i] < 0 ? -code : code);
  }
}

// The scale is a power of two: the best of those around the largest magnitude.
void encode_block(MXFP4, const float* x, uint8_t* out) {
  using Code = Listed<Fp4Values>;
  float w[32], most = 0, least = 0;
  importance<32>(x, w);
  for (int i = 0; i < 32; i++) most = magnitude(x[i]) > most ? magnitude(x[i]) : most;
  const int exponent = int(float_to_bits(most) >> 23);  // biased; 2^(exponent - 127) <= most
  int best = 0;
  for (int e = exponent - 3, first = 1; e <= exponent; e++) {
    if (e < 2 || e > 254) continue;  // below 2 the power is subnormal, and so is the weight
    const float found = error<Code, 32>(x, w, bits_to_float(uint32_t(e - 1) << 23), 0);
    if (first || found < least) least = found, best = e, first = 0;
  }
  out[0] = uint8_t(best);
  uint8_t codes[32];
  choose<Code>(x, best ? bits_to_float(uint32_t(best - 1) << 23) : 0, 0, codes);
  put_nibbles(codes, out + 1);
}

// Pairs of bits as Q2_K and Q3_K have them: in each half of 128 columns, bits 2s of byte j hold column 32s + j.
void put_pairs(const uint8_t* codes, uint8_t* out) {
  for (int c = 0; c < 256; c++) {
    uint8_t& byte = out[32 * (c / 128) + c % 32];
    byte = uint8_t(byte | (codes[c] & 3) << (2 * (c / 32 % 4)));
  }
}

// Bit t of byte j: bit `at` of column 32t + j.
void put_high_bits(const uint8_t* codes, int at, uint8_t* out) {
  for (int c = 0; c < 256; c++) out[c % 32] = uint8_t(out[c % 32] | ((codes[c] >> at) & 1) << (c / 32));
}

void put_k_nibbles(const uint8_t* codes, uint8_t* out) {
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 32; j++) out[32 * i + j] = uint8_t((codes[64 * i + j] & 15) | (codes[64 * i + 32 + j] & 15) << 4);
}

template <class Block>
void put_six_bits(const Block& b, uint8_t* out) {
  put_half(out, b.d);
  put_half(out + 2, b.dmin);
  for (int g = 0; g < 4; g++) {
    out[4 + g] = uint8_t(b.scale[g] | (b.scale[4 + g] >> 4) << 6);
    out[8 + g] = uint8_t(b.min[g] | (b.min[4 + g] >> 4) << 6);
    out[12 + g] = uint8_t((b.scale[4 + g] & 15) | (b.min[4 + g] & 15) << 4);
  }
}

void encode_block(Q2_K, const float* x, uint8_t* out) {
  Superblock<Whole<0, 3>, 16> b;
  b.fit_with_min(x, 15);
  for (int g = 0; g < 16; g++) out[g] = uint8_t(b.scale[g] | b.min[g] << 4);
  put_pairs(b.codes, out + 16);
  put_half(out + 80, b.d);
  put_half(out + 82, b.dmin);
}

void encode_block(Q3_K, const float* x, uint8_t* out) {
  Superblock<Whole<-4, 3>, 16> b;
  b.fit(x, -32, 31);
  put_high_bits(b.codes, 2, out);
  put_pairs(b.codes, out + 32);
  for (int g = 0; g < 16; g++) {
    const int six = b.scale[g] + 32;
    out[96 + g % 8] = uint8_t(out[96 + g % 8] | (six & 15) << (4 * (g / 8)));
    out[104 + g % 4] = uint8_t(out[104 + g % 4] | (six >> 4) << (2 * (g / 4)));
  }
  put_half(out + 108, b.d);
}

void encode_block(Q4_K, const float* x, uint8_t* out) {
  Superblock<Whole<0, 15>, 32> b;
  b.fit_with_min(x, 63);
  put_six_bits(b, out);
  put_k_nibbles(b.codes, out + 16);
}

void encode_block(Q5_K, const float* x, uint8_t* out) {
  Superblock<Whole<0, 31>, 32> b;
  b.fit_with_min(x, 63);
  put_six_bits(b, out);
  put_high_bits(b.codes, 4, out + 16);
  put_k_nibbles(b.codes, out + 48);
}

void encode_block(Q6_K, const float* x, uint8_t* out) {
  Superblock<Whole<-32, 31>, 16> b;
  b.fit(x, -128, 127);
  for (int c = 0; c < 256; c++) {
    const int half = c / 128, s = c / 32 % 4, j = c % 32;
    uint8_t &low = out[64 * half + 32 * (s % 2) + j], &top = out[128 + 32 * half + j];
    low = uint8_t(low | (b.codes[c] & 15) << (s < 2 ? 0 : 4));
    top = uint8_t(top | (b.codes[c] >> 4) << (2 * s));
  }
  for (int g = 0; g < 16; g++) out[192 + g] = uint8_t(b.scale[g]);
  put_half(out + 208, b.d);
}

void encode_block(IQ4_XS, const float* x, uint8_t* out) {
  Superblock<Listed<Iq4Values>, 32> b;
  b.fit(x, -32, 31);
  put_half(out, b.d);
  for (int t = 0; t < 8; t++) {
    const int six = b.scale[t] + 32;
    out[2 + t / 4] = uint8_t(out[2 + t / 4] | (six >> 4) << (2 * (t % 4)));
    out[4 + t / 2] = uint8_t(out[4 + t / 2] | (six & 15) << (4 * (t % 2)));
    put_nibbles(b.codes + 32 * t, out + 8 + 16 * t);
  }
}

void encode_block(F32, const float* x, uint8_t* out) { std::memcpy(out, x, 4); }
void encode_block(F16, const float* x, uint8_t* out) { put_half(out, float_to_half(*x)); }
void encode_block(BF16, const float* x, uint8_t* out) { put_half(out, float_to_bf16(*x)); }

}  // namespace

void encode_rows(Format format, const float* x, int rows, int cols, uint8_t* out) {
  const bool known = with_format(format, [&](auto q) {
    const int64_t blocks = int64_t(rows) * (cols / q.block_cols);
    const int tasks = rows < 64 ? rows : 64;
    parallel_for(tasks, [&](int task, int) {
      for (int64_t i = blocks * task / tasks; i < blocks * (task + 1) / tasks; i++) {
        std::memset(out + i * q.block_bytes, 0, q.block_bytes);
        encode_block(q, x + i * q.block_cols, out + i * q.block_bytes);
      }
    });
  });
  if (!known) throw std::invalid_argument("weight format " + std::to_string(int(format)) + " is not supported");
}

}  // namespace nomoat
