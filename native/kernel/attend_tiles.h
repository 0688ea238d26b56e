#pragma once
// Attention by tile registers, the formulas of attend.h: factors in bf16, sums in float32.

#include "kernel/attend_bf16.h"
#include "kernel/tiles.h"
#include "quant/all.h"

namespace nomoat {
namespace {

// ---- forward ------------------------------------------------------------------------------------------------------------------

// 16 virtual rows at a time. A row adds its keys by 32s that begin at a multiple of 32, so that its bits do not depend on the
// rows taken with it.
class AttendTiles {
 public:
  explicit AttendTiles(const AttendArgs& args) : a(args) {}

  void run() {
    if (a.part == AttendPart::all || a.part == AttendPart::scores)
      each_block([&](const Rows& rows) {
        score(rows, a.part == AttendPart::all ? 0 : a.begin, a.part == AttendPart::all ? padded_ : a.end);
      });
    if (a.part == AttendPart::all || a.part == AttendPart::weights)
      each_block([&](const Rows& rows) {
        if (a.part == AttendPart::all || (a.begin <= rows.row && rows.row < a.end))
          for (int r = rows.row; r < rows.row + rows.count; r++)
            AttendRows<Avx512, bf16, 1>(a, r, padded_).weigh(rows.from, rows.to);
      });
    if (a.part == AttendPart::all) sum_values(0, a.dim);
    if (a.part == AttendPart::values) sum_values(a.begin, a.end);
  }

 private:
  static constexpr int kKeys = 128;  // whose values are paired at once: of 64 dimensions 16 KB

  // Virtual rows [row, row + count); any of them sees keys within [from, to), multiples of 16.
  struct Rows {
    int row, count, from, to;
  };

  const AttendArgs& a;
  const int padded_ = round_up(a.first_position + a.rows, 16), total_ = a.rows * a.heads;
  const int depth_ = a.dim % 32 ? 16 : 32;  // dimensions that a product of queries and keys takes
  TileShapes shapes_;
  int shaped_ = 0;
  alignas(64) bf16 left_[kTileRows * kMostHeadDim], values_[kKeys * 64];
  alignas(64) float sums_[kTileRows * 64];

  template <class Visit>
  void each_block(Visit&& visit) {
    for (int row = 0; row < total_; row += kTileRows) {
      const int count = total_ - row < kTileRows ? total_ - row : kTileRows;
      const int low = a.first_position + row / a.heads, high = a.first_position + (row + count - 1) / a.heads;
      visit(Rows{row, count, first_key(low, a.window) / 16 * 16, high / 16 * 16 + 16});
    }
  }

  // Tile registers: 0 to 3 sums; 4 and 6 queries and keys, 5 and 7 weights and values.
  void shape(int count) {
    if (count == shaped_) return;
    shaped_ = count;
    for (int i = 0; i < 4; i++) shapes_.set(i, count, 64);
    shapes_.set(4, count, 2 * depth_), shapes_.set(6, depth_ / 2, 64);
    shapes_.set(5, count, 64), shapes_.set(7, 16, 64);
    shapes_.use();
  }

  size_t at(int row) const { return virtual_row_at(row, a.heads, a.q_stride, a.dim); }
  float* scores(int row) const { return a.scratch + size_t(row) * padded_; }

  void score(const Rows& rows, int begin, int end) {
    shape(rows.count);
    for (int r = 0; r < rows.count; r++) to_bf16<Avx512>(a.q + at(rows.row + r), a.dim, left_ + size_t(r) * a.dim);
    settled();
    int key = begin > rows.from ? begin : rows.from;
    const int last = end < rows.to ? end : rows.to;
    for (; key + 64 <= last; key += 64) score_keys<4>(rows.row, key);
    for (; key < last; key += 16) score_keys<1>(rows.row, key);
    settled();
  }

  // N blocks of 16 keys
  template <int N>
  void score_keys(int row, int key) {
    const int row_bytes = a.dim * int(sizeof(bf16));
    const bf16* keys[N];
    unrolled<N>([&]<int n>() {
      const int at = key + 16 * n;
      keys[n] = reinterpret_cast<const bf16*>(a.k[at / kPageTokens]) + size_t(at % kPageTokens) * a.dim;
      zero_tile<n>();
    });
    for (int d = 0; d < a.dim; d += depth_) {
      load_tile<4>(left_ + d, row_bytes);
      unrolled<N>([&]<int n>() {
        load_tile<6>(keys[n] + 16 * d, 64);
        multiply_bf16<n, 4, 6>();
      });
    }
    for (int n = 0; n < N && row == 0; n++) fetch_values(a, key + 16 * n, sizeof(bf16));
    unrolled<N>([&]<int n>() { store_tile<n>(scores(row) + key + 16 * n, padded_ * int(sizeof(float))); });
  }

  void sum_values(int begin, int end) {
    for (int d = begin; d < end; d += 64) {
      if (end - d >= 64)
        sum_dimensions<4>(d);
      else if (end - d == 48)
        sum_dimensions<3>(d);
      else if (end - d == 32)
        sum_dimensions<2>(d);
      else
        sum_dimensions<1>(d);
    }
  }

