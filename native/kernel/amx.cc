// AVX-512 with tile products, AMX (Sapphire Rapids and later): the products of many rows. Those of few rows, and all else, are
// the AVX-512 level's.
// What tiles take as B is how a strip's granules and a bf16 panel lie anyway.

#include "kernel/attend_tiles.h"
#include "kernel/tiles.h"

namespace nomoat {

namespace {

struct Amx : Avx512 {
  static constexpr int kFetchRows = 1;
};

// ---- int8: exact dots, scaled and added in the order of gemm.h: the bits are those of every level ---------------------------

constexpr int kDepth = 32;      // of a strip's tiles, how many are unpacked at once: 16 KB
constexpr int kRowBlock = 128;  // as in gemm_i8

// What the first rows of a strip fetch ahead with each step: `bytes` a step from `at` on; the other rows none.
struct Ahead {
  const uint8_t* at;
  int bytes;
  const ReadOn& then;

  void fetch(int step) const { fetch_ahead(at + size_t(step) * bytes, bytes, then); }
};

// The weights of a strip as int8, and their scales.
template <class Q>
struct Unpacked {
  static constexpr int steps = kDepth * Q::groups;
  alignas(64) int8_t codes[kDepth][8][64];
  alignas(64) float scale[steps][16], min[Q::has_min ? steps : 1][16];

  void take(const uint8_t* strip, int from, int count) {
    for (int t = 0; t < count; t++) {
      const Tile tile = tile_of<Q>(strip, from + t);
      constexpr int zero = Q::top > 127 ? 128 : Q::zero;
      unrolled<8>([&]<int g>() {
        __m512i w = Q::template granule<Avx512, g>(tile.plane, 0);
        if constexpr (zero != 0) w = _mm512_sub_epi8(w, _mm512_set1_epi8(char(zero)));
        _mm512_store_si512(codes[t][g], w);
      });
      unrolled<Q::groups>([&]<int h>() {
        _mm512_store_ps(scale[t * Q::groups + h], Q::template scale<Avx512>(tile, h, 0));
        if constexpr (Q::has_min) _mm512_store_ps(min[t * Q::groups + h], Q::template min<Avx512>(tile, h, 0));
      });
    }
    settled();
  }
};

// acc[m] += the dots of a group of columns, scaled: as in i8_tile. Not a lambda, whose closure would keep acc in memory.
template <class Q, int D>
inline void scale_dots(const Unpacked<Q>& w, int step, const int32_t (&dots)[D][kTileRows][16], const ActBlock* blocks,
                       int stride, __m512 (&acc)[kTileRows]) {
  const __m512 factor = _mm512_load_ps(w.scale[step]), minimum = _mm512_load_ps(w.min[Q::has_min ? step : 0]);
  const ActBlock* block = blocks + step / Q::groups;
  for (int m = 0; m < kTileRows; m++, block += stride) {
    __m512i dot = _mm512_load_si512(dots[0][m]);
    if constexpr (D == 2) dot = Avx512::add_digit(_mm512_load_si512(dots[1][m]), dot);
    acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_mul_ps(factor, _mm512_set1_ps(block->scale)), acc[m]);
    if constexpr (Q::has_min) {
      const float total = Q::groups == 2 ? block->scale * float(block->sum[step % 2]) : block->scaled_sum;
      acc[m] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(total), acc[m]);
    }
  }
}

