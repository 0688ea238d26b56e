#pragma once
// Eight lanes. Shared by the levels avx2 and avx2_vnni, which differ in the integer dot only; included inside their files.

#include <immintrin.h>

#include "kernel/level.h"

namespace nomoat {

namespace {

struct Avx2 {
  static constexpr int W = 8, kIntRows = 4, kGemmRows = 6, kGemmVectors = 2, kOuterRows = 4;
  static constexpr bool kBf16Dots = false;
  static constexpr int kFetchRows = 1;
#ifdef __AVXVNNI__
  static constexpr bool kHasWords = false;
#else
  static constexpr bool kHasWords = true;
#endif
  using F = __m256;
  using I = __m256i;
  using B = __m256i;
  using Pairs = __m256i;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F set1(float x) { return _mm256_set1_ps(x); }
  static F zero() { return _mm256_setzero_ps(); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F abs(F a) { return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static float sum(F a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static float max_of(F a) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  // vexp keeps n within [-126, 127], where 2^n is a normal number
  static F scale_by_power(F p, F n) {
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
  }

  static F from_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F from_bf16(const bf16* p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  // bits of bf16(x) in the low half of each lane: round to nearest even, NaN stays NaN
  static __m256i bf16_bits(F x) {
    const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd)), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  }
  static void store_bf16(bf16* p, F x) {
    const __m256i bits = bf16_bits(x);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  static F from_u8(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F from_s8(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void store_s8(int8_t* p, F x) {
    const __m256i whole = _mm256_cvtps_epi32(x);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
  }

  static I iset1(int x) { return _mm256_set1_epi32(x); }
  static I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
  static I add_digit(I low, I high) { return _mm256_add_epi32(low, _mm256_slli_epi32(high, 7)); }
  static F from_i32(I x) { return _mm256_cvtepi32_ps(x); }
  static B bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_bytes(void* p, B x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
  static B band(B x, uint8_t mask) { return _mm256_and_si256(x, _mm256_set1_epi8(char(mask))); }
  static B bor(B a, B b) { return _mm256_or_si256(a, b); }
  static B look_up(const uint8_t* table, B x) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), x);
  }
  template <int N>
  static B shr(B x) {
    return _mm256_srli_epi16(x, N);
  }
  template <int N>
  static B shl(B x) {
    return _mm256_slli_epi16(x, N);
  }
  static I broadcast(const void* p) {
    int four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
#ifdef __AVXVNNI__
  static constexpr int kWideZero = 0;
  template <int Top>
  static constexpr int run() {
    return 8;
  }
  template <int Top>
  static I dot(I sum, B w, const int8_t* x) {
    return _mm256_dpbusd_avx_epi32(sum, w, broadcast(x));
  }
  static I widen(I sum) { return sum; }
#else
  static constexpr int kWideZero = 128;
  // maddubs adds two products in 16 bits and saturates: codes up to 63 are safe (2 * 63 * 127 = 16002), and run() granules of
  // them add up before they are widened: 8 of codes up to 15, 4 up to 31, 2 up to 63. Codes up to 255 would saturate (2 * 255 *
  // 127 = 64770), |w - 128| does not (2 * 128 * 127 = 32512): x takes the sign.
  template <int Top>
  static constexpr int run() {
    return Top <= 15 ? 8 : Top <= 31 ? 4 : Top <= 63 ? 2 : 1;
  }
  template <int Top>
  static I dot(I sum, B w, const int8_t* x) {
    sum = _mm256_add_epi16(sum, twos<Top>(w, broadcast(x)));
    // GCC would add products in another order, keep all of them for it and spill: 1.3 to 1.5 times slower.
    __asm__("" : "+x"(sum));
    return sum;
  }
  static I widen(I sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
  template <int Top>
  static __m256i twos(B w, B x) {
    if constexpr (Top <= 63) return _mm256_maddubs_epi16(w, x);
    const __m256i value = _mm256_xor_si256(w, _mm256_set1_epi8(char(128)));
    return _mm256_maddubs_epi16(_mm256_abs_epi8(value), _mm256_sign_epi8(x, value));
  }
#endif
  // int16 activations in the order of store_words: bytes 0, 2 of a lane, then 1, 3.
  static I dot_words(I sum, B w, const int8_t* x) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_and_si256(w, _mm256_set1_epi16(255)), broadcast(x)));
    __asm__("" : "+x"(sum));  // as in dot
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_srli_epi16(w, 8), broadcast(x + 4)));
  }
  // Eight whole numbers as int16, the columns of every four in the order 0, 2, 1, 3.
  static void store_words(int16_t* p, F x) {
    const __m256i whole = _mm256_shuffle_epi32(_mm256_cvtps_epi32(x), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
  }
  template <int N>
  static F byte_to_f(B w) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(w, 8 * N), _mm256_set1_epi32(255)));
  }

  static Pairs pairs(const bf16* p) { return bytes(p); }
  static void split_pairs(Pairs p, F& even, F& odd) {
    even = _mm256_castsi256_ps(_mm256_slli_epi32(p, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(p, _mm256_set1_epi32(int(0xffff0000))));
  }
  static Pairs pair_bf16(F even, F odd) { return _mm256_or_si256(bf16_bits(even), _mm256_slli_epi32(bf16_bits(odd), 16)); }
  static F dot_bf16(F acc, Pairs b, const bf16* a) {
    F even, odd, a_even, a_odd;
    split_pairs(b, even, odd);
    split_pairs(broadcast(a), a_even, a_odd);
    return fma(odd, a_odd, fma(even, a_even, acc));
  }

  static void transpose(const float* src, int stride, float* dst, int dst_stride) {
    F t[8], s[8];
    for (int i = 0; i < 8; i++) t[i] = load(src + i * stride);
    for (int i = 0; i < 8; i += 4) {
      const F a = _mm256_unpacklo_ps(t[i], t[i + 1]), b = _mm256_unpackhi_ps(t[i], t[i + 1]);
      const F c = _mm256_unpacklo_ps(t[i + 2], t[i + 3]), d = _mm256_unpackhi_ps(t[i + 2], t[i + 3]);
      s[i] = _mm256_shuffle_ps(a, c, 0x44);
      s[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
      s[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
      s[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
    for (int j = 0; j < 4; j++) {
      store(dst + j * dst_stride, _mm256_permute2f128_ps(s[j], s[4 + j], 0x20));
      store(dst + (4 + j) * dst_stride, _mm256_permute2f128_ps(s[j], s[4 + j], 0x31));
    }
  }
};

}  // namespace

}  // namespace nomoat
