#pragma once
// Products with packed weights. V is a level's vector type: W lanes, a lane = one output row of a strip.

#include <algorithm>
#include <type_traits>

#include "kernel/table.h"
#include "quant/all.h"

namespace nomoat {
namespace {

// ---- int8 activations: decode and prefill share this loop, so a row's result does not depend on how many rows there are ----

// dot[l][m] = sum of the codes, less zero, of group `h` of a tile's columns times row m's activations, for L times W lanes from
// `first` on; exact. Two-digit activations are 128 * high + low, their low digits 32 bytes behind the high ones; D is kWords
// where they are int16. A granule is unpacked where it is needed and serves all rows and digits, and a row's activations all
// lanes: few registers hold it all.
template <class V, class Q, int M, int D, int L, int h>
inline void exact_dots(const uint8_t* plane, int first, const int8_t* const (&x)[M], const ActBlock* const (&blocks)[M],
                       typename V::I (&dot)[L][M]) {
  using I = typename V::I;
  constexpr int granules = 8 / Q::groups, digits = D == 2 ? 2 : 1;
  constexpr int most = D == kWords ? 8 : V::template run<Q::top>(), run = most < granules ? most : granules;
  I sum[L][M][digits], total[L][M][digits];
  unrolled<granules>([&]<int i>() {
    // The order of formats with one group is that of their planes: both nibbles of a byte after each other.
    constexpr int g = Q::groups == 2 ? granules * h + i : i / 2 + 4 * (i % 2);
    for (int l = 0; l < L; l++) {
      const typename V::B w = Q::template granule<V, g>(plane, first + l * V::W);
      for (int m = 0; m < M; m++)
        for (int d = 0; d < digits; d++) {
          I& s = sum[l][m][d];
          if constexpr (i % run == 0) s = V::iset1(0);
          if constexpr (D == kWords)
            s = V::dot_words(s, w, x[m] + 8 * g);
          else
            s = V::template dot<Q::top>(s, w, x[m] + d * kTileCols + 4 * g);
        }
    }
    if constexpr (i % run == run - 1)
      for (int l = 0; l < L; l++)
        for (int m = 0; m < M; m++)
          for (int d = 0; d < digits; d++) {
            const I part = D == kWords ? sum[l][m][d] : V::widen(sum[l][m][d]);
            total[l][m][d] = i < run ? part : V::iadd(total[l][m][d], part);
          }
  });
  constexpr int zero = D != kWords && Q::top > 127 ? 128 - V::kWideZero : Q::zero;
  for (int m = 0; m < M; m++) {
    const int sum_of_x = Q::groups == 2 ? blocks[m]->sum[h] : blocks[m]->sum[0] + blocks[m]->sum[1];
    for (int l = 0; l < L; l++) {
      dot[l][m] = D == 2 ? V::add_digit(total[l][m][digits - 1], total[l][m][0]) : total[l][m][0];
      if constexpr (zero != 0) dot[l][m] = V::iadd(dot[l][m], V::iset1(-zero * sum_of_x));
    }
  }
}

// Tiles and strips, of this matrix and of the next, lie one behind the other: what a step that uses `bytes` from `at` on fetches
// are as many, kAhead further on.
inline void fetch_ahead(const uint8_t* at, int bytes, const ReadOn& then) {
  const uint8_t* ahead = at + kAhead;
  if (then.next && ahead >= then.end) ahead = then.next + (ahead - then.end);
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(ahead + line, 0, 2);
}

// M rows x L times W lanes from `first` on. Integer dots are exact; each lane adds its 32-column blocks in order. `fetched`:
// bytes to fetch ahead with each tile.
template <class V, class Q, int M, int D, int L>
inline void i8_tile(const uint8_t* strip, int fetched, const ReadOn& then, int first, int tiles, const int8_t* q,
                    const ActBlock* blocks, float* y, int ldy, bool add) {
  using F = typename V::F;
  F acc[L][M];
  for (int l = 0; l < L; l++)
    for (int m = 0; m < M; m++) acc[l][m] = V::zero();
  for (int t = 0; t < tiles; t++) {
    const Tile tile = tile_of<Q>(strip, t);
    fetch_ahead(strip + size_t(t) * fetched, fetched, then);
    const int8_t* x[M];
    const ActBlock* block[M];
    for (int m = 0; m < M; m++) {
      x[m] = q + (size_t(m) * tiles + t) * kTileCols * code_bytes(D);
      block[m] = blocks + size_t(m) * tiles + t;
    }
    unrolled<Q::groups>([&]<int h>() {
      typename V::I dot[L][M];
      exact_dots<V, Q, M, D, L, h>(tile.plane, first, x, block, dot);
      for (int l = 0; l < L; l++) {
        const int lane = first + l * V::W;
        const F scale = Q::template scale<V>(tile, h, lane);
        for (int m = 0; m < M; m++)
          acc[l][m] = V::fma(V::from_i32(dot[l][m]), V::mul(scale, V::set1(block[m]->scale)), acc[l][m]);
        if constexpr (Q::has_min) {
          const F minimum = Q::template min<V>(tile, h, lane);
          for (int m = 0; m < M; m++) {
            const F total = Q::groups == 2 ? V::mul(V::set1(block[m]->scale), V::from_i32(V::iset1(block[m]->sum[h])))
                                           : V::set1(block[m]->scaled_sum);
            acc[l][m] = V::fma(minimum, total, acc[l][m]);
          }
        }
      }
    });
  }
  for (int l = 0; l < L; l++)
    for (int m = 0; m < M; m++) {
      float* at = y + size_t(m) * ldy + first + l * V::W;
      V::store(at, add ? V::add(V::load(at), acc[l][m]) : acc[l][m]);
    }
}

// Many rows: one vector of lanes at a time; two where there is one digit, and so half the accumulators. One or two rows: all
// lanes at once, so that the weights are read in one go.
template <class V, class Q, int D>
inline void i8_strip(const Matrix& w, int strip, const ReadOn& then, const int8_t* q, const ActBlock* blocks, int rows, float* y,
                     int ldy, bool add) {
  constexpr int L = D == 1 && kStripRows > V::W ? 2 : 1;
  const int tiles = w.tiles(), fetched = rows < V::kFetchRows ? 0 : int(w.strip_bytes) / tiles;
  auto run = [&]<int M, int Lanes>(int m, int lane) {
    i8_tile<V, Q, M, D, Lanes>(w.strip(strip), m == 0 && lane == 0 ? fetched : 0, then, lane, tiles,
                               q + size_t(m) * tiles * kTileCols * code_bytes(D), blocks + size_t(m) * tiles,
                               y + size_t(m) * ldy + strip * kStripRows, ldy, add);
  };
  const int many = rows / V::kIntRows * V::kIntRows;
  for (int lane = 0; lane < kStripRows; lane += L * V::W)
    for (int m = 0; m < many; m += V::kIntRows) run.template operator()<V::kIntRows, L>(m, lane);
  int m = many;
  for (; m + 2 <= rows; m += 2) run.template operator()<2, kStripRows / V::W>(m, 0);
  if (m < rows) run.template operator()<1, kStripRows / V::W>(m, 0);
}

template <class V>
void gemm_i8(const Matrix& w, int first, int last, const ReadOn& then, int digits, const int8_t* q, const ActBlock* blocks,
             int rows, float* y, int ldy, bool add) {
  constexpr int kRowBlock = 128;  // whose activations stay in a second-level cache of 512 KB
  with_format(w.format, [&](auto format) {
    using Q = decltype(format);
    if constexpr (Q::integer) {
      auto run = [&]<int D>() {
        for (int m = 0; m < rows; m += kRowBlock)
          for (int s = first; s < last; s++)
            i8_strip<V, Q, D>(w, s, then, q + size_t(m) * w.tiles() * kTileCols * code_bytes(D), blocks + size_t(m) * w.tiles(),
                              rows - m < kRowBlock ? rows - m : kRowBlock, y + size_t(m) * ldy, ldy, add);
      };
      if (digits == 1) run.template operator()<1>();
      if (digits == 2) run.template operator()<2>();
      if constexpr (V::kHasWords)
        if (digits == kWords) run.template operator()<kWords>();
    }
  });
}

// ---- float32 activations --------------------------------------------------------------------------------------------

template <class V, class Q, int M>
inline void float_tile(const uint8_t* strip, int lane, int tiles, const float* x, int ldx, float* y, int ldy, bool add) {
  typename V::F acc[M];
  for (int m = 0; m < M; m++) acc[m] = V::zero();
  for (int t = 0; t < tiles; t++)
    for (int c = 0; c < kTileCols; c++) {
      const typename V::F w = Q::template column<V>(tile_of<Q>(strip, t).plane, c, lane);
      for (int m = 0; m < M; m++) acc[m] = V::fma(w, V::set1(x[size_t(m) * ldx + t * kTileCols + c]), acc[m]);
    }
  for (int m = 0; m < M; m++) {
    float* at = y + size_t(m) * ldy;
    V::store(at, add ? V::add(V::load(at), acc[m]) : acc[m]);
  }
}

template <class V>
void gemm_float(const Matrix& w, int first, int last, const float* x, int ldx, int rows, float* y, int ldy, bool add) {
  with_format(w.format, [&](auto format) {
    using Q = decltype(format);
    if constexpr (!Q::integer) {
      for (int s = first; s < last; s++)
        for (int lane = 0; lane < kStripRows; lane += V::W) {
          float* at = y + s * kStripRows + lane;
          int m = 0;
          for (; m + 4 <= rows; m += 4)
            float_tile<V, Q, 4>(w.strip(s), lane, w.tiles(), x + size_t(m) * ldx, ldx, at + size_t(m) * ldy, ldy, add);
          for (; m < rows; m++)
            float_tile<V, Q, 1>(w.strip(s), lane, w.tiles(), x + size_t(m) * ldx, ldx, at + size_t(m) * ldy, ldy, add);
        }
    }
  });
}

// ---- panels: weights decoded for the training GEMM ----------------------------------------------------------------------

// What was stored before is in memory for what follows, of whatever type it reads it.
inline void settled() { __asm__ volatile("" ::: "memory"); }

// visit(j, lane, W[:, j], ... W[:, j + 3]) for the 16 columns of half a tile, four at a time and a vector of rows from `lane` on:
// bit-exact with the format's definition.
template <class V, class Q, int Half, class Visit>
inline void decode_half_tile(const Matrix& w, int strip, int tile, Visit&& visit) {
  using F = typename V::F;
  const Tile at = tile_of<Q>(w.strip(strip), tile);
  for (int lane = 0; lane < kStripRows; lane += V::W) {
    if constexpr (Q::integer) {
      constexpr int group = Q::groups == 2 ? Half : 0;
      const F scale = Q::template scale<V>(at, group, lane);
      F minimum = V::zero();
      if constexpr (Q::has_min) minimum = Q::template min<V>(at, group, lane);
      auto value = [&](F code) {
        if constexpr (Q::zero != 0) code = V::sub(code, V::set1(float(Q::zero)));
        const F product = V::mul(scale, code);
        if constexpr (Q::has_min)
          return V::add(product, minimum);
        else
          return product;
      };
      unrolled<4>([&]<int g>() {
        const typename V::B codes = Q::template granule<V, 4 * Half + g>(at.plane, lane);
        visit(4 * g, lane, value(V::template byte_to_f<0>(codes)), value(V::template byte_to_f<1>(codes)),
              value(V::template byte_to_f<2>(codes)), value(V::template byte_to_f<3>(codes)));
      });
    } else {
      auto column = [&](int j) { return Q::template column<V>(at.plane, 16 * Half + j, lane); };
      for (int j = 0; j < 16; j += 4) visit(j, lane, column(j), column(j + 1), column(j + 2), column(j + 3));
    }
  }
}

// Asks memory for a tile two strips further on, and for what its block shares if it is the first of it or of those that are read
// of a strip: panels need them soon.
template <class Q>
inline void fetch_tile(const Matrix& w, int strip, int tile, bool first) {
  constexpr int kStrips = 2;
  const Tile at = tile_of<Q>(w.strip(strip + kStrips), tile);
  for (int line = 0; line < Q::plane_bytes + Q::scale_bytes; line += 64) __builtin_prefetch(at.plane + line, 0, 3);
  if (first || at.index == 0)
    for (int line = 0; line < Q::shared_bytes; line += 64) __builtin_prefetch(at.shared + line, 0, 3);
}

inline bf16* panel_at(bf16* panel, int p, int c) { return panel + p * kPanelCols + 2 * c; }
inline float* panel_at(float* panel, int p, int c) { return panel + p * kPanelCols + c; }

// Rows p to p + 3 of a panel, p even.
template <class V>
inline void put_rows(bf16* panel, int p, int c, typename V::F w0, typename V::F w1, typename V::F w2, typename V::F w3) {
  V::store_bytes(panel_at(panel, p, c), V::pair_bf16(w0, w1));
  V::store_bytes(panel_at(panel, p + 2, c), V::pair_bf16(w2, w3));
}
template <class V>
inline void put_rows(float* panel, int p, int c, typename V::F w0, typename V::F w1, typename V::F w2, typename V::F w3) {
  V::store(panel_at(panel, p, c), w0);
  V::store(panel_at(panel, p + 1, c), w1);
  V::store(panel_at(panel, p + 2, c), w2);
  V::store(panel_at(panel, p + 3, c), w3);
}

template <class V, class T>
inline void put_zeros(T* panel, int p) {
  for (int j = 0; j < 16; j += 4)
    for (int lane = 0; lane < 16; lane += V::W) put_rows<V>(panel, p + j, lane, V::zero(), V::zero(), V::zero(), V::zero());
}

template <class V>
inline void put_column(bf16* column, typename V::F x) {
  V::store_bf16(column, x);
}
template <class V>
inline void put_column(float* column, typename V::F x) {
  V::store(column, x);
}

// Two strips: sixteen pairs of bf16.
constexpr int kPairRows = 2 * kStripRows;

// panel[p][c] = columns[c][p], a pair of bf16 as one word.
template <class V, class T>
inline void transpose_columns(const T (&columns)[16][kPairRows], T* panel) {
  constexpr int words = int(kPairRows * sizeof(T) / sizeof(float));
  const float* from = reinterpret_cast<const float*>(columns);
  float* to = reinterpret_cast<float*>(panel);
  settled();
  for (int p = 0; p < words; p += V::W)
    for (int c = 0; c < 16; c += V::W) V::transpose(from + c * words + p, words, to + p * kPanelCols + c, kPanelCols);
  settled();
}

template <class V, class Q, class T>
void fill_forward(const Matrix& w, int column, int panels, int from, int count, T* panel, size_t stride) {
  for (int c = 0; c < panels * kPanelCols; c += 16) {
    const int strip = (column + c) / kStripRows;
    T* own = panel_at(panel + size_t(c / kPanelCols) * stride, 0, c % kPanelCols);
    for (int p = 0; p < count; p += kTileCols) {
      const int tile = (from + p) / kTileCols;
      T* to = panel_at(own, p, 0);
      const bool inside = strip < w.strips() && tile < w.tiles();
      if (inside) fetch_tile<Q>(w, strip, tile, p == 0);
      unrolled<2>([&]<int Half>() {
        if (inside)
          decode_half_tile<V, Q, Half>(
              w, strip, tile, [&](int j, int lane, auto... columns) { put_rows<V>(to, 16 * Half + j, lane, columns...); });
        else
          put_zeros<V>(to, 16 * Half);
      });
    }
  }
}

// The panels' columns are the matrix's: all that is read of a strip is read before the next strip.
template <class V, class Q, class T>
void fill_backward(const Matrix& w, int column, int panels, int from, int count, T* panel, size_t stride) {
  alignas(64) T columns[16][kPairRows];
  for (int p = 0; p < count; p += kPairRows)
    for (int c = 0; c < panels * kPanelCols; c += 16) {
      const int half = (column + c) / 16, tile = half / 2;
      for (int row = 0; row < kPairRows; row += kStripRows) {
        const int strip = (from + p + row) / kStripRows;
        auto take = [&](int j, int lane, auto... values) {
          T* to = columns[j] + row + lane;
          ((put_column<V>(to, values), to += kPairRows), ...);
        };
        if (strip >= w.strips() || tile >= w.tiles()) {
          for (auto& own : columns) std::fill_n(own + row, kStripRows, T(0));
          continue;
        }
        if (half % 2 == 0 || c == 0) fetch_tile<Q>(w, strip, tile, c == 0);
        if (half % 2)
          decode_half_tile<V, Q, 1>(w, strip, tile, take);
        else
          decode_half_tile<V, Q, 0>(w, strip, tile, take);
      }
      transpose_columns<V>(columns, panel_at(panel + size_t(c / kPanelCols) * stride, p, c % kPanelCols));
    }
}

template <class V, class T>
void fill_panels(const Matrix& w, bool backward, int column, int panels, int from, int count, T* panel, size_t stride) {
  with_format(w.format, [&](auto format) {
    using Q = decltype(format);
    (backward ? fill_backward<V, Q, T> : fill_forward<V, Q, T>)(w, column, panels, from, count, panel, stride);
  });
}

// dst[j][i] = src[i][j], 16 x 16.
template <class V>
inline void transpose16(const float* src, int src_stride, float* dst) {
  for (int i = 0; i < 16; i += V::W)
    for (int j = 0; j < 16; j += V::W) V::transpose(src + i * src_stride + j, src_stride, dst + j * 16 + i, 16);
}

// block[p][c], 16 x 16, goes to rows p of a panel whose first column is `panel`.
template <class V, class T>
inline void put_block(const float* block, T* panel) {
  for (int p = 0; p < 16; p += 4)
    for (int c = 0; c < 16; c += V::W) {
      const float* at = block + 16 * p + c;
      put_rows<V>(panel, p, c, V::load(at), V::load(at + 16), V::load(at + 32), V::load(at + 48));
    }
}

// src[rows][cols] with row stride ld; rows and cols need not be multiples of 16.
template <class V, class T>
void fill_plain_panel(const float* src, int ld, int rows, int cols, bool backward, int column, int from, int count, T* panel) {
  alignas(64) float block[256], turned[256];
  for (int c = 0; c < kPanelCols; c += 16)
    for (int p = 0; p < count; p += 16) {
      const int row = backward ? from + p : column + c, col = backward ? column + c : from + p;
      for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++)
          block[16 * i + j] = row + i < rows && col + j < cols ? src[size_t(row + i) * ld + col + j] : 0.0f;
      if (!backward) transpose16<V>(block, 16, turned);
      put_block<V>(backward ? block : turned, panel_at(panel, p, c));
    }
}

template <class V>
void panels_bf16(const Matrix& w, bool backward, int column, int panels, int from, int count, bf16* panel, size_t stride) {
  fill_panels<V>(w, backward, column, panels, from, count, panel, stride);
}
template <class V>
void panels_f32(const Matrix& w, bool backward, int column, int panels, int from, int count, float* panel, size_t stride) {
  fill_panels<V>(w, backward, column, panels, from, count, panel, stride);
}
template <class V>
void plain_panel_bf16(const float* src, int ld, int rows, int cols, bool backward, int column, int from, int count, bf16* panel) {
  fill_plain_panel<V>(src, ld, rows, cols, backward, column, from, count, panel);
}
template <class V>
void plain_panel_f32(const float* src, int ld, int rows, int cols, bool backward, int column, int from, int count, float* panel) {
  fill_plain_panel<V>(src, ld, rows, cols, backward, column, from, count, panel);
}

// ---- the training GEMM: R rows x N vectors of accumulators, one broadcast of a feeds N products -----------------------------

// Sums are set and stored by unrolled calls: GCC unrolls a loop only after it has placed the array, then on the stack.
template <class V, int R, int N, class T>
inline void gemm_tile(const T* a, int lda, const T* panel, int count, float* c, bool add) {
  typename V::F acc[R][N];
  auto each = [&](auto&& visit) {
    unrolled<R>([&]<int r>() { unrolled<N>([&]<int n>() { visit(acc[r][n], c + r * kPanelCols + n * V::W); }); });
  };
  if (add)
    each([](auto& sum, const float* at) { sum = V::load(at); });
  else
    each([](auto& sum, const float*) { sum = V::zero(); });
  if constexpr (std::is_same_v<T, bf16>)
    for (int p = 0; p < count; p += 2) {
      typename V::Pairs b[N];
      for (int n = 0; n < N; n++) b[n] = V::pairs(panel + p * kPanelCols + 2 * n * V::W);
      for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) acc[r][n] = V::dot_bf16(acc[r][n], b[n], a + size_t(r) * lda + p);
    }
  else
    for (int p = 0; p < count; p++) {
      typename V::F b[N];
      for (int n = 0; n < N; n++) b[n] = V::load(panel + p * kPanelCols + n * V::W);
      for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) acc[r][n] = V::fma(V::set1(a[size_t(r) * lda + p]), b[n], acc[r][n]);
    }
  each([](auto& sum, float* at) { V::store(at, sum); });
}

