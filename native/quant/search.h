#pragma once
// The search for scales: weighted least squares over x ~ scale * code and x ~ scale * code + min, shared by every encoder.
//
// For fixed codes the best scale is a closed form, so what is searched is the rounding: candidates stretch the group over the
// codes a little more or less. Errors are weighted by |x| + rms(x): large weights count more, small ones are not forgotten. Four
// lanes are added up in a fixed order, so that the bytes do not depend on the instruction set.

#include "quant/half.h"

namespace nomoat {
namespace {

typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));

inline F4 splat(float x) { return F4{x, x, x, x}; }
inline float sum(F4 x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline F4 load(const float* x) {
  F4 lanes;
  std::memcpy(&lanes, x, 16);
  return lanes;
}
inline F4 smaller(F4 a, F4 b) { return a < b ? a : b; }
inline F4 larger(F4 a, F4 b) { return a > b ? a : b; }
inline float magnitude(float x) { return x < 0 ? -x : x; }
inline float nearest_whole(float x) { return (x + 12582912.0f) - 12582912.0f; }  // 1.5 * 2^23; half to even
inline float inverse(float x) { return magnitude(x) > 1e-30f ? 1 / x : 0; }

// Codes are whole numbers.
template <int Low, int High>
struct Whole {
  static constexpr float low = Low, high = High, step = 0.1f;  // of candidates, in codes
  static F4 nearest(F4 x) {
    const F4 inside = smaller(larger(x, splat(Low)), splat(High)), magic = splat(12582912.0f);
    return (inside + magic) - magic;
  }
  static uint8_t index(float code) { return uint8_t(int(code) - Low); }
};

// Codes are the ascending values of a table.
template <class Values>
struct Listed {
  static constexpr int count = sizeof(Values::sorted) / sizeof(Values::sorted[0]);
  static constexpr float low = Values::sorted[0], high = Values::sorted[count - 1], step = high / 90;
  static F4 nearest(F4 x) {
    F4 code = splat(low);
    for (int i = 1; i < count; i++) {
      const float below = Values::sorted[i - 1], above = Values::sorted[i];
      code += x > splat((below + above) / 2) ? splat(above - below) : splat(0);
    }
    return code;
  }
  static uint8_t index(float code) {
    int i = 0;
    while (i < count - 1 && float(Values::sorted[i]) < code) i++;
    return Values::index[i];
  }
};

constexpr int kCandidates = 9;  // to each side of the plain scale

// Importance of every x.
template <int N>
inline void importance(const float* x, float* w) {
  F4 squares = splat(0);
  for (int i = 0; i < N; i += 4) squares += load(x + i) * load(x + i);
  const float rms = __builtin_sqrtf(sum(squares) / N);
  for (int i = 0; i < N; i++) w[i] = rms + magnitude(x[i]);
}

struct Moments {
  float xc, cc;  // sums of w x c and w c c
};

template <class Code, int N>
inline Moments moments(const float* x, const float* w, float inverse_scale) {
  F4 xc = splat(0), cc = splat(0);
  for (int i = 0; i < N; i += 4) {
    const F4 xi = load(x + i), code = Code::nearest(xi * splat(inverse_scale)), weighted = load(w + i) * code;
    xc += weighted * xi;
    cc += weighted * code;
  }
  return {sum(xc), sum(cc)};
}

// The scale of x ~ scale * code; negative where that suits codes that reach further down than up.
template <class Code, int N>
inline float fit_scale(const float* x, const float* w) {
  float extreme = 0;
  for (int i = 0; i < N; i++)
    if (magnitude(x[i]) > magnitude(extreme)) extreme = x[i];
  if (magnitude(extreme) < 1e-30f) return 0;
  float scale = 0, gain = 0;
  for (float end : {Code::low, Code::high})
    for (int k = -kCandidates; k <= kCandidates; k++) {
      const Moments m = moments<Code, N>(x, w, (end + Code::step * float(k)) / extreme);
      if (m.cc > 0 && m.xc * m.xc > gain * m.cc) gain = m.xc * m.xc / m.cc, scale = m.xc / m.cc;
    }
  const Moments again = moments<Code, N>(x, w, inverse(scale));  // codes of the fitted scale fit no worse
  return again.cc > 0 ? again.xc / again.cc : scale;
}

struct Line {
  float scale, min;
};

// x ~ scale * code + min, codes 0 .. High. Of a K format min must not be positive.
template <int High, int N, bool AnyMin>
inline Line fit_line(const float* x, const float* w) {
  float low = AnyMin ? x[0] : 0, high = x[0];
  for (int i = 0; i < N; i++) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
  if (high - low < 1e-30f) return {0, low};
  F4 sum_w = splat(0), sum_x = splat(0);
  for (int i = 0; i < N; i += 4) sum_w += load(w + i), sum_x += load(w + i) * load(x + i);
  const float sw = sum(sum_w), sx = sum(sum_x);
  Line best{(high - low) / High, low};
  float gain = 0, start = low, span = high - low;
  for (int k = -kCandidates; k <= kCandidates + 1; k++) {
    if (k > kCandidates) start = best.min, span = best.scale * High;  // once more with what was found
    const F4 stretch = splat((float(High) + (k > kCandidates ? 0.0f : 0.1f * float(k))) / span);
    F4 c1 = splat(0), cc = splat(0), xc = splat(0);
    for (int i = 0; i < N; i += 4) {
      const F4 xi = load(x + i), code = Whole<0, High>::nearest((xi - splat(start)) * stretch), weighted = load(w + i) * code;
      c1 += weighted;
      cc += weighted * code;
      xc += weighted * xi;
    }
    const float c = sum(c1), c2 = sum(cc), p = sum(xc), spread = sw * c2 - c * c;
    if (!(spread > 0)) continue;
    Line line{(sw * p - c * sx) / spread, (c2 * sx - c * p) / spread};
    if (!AnyMin && line.min > 0) line = {p / c2, 0};
    const float found = line.scale * p + line.min * sx + (line.scale * p - line.scale * line.scale * c2) +
                        (line.min * sx - line.min * line.min * sw) - 2 * line.scale * line.min * c;
    if (line.scale > 0 && found > gain) gain = found, best = line;
  }
  return best;
}

template <class Code, int N>
inline float error(const float* x, const float* w, float scale, float min) {
  const F4 by = splat(inverse(scale));
  F4 total = splat(0);
  for (int i = 0; i < N; i += 4) {
    const F4 xi = load(x + i), rest = xi - splat(min), off = rest - splat(scale) * Code::nearest(rest * by);
    total += load(w + i) * off * off;
  }
  return sum(total);
}

inline int within(float x, int low, int high) {
  const float whole = nearest_whole(x < float(low) ? float(low) : x > float(high) ? float(high) : x);
  return int(whole);
}

// 256 columns as groups of N: x ~ d * scale[g] * code, or x ~ d * scale[g] * code - dmin * min[g]; d and dmin are fp16.
template <class Code, int N>
struct Superblock {
  static constexpr int groups = 256 / N;
  uint16_t d = 0, dmin = 0;
  int scale[groups] = {}, min[groups] = {};
  uint8_t codes[256];

  // Group scales from Low (the largest in magnitude) to High.
  void fit(const float* x, int low, int high) {
    float w[256], wanted[groups], extreme = 0;
    importance<256>(x, w);
    for (int g = 0; g < groups; g++) {
      wanted[g] = fit_scale<Code, N>(x + N * g, w + N * g);
      if (magnitude(wanted[g]) > magnitude(extreme)) extreme = wanted[g];
    }
    float unit = extreme / float(low);
    for (int pass = 0; pass < 2; pass++) {
      d = float_to_half(unit);
      const float step = half_to_float(d);
      float xc = 0, cc = 0;
      for (int g = 0; g < groups; g++) {
        const float *xg = x + N * g, *wg = w + N * g;
        const int middle = within(wanted[g] * inverse(step), low, high);
        float least = 0;
        for (int s = middle > low ? middle - 1 : low, first = 1; s <= middle + 1 && s <= high; s++, first = 0) {
          const float found = error<Code, N>(xg, wg, step * float(s), 0);
          if (first || found < least) least = found, scale[g] = s;
        }
        const Moments m = moments<Code, N>(xg, wg, inverse(step * float(scale[g])));
        if (scale[g]) xc += float(scale[g]) * m.xc, cc += float(scale[g] * scale[g]) * m.cc;
      }
      if (cc > 0) unit = xc / cc;
    }
    d = float_to_half(unit);
    encode(x);
  }

  // Group scales and mins from 0 to `most`; codes are whole, from 0.
  void fit_with_min(const float* x, int most) {
    float w[256], deepest = 0, steepest = 0;
    Line wanted[groups];
    importance<256>(x, w);
    for (int g = 0; g < groups; g++) {
      wanted[g] = fit_line<int(Code::high), N, false>(x + N * g, w + N * g);
      steepest = wanted[g].scale > steepest ? wanted[g].scale : steepest;
      deepest = -wanted[g].min > deepest ? -wanted[g].min : deepest;
    }
    float unit = steepest / float(most), unit_min = deepest / float(most);
    for (int pass = 0; pass < 2; pass++) {
      d = float_to_half(unit), dmin = float_to_half(unit_min);
      const float step = half_to_float(d), depth = half_to_float(dmin);
      double aa = 0, ab = 0, bb = 0, xa = 0, xb = 0;  // normal equations of x ~ unit * a - unit_min * b
      for (int g = 0; g < groups; g++) {
        const float *xg = x + N * g, *wg = w + N * g;
        const int s0 = within(wanted[g].scale * inverse(step), 0, most), m0 = within(-wanted[g].min * inverse(depth), 0, most);
        float least = 0;
        bool first = true;
        for (int s = s0 > 0 ? s0 - 1 : 0; s <= s0 + 1 && s <= most; s++)
          for (int m = m0 > 0 ? m0 - 1 : 0; m <= m0 + 1 && m <= most; m++, first = false) {
            const float found = error<Code, N>(xg, wg, step * float(s), -depth * float(m));
            if (first || found < least) least = found, scale[g] = s, min[g] = m;
          }
        const F4 by = splat(inverse(step * float(scale[g]))), base = splat(depth * float(min[g]));
        F4 c1 = splat(0), c2 = splat(0), xc = splat(0), x1 = splat(0), w1 = splat(0);
        for (int i = 0; i < N; i += 4) {
          const F4 xi = load(xg + i), wi = load(wg + i), code = Code::nearest((xi + base) * by);
          c1 += wi * code, c2 += wi * code * code, xc += wi * code * xi, x1 += wi * xi, w1 += wi;
        }
        const double s = scale[g], m = min[g];
        aa += s * s * sum(c2), ab += s * m * sum(c1), bb += m * m * sum(w1), xa += s * sum(xc), xb += m * sum(x1);
      }
      const double det = aa * bb - ab * ab;
      if (det > 1e-9 * aa * bb && xa * bb - ab * xb > 0 && ab * xa - aa * xb > 0)
        unit = float((xa * bb - ab * xb) / det), unit_min = float((ab * xa - aa * xb) / det);
    }
    d = float_to_half(unit), dmin = float_to_half(unit_min);
    encode(x);
  }

 private:
  void encode(const float* x) {
    const float step = half_to_float(d), depth = half_to_float(dmin);
    for (int g = 0; g < groups; g++)
      for (int i = N * g; i < N * (g + 1); i += 4) {
        const F4 shifted = load(x + i) + splat(depth * float(min[g]));
        const F4 code = Code::nearest(shifted * splat(inverse(step * float(scale[g]))));
        for (int j = 0; j < 4; j++) codes[i + j] = Code::index(code[j]);
      }
  }
};

}  // namespace
}  // namespace nomoat
