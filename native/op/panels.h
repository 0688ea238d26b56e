#pragma once
// Products of many rows by panels: 48 columns of weights decoded to bf16 or float32, for op/linear.cc.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "op/engine.h"

namespace nomoat {
namespace {

// The kernels, and what they take of the activations, whose factors are T: bf16 or float.
template <class T>
struct Ops {
  static auto panels() { return pick(kernels().panels_bf16, kernels().panels_f32); }
  static auto plain_panel() { return pick(kernels().plain_panel_bf16, kernels().plain_panel_f32); }
  static auto gemm() { return pick(kernels().gemm_bf16, kernels().gemm_f32); }
  static auto outer() { return pick(kernels().outer_bf16, kernels().outer_f32); }
  static const T* of(const Activations& x) { return pick(x.low, x.f32); }
  static int stride(const Activations& x) { return pick(x.low_ld, x.cols); }

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

// Rows that meet all panels of a task before the next ones do, and the most panels of a task: the rows are read that many times
// less often. Up to 1,024 steps of the contraction are decoded at once as bf16, 512 as float32: 576 KB, and 256 KB of rows.
constexpr int kRowBlock = 128, kMostPanels = 6, kDecodedBytes = 1024 * kPanelCols * int(sizeof(bf16));

// Neighbouring panels, columns [column, last) of y, as one task decodes and multiplies them. The sums of a row do not depend on
// which panels or rows are taken together.
template <class T>
class PanelTask {
 public:
  PanelTask(const PanelProduct<T>& product, int column, int last, Buffer& scratch)
      : p(product), column_(column), panels_(round_up(last - column, kPanelCols) / kPanelCols) {
    for (const Term<T>& term : p.terms) depth_ += depth_of(term);
    const int most = kDecodedBytes / (kPanelCols * int(sizeof(T))), parts = round_up(depth_, most) / most;
    part_ = round_up((depth_ + parts - 1) / parts, kTileCols);
    for (const LowRank& low : p.low) low_floats_ += size_t(round_up(low.rank, 16)) * kPanelCols;
    const size_t decoded = size_t(panels_) * panel_stride() * sizeof(T) / sizeof(float);
    const size_t sums = size_t(panels_) * panel_sums();
    sums_ = scratch.get<float>(sums + decoded + size_t(panels_) * low_floats_);
    decoded_ = reinterpret_cast<T*>(sums_ + sums);
    low_ = sums_ + sums + decoded;
    for (int i = 0; i < panels_; i++) take_low(i);
  }

  void run() {
    const bool in_one_go = part_ == depth_;
    for (int begin = 0; begin < depth_; begin += part_) {
      const int end = std::min(depth_, begin + part_);
      for_spans(begin, end, [&](const Term<T>& term, int from, int count, int at) {
        Ops<T>::panels()(*term.w, p.backward, column_, panels_, from, count, panel(0, at), panel_stride());
      });
      for (int row = 0; row < p.rows; row += kRowBlock)
        for (int i = 0; i < panels_; i++) {
          const int rows = std::min(kRowBlock, p.rows - row);
          float* sums = in_one_go ? sums_ : sums_ + size_t(i) * panel_sums() + size_t(row) * kPanelCols;
          for_spans(begin, end, [&](const Term<T>& term, int from, int count, int at) {
            Ops<T>::gemm()(term.a + size_t(row) * term.lda + from, term.lda, rows, panel(i, at), count, kPanelCols, sums,
                           begin + at > 0);
          });
          if (end == depth_) put(i, row, rows, sums);
        }
    }
  }

  // By int8 products with two digits, in place of the only term's.
  void run_int8(const Activations& x) {
    for (int i = 0; i < panels_; i++) {
      Matrix own = *p.terms[0].w;
      own.data = own.strip((column_ + i * kPanelCols) / kStripRows);
      own.rows = std::min(kPanelCols, own.rows - column_ - i * kPanelCols);
      if (own.strips() * kStripRows < kPanelCols) std::fill_n(sums_, size_t(x.rows) * kPanelCols, 0.0f);
      kernels().gemm_i8(own, 0, own.strips(), {}, x.digits, x.q, x.blocks, x.rows, sums_, kPanelCols, false);
      put(i, 0, x.rows, sums_);
    }
  }

