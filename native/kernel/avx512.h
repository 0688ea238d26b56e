#pragma once
// AVX-512 with VNNI and BF16, for the levels with and without tiles.

#include <immintrin.h>

#include "kernel/level.h"

namespace nomoat {

namespace {

struct Avx512 {
  static constexpr int W = 16, kIntRows = 8, kGemmRows = 8, kGemmVectors = 3, kOuterRows = 8;
  static constexpr bool kHasWords = false, kBf16Dots = true;
  // Up to two rows pass over a strip once, and Zen 4's own prefetches do best: one row on one core gets 29 to 34 x 10^9 bytes/s
  // of weights from memory, 24 to 32 with 32 KB fetched ahead, 15 to 33 with 1 to 8 KB (reading alone: 32). 4 and 16 streams lose
  // 8 and 15 % without.
  static constexpr int kFetchRows = 3;
  using F = __m512;
  using I = __m512i;
  using B = __m512i;
  using Pairs = __m512i;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F set1(float x) { return _mm512_set1_ps(x); }
  static F zero() { return _mm512_setzero_ps(); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F round(F a) { return _mm512_roundscale_ps(a, 0); }
  static float sum(F a) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static float max_of(F a) { return _mm512_reduce_max_ps(a); }
  static F scale_by_power(F p, F n) { return _mm512_scalef_ps(p, n); }

  static F from_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F from_bf16(const bf16* p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  static void store_bf16(bf16* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), __m256i(_mm512_cvtneps_pbh(x))); }
  static F from_u8(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static F from_s8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void store_s8(int8_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
  }

  static I iset1(int x) { return _mm512_set1_epi32(x); }
  static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
  static I add_digit(I low, I high) { return _mm512_add_epi32(low, _mm512_slli_epi32(high, 7)); }
  static F from_i32(I x) { return _mm512_cvtepi32_ps(x); }
  static B bytes(const void* p) { return _mm512_loadu_si512(p); }
  static void store_bytes(void* p, B x) { _mm512_storeu_si512(p, x); }
  static B band(B x, uint8_t mask) { return _mm512_and_si512(x, _mm512_set1_epi8(char(mask))); }
  static B bor(B a, B b) { return _mm512_or_si512(a, b); }
  static B look_up(const uint8_t* table, B x) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), x);
  }
  template <int N>
  static B shr(B x) {
    return _mm512_srli_epi16(x, N);
  }
  template <int N>
  static B shl(B x) {
    return _mm512_slli_epi16(x, N);
  }
  static I broadcast(const void* p) {
    int four;
    std::memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  static constexpr int kWideZero = 0;
  template <int Top>
  static constexpr int run() {
    return 8;
  }
  template <int Top>
  static I dot(I sum, B w, const int8_t* x) {
    return _mm512_dpbusd_epi32(sum, w, broadcast(x));
  }
  static I widen(I sum) { return sum; }
  template <int N>
  static F byte_to_f(B w) {
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(w, 8 * N), _mm512_set1_epi32(255)));
  }

  static Pairs pairs(const bf16* p) { return bytes(p); }
  static void split_pairs(Pairs p, F& even, F& odd) {
    even = _mm512_castsi512_ps(_mm512_slli_epi32(p, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(p, _mm512_set1_epi32(int(0xffff0000))));
  }
  static Pairs pair_bf16(F even, F odd) {
    const __m512i low = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(even))),
                  high = _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(odd)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  // The values of two rows, pair by pair.
  template <int N>
  static void pair_up(const bf16* even, const bf16* odd, Pairs (&to)[N]) {
    const __m512i first = _mm512_setr_epi32(0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006, 0x270007,
                                            0x280008, 0x290009, 0x2a000a, 0x2b000b, 0x2c000c, 0x2d000d, 0x2e000e, 0x2f000f);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(0x100010));
    for (int n = 0; n + 2 <= N; n += 2) {
      const __m512i a = bytes(even + n * W), b = bytes(odd + n * W);
      to[n] = _mm512_permutex2var_epi16(a, first, b);
      to[n + 1] = _mm512_permutex2var_epi16(a, second, b);
    }
    if constexpr (N % 2) {
      auto half = [](const bf16* x) {
        return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + (N - 1) * W)));
      };
      to[N - 1] = _mm512_permutex2var_epi16(half(even), first, half(odd));
    }
  }
  static F dot_bf16(F acc, Pairs b, const bf16* a) { return _mm512_dpbf16_ps(acc, __m512bh(b), __m512bh(broadcast(a))); }

  static void transpose(const float* src, int stride, float* dst, int dst_stride) {
    F t[16], s[16];
    for (int i = 0; i < 16; i++) t[i] = load(src + i * stride);
    for (int i = 0; i < 16; i += 4) {
      const F a = _mm512_unpacklo_ps(t[i], t[i + 1]), b = _mm512_unpackhi_ps(t[i], t[i + 1]);
      const F c = _mm512_unpacklo_ps(t[i + 2], t[i + 3]), d = _mm512_unpackhi_ps(t[i + 2], t[i + 3]);
      s[i] = _mm512_shuffle_ps(a, c, 0x44);
      s[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
      s[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
      s[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
    for (int j = 0; j < 4; j++) {  // s[4i + j], 128-bit lane l: rows 4i .. 4i+3 of column 4l + j
      const F a = _mm512_shuffle_f32x4(s[j], s[4 + j], 0x88), b = _mm512_shuffle_f32x4(s[j], s[4 + j], 0xdd);
      const F c = _mm512_shuffle_f32x4(s[8 + j], s[12 + j], 0x88), d = _mm512_shuffle_f32x4(s[8 + j], s[12 + j], 0xdd);
      store(dst + j * dst_stride, _mm512_shuffle_f32x4(a, c, 0x88));
      store(dst + (4 + j) * dst_stride, _mm512_shuffle_f32x4(b, d, 0x88));
      store(dst + (8 + j) * dst_stride, _mm512_shuffle_f32x4(a, c, 0xdd));
      store(dst + (12 + j) * dst_stride, _mm512_shuffle_f32x4(b, d, 0xdd));
    }
  }
};

}  // namespace

}  // namespace nomoat