// sums[m][r] (+)= 16 rows of activations times `count` tiles of weights. A step is a group of columns with one scale; while the
// tile registers multiply those of one step, vectors scale and add those of the step before. `stride`: tiles of a row.
template <class Q, int D>
inline void i8_rows(const Unpacked<Q>& w, int count, const int8_t* q, const ActBlock* blocks, int stride, const Ahead& ahead,
                    float (*sums)[16], bool add) {
  constexpr int group_bytes = kTileCols / Q::groups;
  alignas(64) int32_t dots[2][D][kTileRows][16];
  const int last = count * Q::groups - 1, row_bytes = stride * kTileCols * D;
  auto multiply = [&]<int Turn>(int step) {  // tile registers: 0 to 3 dots, 4 and 5 activations, 6 and 7 weights
    if (step > last) return;
    const int8_t* x = q + size_t(step / Q::groups) * kTileCols * D + step % Q::groups * group_bytes;
    load_tile<6 + Turn>(w.codes[0][0] + size_t(step) * 16 * group_bytes, 64);
    load_tile<4>(x, row_bytes);
    zero_tile<2 * Turn>();
    multiply_int8<2 * Turn, 4, 6 + Turn>();
    if constexpr (D == 2) {
      load_tile<5>(x + kTileCols, row_bytes);
      zero_tile<2 * Turn + 1>();
      multiply_int8<2 * Turn + 1, 5, 6 + Turn>();
    }
  };
  auto store = [&]<int Turn>() {
    store_dots<2 * Turn>(dots[Turn][0]);
    if constexpr (D == 2) store_dots<2 * Turn + 1>(dots[Turn][D - 1]);
  };
  __m512 acc[kTileRows];
  for (int m = 0; m < kTileRows; m++) acc[m] = add ? _mm512_load_ps(sums[m]) : _mm512_setzero_ps();
  multiply.template operator()<0>(0);
  multiply.template operator()<1>(1);
  store.template operator()<0>();
  int step = 0;
  for (; step < last; step += 2) {
    ahead.fetch(step);
    multiply.template operator()<0>(step + 2);
    store.template operator()<1>();
    scale_dots<Q, D>(w, step, dots[0], blocks, stride, acc);
    ahead.fetch(step + 1);
    multiply.template operator()<1>(step + 3);
    store.template operator()<0>();
    scale_dots<Q, D>(w, step + 1, dots[1], blocks, stride, acc);
  }
  if (step == last) scale_dots<Q, D>(w, step, dots[0], blocks, stride, acc);
  for (int m = 0; m < kTileRows; m++) _mm512_store_ps(sums[m], acc[m]);
}

template <class Q, int D>
void i8_strips(const Matrix& w, int first, int last, const ReadOn& then, const int8_t* q, const ActBlock* blocks, int rows,
               float* y, int ldy, bool add) {
  alignas(64) float sums[kRowBlock][16];
  Unpacked<Q> unpacked;
  TileShapes shapes;
  for (int c = 0; c < 4; c++) shapes.set(c, kTileRows, 64);
  for (int a = 4; a < 6; a++) shapes.set(a, kTileRows, kTileCols / Q::groups);
  for (int b = 6; b < 8; b++) shapes.set(b, kTileCols / Q::groups / 4, 64);
  shapes.use();
  const int tiles = w.tiles(), step_bytes = int(w.strip_bytes) / (tiles * Q::groups);
  for (int begin = 0; begin < rows; begin += kRowBlock) {
    const int taken = rows - begin < kRowBlock ? rows - begin : kRowBlock;
    for (int s = first; s < last; s++) {
      const uint8_t* strip = w.strip(s);
      for (int from = 0; from < tiles; from += kDepth) {
        const int count = tiles - from < kDepth ? tiles - from : kDepth;
        unpacked.take(strip, from, count);
        for (int m = 0; m < taken; m += kTileRows) {
          const size_t at = size_t(begin + m) * tiles + from;
          const Ahead ahead{strip + size_t(from * Q::groups) * step_bytes, begin + m ? 0 : step_bytes, then};
          i8_rows<Q, D>(unpacked, count, q + at * kTileCols * D, blocks + at, tiles, ahead, sums + m, from > 0);
        }
      }
      for (int m = 0; m < taken; m++) {
        float* to = y + size_t(begin + m) * ldy + s * kStripRows;
        const __m512 sum = _mm512_load_ps(sums[m]);
        _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum) : sum);
      }
    }
  }
}

