#pragma once
// Products of many rows by panels: 48 columns of weights decoded to bf16 or float32, for op/linear.cc.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "op/engine.h"

namespace nomoat {
namespace {

// Contraction steps of one panel: 256 x 48 bf16 are 24 KB, which leave half of a 48 KB first-level cache to the rows.
constexpr int kPanelDepth = 256;

// The kernels, and what they take of the activations, whose factors are T: bf16 or float.
template <class T>
struct Ops {
  static auto panel() { return pick(kernels().panel_bf16, kernels().panel_f32); }
  static auto plain_panel() { return pick(kernels().plain_panel_bf16, kernels().plain_panel_f32); }
  static auto gemm() { return pick(kernels().gemm_bf16, kernels().gemm_f32); }
  static auto outer() { return pick(kernels().outer_bf16, kernels().outer_f32); }
  static const T* of(const Activations& x) { return pick(x.low, x.f32); }

 private:
  template <class Low, class Wide>
  static auto pick(Low low, Wide wide) {
    if constexpr (std::is_same_v<T, bf16>)
      return low;
    else
      return wide;
  }
};

// c[m, :] += sum_p a[m, p] W[:, p], or W[p, :] when backward
template <class T>
struct Term {
  const Matrix* w;
  const T* a;
  int lda;
};

// c[m, :] += sum_r u[m, r] b[r, :] for rows [first, last) of all; b has `cols` columns
struct LowRank {
  const float *u, *b;
  int ldu, ldb, rank, cols, first, last;
};

// Sums over terms that are written to the same columns of y.
template <class T>
struct PanelProduct {
  std::vector<Term<T>> terms;
  std::vector<LowRank> low;
  bool backward, add;
  int rows, cols;  // of y; columns beyond `cols` become zero
  float* y;
  int ldy;
};

// Rows that meet all panels of a task before the next ones do: 128 x 1,536 bf16 are 384 KB.
constexpr int kRowBlock = 128;
// Bytes of panels decoded at once, to stay in a second-level cache beside them.
constexpr int kDecoded = 384 << 10;

// Panels as one task decodes and multiplies them. The sums of a row do not depend on which panels or rows are taken together.
template <class T>
class PanelTask {
 public:
  PanelTask(const PanelProduct<T>& product, Buffer& scratch) : p(product) {
    for (const Term<T>& term : p.terms) {
      const int depth = p.backward ? term.w->strips() * kStripRows : term.w->tiles() * kTileCols;
      for (int from = 0; from < depth; from += kPanelDepth) pieces_.push_back({&term, from, std::min(kPanelDepth, depth - from)});
    }
    taken_ = std::clamp(int(kDecoded / (kPiece * sizeof(T))), 1, int(pieces_.size()));
    together_ = int(pieces_.size()) > taken_ ? 1 : std::max(1, int(kDecoded / (kPiece * sizeof(T))) / taken_);
    for (const LowRank& low : p.low) low_floats_ += size_t(round_up(low.rank, 16)) * kPanelCols;
    const size_t decoded = size_t(together_) * size_t(taken_) * kPiece * sizeof(T) / sizeof(float);
    sums_ = scratch.get<float>(decoded + size_t(together_) * low_floats_ + size_t(round_up(p.rows, kRowBlock)) * kPanelCols);
    panels_ = reinterpret_cast<T*>(sums_ + size_t(round_up(p.rows, kRowBlock)) * kPanelCols);
    low_ = reinterpret_cast<float*>(panels_ + size_t(together_) * size_t(taken_) * kPiece);
  }

  // Columns [column, last) of y.
  void run(int column, int last) {
    for (; column < last; column += together_ * kPanelCols) {
      const int end = std::min(last, column + together_ * kPanelCols);
      for (int c = column, i = 0; c < end; c += kPanelCols, i++) take_low(c, i);
      for (size_t begin = 0; begin < pieces_.size(); begin += size_t(taken_)) {
        const size_t count = std::min(size_t(taken_), pieces_.size() - begin);
        for (int c = column, i = 0; c < end; c += kPanelCols, i++)
          for (size_t k = 0; k < count; k++) {
            const Piece& piece = pieces_[begin + k];
            Ops<T>::panel()(*piece.term->w, p.backward, c, piece.from, piece.count, panel(i, k));
          }
        const bool complete = begin + count == pieces_.size();
        for (int row = 0; row < p.rows; row += kRowBlock)
          for (int c = column, i = 0; c < end; c += kPanelCols, i++) {
            const int rows = std::min(kRowBlock, p.rows - row);
            float* sums = begin == 0 && complete ? sums_ : sums_ + size_t(row) * kPanelCols;
            for (size_t k = 0; k < count; k++) {
              const Piece& piece = pieces_[begin + k];
              Ops<T>::gemm()(piece.term->a + size_t(row) * piece.term->lda + piece.from, piece.term->lda, rows, panel(i, k),
                             piece.count, kPanelCols, sums, begin + k > 0);
            }
            if (complete) put(c, i, row, rows, sums);
          }
      }
    }
  }