// All rows of N vectors of columns.
template <class V, int N, class T>
inline void gemm_columns(const T* a, int lda, int rows, const T* panel, int count, float* c, bool add) {
  constexpr int R = V::kGemmRows;
  auto run = [&]<int M>(int m) { gemm_tile<V, M, N>(a + size_t(m) * lda, lda, panel, count, c + size_t(m) * kPanelCols, add); };
  int m = 0;
  for (; m + R <= rows; m += R) run.template operator()<R>(m);
  for (; m + 2 <= rows; m += 2) run.template operator()<2>(m);
  if (m < rows) run.template operator()<1>(m);
}

// Rows are taken in blocks that stay in the second-level cache (96 x 640 bf16 are 120 KB) while all columns pass over them, and
// the contraction in equal steps. A step ends with its sums stored and loaded again, so that long ones are better, though the
// panel of one (640 x 48 bf16 are 60 KB) comes from the second-level cache: 8 rows of bf16 need 8 bytes of it a cycle.
// Longer steps of float32 were not measured.
template <class V, class T>
inline void gemm_panel(const T* a, int lda, int rows, const T* panel, int count, int columns, float* c, bool add) {
  constexpr int N = V::kGemmVectors, kRowBlock = 12 * V::kGemmRows, kDepth = std::is_same_v<T, bf16> ? 640 : 256;
  const int parts = std::max(1, (count + kDepth - 1) / kDepth), depth = round_up((count + parts - 1) / parts, 2);
  for (int p = 0; p < count; p += depth)
    for (int begin = 0; begin < rows; begin += kRowBlock) {
      const int taken = std::min(kRowBlock, rows - begin), steps = std::min(depth, count - p);
      const T* from = a + size_t(begin) * lda + p;
      T* columns_of = const_cast<T*>(panel) + size_t(p) * kPanelCols;
      float* to = c + size_t(begin) * kPanelCols;
      int column = 0;
      for (; column + N * V::W <= columns; column += N * V::W)
        gemm_columns<V, N>(from, lda, taken, panel_at(columns_of, 0, column), steps, to + column, add || p > 0);
      for (; column < columns; column += V::W)
        gemm_columns<V, 1>(from, lda, taken, panel_at(columns_of, 0, column), steps, to + column, add || p > 0);
    }
}