  // N tiles of dimensions from `d` on.
  template <int N>
  void sum_dimensions(int d) {
    const int last = a.first_position + a.rows;
    for (int key = first_key(a.first_position, a.window) / kKeys * kKeys; key < last; key += kKeys) {
      const int end = key + kKeys < last ? key + kKeys : last;
      pair_values<N>(key, end, d);
      each_block([&](const Rows& rows) {
        if (rows.to <= key || end <= rows.from) return;
        shape(rows.count);
        const bool begins = rows.from >= key;
        if (!begins)
          for (int r = 0; r < rows.count; r++)
            std::memcpy(sums_ + r * 16 * N, a.out + at(rows.row + r) + d, size_t(16 * N) * sizeof(float));
        settled();
        unrolled<N>([&]<int n>() {
          if (begins)
            zero_tile<n>();
          else
            load_tile<n>(sums_ + 16 * n, 64 * N);
        });
        for (int k = key; k < end && k < rows.to; k += 32) {
          if (k + 32 <= rows.from) continue;
          for (int r = 0; r < rows.count; r++)
            for (int half = 0; half < 32; half += 16) {
              const bool seen = rows.from <= k + half && k + half < rows.to;
              Avx512::store_bf16(left_ + r * 32 + half, seen ? Avx512::load(scores(rows.row + r) + k + half) : Avx512::zero());
            }
          settled();
          load_tile<5>(left_, 64);
          unrolled<N>([&]<int n>() {
            load_tile<7>(values_ + size_t(k - key) * 16 * N + 32 * n, 64 * N);
            multiply_bf16<n, 5, 7>();
          });
        }
        unrolled<N>([&]<int n>() { store_tile<n>(sums_ + 16 * n, 64 * N); });
        settled();
        for (int r = 0; r < rows.count; r++) {
          const float factor = rows.to <= key + kKeys ? a.scratch[size_t(total_) * padded_ + size_t(rows.row + r)] : 1.0f;
          for (int i = 0; i < 16 * N; i += 16)
            Avx512::store(a.out + at(rows.row + r) + d + i,
                          Avx512::mul(Avx512::load(sums_ + r * 16 * N + i), Avx512::set1(factor)));
        }
      });
    }
  }

  // [key / 2][16 N dimensions][2] of keys [key, end), zero up to a multiple of 32: slots without a token may hold anything.
  template <int N>
  void pair_values(int key, int end, int d) {
    auto row = [&](int k) { return reinterpret_cast<const bf16*>(a.v[k / kPageTokens]) + size_t(k % kPageTokens) * a.dim + d; };
    auto wide = [](const bf16* x) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); };
    bf16* to = values_;
    int k = key;
    for (; k + 2 <= end; k += 2, to += 32 * N) {
      const bf16 *even = row(k), *odd = even + a.dim;  // on the same page
      unrolled<N>([&]<int n>() {
        const __m512i high = _mm512_slli_epi32(wide(odd + 16 * n), 16);
        _mm512_store_si512(to + 32 * n, _mm512_or_si512(wide(even + 16 * n), high));
      });
    }
    for (; k < round_up(end, 32); k += 2, to += 32 * N)
      unrolled<N>([&]<int n>() { _mm512_store_si512(to + 32 * n, k < end ? wide(row(k) + 16 * n) : _mm512_setzero_si512()); });
  }
};

void attend_tiles(const AttendArgs& args) { AttendTiles(args).run(); }

// ---- backward -----------------------------------------------------------------------------------------------------------------

// Products of LowBackward.
class TileProducts {
 public:
  TileProducts() {
    for (int i = 0; i < 8; i++) shapes_.set(i, kTileRows, 64);
    shapes_.use();
  }

  static void multiply(const Factor& a, int rows, const Factor& b, int columns, int steps, float* c, int ldc, bool add) {
    settled();
    const int last_m = rows / 16, last_n = columns / 16;
    for (int m = 0; m < last_m; m += 2)
      for (int n = 0; n < last_n; n += 2) {
        if (m + 2 <= last_m && n + 2 <= last_n)
          block<2, 2>(a, m, b, n, steps, c, ldc, add);
        else if (m + 2 <= last_m)
          block<2, 1>(a, m, b, n, steps, c, ldc, add);
        else if (n + 2 <= last_n)
          block<1, 2>(a, m, b, n, steps, c, ldc, add);
        else
          block<1, 1>(a, m, b, n, steps, c, ldc, add);
      }
    settled();
  }

 private:
  TileShapes shapes_;

  template <int M, int N>
  static void block(const Factor& a, int m, const Factor& b, int n, int steps, float* c, int ldc, bool add) {
    const int c_bytes = ldc * int(sizeof(float));
    const bf16 *left = a.data + size_t(m) * a.next, *right = b.data + size_t(n) * b.next;
    c += size_t(16) * m * ldc + 16 * n;
    // tile registers: 0 to 3 sums, 4 and 5 rows, 6 and 7 columns
    auto each = [&](auto visit) {
      visit.template operator()<0, 0>();
      if constexpr (N > 1) visit.template operator()<0, 1>();
      if constexpr (M > 1) visit.template operator()<1, 0>();
      if constexpr (M > 1 && N > 1) visit.template operator()<1, 1>();
    };
    each([&]<int i, int j>() {
      if (add)
        load_tile<2 * i + j>(c + size_t(16) * i * ldc + 16 * j, c_bytes);
      else
        zero_tile<2 * i + j>();
    });
    for (int s = 0; s < steps; s++, left += a.step, right += b.step) {
      load_tile<4>(left, a.row_bytes);
      if constexpr (M > 1) load_tile<5>(left + a.next, a.row_bytes);
      load_tile<6>(right, b.row_bytes);
      if constexpr (N > 1) load_tile<7>(right + b.next, b.row_bytes);
      each([&]<int i, int j>() { multiply_bf16<2 * i + j, 4 + i, 6 + j>(); });
    }
    each([&]<int i, int j>() { store_tile<2 * i + j>(c + size_t(16) * i * ldc + 16 * j, c_bytes); });
  }
};

}  // namespace
}  // namespace nomoat