  // Columns [column, last) of y by int8 products with two digits, in place of the only term's.
  void run_int8(const Activations& x, int column, int last) {
    for (; column < last; column += kPanelCols) {
      take_low(column, 0);
      Matrix own = *p.terms[0].w;
      own.data = own.strip(column / kStripRows);
      own.rows = std::min(kPanelCols, own.rows - column);
      if (own.strips() * kStripRows < kPanelCols) std::fill_n(sums_, size_t(x.rows) * kPanelCols, 0.0f);
      kernels().gemm_i8(own, 0, own.strips(), {}, x.digits, x.q, x.blocks, x.rows, sums_, kPanelCols, false);
      put(column, 0, 0, x.rows, sums_);
    }
  }

 private:
  static constexpr int kPiece = kPanelDepth * kPanelCols;
  struct Piece {
    const Term<T>* term;
    int from, count;
  };

  const PanelProduct<T>& p;
  std::vector<Piece> pieces_;
  int taken_, together_;  // pieces decoded at once, and panels: several only where all pieces of each are
  size_t low_floats_ = 0;
  float* sums_;
  T* panels_;
  float* low_;

  T* panel(int index, size_t piece) { return panels_ + (size_t(index) * size_t(taken_) + piece) * kPiece; }

  void take_low(int column, int index) {
    float* to = low_ + size_t(index) * low_floats_;
    for (const LowRank& low : p.low) {
      const int depth = round_up(low.rank, 16);
      kernels().plain_panel_f32(low.b, low.ldb, low.rank, low.cols, true, column, 0, depth, to);
      to += size_t(depth) * kPanelCols;
    }
  }

  // Adds the adapters of rows [row, row + rows) and writes them.
  void put(int column, int index, int row, int rows, float* sums) {
    const float* b = low_ + size_t(index) * low_floats_;
    for (const LowRank& low : p.low) {
      const int first = std::max(row, low.first), last = std::min(row + rows, low.last);
      if (first < last)
        kernels().gemm_f32(low.u + size_t(first) * low.ldu, low.ldu, last - first, b, low.rank, kPanelCols,
                           sums + size_t(first - row) * kPanelCols, true);
      b += size_t(round_up(low.rank, 16)) * kPanelCols;
    }
    const int width = std::min(kPanelCols, p.ldy - column);
    for (int m = 0; m < rows; m++) {
      float* y = p.y + size_t(row + m) * p.ldy + column;
      const float* own = sums + size_t(m) * kPanelCols;
      if (p.add)
        for (int i = 0; i < width; i++) y[i] += own[i];
      else
        std::memcpy(y, own, size_t(width) * sizeof(float));
    }
    if (!p.add && column + kPanelCols >= p.cols) clear_padding(p.y + size_t(row) * p.ldy, rows, column + width, p.ldy);
  }
};

// All of them on all threads, neighbouring panels as one task where there are enough.
template <class T>
void multiply_panels(Engine& engine, const std::vector<PanelProduct<T>>& products, const Activations* int8) {
  struct Task {
    const PanelProduct<T>* product;
    int column, last;
  };
  constexpr int kMost = 4;
  int all = 0;
  for (const PanelProduct<T>& p : products) all += (p.cols + kPanelCols - 1) / kPanelCols;
  const int width = std::clamp(all / (2 * threads()), 1, kMost) * kPanelCols;
  std::vector<Task> tasks;
  for (const PanelProduct<T>& p : products)
    for (int column = 0; column < p.cols; column += width) tasks.push_back({&p, column, std::min(column + width, p.cols)});
  parallel_for(int(tasks.size()), [&](int index, int thread) {
    const Task& t = tasks[size_t(index)];
    PanelTask<T> task(*t.product, engine.thread_scratch[size_t(thread)]);
    if (int8 && !t.product->terms[0].w->floating())
      task.run_int8(int8[t.product - products.data()], t.column, t.last);
    else
      task.run(t.column, t.last);
  });
}

}  // namespace
}  // namespace nomoat
