// quant/half.h over every fp16 and bf16 value, and the levels' bf16 conversions against it.

#include "quant/half.h"

#include <cmath>

#include "test/test.h"

namespace nomoat {

namespace {

bool is_nan16(uint32_t bits) { return (bits & 0x7fff) > 0x7c00; }

// IEEE 754 binary16 in words: sign, 5 bits of exponent with bias 15, 10 bits of fraction.
double half_by_definition(uint32_t bits) {
  const int exponent = int(bits >> 10 & 31), fraction = int(bits & 1023);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

TEST("half: every fp16 value reads exactly and comes back") {
  for (uint32_t bits = 0; bits < 65536; bits++) {
    const float value = half_to_float(uint16_t(bits));
    if (is_nan16(bits)) {
      CHECK(std::isnan(value) && is_nan16(float_to_half(value)), "0x%04x: NaN expected, found %g", bits, double(value));
      continue;
    }
    const double expected = half_by_definition(bits);
    CHECK(double(value) == expected && std::signbit(value) == std::signbit(expected), "0x%04x: %a, expected %a", bits,
          double(value), expected);
    CHECK(float_to_half(value) == bits, "0x%04x came back as 0x%04x", bits, unsigned(float_to_half(value)));
  }
}

TEST("half: fp16 rounds to the nearest, ties to even, also below the smallest normal number") {
  for (uint32_t bits = 0; bits < 0x7c00; bits++) {
    const float low = half_to_float(uint16_t(bits));
    const float high = bits == 0x7bff ? 65536.0f : half_to_float(uint16_t(bits + 1));  // above the largest: infinity
    const float middle = float((double(low) + double(high)) / 2);                      // exact in float32
    const uint32_t even = bits + (bits & 1);
    for (uint32_t sign : {0u, 0x8000u}) {
      const float s = sign ? -1 : 1;
      CHECK(float_to_half(s * middle) == (sign | even), "tie above 0x%04x: 0x%04x", bits, float_to_half(s * middle));
      CHECK(float_to_half(s * std::nextafter(middle, 0.0f)) == (sign | bits), "just below the tie above 0x%04x", bits);
      CHECK(float_to_half(s * std::nextafter(middle, INFINITY)) == (sign | (bits + 1)), "just above the tie above 0x%04x", bits);
    }
  }
  CHECK(float_to_half(1e30f) == 0x7c00 && float_to_half(-INFINITY) == 0xfc00, "large values become infinite");
}

TEST("half: every bf16 value reads exactly and comes back") {
  for (uint32_t bits = 0; bits < 65536; bits++) {
    const float value = bf16_to_float(uint16_t(bits));
    CHECK(float_to_bits(value) == bits << 16, "0x%04x reads as %a", bits, double(value));
    const uint16_t back = float_to_bf16(value);
    CHECK(std::isnan(value) ? std::isnan(bf16_to_float(back)) : back == bits, "0x%04x came back as 0x%04x", bits, unsigned(back));
  }
}

TEST("half: bf16 rounds to the nearest, ties to even; NaN stays NaN") {
  for (uint32_t bits = 0; bits < 0x7f80; bits++) {
    const uint32_t tie = bits << 16 | 0x8000;
    CHECK(float_to_bf16(bits_to_float(tie)) == bits + (bits & 1), "tie above 0x%04x", bits);
    CHECK(float_to_bf16(bits_to_float(tie - 1)) == bits, "below the tie above 0x%04x", bits);
    CHECK(float_to_bf16(bits_to_float(tie + 1)) == bits + 1, "above the tie above 0x%04x", bits);
  }
  for (uint32_t bits : {0x7f800001u, 0x7fbfffffu, 0x7fffffffu, 0xff800001u, 0xffffffffu})
    CHECK(std::isnan(bf16_to_float(float_to_bf16(bits_to_float(bits)))), "NaN 0x%08x became a number", bits);
}

TEST("half: every level converts to bf16 and back like half.h") {
  for_levels([](const Kernels& k) {
    std::vector<bf16> all(65536), back(65536);
    Floats wide(65536);
    for (uint32_t i = 0; i < 65536; i++) all[i] = bf16(i);
    k.to_f32(all.data(), 65536, wide.data());
    for (uint32_t i = 0; i < 65536; i++) CHECK(float_to_bits(wide[i]) == i << 16, "0x%04x reads as %a", i, double(wide[i]));
    k.to_bf16(wide.data(), 65536, back.data());
    for (uint32_t i = 0; i < 65536; i++) {
      // AVX-512's conversion takes subnormal numbers for zero
      const bool tiny = (i & 0x7f80) == 0;
      CHECK(std::isnan(wide[i]) ? std::isnan(bf16_to_float(back[i])) : back[i] == i || (tiny && back[i] == (i & 0x8000)),
            "0x%04x came back as 0x%04x", i, unsigned(back[i]));
    }
    Random random(1);
    for (uint32_t i = 0; i < 65536; i++) wide[i] = bits_to_float(uint32_t(random()) % 0x7f000000u + 0x00800000u);
    for (uint32_t i = 0; i < 65536; i += 4) wide[i] = bits_to_float((float_to_bits(wide[i]) & 0xffff0000u) | 0x8000);  // ties
    k.to_bf16(wide.data(), 65536, back.data());
    for (uint32_t i = 0; i < 65536; i++)
      CHECK(back[i] == float_to_bf16(wide[i]), "%a became 0x%04x", double(wide[i]), unsigned(back[i]));
  });
}

}  // namespace

}  // namespace nomoat
