#pragma once
// Backward of attention with factors in bf16 and sums in float32, the formulas of attend.h, for levels with AVX-512.
// Scores are computed as [keys][rows], lanes being rows: then what the softmax knows of a row are vectors, and no product needs
// the transpose of another's result.

#include "kernel/attend.h"
#include "kernel/avx512.h"
#include "kernel/rowwise.h"

namespace nomoat {
namespace {

// A factor of a product of blocks of 16: block i of its rows (or columns, of the right one), step s of 32 of the contraction,
// begins at data + i * next + s * step. A row of the left one has 32 steps; a row of the right one two of 16 columns, in pairs.
struct Factor {
  const bf16* data;
  int row_bytes;
  size_t next, step;
};

// Backward of one segment and kv head: virtual rows and keys by blocks of 64.
// Products::multiply(a, rows, b, columns, steps, c, ldc, add): c (+)= a b, `rows` and `columns` of c, multiples of 16.
template <class Products>
class LowBackward {
 public:
  explicit LowBackward(const AttendBackwardArgs& args) : a(args) {
    for (bf16* x : {k_, v_}) std::memset(x, 0, size_t(keys_) * width_ * sizeof(bf16));
    for (int key = 0; key < key_count_; key++) {
      to_bf16<Avx512>(a.k + size_t(key) * a.dim, a.dim, k_ + size_t(key) * width_);
      to_bf16<Avx512>(a.v + size_t(key) * a.dim, a.dim, v_ + size_t(key) * width_);
    }
    std::memset(zeros_, 0, size_t(a.dim) * sizeof(float));
    for (int key = 0; key < keys_; key += 32)
      for (int d = 0; d < a.dim; d += 16) {
        alignas(64) float pairs[16][16];
        for (int i = 0; i < 16; i++)
          _mm512_store_si512(pairs[i], pair_rows(key_row(key + 2 * i) + d, key_row(key + 2 * i + 1) + d));
        Avx512::transpose(pairs[0], 16, reinterpret_cast<float*>(k_columns_ + size_t(d) * keys_ + key), keys_ / 2);
      }
  }

  void run() {
    const int total = a.count * a.heads;
    for (int first = 0; first < total; first += kBlock) {
      const int count = total - first < kBlock ? total - first : kBlock, rows = round_up(count, 32);
      take_rows(first, count, rows);
      const int begin = first_key(a.before + first / a.heads, a.window) / kBlock * kBlock;
      const int last = a.before + (first + count - 1) / a.heads;
      for (int key = begin; key <= last; key += kBlock) {
        const int taken = last + 1 - key < kBlock ? round_up(last + 1 - key, 32) : kBlock;
        take_keys(key, taken, rows, key > begin);
      }
      put_rows(first, count, rows);
    }
  }

 private:
  static constexpr int kBlock = 64;

  const AttendBackwardArgs& a;
  Products products_;
  const int key_count_ = a.before + a.count, keys_ = round_up(key_count_, kBlock), width_ = round_up(a.dim, 32);
  // of all keys: [key][width], and [dim][key]
  bf16 *k_ = reinterpret_cast<bf16*>(a.scratch), *v_ = k_ + size_t(keys_) * width_, *k_columns_ = v_ + size_t(keys_) * width_;
  // of a block's rows: [row / 16][width / 2][row % 16][2], [row / 2][dim][2]; 16 rows as they come
  bf16 *q_pairs_ = k_columns_ + size_t(keys_) * a.dim, *d_pairs_ = q_pairs_ + kBlock * width_;
  bf16 *q_rows_ = d_pairs_ + kBlock * width_, *d_rows_ = q_rows_ + kBlock * a.dim, *low_ = d_rows_ + kBlock * a.dim;
  // of a block's keys and rows: [key][row], and gradients of scores also [key / 2][row][2]
  bf16 *weights_ = low_ + 16 * width_, *d_scores_ = weights_ + kBlock * kBlock, *d_score_pairs_ = d_scores_ + kBlock * kBlock;
  float *scores_ = reinterpret_cast<float*>(d_score_pairs_ + kBlock * kBlock), *d_weights_ = scores_ + kBlock * kBlock;
  float *dq_ = d_weights_ + kBlock * kBlock, *zeros_ = dq_ + size_t(a.dim) * kBlock;  // [dim][row]; of one row
  alignas(64) float lse_[kBlock], delta_[kBlock];
  alignas(64) int32_t position_[kBlock], start_[kBlock];

