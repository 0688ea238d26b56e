#pragma once
// Everything that works on one row or on flat arrays: quantization, norms, activation, softmax, adapters, AdamW.
// Reductions keep sixteen partial sums at every vector width, so that their order is the same at every level.

#include "kernel/load.h"
#include "kernel/table.h"
#include "kernel/vexp.h"
#include "quant/half.h"

namespace nomoat {
namespace {

inline float as_float(bf16 x) { return bf16_to_float(x); }
inline float as_float(float x) { return x; }

// sixteen lanes as 16 / W vectors
template <class V>
struct Sixteen {
  static constexpr int N = 16 / V::W;
  typename V::F at[N];

  static Sixteen zero() {
    Sixteen s;
    for (int i = 0; i < N; i++) s.at[i] = V::zero();
    return s;
  }
  template <class T>
  static Sixteen load(const T* x) {
    Sixteen s;
    for (int i = 0; i < N; i++) s.at[i] = load_as_float<V>(x + i * V::W);
    return s;
  }
  void add_product(const float* x, const Sixteen& y) {
    for (int i = 0; i < N; i++) at[i] = V::fma(V::load(x + i * V::W), y.at[i], at[i]);
  }
  float total() const {
    alignas(64) float lanes[16];
    for (int i = 0; i < N; i++) V::store(lanes + i * V::W, at[i]);
    for (int half = 8; half; half /= 2)
      for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
  }
};

template <class V>
inline float dot(const float* x, const float* y, int count) {
  Sixteen<V> sum = Sixteen<V>::zero();
  for (int i = 0; i < count; i += 16) sum.add_product(x + i, Sixteen<V>::load(y + i));
  return sum.total();
}

// One digit: c = round(x * 127 / max|x|). Two: c = round(x * 16256 / max|x|), high = round(c / 128), low = c - 128 * high.
// kWords: that c.
template <class V>
void quantize(const float* x, int cols, int digits, int8_t* q, ActBlock* blocks) {
  const float range = digits == 1 ? 127.0f : 127.0f * 128.0f;
  for (int b = 0; b < cols / kTileCols; b++) {
    const float* at = x + b * kTileCols;
    int8_t* codes = q + size_t(b) * kTileCols * code_bytes(digits);
    typename V::F top = V::zero();
    for (int i = 0; i < kTileCols; i += V::W) top = V::max(top, V::abs(V::load(at + i)));
    const float peak = V::max_of(top), scale = peak / range;
    const typename V::F factor = V::set1(peak > 1e-30f ? range / peak : 0.0f);  // range / 1e-35 would be infinite
    float sum[2];
    for (int half = 0; half < 2; half++) {
      typename V::F total = V::zero();  // of whole numbers, below 2^18: exact
      for (int i = 16 * half; i < 16 * half + 16; i += V::W) {
        const typename V::F code = V::round(V::mul(V::load(at + i), factor));
        total = V::add(total, code);
        if (digits == 1) {
          V::store_s8(codes + i, code);
        } else if (digits == kWords) {
          if constexpr (V::kHasWords) V::store_words(reinterpret_cast<int16_t*>(codes) + i, code);
        } else {
          const typename V::F high = V::round(V::mul(code, V::set1(1.0f / 128)));
          V::store_s8(codes + i, high);
          V::store_s8(codes + kTileCols + i, V::fma(high, V::set1(-128.0f), code));
        }
      }
      sum[half] = V::sum(total);
    }
    const float both = sum[0] + sum[1];
    if (both == both)
      blocks[b] = {scale, scale * both, {int(sum[0]), int(sum[1])}};
    else  // an activation is NaN or infinite, max may have lost it: every product with this block becomes NaN
      blocks[b] = {NAN, NAN, {0, 0}};
  }
}

template <class V>
float to_int8(const float* x, int count, int8_t* out) {
  typename V::F top = V::zero(), total = V::zero();
  for (int i = 0; i < count; i += V::W) top = V::max(top, V::abs(V::load(x + i)));
  const float peak = V::max_of(top);
  const typename V::F factor = V::set1(peak > 1e-30f ? 127.0f / peak : 0.0f);
  for (int i = 0; i < count; i += V::W) {
    const typename V::F code = V::round(V::mul(V::load(x + i), factor));
    total = V::add(total, code);  // NaN where x is NaN or infinite: max may have lost it
    V::store_s8(out + i, code);
  }
  const float sum = V::sum(total);
  return sum == sum ? peak / 127.0f : NAN;
}

template <class V>
void to_bf16(const float* x, int count, bf16* out) {
  for (int i = 0; i < count; i += V::W) V::store_bf16(out + i, V::load(x + i));
}

template <class V>
void to_f32(const bf16* x, int count, float* out) {
  for (int i = 0; i < count; i += V::W) V::store(out + i, V::from_bf16(x + i));
}

template <class V>
void rms_norm(const float* x, const float* w, int cols, float eps, float* y) {
  const int padded = round_up(cols, 16);
  const float inverse = 1.0f / sqrtf(dot<V>(x, x, padded) / float(cols) + eps);
  for (int i = 0; i < padded; i += V::W) V::store(y + i, V::mul(V::mul(V::load(x + i), V::set1(inverse)), V::load(w + i)));
}

// With r = rsqrt(mean(x^2) + eps):  dx = r * (w dy - x * r^2 * mean(w dy x))
template <class V>
void rms_norm_backward(const float* x, const float* w, const float* dy, int cols, float eps, float* dx) {
  const int padded = round_up(cols, 16);
  const float inverse = 1.0f / sqrtf(dot<V>(x, x, padded) / float(cols) + eps);
  Sixteen<V> sum = Sixteen<V>::zero();
  for (int i = 0; i < padded; i += 16)
    for (int j = 0; j < Sixteen<V>::N; j++) {
      const int at = i + j * V::W;
      sum.at[j] = V::fma(V::mul(V::load(w + at), V::load(dy + at)), V::load(x + at), sum.at[j]);
    }
  const typename V::F r = V::set1(inverse), shift = V::set1(-inverse * inverse * inverse * sum.total() / float(cols));
  for (int i = 0; i < padded; i += V::W) {
    const typename V::F scaled = V::mul(V::mul(V::load(w + i), V::load(dy + i)), r);
    V::store(dx + i, V::add(V::load(dx + i), V::fma(V::load(x + i), shift, scaled)));
  }
}

template <class V>
void center(const float* x, int cols, float* y) {
  const int whole = cols / 16 * 16;
  Sixteen<V> sum = Sixteen<V>::zero();
  for (int i = 0; i < whole; i += 16)
    for (int j = 0; j < Sixteen<V>::N; j++) sum.at[j] = V::add(sum.at[j], V::load(x + i + j * V::W));
  float total = sum.total();
  for (int i = whole; i < cols; i++) total += x[i];
  const float mean = total / float(cols);
  for (int i = 0; i < whole; i += V::W) V::store(y + i, V::sub(V::load(x + i), V::set1(mean)));
  for (int i = whole; i < cols; i++) y[i] = x[i] - mean;
  for (int i = cols; i < round_up(cols, 16); i++) y[i] = 0;
}

template <class V>
inline typename V::F sigmoid(typename V::F x) {
  return V::div(V::set1(1.0f), V::add(V::set1(1.0f), vexp<V>(V::sub(V::zero(), x))));
}

template <class V>
struct Silu {
  using F = typename V::F;
  static F value(F x) { return V::mul(x, sigmoid<V>(x)); }
  // s * (1 + x * (1 - s)), s = sigmoid(x)
  static F slope(F x, F& value) {
    const F one = V::set1(1.0f), s = sigmoid<V>(x);
    value = V::mul(x, s);
    return V::mul(s, V::fma(x, V::sub(one, s), one));
  }
};

// With z = 2 sqrt(2 / pi) (x + c x^3) and s = sigmoid(z): gelu = x s, gelu' = s + x s (1 - s) z'
template <class V>
struct Gelu {
  using F = typename V::F;
  static F gate(F x, F square) {
    return sigmoid<V>(V::mul(V::mul(x, V::set1(1.5957691f)), V::fma(square, V::set1(0.044715f), V::set1(1.0f))));
  }
  static F value(F x) { return V::mul(x, gate(x, V::mul(x, x))); }
  static F slope(F x, F& value) {
    const F one = V::set1(1.0f), square = V::mul(x, x), s = gate(x, square);
    value = V::mul(x, s);
    const F dz = V::mul(V::set1(1.5957691f), V::fma(square, V::set1(3 * 0.044715f), one));
    return V::fma(V::mul(value, V::sub(one, s)), dz, s);
  }
};

template <class V, class Act>
void act_mul(const float* gate, const float* up, int count, float* out) {
  for (int i = 0; i < count; i += V::W) {
    const typename V::F value = Act::value(V::load(gate + i));
    V::store(out + i, up ? V::mul(value, V::load(up + i)) : value);
  }
}

template <class V, class Act>
void act_mul_backward(const float* gate, const float* up, const float* d_out, int count, float* d_gate, float* d_up) {
  for (int i = 0; i < count; i += V::W) {
    typename V::F d = V::load(d_out + i), value;
    const typename V::F slope = Act::slope(V::load(gate + i), value);
    if (up) {
      V::store(d_up + i, V::mul(d, value));
      d = V::mul(d, V::load(up + i));
    }
    V::store(d_gate + i, V::mul(d, slope));
  }
}

template <class V>
void soft_cap(float* x, float cap, int count) {
  for (int i = 0; i < count; i += V::W) V::store(x + i, capped<V>(V::load(x + i), cap));
}

template <class V>
void soft_cap_backward(const float* x, float cap, int count, float* d) {
  for (int i = 0; i < count; i += V::W) V::store(d + i, V::mul(V::load(d + i), cap_slope<V>(V::load(x + i), cap)));
}

template <class V>
void axpy(const float* y, float factor, int count, float* x) {
  for (int i = 0; i < count; i += V::W) V::store(x + i, V::fma(V::load(y + i), V::set1(factor), V::load(x + i)));
}

// Sixteen maxima side by side, in which the compiler sees vectors: an index carried from x to x took four times as long.
template <class V>
float highest(const float* x, int count) {
  float top[16], most = -INFINITY;
  int32_t bad[16] = {}, any = 0;
  for (float& lane : top) lane = -INFINITY;
  auto take = [&](float value, int lane) {
    bad[lane] |= !(value < INFINITY);
    top[lane] = value > top[lane] ? value : top[lane];
  };
  const int whole = count / 16 * 16;
  for (int t = 0; t < whole; t += 16)
    for (int i = 0; i < 16; i++) take(x[t + i], i);
  for (int t = whole; t < count; t++) take(x[t], 0);
  for (int i = 0; i < 16; i++) {
    any |= bad[i];
    most = top[i] > most ? top[i] : most;
  }
  return any ? INFINITY : most;
}

template <class V>
float log_sum_exp(const float* x, int count) {
  const int whole = count / 16 * 16;
  float peak = -INFINITY;
  if (whole) {
    typename V::F top = V::load(x);
    for (int i = V::W; i < whole; i += V::W) top = V::max(top, V::load(x + i));
    peak = V::max_of(top);
  }
  for (int i = whole; i < count; i++) peak = x[i] > peak ? x[i] : peak;
  Sixteen<V> sum = Sixteen<V>::zero();
  for (int i = 0; i < whole; i += 16)
    for (int j = 0; j < Sixteen<V>::N; j++)
      sum.at[j] = V::add(sum.at[j], vexp<V>(V::sub(V::load(x + i + j * V::W), V::set1(peak))));
  float total = sum.total();
  for (int i = whole; i < count; i++) total += expf(x[i] - peak);
  return peak + logf(total);
}

template <class V>
void softmax_bf16(const float* x, float lse, float factor, int count, bf16* out) {
  for (int i = 0; i < count; i += V::W)
    V::store_bf16(out + i, V::mul(vexp<V>(V::sub(V::load(x + i), V::set1(lse))), V::set1(factor)));
}

template <class V>
void softmax_f32(const float* x, float lse, float factor, int count, float* out) {
  for (int i = 0; i < count; i += V::W) V::store(out + i, V::mul(vexp<V>(V::sub(V::load(x + i), V::set1(lse))), V::set1(factor)));
}

// ---- adapters -----------------------------------------------------------------------------------------------------------

// How a factor of T lies: steps from one rank to the next and from one kLoraCols columns to the next, of `group` ranks.
template <class T>
struct LoraSteps {
  int rank, block;