// Up to 15 rows are the AVX-512 level's: as fast there, without weights unpacked in memory.
void gemm_i8_tiles(const Matrix& w, int first, int last, const ReadOn& then, int digits, const int8_t* q, const ActBlock* blocks,
                   int rows, float* y, int ldy, bool add) {
  const int many = rows / kTileRows * kTileRows;
  if (many)
    with_format(w.format, [&](auto format) {
      using Q = decltype(format);
      if constexpr (Q::integer)
        (digits == 1 ? i8_strips<Q, 1> : i8_strips<Q, 2>)(w, first, last, then, q, blocks, many, y, ldy, add);
    });
  const size_t at = size_t(many) * w.tiles();
  if (many < rows)
    gemm_i8<Amx>(w, first, last, many ? ReadOn{} : then, digits, q + at * kTileCols * code_bytes(digits), blocks + at,
                 rows - many, y + size_t(many) * ldy, ldy, add);
}

// ---- bf16: a panel's pairs are tiles as they lie ------------------------------------------------------------------------------

// Up to 16 rows with `count` steps of the contraction, a multiple of what the shapes take at once; N tiles of columns.
template <int N>
inline void bf16_rows(const bf16* a, const bf16* next, int lda, const bf16* panel, int depth, int count, float* c, bool add) {
  constexpr int c_bytes = kPanelCols * int(sizeof(float)), panel_bytes = 2 * kPanelCols * int(sizeof(bf16));
  // tile registers: 0 to 2 sums, 3 rows, 4 to 6 columns
  if (add) {
    load_tile<0>(c, c_bytes);
    if constexpr (N > 1) load_tile<1>(c + 16, c_bytes);
    if constexpr (N > 2) load_tile<2>(c + 32, c_bytes);
  } else {
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
  }
  for (int p = 0; p < count; p += depth) {
    const bf16* columns = panel + size_t(p) * kPanelCols;
    for (int m = 0; m < kTileRows; m++) __builtin_prefetch(next + size_t(m) * lda + p, 0, 3);
    load_tile<3>(a + p, lda * int(sizeof(bf16)));
    load_tile<4>(columns, panel_bytes);
    multiply_bf16<0, 3, 4>();
    if constexpr (N > 1) {
      load_tile<5>(columns + 32, panel_bytes);
      multiply_bf16<1, 3, 5>();
    }
    if constexpr (N > 2) {
      load_tile<6>(columns + 64, panel_bytes);
      multiply_bf16<2, 3, 6>();
    }
  }
  store_tile<0>(c, c_bytes);
  if constexpr (N > 1) store_tile<1>(c + 16, c_bytes);
  if constexpr (N > 2) store_tile<2>(c + 32, c_bytes);
}

// A panel's pieces stay in the first-level cache while all rows pass: 288 x 48 bf16 are 27 of its 48 KB.
void gemm_bf16_tiles(const bf16* a, int lda, int rows, const bf16* panel, int count, int columns, float* c, bool add) {
  constexpr int kMostSteps = 288;
  settled();
  TileShapes shapes;  // set once for all pieces: it takes 0.1 microseconds
  auto run = [&]<int N>(int first, int last, int from, int depth, int steps) {
    if (first == last || !steps) return;
    const int height = last - first < kTileRows ? last - first : kTileRows;
    for (int i = 0; i < 3; i++) shapes.set(i, height, 64);
    shapes.set(3, height, 2 * depth);
    for (int i = 4; i < 7; i++) shapes.set(i, depth / 2, 64);
    shapes.use();
    const int pieces = round_up(steps, kMostSteps) / kMostSteps, piece = round_up((steps + pieces - 1) / pieces, depth);
    for (int p = from; p < from + steps; p += piece)
      for (int m = first; m < last; m += height) {
        const int taken = std::min(piece, from + steps - p);
        // the rows behind these, and after the last ones the first of the next piece
        const bf16* next = a + p + (m + 2 * height <= last ? size_t(m + height) * lda : size_t(first) * lda + taken);
        bf16_rows<N>(a + size_t(m) * lda + p, next, lda, panel + size_t(p) * kPanelCols, depth, taken, c + size_t(m) * kPanelCols,
                     add || p > 0);
      }
  };
  auto all = [&]<int N>() {
    const int whole = rows / kTileRows * kTileRows, deep = count / 32 * 32, rest = count - deep;
    run.template operator()<N>(0, whole, 0, 32, deep);
    run.template operator()<N>(0, whole, deep, rest, rest);
    run.template operator()<N>(whole, rows, 0, 32, deep);
    run.template operator()<N>(whole, rows, deep, rest, rest);
  };
  if (columns == 48) all.template operator()<3>();
  if (columns == 32) all.template operator()<2>();
  if (columns == 16) all.template operator()<1>();
  settled();
}

