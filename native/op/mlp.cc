// x += Wdown (silu(Wgate h) * (Wup h)), h = norm(x). Backward reads the tape: x before the block, gate and up.

#include "op/engine.h"

namespace nomoat {

void mlp_forward(Engine& engine, int layer, Mode mode, float* x, const Batch& batch, LayerTape* tape) {
  const Layer& own = engine.layers[layer];
  const int width = padded(engine.dims.width), ffn = padded(engine.dims.ffn);
  const size_t rows = size_t(batch.rows);
  const float* h = normed(engine, x, own.mlp_norm, batch.rows);
  const Activations input = prepare(mode, engine.digits[2], h, batch.rows, width, engine.normed_low, engine.q8, engine.blocks);
  float *gate = engine.gate.get<float>(rows * ffn), *up = engine.up.get<float>(rows * ffn),
        *act = engine.act.get<float>(rows * ffn);
  const LinearJob jobs[] = {
      {&own.w[kGate], kGate, gate, ffn, false, tape ? &tape->u[kGate] : nullptr},
      {&own.w[kUp], kUp, up, ffn, false, tape ? &tape->u[kUp] : nullptr},
  };
  linear(engine, input, jobs, 2, batch, layer);
  for_rows(batch.rows, 8, [&](int first, int last) {
    const size_t at = size_t(first) * ffn;
    kernels().silu_mul(gate + at, up + at, (last - first) * ffn, act + at);
  });
  if (tape) {
    save_rows(mode, x, rows * width, tape->middle);
    save_rows(mode, gate, rows * ffn, tape->gate);
    save_rows(mode, up, rows * ffn, tape->up);
  }
  const Activations middle = prepare(mode, engine.digits[3], act, batch.rows, ffn, engine.act_low, engine.q8, engine.blocks);
  const LinearJob down[] = {{&own.w[kDown], kDown, x, width, true, tape ? &tape->u[kDown] : nullptr}};
  linear(engine, middle, down, 1, batch, layer);
}

void mlp_backward(Engine& engine, int layer, Mode mode, float* dx, const Batch& batch, const LayerTape& tape) {
  const Layer& own = engine.layers[layer];
  const int width = padded(engine.dims.width), ffn = padded(engine.dims.ffn);
  const size_t rows = size_t(batch.rows);
  const float *gate = load_rows(mode, tape.gate, rows * ffn, engine.gate), *up = load_rows(mode, tape.up, rows * ffn, engine.up);
  float *act = engine.act.get<float>(rows * ffn), *d_gate = engine.dgate.get<float>(rows * ffn),
        *d_up = engine.dup.get<float>(rows * ffn);
  for_rows(batch.rows, 8, [&](int first, int last) {
    const size_t at = size_t(first) * ffn;
    kernels().silu_mul(gate + at, up + at, (last - first) * ffn, act + at);
  });
  const Activations middle = prepare(mode, engine.digits[3], act, batch.rows, ffn, engine.act_low, engine.q8, engine.blocks);
  const LinearBackwardJob down[] = {{&own.w[kDown], kDown, dx, width, tape.u[kDown].data<float>()}};
  linear_backward(engine, middle, down, 1, batch, layer, act, ffn);  // act now holds its gradient
  for_rows(batch.rows, 8, [&](int first, int last) {
    const size_t at = size_t(first) * ffn;
    kernels().silu_mul_backward(gate + at, up + at, act + at, (last - first) * ffn, d_gate + at, d_up + at);
  });
  const float* x = load_rows(mode, tape.middle, rows * width, engine.x_wide);
  const float* h = normed(engine, x, own.mlp_norm, batch.rows);
  const Activations input = prepare(mode, engine.digits[2], h, batch.rows, width, engine.normed_low, engine.q8, engine.blocks);
  const LinearBackwardJob jobs[] = {
      {&own.w[kGate], kGate, d_gate, ffn, tape.u[kGate].data<float>()},
      {&own.w[kUp], kUp, d_up, ffn, tape.u[kUp].data<float>()},
  };
  float* dh = engine.dx.get<float>(rows * width);
  linear_backward(engine, input, jobs, 2, batch, layer, dh, width);
  for_rows(batch.rows, 8, [&](int first, int last) {
    for (int m = first; m < last; m++)
      kernels().rms_norm_backward(x + size_t(m) * width, own.mlp_norm, dh + size_t(m) * width, engine.dims.width, engine.dims.eps,
                                  dx + size_t(m) * width);
  });
}

}  // namespace nomoat
