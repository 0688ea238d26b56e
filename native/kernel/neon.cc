// NEON with the ARMv8.2 dot product (Cortex-A76 and Neoverse N1 and later, every Apple M).

#include <arm_neon.h>

#include "kernel/level.h"

namespace nomoat {

namespace {

struct Neon {
  // 8 rows x 12 columns: 24 accumulators and six vectors of weights leave one register for the activations, one for zeros
  static constexpr int W = 4, kIntRows = 8, kGemmRows = 8, kGemmVectors = 3, kOuterRows = 4;
  static constexpr bool kHasWords = false, kBf16Dots = false;
  static constexpr int kFetchRows = 1;  // as on AVX2
  using F = float32x4_t;
  using I = int32x4_t;
  using B = uint8x16_t;
  using Pairs = uint8x16_t;

  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static F set1(float x) { return vdupq_n_f32(x); }
  static F zero() { return vdupq_n_f32(0.0f); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  static F min(F a, F b) { return vminq_f32(a, b); }
  static F abs(F a) { return vabsq_f32(a); }
  static F round(F a) { return vrndnq_f32(a); }
  // lanes (0 + 2) + (1 + 3), the order of the other levels; vaddvq adds neighbours first
  static float sum(F a) {
    const float32x2_t two = vadd_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
  static float max_of(F a) { return vmaxvq_f32(a); }
  // vexp keeps n within [-126, 127], where 2^n is a normal number
  static F scale_by_power(F p, F n) {
    const I power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    return vmulq_f32(p, vreinterpretq_f32_s32(power));
  }

  // Four bytes as the low half of a 64-bit register: a plain load, where a load that broadcasts also takes an arithmetic unit.
  static uint8x8_t four_bytes(const void* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    return vcreate_u8(four);
  }

  static F from_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  // zeros below the bits of a bf16 make it a float32
  static F from_bf16(const bf16* p) {
    return vreinterpretq_f32_u16(vzip1q_u16(vdupq_n_u16(0), vcombine_u16(vld1_u16(p), vdup_n_u16(0))));
  }
  // bf16(x) in the high half of each lane, the low half undefined: round to nearest even, NaN stays NaN
  static uint32x4_t bf16_bits(F x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    return vbslq_u32(vceqq_f32(x, x), rounded, vorrq_u32(bits, vdupq_n_u32(0x400000)));
  }
  static void store_bf16(bf16* p, F x) { vst1_u16(p, vshrn_n_u32(bf16_bits(x), 16)); }
  static F from_u8(const uint8_t* p) { return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(four_bytes(p))))); }
  static F from_s8(const int8_t* p) {
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(four_bytes(p))))));
  }
  static void store_s8(int8_t* p, F x) {
    const int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(x));
    const uint32_t four = vget_lane_u32(vreinterpret_u32_s8(vqmovn_s16(vcombine_s16(words, words))), 0);
    std::memcpy(p, &four, 4);
  }

  static I iset1(int x) { return vdupq_n_s32(x); }
  static I iadd(I a, I b) { return vaddq_s32(a, b); }
  static I add_digit(I low, I high) { return vaddq_s32(low, vshlq_n_s32(high, 7)); }
  static F from_i32(I x) { return vcvtq_f32_s32(x); }
  static B bytes(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
  static void store_bytes(void* p, B x) { vst1q_u8(static_cast<uint8_t*>(p), x); }
  static B band(B x, uint8_t mask) { return vandq_u8(x, vdupq_n_u8(mask)); }
  static B bor(B a, B b) { return vorrq_u8(a, b); }
  static B look_up(const uint8_t* table, B x) { return vqtbl1q_u8(vld1q_u8(table), x); }
  template <int N>
  static B shr(B x) {
    return vshrq_n_u8(x, N);
  }
  template <int N>
  static B shl(B x) {
    return vshlq_n_u8(x, N);
  }
  // sdot is signed on both sides: codes up to 127 are what they seem, of those up to 255 w - 128 is signed.
  static constexpr int kWideZero = 128;
  template <int Top>
  static constexpr int run() {
    return 8;
  }
  template <int Top>
  static I dot(I sum, B w, const int8_t* x) {
    const B code = Top > 127 ? veorq_u8(w, vdupq_n_u8(128)) : w;
    return vdotq_lane_s32(sum, vreinterpretq_s8_u8(code), vreinterpret_s8_u8(four_bytes(x)), 0);
  }
  static I widen(I sum) { return sum; }
  template <int N>
  static F byte_to_f(B w) {
    uint32x4_t word = vreinterpretq_u32_u8(w);
    if constexpr (N > 0) word = vshrq_n_u32(word, 8 * N);
    return vcvtq_f32_u32(vandq_u32(word, vdupq_n_u32(255)));
  }

  static Pairs pairs(const bf16* p) { return bytes(p); }
  static void split_pairs(Pairs p, F& even, F& odd) {
    even = vreinterpretq_f32_u16(vtrn1q_u16(vdupq_n_u16(0), vreinterpretq_u16_u8(p)));
    odd = vreinterpretq_f32_u16(vtrn2q_u16(vdupq_n_u16(0), vreinterpretq_u16_u8(p)));
  }
  static Pairs pair_bf16(F even, F odd) { return vreinterpretq_u8_u32(vsriq_n_u32(bf16_bits(odd), bf16_bits(even), 16)); }
  static F dot_bf16(F acc, Pairs b, const bf16* a) {
    F even, odd;
    split_pairs(b, even, odd);
    const float32x2_t x = vreinterpret_f32_u16(vzip1_u16(vdup_n_u16(0), vreinterpret_u16_u8(four_bytes(a))));
    return vfmaq_lane_f32(vfmaq_lane_f32(acc, even, x, 0), odd, x, 1);
  }

  static void transpose(const float* src, int stride, float* dst, int dst_stride) {
    const F r0 = load(src), r1 = load(src + stride), r2 = load(src + 2 * stride), r3 = load(src + 3 * stride);
    const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(r0, r1)), b = vreinterpretq_f64_f32(vtrn2q_f32(r0, r1));
    const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(r2, r3)), d = vreinterpretq_f64_f32(vtrn2q_f32(r2, r3));
    store(dst, vreinterpretq_f32_f64(vtrn1q_f64(a, c)));
    store(dst + dst_stride, vreinterpretq_f32_f64(vtrn1q_f64(b, d)));
    store(dst + 2 * dst_stride, vreinterpretq_f32_f64(vtrn2q_f64(a, c)));
    store(dst + 3 * dst_stride, vreinterpretq_f32_f64(vtrn2q_f64(b, d)));
  }
};

constexpr Kernels kTable = make_kernels<Neon>(Level::neon);

}  // namespace

const Kernels* neon_kernels() { return &kTable; }

}  // namespace nomoat
