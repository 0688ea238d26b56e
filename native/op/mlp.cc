// x += [norm] Wdown (act(Wgate h) * (Wup h)), or Wdown act(Wup h) without a gate; h = [norm] x. Backward reads the tape: x before
// the block, gate and up with their biases, what a post-norm needs.

#include "base/profile.h"
#include "op/engine.h"

namespace nomoat {

namespace {

// Without a gate, up goes through the activation, and is multiplied with nothing.
void activate(const Dims& dims, const float* gate, const float* up, int count, float* out) {
  const auto act = dims.gelu ? kernels().gelu_mul : kernels().silu_mul;
  act(dims.gated ? gate : up, dims.gated ? up : nullptr, count, out);
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
  {
    const Timed timed("activation");
    Rows kept_gate{}, kept_up{};
    if (tape && gated) kept_gate = rows_on_tape(mode, count, ffn, tape->gate);
    if (tape) kept_up = rows_on_tape(mode, count, ffn, tape->up);
    for_each_row(engine, count, size_t(ffn), [&](int m, float* scratch) {
      const float *g = gated ? gate + size_t(m) * ffn : nullptr, *u = up + size_t(m) * ffn;
      float* out = act.begin(m, scratch);
      activate(dims, g, u, ffn, out);
      act.end(m, out);
      if (g) kept_gate.put(m, g);
      kept_up.put(m, u);
    });
  }
  const Activations middle = prepare(mode, engine.digits[3], act, count, engine.q8, engine.blocks);
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
    for_each_row(engine, count, 3 * size_t(ffn), [&](int m, float* scratch) {
      float* out = act.begin(m, scratch);
      activate(dims, gate.read(m, scratch + ffn), up.read(m, scratch + 2 * ffn), ffn, out);
      act.end(m, out);
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
    for_each_row(engine, count, 4 * size_t(ffn), [&](int m, float* scratch) {
      float *d_g = d_gate.begin(m, scratch), *d_u = d_up.begin(m, scratch + ffn);
      activate_backward(dims, gate.read(m, scratch + 2 * ffn), up.read(m, scratch + 3 * ffn), d_act + size_t(m) * ffn, ffn, d_g,
                        d_u);
      d_gate.end(m, d_g);
      d_up.end(m, d_u);
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