  static __m512i pair_rows(const float* even, const float* odd) {
    return Avx512::pair_bf16(Avx512::load(even), Avx512::load(odd));
  }
  const float* key_row(int key) const { return key < key_count_ ? a.k + size_t(key) * a.dim : zeros_; }
  size_t at(int row) const { return virtual_row_at(row, a.heads, a.q_stride, a.dim); }

  // Rows [first, first + count) as factors, with zeros up to `rows`: these see no key.
  void take_rows(int first, int count, int rows) {
    auto row = [&](const float* x, int r) { return r < count ? x + at(first + r) : zeros_; };
    auto pack = [&](const float* x, bf16* pairs, bf16* by_rows) {
      for (int r = 0; r < rows; r += 16) {
        std::memset(low_, 0, size_t(16) * width_ * sizeof(bf16));
        for (int i = 0; i < 16; i++) to_bf16<Avx512>(row(x, r + i), a.dim, low_ + size_t(i) * width_);
        for (int p = 0; p < width_ / 2; p += 16)
          Avx512::transpose(reinterpret_cast<float*>(low_) + p, width_ / 2,
                            reinterpret_cast<float*>(pairs) + size_t(r / 16 * width_ / 2 + p) * 16, 16);
      }
      for (int r = 0; r < rows; r += 2)
        for (int d = 0; d < a.dim; d += 16)
          _mm512_storeu_si512(by_rows + size_t(r) * a.dim + 2 * d, pair_rows(row(x, r) + d, row(x, r + 1) + d));
    };
    pack(a.q, q_pairs_, q_rows_);
    pack(a.d_out, d_pairs_, d_rows_);
    for (int r = 0; r < rows; r++) {
      const bool real = r < count;
      const int m = (first + r) / a.heads;
      lse_[r] = real ? a.lse[size_t(m) * a.lse_stride + (first + r) % a.heads] : 0;
      delta_[r] = real ? dot<Avx512>(row(a.out, r), row(a.d_out, r), a.dim) : 0;
      position_[r] = real ? a.before + m : -1;
      start_[r] = first_key(position_[r], a.window);
    }
  }

  // Adds what `taken` keys from `key` on have to do with the rows.
  void take_keys(int key, int taken, int rows, bool add) {
    const Factor q{q_pairs_, 64, size_t(width_) * 16, 512}, d{d_pairs_, 64, size_t(width_) * 16, 512};
    const int bytes = width_ * int(sizeof(bf16));
    products_.multiply({k_ + size_t(key) * width_, bytes, size_t(width_) * 16, 32}, taken, q, rows, width_ / 32, scores_, kBlock,
                       false);
    products_.multiply({v_ + size_t(key) * width_, bytes, size_t(width_) * 16, 32}, taken, d, rows, width_ / 32, d_weights_,
                       kBlock, false);
    for (int i = 0; i < taken; i += 2)
      for (int r = 0; r < rows; r += 16) {
        __m512 even, odd;
        weigh(key, i, r, even);
        weigh(key, i + 1, r, odd);
        _mm512_storeu_si512(d_score_pairs_ + i * kBlock + 2 * r, Avx512::pair_bf16(even, odd));
      }
    const int real = round_up(key_count_, 16) - key < taken ? round_up(key_count_, 16) - key : taken;
    const size_t at = size_t(key) * a.dim, pair = size_t(a.dim) * 32;
    const int row_bytes = 2 * a.dim * int(sizeof(bf16)), block_bytes = kBlock * int(sizeof(bf16));
    products_.multiply({weights_, block_bytes, 16 * kBlock, 32}, real, {d_rows_, row_bytes, 32, pair}, a.dim, rows / 32,
                       a.dv + at, a.dim, true);
    products_.multiply({d_scores_, block_bytes, 16 * kBlock, 32}, real, {q_rows_, row_bytes, 32, pair}, a.dim, rows / 32,
                       a.dk + at, a.dim, true);
    products_.multiply({k_columns_ + key, keys_ * int(sizeof(bf16)), size_t(keys_) * 16, 32}, a.dim,
                       {d_score_pairs_, 2 * block_bytes, 32, 32 * kBlock}, rows, taken / 32, dq_, kBlock, add);
  }