// ---- gradients of adapters: out[r, c] += sum_m u[m, r] x[m, c] ---------------------------------------------------------

// high[r][m] + low[r][m] = u[m][r] to 16 bits, for 16 ranks and 16 of the 32 rows; zero behind the last.
inline void split_turned(const float* u, int ldu, int ranks, int rows, bf16 (*high)[32], bf16 (*low)[32]) {
  alignas(64) float block[16][16], turned[16][16];
  const __mmask16 used = __mmask16((1u << ranks) - 1);
  for (int m = 0; m < 16; m++)
    _mm512_store_ps(block[m], m < rows ? _mm512_maskz_loadu_ps(used, u + size_t(m) * ldu) : _mm512_setzero_ps());
  Avx512::transpose(block[0], 16, turned[0], 16);
  for (int r = 0; r < 16; r++) {
    const __m512 x = _mm512_load_ps(turned[r]);
    Avx512::store_bf16(high[r], x);
    Avx512::store_bf16(low[r], Avx512::sub(x, Avx512::from_bf16(high[r])));
  }
}

// Rows of x as pairs, 32 columns in two tiles: of each eight columns four are in the first.
inline void pair_rows(const bf16* x, int ldx, __mmask32 columns, int rows, bf16 (*tiles)[16][32]) {
  for (int i = 0; i < 16; i++, x += 2 * size_t(ldx)) {
    const __m512i even = 2 * i < rows ? _mm512_maskz_loadu_epi16(columns, x) : _mm512_setzero_si512(),
                  odd = 2 * i + 1 < rows ? _mm512_maskz_loadu_epi16(columns, x + ldx) : _mm512_setzero_si512();
    _mm512_store_si512(tiles[0][i], _mm512_unpacklo_epi16(even, odd));
    _mm512_store_si512(tiles[1][i], _mm512_unpackhi_epi16(even, odd));
  }
}

void outer_bf16_tiles(const float* u, int ldu, int rank, const bf16* x, int ldx, int rows, int first, int last, float* out,
                      int ldo) {
  constexpr int kSteps = 32, kColumns = 64;
  alignas(64) bf16 high[16][kSteps], low[16][kSteps], pairs[4][16][kSteps];
  alignas(64) float sums[4][16][16];
  const __m512i in_order[] = {_mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23),
                              _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31)};
  TileShapes shapes;
  for (int i = 0; i < 8; i++) shapes.set(i, kTileRows, 64);
  shapes.use();
  for (int c = first; c < last; c += kColumns)
    for (int r = 0; r < rank; r += 16) {
      const int ranks = rank - r < 16 ? rank - r : 16;
      const uint64_t columns = last - c < kColumns ? (uint64_t(1) << (last - c)) - 1 : ~uint64_t(0);
      zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
      for (int m = 0; m < rows; m += kSteps) {
        const float* own = u + size_t(m) * ldu + r;
        split_turned(own, ldu, ranks, rows - m, high, low);
        split_turned(own + 16 * size_t(ldu), ldu, ranks, rows - m - 16, reinterpret_cast<bf16(*)[32]>(high[0] + 16),
                     reinterpret_cast<bf16(*)[32]>(low[0] + 16));
        pair_rows(x + size_t(m) * ldx + c, ldx, __mmask32(columns), rows - m, pairs);
        pair_rows(x + size_t(m) * ldx + c + 32, ldx, __mmask32(columns >> 32), rows - m, pairs + 2);
        settled();
        load_tile<4>(high, 64);
        load_tile<5>(low, 64);
        load_tile<6>(pairs[0], 64);
        multiply_bf16<0, 4, 6>(), multiply_bf16<0, 5, 6>();
        load_tile<7>(pairs[1], 64);
        multiply_bf16<1, 4, 7>(), multiply_bf16<1, 5, 7>();
        load_tile<6>(pairs[2], 64);
        multiply_bf16<2, 4, 6>(), multiply_bf16<2, 5, 6>();
        load_tile<7>(pairs[3], 64);
        multiply_bf16<3, 4, 7>(), multiply_bf16<3, 5, 7>();
      }
      store_tile<0>(sums[0], 64), store_tile<1>(sums[1], 64), store_tile<2>(sums[2], 64), store_tile<3>(sums[3], 64);
      settled();
      for (int i = 0; i < ranks; i++)
        for (int at = 0; at < kColumns && c + at < last; at += 16) {
          const __m512 sum = _mm512_permutex2var_ps(_mm512_load_ps(sums[at / 32 * 2][i]), in_order[at / 16 % 2],
                                                    _mm512_load_ps(sums[at / 32 * 2 + 1][i]));
          float* to = out + size_t(r + i) * ldo + c + at;
          const __mmask16 kept = __mmask16(columns >> at);
          _mm512_mask_storeu_ps(to, kept, _mm512_add_ps(_mm512_maskz_loadu_ps(kept, to), sum));
        }
    }
}