  LoraSteps(int ld, int group) {
    constexpr bool interleaved = std::is_same_v<T, bf16>;
    rank = interleaved ? kLoraCols : ld;
    block = interleaved ? group * kLoraCols : kLoraCols;
  }
  const T* at(const T* base, int r, int c) const {
    return base + size_t(r) * size_t(rank) + size_t(c / kLoraCols) * size_t(block) + c % kLoraCols;
  }
};

// M rows with R ranks
template <class V, int M, int R, class T>
inline void shrink_tile(const float* x, int ldx, const T* a, LoraSteps<T> steps, const float* scale, int cols, float* u,
                        int ldu) {
  const int whole = cols / 16 * 16;
  Sixteen<V> sum[M][R];
  for (auto& row : sum)
    for (Sixteen<V>& s : row) s = Sixteen<V>::zero();
  for (int k = 0; k < whole; k += 16)
    for (int r = 0; r < R; r++) {
      const Sixteen<V> factor = Sixteen<V>::load(steps.at(a, r, k));
      for (int m = 0; m < M; m++) sum[m][r].add_product(x + size_t(m) * ldx + k, factor);
    }
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) {
      float total = sum[m][r].total();
      for (int k = whole; k < cols; k++) total += x[size_t(m) * ldx + k] * as_float(*steps.at(a, r, k));
      u[size_t(m) * ldu + r] = scale[r] * total;
    }
}

// Four rows or four ranks at a time: a sum alone would wait for each of its additions.
template <class V, class T>
void lora_shrink(const float* x, int ldx, int rows, const T* a, int lda, const float* scale, int rank, int cols, float* u,
                 int ldu) {
  const LoraSteps<T> steps(lda, kLoraRanks);
  auto run = [&]<int M, int R>(int m, int r) {
    const T* group = a + size_t(r / kLoraRanks * kLoraRanks) * lda;
    shrink_tile<V, M, R>(x + size_t(m) * ldx, ldx, steps.at(group, r % kLoraRanks, 0), steps, scale + r, cols,
                         u + size_t(m) * ldu + r, ldu);
  };
  int m = 0;
  for (; m + 4 <= rows; m += 4)
    for (int r = 0; r < rank; r++) run.template operator()<4, 1>(m, r);
  for (; m < rows; m++) {
    int r = 0;
    for (; r + kLoraRanks <= rank; r += kLoraRanks) run.template operator()<1, kLoraRanks>(m, r);
    for (; r < rank; r++) run.template operator()<1, 1>(m, r);
  }
}

// M rows, N vectors of columns
template <class V, int M, int N, class T>
inline void expand_tile(const float* u, int ldu, const T* bt, int next, int rank, float* y, int ldy) {
  typename V::F acc[M][N];
  for (int m = 0; m < M; m++)
    for (int i = 0; i < N; i++) acc[m][i] = V::zero();
  for (int r = 0; r < rank; r++) {
    typename V::F factor[N];
    for (int i = 0; i < N; i++) factor[i] = load_as_float<V>(bt + size_t(r) * next + i * V::W);
    for (int m = 0; m < M; m++)
      for (int i = 0; i < N; i++) acc[m][i] = V::fma(factor[i], V::set1(u[size_t(m) * ldu + r]), acc[m][i]);
  }
  for (int m = 0; m < M; m++)
    for (int i = 0; i < N; i++) {
      float* at = y + size_t(m) * ldy + i * V::W;
      V::store(at, V::add(V::load(at), acc[m][i]));
    }
}

template <class V, class T>
void lora_expand(const float* u, int ldu, int rows, const T* bt, int ldb, int rank, int first, int last, float* y, int ldy) {
  const LoraSteps<T> steps(ldb, rank);
  auto run = [&]<int M, int Columns>(int m) {
    const float* weight = u + size_t(m) * ldu;
    float* out = y + size_t(m) * ldy;
    int n = first;
    for (; n + Columns <= last; n += Columns)
      expand_tile<V, M, Columns / V::W>(weight, ldu, steps.at(bt, 0, n), steps.rank, rank, out + n, ldy);
    for (; n + V::W <= last; n += V::W) expand_tile<V, M, 1>(weight, ldu, steps.at(bt, 0, n), steps.rank, rank, out + n, ldy);
    for (; n < last; n++)
      for (int i = 0; i < M; i++) {
        float acc = 0;
        for (int r = 0; r < rank; r++) acc += as_float(*steps.at(bt, r, n)) * weight[size_t(i) * ldu + r];
        out[size_t(i) * ldy + n] += acc;
      }
  };
  int m = 0;
  for (; m + 4 <= rows; m += 4) run.template operator()<4, 16>(m);
  for (; m < rows; m++) run.template operator()<1, kLoraCols>(m);
}

template <class V, class T, int R>
inline void outer_tile(const float* u, int ldu, const T* x, int ldx, int rows, float* out, int ldo, int width) {
  constexpr int N = 16 / V::W;
  typename V::F acc[R][N];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) acc[r][n] = V::zero();
  for (int m = 0; m < rows; m++) {
    typename V::F v[N];
    for (int n = 0; n < N; n++) v[n] = load_as_float<V>(x + size_t(m) * ldx + n * V::W);
    for (int r = 0; r < R; r++) {
      const typename V::F factor = V::set1(u[size_t(m) * ldu + r]);
      for (int n = 0; n < N; n++) acc[r][n] = V::fma(v[n], factor, acc[r][n]);
    }
  }
  for (int r = 0; r < R; r++) {
    alignas(64) float lanes[16];
    for (int n = 0; n < N; n++) V::store(lanes + n * V::W, acc[r][n]);
    for (int i = 0; i < width; i++) out[size_t(r) * ldo + i] += lanes[i];
  }
}