 private:
  const PanelProduct<T>& p;
  const int column_, panels_;
  int depth_ = 0, part_;  // steps of the contraction, of all terms one behind the other: all, and those decoded at once
  size_t low_floats_ = 0;
  float *sums_, *low_;
  T* decoded_;

  int depth_of(const Term<T>& term) const { return round_up(p.backward ? term.w->rows : term.w->cols, kTileCols); }
  size_t panel_sums() const { return size_t(round_up(p.rows, kRowBlock)) * kPanelCols; }
  size_t panel_stride() const { return size_t(part_) * kPanelCols; }
  T* panel(int index, int at) { return decoded_ + size_t(index) * panel_stride() + size_t(at) * kPanelCols; }

  // visit(term, from, count, at): of every term its steps that are among [begin, end) of all, the first of them `at` behind
  // begin.
  template <class Visit>
  void for_spans(int begin, int end, Visit&& visit) const {
    int first = 0;  // of a term, among all
    for (const Term<T>& term : p.terms) {
      const int from = std::max(begin, first), to = std::min(end, first + depth_of(term));
      if (from < to) visit(term, from - first, to - from, from - begin);
      first += depth_of(term);
    }
  }

  void take_low(int index) {
    float* to = low_ + size_t(index) * low_floats_;
    for (const LowRank& low : p.low) {
      const int depth = round_up(low.rank, 16);
      kernels().plain_panel_f32(low.b, low.ldb, low.rank, low.cols, true, column_ + index * kPanelCols, 0, depth, to);
      to += size_t(depth) * kPanelCols;
    }
  }

  // Adds the adapters of rows [row, row + rows) and writes them.
  void put(int index, int row, int rows, float* sums) {
    const int column = column_ + index * kPanelCols;
    const float* b = low_ + size_t(index) * low_floats_;
    for (const LowRank& low : p.low) {
      const int first = std::max(row, low.first), last = std::min(row + rows, low.last);
      if (first < last)
        kernels().gemm_f32(low.u + size_t(first) * low.ldu, low.ldu, last - first, b, low.rank, kPanelCols,
                           sums + size_t(first - row) * kPanelCols, true);
      b += size_t(round_up(low.rank, 16)) * kPanelCols;
    }
    const int width = std::min(kPanelCols, p.ldy - column);
    kernels().write_sums(sums, rows, width, p.add, p.y + size_t(row) * p.ldy + column, p.ldy);
    if (!p.add && column + kPanelCols >= p.cols) clear_padding(p.y + size_t(row) * p.ldy, rows, column + width, p.ldy);
  }
};

// All of them on all threads.
template <class T>
void multiply_panels(Engine& engine, const std::vector<PanelProduct<T>>& products, const Activations* int8) {
  struct Task {
    const PanelProduct<T>* product;
    int column, last;
  };
  std::vector<Task> tasks;
  for (const PanelProduct<T>& p : products) {  // equal tasks, as many for each thread
    const int panels = round_up(p.cols, kPanelCols) / kPanelCols, least = round_up(panels, kMostPanels) / kMostPanels,
              count = std::min(panels, round_up(least, threads()));
    for (int i = 0; i < count; i++)
      tasks.push_back({&p, panels * i / count * kPanelCols, std::min(p.cols, panels * (i + 1) / count * kPanelCols)});
  }
  parallel_for(int(tasks.size()), [&](int index, int thread) {
    const Task& t = tasks[size_t(index)];
    PanelTask<T> task(*t.product, t.column, t.last, engine.thread_scratch[size_t(thread)]);
    if (int8 && !t.product->terms[0].w->floating())
      task.run_int8(int8[t.product - products.data()]);
    else
      task.run();
  });
}

}  // namespace
}  // namespace nomoat