// Past the caches: these sums are read much later, and their lines need not be read to be written. Training x 1.08, where the
// third-level cache is not faster than memory.
void write_sums_past(const float* c, int rows, int width, bool add, float* y, int ldy) {
  if (add || uintptr_t(y) % 64) return write_sums<Amx>(c, rows, width, add, y, ldy);
  for (int m = 0; m < rows; m++, c += kPanelCols, y += ldy)
    for (int i = 0; i < width; i += 16) _mm512_stream_ps(y + i, _mm512_load_ps(c + i));
  _mm_sfence();
}

// ---- limits: the same products, their operands in the first-level cache ------------------------------------------------

int64_t peak_tiles(Peak what, int64_t steps) {
  if (what != Peak::int8 && what != Peak::bf16) return peak<Amx>(what, steps);
  constexpr int depth = 256;
  alignas(64) bf16 rows[kTileRows * depth], panel[depth * kPanelCols];
  alignas(64) float sums[kTileRows * kPanelCols];
  // From 1 to 2 in no order: a core that multiplies zeros takes less power, and is a third faster.
  uint32_t bits = 1;
  for (bf16& x : rows) x = bf16(0x3f80 + ((bits = bits * 1664525 + 1013904223) >> 25));
  for (bf16& x : panel) x = bf16(0x3f80 + ((bits = bits * 1664525 + 1013904223) >> 25));
  settled();
  TileShapes shapes;
  if (what == Peak::int8) {
    shapes.set(0, kTileRows, 64), shapes.set(1, kTileRows, 64);
    shapes.set(4, kTileRows, kTileCols), shapes.set(6, kTileCols / 4, 64), shapes.set(7, kTileCols / 4, 64);
    shapes.use();
    zero_tile<0>(), zero_tile<1>();
    for (int64_t i = 0; i < steps; i++) {
      load_tile<4>(rows, kTileCols);
      load_tile<6>(panel, 64);
      multiply_int8<0, 4, 6>();
      load_tile<7>(panel + 256, 64);
      multiply_int8<1, 4, 7>();
    }
    return steps * 2 * kTileRows * 16 * kTileCols;
  }
  for (int i = 0; i < 7; i++) shapes.set(i, kTileRows, 64);
  shapes.use();
  for (int64_t i = 0; i < steps; i++) bf16_rows<3>(rows, rows, depth, panel, 32, depth, sums, false);
  look_at(sums);
  return steps * kTileRows * kPanelCols * depth;
}

constexpr Kernels make_tile_kernels() {
  Kernels k = make_kernels<Amx>(Level::amx);
  k.gemm_i8 = gemm_i8_tiles;
  k.gemm_bf16 = gemm_bf16_tiles;
  k.outer_bf16 = outer_bf16_tiles;
  k.write_sums = write_sums_past;
  k.attend_bf16 = attend_tiles;
  k.attend_backward_bf16 = attend_backward_low<TileProducts>;
  k.peak = peak_tiles;
  return k;
}

constexpr Kernels kTable = make_tile_kernels();

}  // namespace

const Kernels* amx_kernels() { return &kTable; }

}  // namespace nomoat
