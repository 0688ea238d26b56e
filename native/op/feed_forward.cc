// The second half of a layer, dense or of experts. After the last one the head reads few rows, in training those that carry loss,
// in chat one a sequence: only they go through its second half.

#include "op/engine.h"

namespace nomoat {

namespace {

bool takes_all(const Engine& engine, int layer, const Batch& batch) { return layer + 1 < engine.dims.layers || !batch.read; }

// The rows that are read as a batch of their own, for products and adapters: attention is behind them.
Batch read_rows(const Batch& batch) {
  Batch few;
  few.rows = int(batch.read->size());
  size_t at = 0;
  for (const Segment& s : batch.segments) {
    const size_t first = at;
    while (at < batch.read->size() && (*batch.read)[at] < s.row + s.count) at++;
    if (first < at) few.segments.push_back({int(first), int(at - first), 0, nullptr, s.lora});
  }
  return few;
}

// few = the rows of x that are read, in their order; body(few, batch of them); and back into x.
template <class Body>
void through_few(Engine& engine, const Batch& batch, float* x, Body&& body) {
  const size_t width = size_t(padded(engine.dims.width));
  const std::vector<int32_t>& rows = *batch.read;
  if (rows.empty()) return;
  float* few = engine.few.get<float>(rows.size() * width);
  for (size_t i = 0; i < rows.size(); i++) std::memcpy(few + i * width, x + size_t(rows[i]) * width, width * sizeof(float));
  body(few, read_rows(batch));
  for (size_t i = 0; i < rows.size(); i++) std::memcpy(x + size_t(rows[i]) * width, few + i * width, width * sizeof(float));
}

}  // namespace

void feed_forward(Engine& engine, int layer, Mode mode, float* x, const Batch& batch, LayerTape* tape) {
  const auto forward = engine.layers[size_t(layer)].experts ? moe_forward : mlp_forward;
  if (takes_all(engine, layer, batch)) return forward(engine, layer, mode, x, batch, tape);
  through_few(engine, batch, x, [&](float* few, const Batch& own) { forward(engine, layer, mode, few, own, tape); });
}

void feed_forward_backward(Engine& engine, int layer, Mode mode, float* dx, const Batch& batch, const LayerTape& tape) {
  const auto backward = engine.layers[size_t(layer)].experts ? moe_backward : mlp_backward;
  if (takes_all(engine, layer, batch)) return backward(engine, layer, mode, dx, batch, tape);
  through_few(engine, batch, dx, [&](float* few, const Batch& own) { backward(engine, layer, mode, few, own, tape); });
}

}  // namespace nomoat
