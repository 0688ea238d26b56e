// x += [norm] Wdown (act(Wgate h) * (Wup h)), or Wdown act(Wup h) without a gate; h = [norm] x. Backward reads the tape: x before
// the block, gate and up with their biases, what a post-norm needs.

#include <algorithm>

#include "base/profile.h"
#include "op/engine.h"

namespace nomoat {

namespace {

// Without a gate, up goes through the activation, and is multiplied with nothing.
void activate(const Dims& dims, const float* gate, const float* up, int count, float* out) {
  const auto act = dims.gelu ? kernels().gelu_mul : kernels().silu_mul;
  act(dims.gated ? gate : up, dims.gated ? up : nullptr, count, out);
}

// Columns of a row that are computed at once: float32 copies of four are 16 KB, in the first-level cache.
constexpr int kColumns = 1024;

// visit(row, first column, number of columns, scratch of four times as many floats)
template <class Visit>
void for_each_span(Engine& engine, int rows, int cols, Visit&& visit) {
  for_each_row(engine, rows, 4 * size_t(kColumns), [&](int m, float* scratch) {
    for (int c = 0; c < cols; c += kColumns) visit(m, c, std::min(kColumns, cols - c), scratch);
  });
}

void activate_backward(const Dims& dims, const float* gate, const float* up, const float* d_out, int count, float* d_gate,
                       float* d_up) {
  const auto act = dims.gelu ? kernels().gelu_mul_backward : kernels().silu_mul_backward;
  if (dims.gated)
    act(gate, up, d_out, count, d_gate, d_up);
  else
    act(up, nullptr, d_out, count, d_up, nullptr);
}

}  // namespace

void mlp_forward(Engine& engine, int layer, Mode mode, float* x, const Batch& batch, LayerTape* tape) {
  const Dims& dims = engine.dims;
  const Layer& own = engine.layers[size_t(layer)];
  const int width = padded(dims.width), ffn = padded(own.ffn), gated = dims.gated, count = batch.rows;
  const size_t rows = size_t(count);
  const Rows kept = tape ? rows_on_tape(mode, count, width, tape->middle) : Rows{};
  const Activations input =
      prepare_normed(engine, mode, engine.digits[2], rows_of(x, width), own.mlp_norm, own.mlp_norm_bias, count, kept);
  float *gate = gated ? engine.gate.get<float>(rows * ffn) : nullptr, *up = engine.up.get<float>(rows * ffn);
  const LinearJob jobs[] = {
      {&own.w[kGate], kGate, gate, ffn, false, tape ? &tape->u[kGate] : nullptr, own.bias[kGate]},
      {&own.w[kUp], kUp, up, ffn, false, tape ? &tape->u[kUp] : nullptr, own.bias[kUp]},
  };
  linear(engine, input, jobs + !gated, 1 + gated, batch, layer);
  const Rows act = rows_for_products(mode, count, ffn, engine.act, engine.act_low);
  const Activations middle = room_for(mode, engine.digits[3], act, count, engine.q8, engine.blocks);
  {
    const Timed timed("activation");
    Rows kept_gate{}, kept_up{};
    if (tape && gated) kept_gate = rows_on_tape(mode, count, ffn, tape->gate);
    if (tape) kept_up = rows_on_tape(mode, count, ffn, tape->up);
    for_each_span(engine, count, ffn, [&](int m, int c, int n, float* scratch) {
      const size_t at = size_t(m) * ffn + c;
      const float *g = gated ? gate + at : nullptr, *u = up + at;
      const Rows to = act.part(c, n);
      float* out = to.begin(m, scratch);
      activate(dims, g, u, n, out);
      to.end(m, out);
      quantize_row(middle, m, c, n);
      if (g) kept_gate.part(c, n).put(m, g);
      kept_up.part(c, n).put(m, u);
    });
  }
  const Branch branch = branch_of(engine, own.mlp_post_norm, x, count);
  const LinearJob down[] = {
      {&own.w[kDown], kDown, branch.to, width, branch.direct, tape ? &tape->u[kDown] : nullptr, own.bias[kDown]}};
  linear(engine, middle, down, 1, batch, layer);
  join(engine, mode, branch, own.mlp_post_norm, count, x, tape ? &tape->mlp_branch : nullptr);
}

void mlp_backward(Engine& engine, int layer, Mode mode, float* dx, const Batch& batch, const LayerTape& tape) {
  const Dims& dims = engine.dims;
  const Layer& own = engine.layers[size_t(layer)];
  const int width = padded(dims.width), ffn = padded(own.ffn), gated = dims.gated, count = batch.rows;
  const size_t rows = size_t(count);
  const Rows gate = gated ? rows_on_tape(mode, ffn, tape.gate) : Rows{}, up = rows_on_tape(mode, ffn, tape.up),
             act = rows_for_products(mode, count, ffn, engine.act, engine.act_low);
  {
    const Timed timed("activation");
    for_each_span(engine, count, ffn, [&](int m, int c, int n, float* scratch) {
      const Rows to = act.part(c, n);
      float* out = to.begin(m, scratch);
      activate(dims, gate.part(c, n).read(m, scratch + n), up.part(c, n).read(m, scratch + 2 * n), n, out);
      to.end(m, out);
    });
  }
  const Activations middle = prepare(mode, 0, act, count, engine.q8, engine.blocks);
  const float* d_branch = branch_backward(engine, mode, own.mlp_post_norm, tape.mlp_branch, count, dx);
  const LinearBackwardJob down[] = {{&own.w[kDown], kDown, d_branch, width, tape.u[kDown].data<float>()}};
  float* d_act = engine.act.get<float>(rows * ffn);  // in the place of act, if that is float32
  linear_backward(engine, middle, down, 1, batch, layer, d_act, ffn);
  const Rows d_gate = gated ? rows_for_products(mode, count, ffn, engine.dgate, engine.dgate) : Rows{},
             d_up = rows_for_products(mode, count, ffn, engine.dup, engine.dup);
  {
    const Timed timed("activation: backward");
    for_each_span(engine, count, ffn, [&](int m, int c, int n, float* scratch) {
      const Rows to_gate = d_gate.part(c, n), to_up = d_up.part(c, n);
      float *d_g = to_gate.begin(m, scratch), *d_u = to_up.begin(m, scratch + n);
      activate_backward(dims, gate.part(c, n).read(m, scratch + 2 * n), up.part(c, n).read(m, scratch + 3 * n),
                        d_act + size_t(m) * ffn + c, n, d_g, d_u);
      to_gate.end(m, d_g);
      to_up.end(m, d_u);
    });
  }
  const Rows x = rows_on_tape(mode, width, tape.middle);
  const Activations input = prepare_normed(engine, mode, 0, x, own.mlp_norm, own.mlp_norm_bias, count);
  const LinearBackwardJob jobs[] = {
      {&own.w[kGate], kGate, d_gate.f32, d_gate.ld, tape.u[kGate].data<float>(), d_gate.low},
      {&own.w[kUp], kUp, d_up.f32, d_up.ld, tape.u[kUp].data<float>(), d_up.low},
  };
  float* dh = engine.dx.get<float>(rows * width);
  linear_backward(engine, input, jobs + !gated, 1 + gated, batch, layer, dh, width);
  normed_backward(engine, x, own.mlp_norm, dh, count, dx);
}

}  // namespace nomoat