template <class V, class T>
inline void outer(const float* u, int ldu, int rank, const T* x, int ldx, int rows, int first, int last, float* out, int ldo) {
  constexpr int R = V::kOuterRows;  // with 16 / W vectors each, what the registers hold
  for (int c = first; c < last; c += 16) {
    const int width = last - c < 16 ? last - c : 16;
    int r = 0;
    for (; r + R <= rank; r += R) outer_tile<V, T, R>(u + r, ldu, x + c, ldx, rows, out + size_t(r) * ldo + c, ldo, width);
    for (; r < rank; r++) outer_tile<V, T, 1>(u + r, ldu, x + c, ldx, rows, out + size_t(r) * ldo + c, ldo, width);
  }
}

template <class V>
void outer_bf16(const float* u, int ldu, int rank, const bf16* x, int ldx, int rows, int first, int last, float* out, int ldo) {
  outer<V>(u, ldu, rank, x, ldx, rows, first, last, out, ldo);
}
template <class V>
void outer_f32(const float* u, int ldu, int rank, const float* x, int ldx, int rows, int first, int last, float* out, int ldo) {
  outer<V>(u, ldu, rank, x, ldx, rows, first, last, out, ldo);
}

// ---- optimizer ----------------------------------------------------------------------------------------------------------

inline double sum_squares(const float* x, int64_t count) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; j++) lanes[j] += double(x[i + j]) * double(x[i + j]);
  for (int j = 0; i < count; i++, j++) lanes[j] += double(x[i]) * double(x[i]);
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

// Plain loops: the compiler vectorizes them, element by element, so every level computes the same function.
inline void adamw(float* w, const float* g, float* m, float* v, int64_t count, float grad_scale, float beta1, float beta2,
                  float step_size, float root_correction, float eps, float decay) {
  for (int64_t i = 0; i < count; i++) {
    const float gradient = g[i] * grad_scale;
    m[i] = beta1 * m[i] + (1.0f - beta1) * gradient;
    v[i] = beta2 * v[i] + (1.0f - beta2) * gradient * gradient;
    w[i] = w[i] * decay - step_size * m[i] / (sqrtf(v[i]) * root_correction + eps);
  }
}

}  // namespace
}  // namespace nomoat