template <class V>
void gemm_bf16(const bf16* a, int lda, int rows, const bf16* panel, int count, int columns, float* c, bool add) {
  gemm_panel<V>(a, lda, rows, panel, count, columns, c, add);
}
template <class V>
void gemm_f32(const float* a, int lda, int rows, const float* panel, int count, int columns, float* c, bool add) {
  gemm_panel<V>(a, lda, rows, panel, count, columns, c, add);
}

template <class V>
void write_sums(const float* c, int rows, int width, bool add, float* y, int ldy) {
  for (int m = 0; m < rows; m++, c += kPanelCols, y += ldy)
    for (int i = 0; i < width; i += V::W) V::store(y + i, add ? V::add(V::load(y + i), V::load(c + i)) : V::load(c + i));
}

template <class V>
void read_row(const Matrix& w, int row, float* out) {
  alignas(64) float block[256] = {};
  with_format(w.format, [&](auto format) {
    for (int tile = 0; tile < w.tiles(); tile++)
      unrolled<2>([&]<int Half>() {
        decode_half_tile<V, decltype(format), Half>(w, row / kStripRows, tile, [&](int j, int lane, auto... columns) {
          float* to = block + 16 * j + lane;
          ((V::store(to, columns), to += 16), ...);
        });
        for (int j = 0; j < 16; j++) out[kTileCols * tile + 16 * Half + j] = block[16 * j + row % kStripRows];
      });
  });
}

}  // namespace
}  // namespace nomoat
