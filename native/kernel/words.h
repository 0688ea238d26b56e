#pragma once
// Products of packed weights with many rows of int16 activations, for levels without an int8 dot that adds in 32 bits. One
// multiply-add takes two columns of any format; with two int8 digits narrow codes need as many and wide ones three times that.
// Integer sums are exact and each lane adds its 32-column blocks in order, so the bits are those of gemm_i8 with two digits.

#include "kernel/table.h"
#include "quant/all.h"

namespace nomoat {
namespace {

// A panel of 512 columns: 16 KB of codes and 4 KB of scales, which leave a 32 KB first-level cache to the rows of a tile.
constexpr int kPanelTiles = 16;
// Rows that pass by one panel before the next is unpacked: at 128 unpacking costs 2 %, and rows stay in a 512 KB second level.
constexpr int kWordRows = 128;

// One strip's columns of a few tiles, unpacked. A 32-bit lane of `codes` is a row and holds two of its columns, 4g and 4g + 2 or
// 4g + 1 and 4g + 3, less zero: the order in which quantize stores int16 activations.
struct WordPanel {
  alignas(64) int16_t codes[kPanelTiles][16][kStripRows][2];
  alignas(64) float scales[kPanelTiles * 2][kStripRows], mins[kPanelTiles * 2][kStripRows];
};

template <class V, class Q>
inline void fill_words(const Matrix& w, int strip, int tile, int count, WordPanel& panel) {
  const uint8_t *planes = w.strip(strip), *scales = planes + w.plane_section;
  for (int t = 0; t < count; t++)
    for (int lane = 0; lane < kStripRows; lane += V::W) {
      typename V::B codes[8];
      Q::template unpack<V>(planes + size_t(tile + t) * Q::plane_bytes, lane, codes);
      for (int g = 0; g < 8; g++) {
        V::store_bytes(panel.codes[t][2 * g][lane], V::template even_words<Q::zero>(codes[g]));
        V::store_bytes(panel.codes[t][2 * g + 1][lane], V::template odd_words<Q::zero>(codes[g]));
      }
      for (int h = 0; h < Q::groups; h++) {
        V::store(panel.scales[Q::groups * t + h] + lane, Q::template scale<V>(scales, tile + t, h, lane));
        if constexpr (Q::has_min) V::store(panel.mins[Q::groups * t + h] + lane, Q::template min<V>(scales, tile + t, h, lane));
      }
    }
}

// c[m][0..15] += the panel's columns of M rows, whose int16 and blocks are `tiles` tiles apart
template <class V, int Groups, bool HasMin, int M>
inline void word_tile(const WordPanel& panel, int count, const int16_t* q, const ActBlock* blocks, int tiles, float* c) {
  constexpr int N = kStripRows / V::W, steps = 16 / Groups;
  for (int t = 0; t < count; t++)
    for (int h = 0; h < Groups; h++) {
      typename V::I sum[M][N];
      for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) sum[m][n] = V::iset1(0);
      for (int p = steps * h; p < steps * (h + 1); p++) {
        typename V::B w[N];
        for (int n = 0; n < N; n++) w[n] = V::bytes(panel.codes[t][p][n * V::W]);
        for (int m = 0; m < M; m++) {
          const typename V::I x = V::broadcast(q + (size_t(m) * tiles + t) * kTileCols + 2 * p);
          for (int n = 0; n < N; n++) sum[m][n] = V::dot_words(sum[m][n], w[n], x);
        }
      }
      for (int m = 0; m < M; m++) {
        const ActBlock& b = blocks[size_t(m) * tiles + t];
        const typename V::F factor = V::set1(b.scale);
        const typename V::F total = Groups == 2 ? V::mul(factor, V::from_i32(V::iset1(b.sum[h]))) : V::set1(b.scaled_sum);
        for (int n = 0; n < N; n++) {
          float* at = c + m * kStripRows + n * V::W;
          const typename V::F scale = V::mul(V::load(panel.scales[Groups * t + h] + n * V::W), factor);
          typename V::F acc = V::fma(V::from_i32(sum[m][n]), scale, V::load(at));
          if constexpr (HasMin) acc = V::fma(V::load(panel.mins[Groups * t + h] + n * V::W), total, acc);
          V::store(at, acc);
        }
      }
    }
}

// y[m, 16s + r] (+)= as gemm_i8, for rows [0, rows) of at most kWordRows
template <class V, class Q>
inline void word_strip(const Matrix& w, int strip, const int16_t* q, const ActBlock* blocks, int rows, float* y, int ldy,
                       bool add) {
  const int tiles = w.tiles();
  alignas(64) WordPanel panel;
  alignas(64) float c[kWordRows][kStripRows] = {};
  for (int tile = 0; tile < tiles; tile += kPanelTiles) {
    const int count = tiles - tile < kPanelTiles ? tiles - tile : kPanelTiles;
    fill_words<V, Q>(w, strip, tile, count, panel);
    auto run = [&]<int M>(int m) {
      const size_t at = size_t(m) * tiles + tile;
      word_tile<V, Q::groups, Q::has_min, M>(panel, count, q + at * kTileCols, blocks + at, tiles, c[m]);
      return m + M;
    };
    int m = 0;
    while (m + 4 <= rows) m = run.template operator()<4>(m);
    if (m + 2 <= rows) m = run.template operator()<2>(m);
    if (m < rows) run.template operator()<1>(m);
  }
  for (int m = 0; m < rows; m++)
    for (int n = 0; n < kStripRows; n += V::W) {
      float* at = y + size_t(m) * ldy + strip * kStripRows + n;
      V::store(at, add ? V::add(V::load(at), V::load(c[m] + n)) : V::load(c[m] + n));
    }
}

template <class V>
void gemm_words(const Matrix& w, int first, int last, const int16_t* q, const ActBlock* blocks, int rows, float* y, int ldy,
                bool add) {
  with_format(w.format, [&](auto format) {
    using Q = decltype(format);
    if constexpr (Q::integer)
      for (int m = 0; m < rows; m += kWordRows)
        for (int s = first; s < last; s++)
          word_strip<V, Q>(w, s, q + size_t(m) * w.tiles() * kTileCols, blocks + size_t(m) * w.tiles(),
                           rows - m < kWordRows ? rows - m : kWordRows, y + size_t(m) * ldy, ldy, add);
  });
}

}  // namespace
}  // namespace nomoat