  // Weights and gradients of the scores of one key, for 16 rows.
  void weigh(int key, int i, int r, __m512& d_score) {
    const __m512i at = _mm512_set1_epi32(key + i);
    const __mmask16 seen = _mm512_cmple_epi32_mask(at, _mm512_load_si512(position_ + r)) &
                           _mm512_cmpge_epi32_mask(at, _mm512_load_si512(start_ + r));
    __m512 score = _mm512_loadu_ps(scores_ + i * kBlock + r);
    if (a.cap != 0) score = capped<Avx512>(score, a.cap);
    const __m512 weight = _mm512_maskz_mov_ps(seen, vexp<Avx512>(_mm512_sub_ps(score, _mm512_load_ps(lse_ + r))));
    d_score = _mm512_maskz_mul_ps(seen, weight,
                                  _mm512_sub_ps(_mm512_loadu_ps(d_weights_ + i * kBlock + r), _mm512_load_ps(delta_ + r)));
    if (a.cap != 0) d_score = _mm512_mul_ps(d_score, cap_slope<Avx512>(score, a.cap));
    Avx512::store_bf16(weights_ + i * kBlock + r, weight);
    Avx512::store_bf16(d_scores_ + i * kBlock + r, d_score);
  }

  void put_rows(int first, int count, int rows) {
    for (int r = 0; r < rows; r += 16)
      for (int d = 0; d < a.dim; d += 16) {
        alignas(64) float turned[16][16];
        Avx512::transpose(dq_ + size_t(d) * kBlock + r, kBlock, turned[0], 16);
        for (int i = 0; i < 16 && r + i < count; i++)
          _mm512_storeu_ps(a.dq + at(first + r + i) + d, _mm512_mul_ps(_mm512_load_ps(turned[i]), _mm512_set1_ps(a.scale)));
      }
  }
};

template <class Products>
void attend_backward_low(const AttendBackwardArgs& args) {
  LowBackward<Products>(args).run();
}

// ---- products by vectors ------------------------------------------------------------------------------------------------------

struct VectorProducts {
  static void multiply(const Factor& a, int rows, const Factor& b, int columns, int steps, float* c, int ldc, bool add) {
    int n = 0;
    for (; n + 32 <= columns; n += 32) all_rows<2>(a, rows, b, n / 16, steps, c + n, ldc, add);
    if (n < columns) all_rows<1>(a, rows, b, n / 16, steps, c + n, ldc, add);
  }

 private:
  template <int N>
  static void all_rows(const Factor& a, int rows, const Factor& b, int n, int steps, float* c, int ldc, bool add) {
    for (int m = 0; m < rows; m += kRows) {
      const bf16* left = a.data + size_t(m / 16) * a.next + size_t(m % 16) * size_t(a.row_bytes) / sizeof(bf16);
      block<N>(left, a, b.data + size_t(n) * b.next, b, steps, c + size_t(m) * ldc, ldc, add);
    }
  }

  static constexpr int kRows = 8;  // with two vectors of columns 16 sums, more than the latency of a dot hides

  template <int N>
  static void block(const bf16* left, const Factor& a, const bf16* right, const Factor& b, int steps, float* c, int ldc,
                    bool add) {
    const size_t a_row = size_t(a.row_bytes) / sizeof(bf16), b_row = size_t(b.row_bytes) / sizeof(bf16);
    __m512 acc[kRows][N];
    for (int m = 0; m < kRows; m++)
      for (int n = 0; n < N; n++) acc[m][n] = add ? Avx512::load(c + size_t(m) * ldc + 16 * n) : Avx512::zero();
    for (int s = 0; s < steps; s++, left += a.step, right += b.step)
      for (int p = 0; p < 16; p++) {
        __m512i columns[N];
        for (int n = 0; n < N; n++) columns[n] = Avx512::pairs(right + size_t(n) * b.next + size_t(p) * b_row);
        for (int m = 0; m < kRows; m++)
          for (int n = 0; n < N; n++) acc[m][n] = Avx512::dot_bf16(acc[m][n], columns[n], left + size_t(m) * a_row + 2 * p);
      }
    for (int m = 0; m < kRows; m++)
      for (int n = 0; n < N; n++) Avx512::store(c + size_t(m) * ldc + 16 * n, acc[m][n]);
  }
};

}  // namespace
}  // namespace nomoat
