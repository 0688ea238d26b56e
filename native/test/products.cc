// Products with packed weights: every format at every level against double sums, the scalar level and themselves.

#include <algorithm>
#include <cmath>

#include "quant/half.h"
#include "test/test.h"

namespace nomoat {

namespace {

constexpr int kRows = 37, kMost = 17;  // ragged output rows; the largest number of activation rows

// Activations as the kernels get them: rows padded to 32 columns.
struct Inputs {
  int rows, cols, digits, ld;
  Floats x;
  std::vector<int8_t> q;
  std::vector<ActBlock> blocks;

  Inputs(int m, int columns, int int8_digits, uint64_t seed)
      : rows(m), cols(columns), digits(int8_digits), ld(round_up(columns, 32)), x(size_t(m * ld)) {
    Random random(seed);
    for (int i = 0; i < m; i++)
      for (int c = 0; c < cols; c++) at(i, c) = random.below(20) ? random.uniform(-1, 1) : random.uniform(-30, 30);
    for (int c = 0; c < cols; c++) at(m / 2, c) = c % 2 ? -4.0f : 4.0f;  // a row at both ends of int8
    q.resize(x.size() * size_t(digits));
    blocks.resize(x.size() / kTileCols);
    quantize();
  }
  void quantize() {
    for (int i = 0; i < rows; i++) {
      const size_t row = size_t(i) * size_t(ld);
      scalar_kernels()->quantize(&x[row], ld, digits, &q[row * size_t(digits)], &blocks[row / kTileCols]);
    }
  }
  float& at(int row, int col) { return x[size_t(row) * size_t(ld) + size_t(col)]; }
  double rounded(int row, int col) const {
    const size_t i = size_t(row) * size_t(ld) + size_t(col), block = i / kTileCols;
    const int8_t* code = &q[block * kTileCols * size_t(digits) + i % kTileCols];
    return double(blocks[block].scale) * (digits == 1 ? code[0] : 128 * code[0] + code[kTileCols]);
  }
};

struct Sum {
  double value = 0, size = 0;  // sum of the products, sum of their sizes
};

Sum product(const Weights& w, const Inputs& in, int m, int n, bool int8) {
  Sum sum;
  for (int c = 0; c < w.cols && n < w.rows; c++) {
    const double x = int8 ? in.rounded(m, c) : double(in.x[size_t(m) * size_t(in.ld) + size_t(c)]);
    sum.value += w.at(n, c) * x;
    sum.size += w.sizes[size_t(n) * size_t(w.cols) + size_t(c)] * std::fabs(x);
  }
  return sum;
}

Floats multiply(const Kernels& k, const Weights& w, const Inputs& in, int first_row, int rows) {
  const int ld = w.matrix.strips() * kStripRows;
  const size_t from = size_t(first_row) * size_t(in.ld);
  Floats y(size_t(rows) * size_t(ld), 99.0f);
  if (is_float(w.format))
    k.gemm_float(w.matrix, 0, w.matrix.strips(), &in.x[from], in.ld, rows, y.data(), ld, false);
  else
    k.gemm_i8(w.matrix, 0, w.matrix.strips(), {}, in.digits, &in.q[from * size_t(in.digits)], &in.blocks[from / kTileCols], rows,
              y.data(), ld, false);
  return y;
}

// A tile's dot is exact in integers. A lane then rounds its factor (twice: scale * scale of the activations, and for the K
// formats d * scale), its product and the sum of each tile; some have two groups a tile, Q2_K with two mins. Float weights: one
// rounding a column.
double roundings(const Weights& w) { return is_float(w.format) ? w.cols + 1 : 4 * w.matrix.tiles() + 4; }

std::vector<int> digits_of(Format format) { return is_float(format) ? std::vector{1} : std::vector{1, 2}; }
int columns_of(Format format) { return is_float(format) ? 77 : block_of(format) == 32 ? 96 : 512; }

TEST("products: the scalar level against sums in double") {
  for (Format format : kFormats)
    for (int digits : digits_of(format)) {
      const Weights w = random_weights(format, kRows, columns_of(format), 11);
      const Inputs in(5, w.cols, digits, 12);
      const Floats y = multiply(*scalar_kernels(), w, in, 0, in.rows);
      const int ld = w.matrix.strips() * kStripRows;
      for (int m = 0; m < in.rows; m++)
        for (int n = 0; n < ld; n++) {
          const Sum exact = product(w, in, m, n, !is_float(format));
          const double found = y[size_t(m * ld + n)];
          CHECK(std::fabs(found - exact.value) <= roundings(w) * kRound * exact.size,
                "format %d, %d digits, [%d, %d]: %g, exact %g", int(format), digits, m, n, found, exact.value);
        }
    }
}

// `in` has two digits: the same numbers as int16, and their products.
Floats multiply_words(const Kernels& k, const Weights& w, const Inputs& in) {
  std::vector<int16_t> q(in.x.size());
  std::vector<ActBlock> blocks(in.blocks.size());
  auto* codes = reinterpret_cast<int8_t*>(q.data());
  for (size_t at = 0; at < in.x.size(); at += size_t(in.ld))
    k.quantize(&in.x[at], in.ld, kWords, codes + 2 * at, &blocks[at / kTileCols]);
  const int ld = w.matrix.strips() * kStripRows;
  Floats y(size_t(in.rows) * size_t(ld), 99.0f);
  k.gemm_i8(w.matrix, 0, w.matrix.strips(), {}, kWords, codes, blocks.data(), in.rows, y.data(), ld, false);
  return y;
}

TEST("products: int16 activations give the bits of two digits, for any number of rows") {
  for_levels([](const Kernels& k) {
    if (!k.words) return;
    for (Format format : kFormats)
      for (int rows : {1, 2, 3, 4, 5, 6, 7, 17}) {
        if (is_float(format)) continue;
        const Weights w = random_weights(format, kRows, columns_of(format), 17);
        const Inputs in(rows, w.cols, 2, 18);
        const Floats expected = multiply(k, w, in, 0, rows), y = multiply_words(k, w, in);
        CHECK(same_bits(y.data(), expected.data(), y.size() * sizeof(float)), "format %d, %d rows differ by %g", int(format),
              rows, distance(y.data(), expected.data(), y.size()));
      }
  });
}

void check_rows(const Kernels& k, const Weights& w, int digits) {
  const Inputs in(kMost, w.cols, digits, 14);
  const Floats expected = multiply(*scalar_kernels(), w, in, 0, kMost);
  for (int rows = 1; rows <= kMost; rows++) {
    const Floats y = multiply(k, w, in, 0, rows);
    CHECK(same_bits(y.data(), expected.data(), y.size() * sizeof(float)), "format %d, %d digits, %d rows differ by %g",
          int(w.format), digits, rows, distance(y.data(), expected.data(), y.size()));
  }
  const Floats last = multiply(k, w, in, kMost - 1, 1);
  CHECK(same_bits(last.data(), &expected[expected.size() - last.size()], last.size() * sizeof(float)),
        "format %d, %d digits: the last row alone is another", int(w.format), digits);
}

TEST("products: every level gives the scalar level's bits, for 1 to 17 rows at once") {
  for_levels([](const Kernels& k) {
    for (Format format : kFormats)
      for (int digits : digits_of(format)) check_rows(k, random_weights(format, kRows, columns_of(format), 13), digits);
  });
}

TEST("products: strips outside the range stay, and `add` adds") {
  for_levels([](const Kernels& k) {
    for (Format format : {Format::Q4_1, Format::Q2_K, Format::Q6_K, Format::F16}) {
      const Weights w = random_weights(format, 50, columns_of(format), 15);
      const Inputs in(3, w.cols, 2, 16);
      const Floats whole = multiply(k, w, in, 0, 3);
      const int ld = w.matrix.strips() * kStripRows;
      Floats y(whole.size(), 0.5f);
      if (is_float(format))
        k.gemm_float(w.matrix, 1, 3, in.x.data(), in.ld, 3, y.data(), ld, true);
      else
        k.gemm_i8(w.matrix, 1, 3, {}, in.digits, in.q.data(), in.blocks.data(), 3, y.data(), ld, true);
      for (size_t i = 0; i < y.size(); i++) {
        const int strip = int(i) % ld / kStripRows;
        const float expected = strip == 1 || strip == 2 ? 0.5f + whole[i] : 0.5f;
        CHECK(y[i] == expected, "format %d, strip %d: %g, expected %g", int(format), strip, double(y[i]), double(expected));
      }
    }
  });
}

// Makes every scale and min of a block a small whole number, most of them 1.
void unit_scales(Format format, uint8_t* block) {
  const auto one = [&](int at) { block[at] = 0x00, block[at + 1] = 0x3c; };
  switch (format) {
    case Format::Q5_1:
      one(0), one(2);
      break;
    case Format::Q2_K:
      std::fill_n(block, 16, uint8_t(0x21));  // scale 1, min 2
      one(80), one(82);
      break;
    case Format::Q3_K:
      std::fill_n(block + 96, 8, uint8_t(0x11));
      std::fill_n(block + 104, 4, uint8_t(0xaa));  // six bits: 33, less 32
      one(108);
      break;
    case Format::Q6_K:
      std::fill_n(block + 192, 16, uint8_t(1));
      one(208);
      break;
    case Format::IQ4_XS:
      std::fill_n(block + 2, 2, uint8_t(0xaa));
      std::fill_n(block + 4, 4, uint8_t(0x11));
      one(0);
      break;
    case Format::MXFP4:
      block[0] = 128;
      break;
    default:
      one(0);
  }
}

// All codes and all activations at their largest: 16-bit intermediate sums would saturate (maddubs) or overflow.
TEST("products: the largest codes with the largest activations are exact") {
  for (Format format : {Format::Q4_0, Format::Q5_1, Format::Q8_0, Format::Q2_K, Format::Q3_K, Format::Q6_K, Format::IQ4_NL,
                        Format::IQ4_XS, Format::MXFP4}) {
    for (int byte : {0xff, 0x00, 0x77, 0x7f, 0x80}) {
      Weights w = random_weights(format, 16, 256, 17);
      const size_t block = w.gguf.size() / (16 * 256 / size_t(block_of(format)));
      for (size_t b = 0; b < w.gguf.size(); b += block) {
        std::fill_n(w.gguf.begin() + long(b), block, uint8_t(byte));
        unit_scales(format, &w.gguf[b]);
      }
      pack_strips(w.matrix, w.gguf.data(), 0, 1, w.packed.data());
      Floats row(256);
      scalar_kernels()->read_row(w.matrix, 0, row.data());
      for (int sign : {2, 1, -1, -2}) {
        Inputs in(1, 256, std::abs(sign), 18);
        for (float& x : in.x) x = float(127 * sign);
        in.quantize();
        float exact = 0;  // integers below 2^24
        for (float value : row) exact += value * float(127 * sign);
        for_levels([&](const Kernels& k) {
          const Floats y = multiply(k, w, in, 0, 1);
          CHECK(y[0] == exact, "format %d, bytes 0x%02x: %g, expected %g", int(format), unsigned(byte), double(y[0]),
                double(exact));
        });
      }
    }
  }
}

// Panels of float32, or pairs of bf16 [p / 2][48][2].
float panel_value(const Floats& panel, int p, int c) { return panel[size_t(p * kPanelCols + c)]; }
float panel_value(const std::vector<bf16>& panel, int p, int c) {
  return bf16_to_float(panel[size_t(p / 2 * 2 * kPanelCols + 2 * c + p % 2)]);
}
float kept(const Floats&, float value) { return value; }
float kept(const std::vector<bf16>&, float value) { return bf16_to_float(float_to_bf16(value)); }

template <class T, class At>
void check_panel(const std::vector<T>& panel, int count, At at, const char* what) {
  for (int p = 0; p < count; p++)
    for (int c = 0; c < kPanelCols; c++)
      CHECK(panel_value(panel, p, c) == kept(panel, at(p, c)), "%s [%d, %d]: %g, expected %g", what, p, c,
            double(panel_value(panel, p, c)), double(kept(panel, at(p, c))));
}

// Two panels of 64 rows, one behind the other with a gap, which stays as it is.
template <class T, class Fill, class At>
void check_panels(Fill fill, At at, const char* what) {
  constexpr int count = 64, gap = 64, size = count * kPanelCols;
  std::vector<T> both(2 * size + gap, T(7));
  fill(both.data(), 2, count, size_t(size + gap));
  for (int i : {0, 1}) {
    const auto first = both.begin() + i * (size + gap);
    check_panel(std::vector<T>(first, first + size), count, [&](int p, int c) { return at(p, i * kPanelCols + c); }, what);
  }
  CHECK(std::all_of(both.begin() + size, both.begin() + size + gap, [](T x) { return x == T(7); }), "%s wrote behind it", what);
}

TEST("products: panels hold the weights by definition, both ways, zero outside") {
  for_levels([](const Kernels& k) {
    for (Format format : kFormats) {
      const Weights w = random_weights(format, 70, columns_of(format), 19);
      for (bool backward : {false, true})
        for (int column : {0, 48})
          for (int from : {0, 32}) {
            const auto at = [&](int p, int c) { return backward ? w.at(from + p, column + c) : w.at(column + c, from + p); };
            const auto fill = [&](auto panels) {
              return [&, panels](auto* to, int all, int count, size_t stride) {
                panels(w.matrix, backward, column, all, from, count, to, stride);
              };
            };
            check_panels<float>(fill(k.panels_f32), at, "panels_f32");
            check_panels<bf16>(fill(k.panels_bf16), at, "panels_bf16");
          }
    }
  });
}

TEST("products: panels of a plain matrix") {
  const int rows = 45, cols = 53, ld = 60;
  const Floats source = Random(20).floats(size_t(rows * ld));
  const auto value = [&](int row, int col) { return row < rows && col < cols ? source[size_t(row * ld + col)] : 0.0f; };
  for_levels([&](const Kernels& k) {
    for (bool backward : {false, true})
      for (int column : {0, 16, 48})
        for (int from : {0, 32}) {
          const auto at = [&](int p, int c) { return backward ? value(from + p, column + c) : value(column + c, from + p); };
          Floats wide(32 * kPanelCols);
          std::vector<bf16> low(32 * kPanelCols);
          k.plain_panel_f32(source.data(), ld, rows, cols, backward, column, from, 32, wide.data());
          k.plain_panel_bf16(source.data(), ld, rows, cols, backward, column, from, 32, low.data());
          check_panel(wide, 32, at, "plain_panel_f32");
          check_panel(low, 32, at, "plain_panel_bf16");
        }
  });
}

// c[m][48] = a[m][count] panel[count][48] in both element types.
struct Gemm {
  static constexpr int lda = 80, depth = 64;
  Floats a, b;
  std::vector<bf16> a_low, b_low;

