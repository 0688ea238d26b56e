// x += [norm] Wdown (act(Wgate h) * (Wup h)), or Wdown act(Wup h) without a gate; h = [norm] x. Backward reads the tape: x before
// the block, gate and up with their biases, what a post-norm needs.

#include "base/profile.h"
#include "op/engine.h"

namespace nomoat {

namespace {

// What goes through the activation, and what it is multiplied with: without a gate, up and nothing.
struct Gated {
  const float *gate, *up;
  float *d_gate, *d_up;

  Gated(const Dims& dims, const float* g, const float* u, float* dg = nullptr, float* du = nullptr)
      : gate(dims.gated ? g : u), up(dims.gated ? u : nullptr), d_gate(dims.gated ? dg : du), d_up(dims.gated ? du : nullptr) {}
};

void activate(const Dims& dims, const Gated& in, int rows, int ffn, float* out) {
  const Timed timed("activation");
  const auto act = dims.gelu ? kernels().gelu_mul : kernels().silu_mul;
  for_rows(rows, 8, [&](int first, int last) {
    const size_t at = size_t(first) * ffn;
    act(in.gate + at, in.up ? in.up + at : nullptr, (last - first) * ffn, out + at);
  });
}

void activate_backward(const Dims& dims, const Gated& in, const float* d_out, int rows, int ffn) {
  const Timed timed("activation: backward");
  const auto act = dims.gelu ? kernels().gelu_mul_backward : kernels().silu_mul_backward;
  for_rows(rows, 8, [&](int first, int last) {
    const size_t at = size_t(first) * ffn;
    act(in.gate + at, in.up ? in.up + at : nullptr, d_out + at, (last - first) * ffn, in.d_gate + at,
        in.up ? in.d_up + at : nullptr);
  });
}

}  // namespace

void mlp_forward(Engine& engine, int layer, Mode mode, float* x, const Batch& batch, LayerTape* tape) {
  const Dims& dims = engine.dims;
  const Layer& own = engine.layers[size_t(layer)];
  const int width = padded(dims.width), ffn = padded(own.ffn), gated = dims.gated;
  const size_t rows = size_t(batch.rows);
  const float* h = normed(engine, x, own.mlp_norm, own.mlp_norm_bias, batch.rows);
  const Activations input = prepare(mode, engine.digits[2], h, batch.rows, width, engine.normed_low, engine.q8, engine.blocks);
  float *gate = gated ? engine.gate.get<float>(rows * ffn) : nullptr, *up = engine.up.get<float>(rows * ffn),
        *act = engine.act.get<float>(rows * ffn);
  const LinearJob jobs[] = {
      {&own.w[kGate], kGate, gate, ffn, false, tape ? &tape->u[kGate] : nullptr, own.bias[kGate]},
      {&own.w[kUp], kUp, up, ffn, false, tape ? &tape->u[kUp] : nullptr, own.bias[kUp]},
  };
  linear(engine, input, jobs + !gated, 1 + gated, batch, layer);
  activate(dims, Gated(dims, gate, up), batch.rows, ffn, act);
  if (tape) {
    save_rows(mode, x, rows * width, tape->middle);
    if (gated) save_rows(mode, gate, rows * ffn, tape->gate);
    save_rows(mode, up, rows * ffn, tape->up);
  }
  const Activations middle = prepare(mode, engine.digits[3], act, batch.rows, ffn, engine.act_low, engine.q8, engine.blocks);
  const Branch branch = branch_of(engine, own.mlp_post_norm, x, batch.rows);
  const LinearJob down[] = {
      {&own.w[kDown], kDown, branch.to, width, branch.direct, tape ? &tape->u[kDown] : nullptr, own.bias[kDown]}};
  linear(engine, middle, down, 1, batch, layer);
  join(engine, mode, branch, own.mlp_post_norm, batch.rows, x, tape ? &tape->mlp_branch : nullptr);
}

void mlp_backward(Engine& engine, int layer, Mode mode, float* dx, const Batch& batch, const LayerTape& tape) {
  const Dims& dims = engine.dims;
  const Layer& own = engine.layers[size_t(layer)];
  const int width = padded(dims.width), ffn = padded(own.ffn), gated = dims.gated;
  const size_t rows = size_t(batch.rows);
  const float* gate = gated ? load_rows(mode, tape.gate, rows * ffn, engine.gate) : nullptr;
  const float* up = load_rows(mode, tape.up, rows * ffn, engine.up);
  float *act = engine.act.get<float>(rows * ffn), *d_gate = gated ? engine.dgate.get<float>(rows * ffn) : nullptr,
        *d_up = engine.dup.get<float>(rows * ffn);
  const Gated in(dims, gate, up, d_gate, d_up);
  activate(dims, in, batch.rows, ffn, act);
  const Activations middle = prepare(mode, 0, act, batch.rows, ffn, engine.act_low, engine.q8, engine.blocks);
  const float* d_branch = branch_backward(engine, mode, own.mlp_post_norm, tape.mlp_branch, batch.rows, dx);
  const LinearBackwardJob down[] = {{&own.w[kDown], kDown, d_branch, width, tape.u[kDown].data<float>()}};
  linear_backward(engine, middle, down, 1, batch, layer, act, ffn);  // act now holds its gradient
  activate_backward(dims, in, act, batch.rows, ffn);
  const float* x = load_rows(mode, tape.middle, rows * width, engine.x_wide);
  const float* h = normed(engine, x, own.mlp_norm, own.mlp_norm_bias, batch.rows);
  const Activations input = prepare(mode, 0, h, batch.rows, width, engine.normed_low, engine.q8, engine.blocks);
  const LinearBackwardJob jobs[] = {
      {&own.w[kGate], kGate, d_gate, ffn, tape.u[kGate].data<float>()},
      {&own.w[kUp], kUp, d_up, ffn, tape.u[kUp].data<float>()},
  };
  float* dh = engine.dx.get<float>(rows * width);
  linear_backward(engine, input, jobs + !gated, 1 + gated, batch, layer, dh, width);
  normed_backward(engine, x, own.mlp_norm, dh, batch.rows, dx);
}

}  // namespace nomoat
