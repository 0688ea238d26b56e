// The specification: one lane, plain C++. Every other level is tested against this one.

#include "kernel/level.h"

namespace nomoat {

namespace {

struct Scalar {
  static constexpr int W = 1, kIntRows = 4, kGemmRows = 4, kGemmVectors = 4, kOuterRows = 8;
  static constexpr bool kHasWords = false, kBf16Dots = true;  // the specification of the levels that have them
  static constexpr int kFetchRows = 1;
  using F = float;
  using I = int32_t;
  using B = uint32_t;      // four codes of one row
  using Pairs = uint32_t;  // two bf16

  static F load(const float* p) { return *p; }
  static void store(float* p, F x) { *p = x; }
  static F set1(float x) { return x; }
  static F zero() { return 0; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return fmaf(a, b, c); }
  static F max(F a, F b) { return a > b ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F abs(F a) { return fabsf(a); }
  static F round(F a) { return nearbyintf(a); }
  static float sum(F a) { return a; }
  static float max_of(F a) { return a; }
  static F scale_by_power(F p, F n) { return ldexpf(p, int(n)); }

  static F from_f16(const uint16_t* p) { return half_to_float(*p); }
  static F from_bf16(const bf16* p) { return bf16_to_float(*p); }
  static void store_bf16(bf16* p, F x) { *p = float_to_bf16(x); }
  static F from_u8(const uint8_t* p) { return *p; }
  static F from_s8(const int8_t* p) { return *p; }
  static void store_s8(int8_t* p, F x) { *p = int8_t(nearbyintf(x)); }

  static I iset1(int x) { return x; }
  static I iadd(I a, I b) { return a + b; }
  static I add_digit(I low, I high) { return low + high * 128; }
  static F from_i32(I x) { return float(x); }
  static B bytes(const void* p) {
    B x;
    std::memcpy(&x, p, 4);
    return x;
  }
  static void store_bytes(void* p, B x) { std::memcpy(p, &x, 4); }
  static B band(B x, uint8_t mask) { return x & (mask * 0x01010101u); }
  static B bor(B a, B b) { return a | b; }
  static B look_up(const uint8_t* table, B x) {
    return table[x & 15] | table[(x >> 8) & 15] << 8 | table[(x >> 16) & 15] << 16 | uint32_t(table[(x >> 24) & 15]) << 24;
  }
  template <int N>
  static B shr(B x) {
    return x >> N;
  }
  template <int N>
  static B shl(B x) {
    return x << N;
  }
  static constexpr int kWideZero = 0;
  template <int Top>
  static constexpr int run() {
    return 8;
  }
  template <int Top>
  static I dot(I sum, B w, const int8_t* x) {
    for (int i = 0; i < 4; i++) sum += int((w >> (8 * i)) & 255) * x[i];
    return sum;
  }
  static I widen(I sum) { return sum; }
  template <int N>
  static F byte_to_f(B w) {
    return float((w >> (8 * N)) & 255);
  }

  static Pairs pairs(const bf16* p) { return bytes(p); }
  static void split_pairs(Pairs p, F& even, F& odd) {
    even = bits_to_float(p << 16);
    odd = bits_to_float(p & 0xffff0000u);
  }
  static Pairs pair_bf16(F even, F odd) { return uint32_t(float_to_bf16(even)) | uint32_t(float_to_bf16(odd)) << 16; }
  template <int N>
  static void pair_up(const bf16* even, const bf16* odd, Pairs (&to)[N]) {
    for (int n = 0; n < N; n++) to[n] = uint32_t(even[n]) | uint32_t(odd[n]) << 16;
  }
  static F dot_bf16(F acc, Pairs b, const bf16* a) {
    F even, odd;
    split_pairs(b, even, odd);
    return fmaf(odd, bf16_to_float(a[1]), fmaf(even, bf16_to_float(a[0]), acc));
  }
  static void transpose(const float* src, int, float* dst, int) { *dst = *src; }
};

constexpr Kernels kTable = make_kernels<Scalar>(Level::scalar);

}  // namespace

const Kernels* scalar_kernels() { return &kTable; }

}  // namespace nomoat