  explicit Gemm(uint64_t seed) : a(kMost * lda), b(depth * kPanelCols), a_low(a.size()), b_low(b.size()) {
    Random random(seed);
    for (size_t i = 0; i < a.size(); i++) a[i] = bf16_to_float(a_low[i] = float_to_bf16(random.uniform(-1, 1)));
    for (int p = 0; p < depth; p++)
      for (int c = 0; c < kPanelCols; c++) {
        const bf16 low = float_to_bf16(random.uniform(-1, 1));
        b_low[size_t(p / 2 * 2 * kPanelCols + 2 * c + p % 2)] = low;
        b[size_t(p * kPanelCols + c)] = bf16_to_float(low);
      }
  }
  Floats run(const Kernels& k, bool low, int rows, int count) const {
    Floats c(size_t(rows * kPanelCols), 3.0f);
    part(k, low, rows, 0, count, c.data(), false);
    return c;
  }
  void part(const Kernels& k, bool low, int rows, int from, int count, float* c, bool add) const {
    if (low)
      k.gemm_bf16(a_low.data() + from, lda, rows, b_low.data() + from * kPanelCols, count, kPanelCols, c, add);
    else
      k.gemm_f32(a.data() + from, lda, rows, b.data() + from * kPanelCols, count, kPanelCols, c, add);
  }
};

TEST("products: panel products against sums in double, for 1 to 17 rows at once") {
  const Gemm gemm(21);
  for_levels([&](const Kernels& k) {
    for (bool low : {false, true})
      for (int count : {2, 16, 64}) {
        const Floats whole = gemm.run(k, low, kMost, count), scalar = gemm.run(*scalar_kernels(), low, kMost, count);
        // products of bf16 pairs: AVX-512 and tiles round and add in an order of their own, the others fuse
        const bool exact = !low || (k.level != Level::avx512 && k.level != Level::amx);
        CHECK(!exact || same_bits(whole, scalar), "count %d: other bits than the scalar level", count);
        for (int m = 0; m < kMost; m++)
          for (int c = 0; c < kPanelCols; c++) {
            Sum sum;
            for (int p = 0; p < count; p++) {
              const double term = double(gemm.a[size_t(m * Gemm::lda + p)]) * gemm.b[size_t(p * kPanelCols + c)];
              sum.value += term;
              sum.size += std::fabs(term);
            }
            const double found = whole[size_t(m * kPanelCols + c)];
            CHECK(std::fabs(found - sum.value) <= 2 * count * kRound * sum.size, "%s, count %d, [%d, %d]: %g, exact %g",
                  low ? "bf16" : "f32", count, m, c, found, sum.value);
          }
        for (int rows = 1; rows < kMost; rows++) {
          const Floats part = gemm.run(k, low, rows, count);
          CHECK(same_bits(part.data(), whole.data(), part.size() * sizeof(float)), "%d rows: other bits than %d rows", rows,
                kMost);
        }
      }
  });
}

TEST("products: a panel taken in two parts gives the bits of the whole; float32 panels may be of any depth") {
  const Gemm gemm(22);
  for_levels([&](const Kernels& k) {
    for (bool low : {false, true}) {
      Floats c(5 * kPanelCols, 3.0f);
      gemm.part(k, low, 5, 0, 32, c.data(), false);
      gemm.part(k, low, 5, 32, 32, c.data(), true);
      CHECK(same_bits(c, gemm.run(k, low, 5, 64)), "%s: 32 + 32 steps differ from 64", low ? "bf16" : "f32");
    }
    for (int count : {1, 3, 5, 17})
      CHECK(same_bits(gemm.run(k, false, 7, count), gemm.run(*scalar_kernels(), false, 7, count)), "depth %d", count);
  });
}

TEST("products: of a panel's columns only those asked for are computed") {
  const Gemm gemm(23);
  for_levels([&](const Kernels& k) {
    for (bool low : {false, true}) {
      const Floats whole = gemm.run(k, low, kMost, 64);
      for (int columns : {16, 32}) {
        Floats c(whole.size(), 3.0f);
        if (low)
          k.gemm_bf16(gemm.a_low.data(), Gemm::lda, kMost, gemm.b_low.data(), 64, columns, c.data(), false);
        else
          k.gemm_f32(gemm.a.data(), Gemm::lda, kMost, gemm.b.data(), 64, columns, c.data(), false);
        for (size_t i = 0; i < c.size(); i++)
          CHECK(c[i] == (int(i) % kPanelCols < columns ? whole[i] : 3.0f), "%d columns: [%d]", columns, int(i));
      }
    }
  });
}

}  // namespace

}  // namespace nomoat
