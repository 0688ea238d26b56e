// Where a half layer meets the residual stream: the norm that it begins with, and how its result is added.

#include "base/profile.h"
#include "op/engine.h"

namespace nomoat {

// A layer norm is the RMS norm of x less its mean, plus a bias.
void norm_row(const Dims& dims, const float* x, const float* weight, const float* bias, float* y) {
  if (dims.layer_norm) kernels().center(x, dims.width, y);
  kernels().rms_norm(dims.layer_norm ? y : x, weight, dims.width, dims.eps, y);
  if (bias) kernels().axpy(bias, 1, padded(dims.width), y);
}

void norm_row_backward(const Dims& dims, const float* x, const float* weight, const float* dy, float* dx) {
  if (!dims.layer_norm) {
    kernels().rms_norm_backward(x, weight, dy, dims.width, dims.eps, dx);
    return;
  }
  const int width = padded(dims.width);
  std::vector<float> rows(size_t(2) * width);  // zero beyond the width
  float *centered = rows.data(), *d_centered = centered + width;
  kernels().center(x, dims.width, centered);
  kernels().rms_norm_backward(centered, weight, dy, dims.width, dims.eps, d_centered);
  kernels().center(d_centered, dims.width, d_centered);
  kernels().axpy(d_centered, 1, width, dx);
}

const float* normed(Engine& engine, const float* x, const float* weight, const float* bias, int rows) {
  if (!weight) return x;
  const int width = padded(engine.dims.width);
  float* h = engine.normed.get<float>(size_t(rows) * width);
  for_rows(rows, 8, [&](int first, int last) {
    for (int m = first; m < last; m++) norm_row(engine.dims, x + size_t(m) * width, weight, bias, h + size_t(m) * width);
  });
  return h;
}

Activations prepare_normed(Engine& engine, Mode mode, int digits, const Rows& x, const float* weight, const float* bias, int rows,
                           const Rows& kept) {
  const Timed timed("norm and low precision");
  const Rows h = rows_for_products(mode, rows, x.cols, engine.normed, engine.normed_low);
  const Activations a = room_for(mode, digits, h, rows, engine.q8, engine.blocks);
  for_each_row(engine, rows, 2 * size_t(x.cols), [&](int m, float* scratch) {
    const float* own = x.read(m, scratch + x.cols);
    kept.put(m, own);
    if (weight) {
      float* y = h.begin(m, scratch);
      norm_row(engine.dims, own, weight, bias, y);
      h.end(m, y);
    } else {
      h.put(m, own);
    }
    quantize_row(a, m, 0, a.cols);
  });
  return a;
}

void normed_backward(Engine& engine, const Rows& x, const float* weight, const float* dh, int rows, float* dx) {
  for_each_row(engine, rows, size_t(x.cols), [&](int m, float* scratch) {
    const size_t at = size_t(m) * size_t(x.cols);
    if (weight)
      norm_row_backward(engine.dims, x.read(m, scratch), weight, dh + at, dx + at);
    else
      kernels().axpy(dh + at, 1, x.cols, dx + at);
  });
}

Branch branch_of(Engine& engine, const float* post_norm, float* x, int rows) {
  if (!post_norm && engine.dims.residual_scale == 1) return {x, true};
  return {engine.branch.get<float>(size_t(rows) * padded(engine.dims.width)), false};
}

void join(Engine& engine, Mode mode, const Branch& branch, const float* post_norm, int rows, float* x, Buffer* tape) {
  if (branch.direct) return;
  const int width = padded(engine.dims.width);
  if (post_norm && tape) save_rows(mode, branch.to, size_t(rows) * width, *tape);
  for_rows(rows, 8, [&](int first, int last) {
    for (int m = first; m < last; m++) {
      float* own = branch.to + size_t(m) * width;
      if (post_norm) norm_row(engine.dims, own, post_norm, nullptr, own);
      kernels().axpy(own, engine.dims.residual_scale, width, x + size_t(m) * width);
    }
  });
}

const float* branch_backward(Engine& engine, Mode mode, const float* post_norm, const Buffer& tape, int rows, const float* dx) {
  const float scale = engine.dims.residual_scale;
  if (!post_norm && scale == 1) return dx;
  const int width = padded(engine.dims.width);
  const size_t count = size_t(rows) * width;
  float* d = engine.d_branch.get<float>(count);
  const float* branch = post_norm ? load_rows(mode, tape, count, engine.branch) : nullptr;
  for_rows(rows, 8, [&](int first, int last) {
    std::vector<float> scaled(size_t(width), 0.0f);
    for (int m = first; m < last; m++) {
      const size_t at = size_t(m) * width;
      float* own = post_norm ? scaled.data() : d + at;
      for (int i = 0; i < width; i++) own[i] = scale * dx[at + i];
      if (!post_norm) continue;
      std::memset(d + at, 0, size_t(width) * sizeof(float));
      norm_row_backward(engine.dims, branch + at, post_norm, own, d + at);
    }
  });
  return d;
}

}  // namespace nomoat
