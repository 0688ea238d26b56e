#pragma once
// Products with packed weights. V is a level's vector type: W lanes, a lane = one output row of a strip.

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

// Few rows wait for memory, and the hardware's prefetcher starts anew at every 4 KB page. Planes, scales and the strips, of this
// matrix and of the next, lie one behind the other: with each tile, as many bytes as it has are asked for kAhead further on.
//
// What a step that uses `bytes` from `at` on fetches: as many, kAhead further on.
inline void fetch_ahead(const uint8_t* at, int bytes, const ReadOn& then) {
  const uint8_t* ahead = at + kAhead;
  if (then.next && ahead >= then.end) ahead = then.next + (ahead - then.end);
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(ahead + line, 0, 2);
}

// M rows x L times W lanes from `first` on. Integer dots are exact; each lane adds its 32-column blocks in order. `fetched`:
// bytes to fetch ahead with each tile.
template <class V, class Q, int M, int D, int L>
inline void i8_tile(const uint8_t* planes, const uint8_t* scales, int fetched, const ReadOn& then, int first, int tiles,
                    const int8_t* q, const ActBlock* blocks, float* y, int ldy, bool add) {
  using F = typename V::F;
  F acc[L][M];
  for (int l = 0; l < L; l++)
    for (int m = 0; m < M; m++) acc[l][m] = V::zero();
  for (int t = 0; t < tiles; t++) {
    const uint8_t* plane = planes + size_t(t) * Q::plane_bytes;
    fetch_ahead(planes + size_t(t) * fetched, fetched, then);
    const int8_t* x[M];
    const ActBlock* block[M];
    for (int m = 0; m < M; m++) {
      x[m] = q + (size_t(m) * tiles + t) * kTileCols * code_bytes(D);
      block[m] = blocks + size_t(m) * tiles + t;
    }
    unrolled<Q::groups>([&]<int h>() {
      typename V::I dot[L][M];
      exact_dots<V, Q, M, D, L, h>(plane, first, x, block, dot);
      for (int l = 0; l < L; l++) {
        const int lane = first + l * V::W;
        const F scale = Q::template scale<V>(scales, t, h, lane);
        for (int m = 0; m < M; m++)
          acc[l][m] = V::fma(V::from_i32(dot[l][m]), V::mul(scale, V::set1(block[m]->scale)), acc[l][m]);
        if constexpr (Q::has_min) {
          const F minimum = Q::template min<V>(scales, t, h, lane);
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
  const uint8_t *planes = w.strip(strip), *scales = planes + w.plane_section;
  const int tiles = w.tiles(), tile_bytes = int(w.strip_bytes) / tiles;
  auto run = [&]<int M, int Lanes>(int m, int lane) {
    i8_tile<V, Q, M, D, Lanes>(planes, scales, m == 0 && lane == 0 ? tile_bytes : 0, then, lane, tiles,
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
inline void float_tile(const uint8_t* planes, int lane, int tiles, const float* x, int ldx, float* y, int ldy, bool add) {
  typename V::F acc[M];
  for (int m = 0; m < M; m++) acc[m] = V::zero();
  for (int t = 0; t < tiles; t++)
    for (int c = 0; c < kTileCols; c++) {
      const typename V::F w = Q::template column<V>(planes + size_t(t) * Q::plane_bytes, c, lane);
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

// out[j][r] = W[16s + r, 16h + j]: half a tile as float32, bit-exact with the format's definition.
template <class V, class Q>
inline void decode_half_tile(const Matrix& w, int strip, int half, float* out) {
  const uint8_t *planes = w.strip(strip), *scales = planes + w.plane_section;
  const int tile = half / 2, first = 16 * (half % 2);
  const uint8_t* plane = planes + size_t(tile) * Q::plane_bytes;
  for (int lane = 0; lane < kStripRows; lane += V::W) {
    if constexpr (Q::integer) {
      using F = typename V::F;
      typename V::B codes[8];
      unpack<V, Q>(plane, lane, codes);
      const int group = Q::groups == 2 ? half % 2 : 0;
      const F scale = Q::template scale<V>(scales, tile, group, lane);
      F minimum = V::zero();
      if constexpr (Q::has_min) minimum = Q::template min<V>(scales, tile, group, lane);
      const F zero = V::set1(float(Q::zero));
      auto put = [&](int j, F code) {
        F value = V::mul(scale, V::sub(code, zero));
        if constexpr (Q::has_min) value = V::add(value, minimum);
        V::store(out + 16 * j + lane, value);
      };
      for (int g = 0; g < 4; g++) {
        const typename V::B granule = codes[first / 4 + g];
        put(4 * g, V::template byte_to_f<0>(granule));
        put(4 * g + 1, V::template byte_to_f<1>(granule));
        put(4 * g + 2, V::template byte_to_f<2>(granule));
        put(4 * g + 3, V::template byte_to_f<3>(granule));
      }
    } else {
      for (int j = 0; j < 16; j++) V::store(out + 16 * j + lane, Q::template column<V>(plane, first + j, lane));
    }
  }
}

// dst[j][i] = src[i][j], 16 x 16.
template <class V>
inline void transpose16(const float* src, int src_stride, float* dst) {
  for (int i = 0; i < 16; i += V::W)
    for (int j = 0; j < 16; j += V::W) V::transpose(src + i * src_stride + j, src_stride, dst + j * 16 + i, 16);
}

// block[p][c], 16 x 16, goes to rows p of a panel whose first column is `panel`.
template <class V>
inline void put_block(const float* block, int stride, bf16* panel) {
  for (int p = 0; p < 16; p += 2)
    for (int c = 0; c < 16; c += V::W)
      V::store_bytes(panel + p * kPanelCols + 2 * c,
                     V::pair_bf16(V::load(block + p * stride + c), V::load(block + (p + 1) * stride + c)));
}

template <class V>
inline void put_block(const float* block, int stride, float* panel) {
  for (int p = 0; p < 16; p++)
    for (int c = 0; c < 16; c += V::W) V::store(panel + p * kPanelCols + c, V::load(block + p * stride + c));
}

inline bf16* panel_at(bf16* panel, int p, int c) { return panel + p * kPanelCols + 2 * c; }
inline float* panel_at(float* panel, int p, int c) { return panel + p * kPanelCols + c; }

template <class V, class T>
void fill_panel(const Matrix& w, bool backward, int column, int from, int count, T* panel) {
  const int strips = w.strips(), halves = 2 * w.tiles();
  with_format(w.format, [&](auto format) {
    using Q = decltype(format);
    alignas(64) float block[256], turned[256];
    for (int c = 0; c < kPanelCols; c += 16)
      for (int p = 0; p < count; p += 16) {
        const int strip = (backward ? from + p : column + c) / 16, half = (backward ? column + c : from + p) / 16;
        const float* source = block;
        if (strip >= strips || half >= halves) {
          for (float& x : block) x = 0;
        } else {
          decode_half_tile<V, Q>(w, strip, half, block);
          if (backward) {
            transpose16<V>(block, 16, turned);
            source = turned;
          }
        }
        put_block<V>(source, 16, panel_at(panel, p, c));
      }
  });
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
      put_block<V>(backward ? block : turned, 16, panel_at(panel, p, c));
    }
}

template <class V>
void panel_bf16(const Matrix& w, bool backward, int column, int from, int count, bf16* panel) {
  fill_panel<V>(w, backward, column, from, count, panel);
}
template <class V>
void panel_f32(const Matrix& w, bool backward, int column, int from, int count, float* panel) {
  fill_panel<V>(w, backward, column, from, count, panel);
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

template <class V, int R, int N>
inline void gemm_tile(const bf16* a, int lda, const bf16* panel, int count, float* c, bool add) {
  typename V::F acc[R][N];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) acc[r][n] = add ? V::load(c + r * kPanelCols + n * V::W) : V::zero();
  for (int p = 0; p < count; p += 2) {
    typename V::Pairs b[N];
    for (int n = 0; n < N; n++) b[n] = V::pairs(panel + p * kPanelCols + 2 * n * V::W);
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) acc[r][n] = V::dot_bf16(acc[r][n], b[n], a + size_t(r) * lda + p);
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) V::store(c + r * kPanelCols + n * V::W, acc[r][n]);
}

template <class V, int R, int N>
inline void gemm_tile(const float* a, int lda, const float* panel, int count, float* c, bool add) {
  typename V::F acc[R][N];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) acc[r][n] = add ? V::load(c + r * kPanelCols + n * V::W) : V::zero();
  for (int p = 0; p < count; p++) {
    typename V::F b[N];
    for (int n = 0; n < N; n++) b[n] = V::load(panel + p * kPanelCols + n * V::W);
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) acc[r][n] = V::fma(V::set1(a[size_t(r) * lda + p]), b[n], acc[r][n]);
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) V::store(c + r * kPanelCols + n * V::W, acc[r][n]);
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

// Rows are taken in blocks that stay in the second-level cache (72 x 256 float32 are 72 KB) while all columns pass over them.
template <class V, class T>
inline void gemm_panel(const T* a, int lda, int rows, const T* panel, int count, int columns, float* c, bool add) {
  constexpr int N = V::kGemmVectors, kRowBlock = 12 * V::kGemmRows;
  for (int begin = 0; begin < rows; begin += kRowBlock) {
    const int taken = rows - begin < kRowBlock ? rows - begin : kRowBlock;
    const T* from = a + size_t(begin) * lda;
    float* to = c + size_t(begin) * kPanelCols;
    int column = 0;
    for (; column + N * V::W <= columns; column += N * V::W)
      gemm_columns<V, N>(from, lda, taken, panel_at(const_cast<T*>(panel), 0, column), count, to + column, add);
    for (; column < columns; column += V::W)
      gemm_columns<V, 1>(from, lda, taken, panel_at(const_cast<T*>(panel), 0, column), count, to + column, add);
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
void read_row(const Matrix& w, int row, float* out) {
  alignas(64) float block[256] = {};
  with_format(w.format, [&](auto format) {
    for (int half = 0; half < 2 * w.tiles(); half++) {
      decode_half_tile<V, decltype(format)>(w, row / 16, half, block);
      for (int j = 0; j < 16; j++) out[16 * half + j] = block[16 * j + row % 16];
    }
  });
}

}  // namespace
}  // namespace nomoat
