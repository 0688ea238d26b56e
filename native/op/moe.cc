// x += [norm] sum over the experts_used best experts e of Wdown_e (w_e act(Wgate_e h) * (Wup_e h)), h = [norm] x, where w are the
// probabilities softmax(router h), over all experts, or these divided by the sum of those used (`expert_norm`). The weight stands
// before the down product, so that what this takes and gives back is what its adapter needs, forward and backward.
//
// A shared expert is one more, of its own width, that every row goes through with w = sigmoid(shared_router . h). It comes first.
//
// A pair is a row and one of its experts. Pairs are sorted by expert, then by row, so that an expert's rows lie together and run
// as one product; a row adds its experts up in order of their index, whatever runs beside it.
//
// The tape keeps x before the block, gate and up of every pair, rank-r intermediates, the routing, and what a post-norm needs.
// The router is float32 in every mode: which experts a row gets must not depend on how its other products are rounded.

#include <algorithm>
#include <cmath>
#include <deque>
#include <numeric>

#include "op/engine.h"

namespace nomoat {

namespace {

constexpr int kFewRows = 8;

struct Pairs {
  std::vector<int> start;  // [experts + 1] first pair of each expert
  std::vector<int> row;    // [pairs]
  std::vector<int> place;  // [rows][used] a row's pairs, in order of experts

  int count() const { return int(row.size()); }
  int of(int expert) const { return start[size_t(expert) + 1] - start[size_t(expert)]; }
};

// `chosen` [rows][used], ascending in each row.
Pairs sort_by_expert(const int32_t* chosen, int rows, int used, int experts) {
  const size_t count = size_t(rows) * size_t(used);
  Pairs pairs{std::vector<int>(size_t(experts) + 1), std::vector<int>(count), std::vector<int>(count)};
  for (size_t i = 0; i < count; i++) pairs.start[size_t(chosen[i]) + 1]++;
  for (size_t e = 0; e < size_t(experts); e++) pairs.start[e + 1] += pairs.start[e];
  std::vector<int> next(pairs.start.begin(), pairs.start.end() - 1);
  for (size_t i = 0; i < count; i++) {
    pairs.place[i] = next[size_t(chosen[i])]++;
    pairs.row[size_t(pairs.place[i])] = int(i / size_t(used));
  }
  return pairs;
}

// The `used` largest logits, the lower index where two are equal; indexes ascend. A NaN makes all weights of the row NaN.
void choose(const float* logits, int experts, int used, int32_t* chosen) {
  for (int e = 0, count = 0; e < experts; e++) {
    int at = count < used ? count++ : used;
    for (; at > 0 && logits[e] > logits[chosen[at - 1]]; at--)
      if (at < used) chosen[at] = chosen[at - 1];
    if (at < used) chosen[at] = e;
  }
  std::sort(chosen, chosen + used);
}

// The weight of every expert for every row, [rows][experts padded]: all probabilities, or with expert_norm those of the experts
// used over their sum, and zeros. In both forms the gradient of a logit is its weight times (d weight - their weighted mean).
void route(Engine& engine, const Layer& own, const float* h, int rows, float* weights, int32_t* chosen) {
  const int stride = padded(own.experts), used = engine.experts_used;
  // The product that int8 mode has for float weights adds in the same order as that of float32 mode and makes no panels of them.
  const Mode mode = rows <= kFewRows && own.router.floating() ? Mode::int8 : Mode::f32;
  const Activations input{mode, rows, padded(engine.dims.width), 0, h, nullptr, nullptr, nullptr};
  const LinearJob job[] = {{&own.router, kTargets, weights, stride, false, nullptr}};
  const Batch plain;
  linear(engine, input, job, 1, plain, 0);
  for_rows(rows, 16, [&](int first, int last) {
    for (int m = first; m < last; m++) {
      float* p = weights + size_t(m) * stride;
      int32_t* best = chosen + size_t(m) * used;
      choose(p, own.experts, used, best);
      kernels().softmax_f32(p, kernels().log_sum_exp(p, own.experts), 1, stride, p);
      float sum = 0;
      for (int j = 0; j < used; j++) sum += p[best[j]];
      for (int e = 0, j = 0; e < stride; e++) {
        const bool is_used = j < used && best[j] == e;
        if (is_used && engine.expert_norm) p[e] /= sum;
        if (e >= own.experts || (!is_used && engine.expert_norm)) p[e] = 0;
        j += is_used;
      }
    }
  });
}

// The activations of every pair, converted once for a row. `wide`: in int8 mode float32 ones too, which weights that are floats
// take.
Activations gather(Engine& engine, const Activations& x, const Pairs& pairs, bool wide) {
  const size_t count = size_t(pairs.count()), cols = size_t(x.cols), codes = cols * size_t(code_bytes(x.digits)),
               blocks = cols / kTileCols;
  float* f32 = !x.low && (x.mode != Mode::int8 || wide) ? engine.pair_x.get<float>(count * cols) : nullptr;
  const size_t stride = size_t(x.low_ld);
  bf16* low = x.low ? engine.pair_low.get<bf16>(count * stride) : nullptr;
  int8_t* q = x.q ? engine.pair_q.get<int8_t>(count * codes) : nullptr;
  ActBlock* scales = x.q ? engine.pair_blocks.get<ActBlock>(count * blocks) : nullptr;
  for_rows(pairs.count(), 16, [&](int first, int last) {
    for (size_t i = size_t(first); i < size_t(last); i++) {
      const size_t m = size_t(pairs.row[i]);
      if (f32) std::memcpy(f32 + i * cols, x.f32 + m * cols, cols * sizeof(float));
      if (low) std::memcpy(low + i * stride, x.low + m * stride, cols * sizeof(bf16));
      if (q) std::memcpy(q + i * codes, x.q + m * codes, codes);
      if (scales) std::memcpy(scales + i * blocks, x.blocks + m * blocks, blocks * sizeof(ActBlock));
    }
  });
  return {x.mode, pairs.count(), x.cols, x.digits, f32, low, q, scales, x.low_ld};
}

bool adapted(const LoraSet* set, int layer, std::initializer_list<Target> targets) {
  return set && std::any_of(targets.begin(), targets.end(), [&](Target t) { return (*set)[size_t(layer)][t].rank > 0; });
}

// The adapters of one expert, as those of the only layer of a set.
LoraSet expert_set(const Dims& dims, const Layer& own, const LoraSet& set, int layer, int expert) {
  LoraSet one(1);
  for (const Target target : {kGate, kUp, kDown})
    if (const Lora& lora = set[size_t(layer)][target]; lora.rank) {
      const auto [rows, cols] = linear_shape(dims, own, target);
      one[0][target] = lora.expert(expert, rows / own.experts, cols);
    }
  return one;
}

// The pairs as a batch: a segment is a run of pairs with the same expert, out of segments with the same adapters.
struct PairBatch {
  Batch batch;
  std::deque<LoraSet> sets;  // segments point into it
  bool on_input = false;     // gate or up of some have adapters
};

void batch_pairs(const Dims& dims, const Layer& own, int layer, const Pairs& pairs, const Batch& rows, PairBatch& into) {
  bool any = false;
  for (const Segment& segment : rows.segments) {
    into.on_input |= adapted(segment.lora, layer, {kGate, kUp});
    any |= adapted(segment.lora, layer, {kGate, kUp, kDown});
  }
  if (!any) return;
  into.batch.rows = pairs.count();
  for (int e = 0; e < own.experts; e++) {
    size_t segment = 0;
    const LoraSet* set = nullptr;  // of the run
    for (int i = pairs.start[size_t(e)], begin = i; i < pairs.start[size_t(e) + 1]; i++) {
      while (rows.segments[segment].row + rows.segments[segment].count <= pairs.row[size_t(i)]) segment++;
      if (i > begin && rows.segments[segment].lora == set) {
        into.batch.segments.back().count++;
        continue;
      }
      set = rows.segments[segment].lora;
      if (set) into.sets.push_back(expert_set(dims, own, *set, layer, e));
      into.batch.segments.push_back({i, 1, 0, nullptr, set ? &into.sets.back() : nullptr});
    }
  }
}

struct Output {
  Target target;
  float* y;  // [pairs][ldy]
  int ldy;
  Buffer* u;
};

// y = W_e x for the pairs of every expert that has any, all in one parallel region: with one row its experts share the threads.
void run_experts(Engine& engine, const Layer& own, const Pairs& pairs, const Batch& batch, const Activations& x,
                 const Output* outputs, int count) {
  std::vector<Matrix> views;
  std::vector<LinearJob> jobs;
  views.reserve(size_t(own.experts) * size_t(count));  // jobs point into it
  for (int e = 0; e < own.experts; e++)
    for (int i = 0; i < count && pairs.of(e); i++) {
      const int first = pairs.start[size_t(e)];
      const Output& out = outputs[i];
      views.push_back(own.expert(out.target, e));
      jobs.push_back(
          {&views.back(), out.target, out.y + size_t(first) * out.ldy, out.ldy, false, out.u, nullptr, first, pairs.of(e)});
    }
  linear(engine, x, jobs.data(), int(jobs.size()), batch, 0);
}

// [pairs][ffn padded]
void activate(const Dims& dims, const float* gate, const float* up, int pairs, int ffn, float* act) {
  for_rows(pairs, 8, [&](int first, int last) {
    const size_t at = size_t(first) * ffn;
    (dims.gelu ? kernels().gelu_mul : kernels().silu_mul)(gate + at, up + at, (last - first) * ffn, act + at);
  });
}

// out[i] = weights[row[i]] * act[i], weights with a stride; without `row`, pair i is of row i
void weigh(const float* act, const int* row, const float* weights, int stride, int pairs, int ffn, float* out) {
  for_rows(pairs, 8, [&](int first, int last) {
    for (int i = first; i < last; i++) {
      const float weight = weights[size_t(row ? row[i] : i) * stride];
      for (size_t at = size_t(i) * ffn; at < size_t(i + 1) * ffn; at++) out[at] = weight * act[at];
    }
  });
}

// What the shared expert adds to the branch, or writes to it where the branch begins at zero. `input` is made of h.
void shared_forward(Engine& engine, int layer, Mode mode, const float* h, const Activations& input, const Batch& batch,
                    const Branch& branch, LayerTape* tape) {
  const Dims& dims = engine.dims;
  const Layer& own = engine.layers[size_t(layer)];
  const int width = padded(dims.width), ffn = padded(own.shared);
  const size_t rows = size_t(batch.rows);
  float *gate = engine.gate.get<float>(rows * ffn), *up = engine.up.get<float>(rows * ffn),
        *act = engine.act.get<float>(rows * ffn), *weight = (tape ? tape->shared_weight : engine.shared_weight).get<float>(rows);
  const auto u = [&](Target target) { return tape ? &tape->u[target] : nullptr; };
  const LinearJob in[] = {{&own.w[kSharedGate], kSharedGate, gate, ffn, false, u(kSharedGate)},
                          {&own.w[kSharedUp], kSharedUp, up, ffn, false, u(kSharedUp)}};
  linear(engine, input, in, 2, batch, layer);
  for_rows(batch.rows, 8, [&](int first, int last) {
    for (int m = first; m < last; m++) {
      const float one = 1;
      kernels().lora_shrink_f32(h + size_t(m) * width, width, 1, own.shared_router, width, &one, 1, width, weight + m, 1);
      weight[m] = float(1 / (1 + std::exp(-double(weight[m]))));
    }
  });
  activate(dims, gate, up, batch.rows, ffn, act);
  weigh(act, nullptr, weight, 1, batch.rows, ffn, act);
  if (tape) {
    save_rows(mode, gate, rows * ffn, tape->shared_gate);
    save_rows(mode, up, rows * ffn, tape->shared_up);
  }
  const Activations middle = prepare(mode, engine.digits[3], act, batch.rows, ffn, engine.act_low, engine.q8, engine.blocks);
  const LinearJob out[] = {{&own.w[kSharedDown], kSharedDown, branch.to, width, branch.direct, u(kSharedDown)}};
  linear(engine, middle, out, 1, batch, layer);
}

}  // namespace

void moe_forward(Engine& engine, int layer, Mode mode, float* x, const Batch& batch, LayerTape* tape) {
  const Dims& dims = engine.dims;
  const Layer& own = engine.layers[size_t(layer)];
  const int width = padded(dims.width), ffn = padded(own.ffn), stride = padded(own.experts), used = engine.experts_used;
  const size_t rows = size_t(batch.rows), count = rows * size_t(used);
  const float* h = normed(engine, x, own.mlp_norm, own.mlp_norm_bias, batch.rows);
  float* weights = (tape ? tape->routing : engine.routing).get<float>(rows * stride);
  int32_t* chosen = (tape ? tape->chosen : engine.chosen).get<int32_t>(count);
  route(engine, own, h, batch.rows, weights, chosen);
  const Pairs pairs = sort_by_expert(chosen, batch.rows, used, own.experts);
  const Activations input = prepare(mode, engine.digits[2], h, batch.rows, width, engine.normed_low, engine.q8, engine.blocks);
  PairBatch runs;
  batch_pairs(dims, own, layer, pairs, batch, runs);
  const bool wide = own.w[kGate].floating() || own.w[kUp].floating() || runs.on_input;
  const Activations gathered = gather(engine, input, pairs, wide);
  if (tape) save_rows(mode, x, rows * width, tape->middle);
  const Branch branch = branch_of(engine, own.mlp_post_norm, x, batch.rows);
  if (own.shared) shared_forward(engine, layer, mode, h, input, batch, branch, tape);  // it may add to x: h is not needed again
  float *gate = engine.gate.get<float>(count * ffn), *up = engine.up.get<float>(count * ffn),
        *act = engine.act.get<float>(count * ffn), *out = engine.pair_out.get<float>(count * width);
  const Output gate_up[] = {{kGate, gate, ffn, tape ? &tape->u[kGate] : nullptr}, {kUp, up, ffn, tape ? &tape->u[kUp] : nullptr}},
               down[] = {{kDown, out, width, tape ? &tape->u[kDown] : nullptr}};
  run_experts(engine, own, pairs, runs.batch, gathered, gate_up, 2);
  activate(dims, gate, up, pairs.count(), ffn, act);
  for (int e = 0; e < own.experts; e++)
    if (const size_t first = size_t(pairs.start[size_t(e)]); pairs.of(e))
      weigh(act + first * ffn, pairs.row.data() + first, weights + e, stride, pairs.of(e), ffn, act + first * ffn);
  if (tape) {
    save_rows(mode, gate, count * ffn, tape->gate);
    save_rows(mode, up, count * ffn, tape->up);
  }
  const Activations middle = prepare(mode, engine.digits[3], act, pairs.count(), ffn, engine.act_low, engine.q8, engine.blocks);
  run_experts(engine, own, pairs, runs.batch, middle, down, 1);
  for_rows(batch.rows, 4, [&](int first, int last) {
    for (size_t m = size_t(first); m < size_t(last); m++) {
      float* to = branch.to + m * width;
      if (!branch.direct && !own.shared) std::memset(to, 0, size_t(width) * sizeof(float));
      for (size_t i = m * used; i < (m + 1) * used; i++) kernels().axpy(out + size_t(pairs.place[i]) * width, 1, width, to);
    }
  });
  join(engine, mode, branch, own.mlp_post_norm, batch.rows, x, tape ? &tape->mlp_branch : nullptr);
}

namespace {

// What goes back through one expert: dx of its rows in, dh of its rows out (added), and the gradient of its weight in them.
struct ExpertBackward {
  Matrix w_gate, w_up, w_down;
  const float *gate, *up;  // [rows of the expert][ffn padded]
  const int* row;          // its rows
  const float* weight;     // [all rows], stride `stride`
  float* d_weight;         // [rows of the expert]
  Activations input;       // its rows of h
  std::array<const float*, kTargets> u;
  int rows, stride;
};

// `adapters`: of one layer, with those of the expert in the places of gate, up and down.
void expert_backward(Engine& engine, const ExpertBackward& e, const LoraSet* adapters, const float* dx, float* dh) {
  const Dims& dims = engine.dims;
  const int width = padded(dims.width), ffn = padded(e.w_gate.rows);
  const size_t rows = size_t(e.rows);
  Batch batch;
  batch.rows = e.rows;
  batch.segments = {{0, e.rows, 0, nullptr, adapters}};
  float *dy = engine.pair_dy.get<float>(rows * width), *act = engine.act.get<float>(rows * ffn),
        *d_act = engine.pair_out.get<float>(rows * ffn), *d_gate = engine.dgate.get<float>(rows * ffn),
        *d_up = engine.dup.get<float>(rows * ffn);
  for_rows(e.rows, 16, [&](int first, int last) {
    for (int i = first; i < last; i++)
      std::memcpy(dy + size_t(i) * width, dx + size_t(e.row[i]) * width, size_t(width) * sizeof(float));
  });
  activate(dims, e.gate, e.up, e.rows, ffn, act);
  Activations middle = e.input;  // without an adapter only its rows count
  if (e.u[kDown]) {
    float* taken = d_up;  // by down, in the place of a gradient that comes later
    weigh(act, e.row, e.weight, e.stride, e.rows, ffn, taken);
    middle = prepare(e.input.mode, 0, taken, e.rows, ffn, engine.act_low, engine.q8, engine.blocks);
  }
  const LinearBackwardJob out[] = {{&e.w_down, kDown, dy, width, e.u[kDown]}};
  linear_backward(engine, middle, out, 1, batch, 0, d_act, ffn);  // the gradient of what the weight multiplies, times it below
  for_rows(e.rows, 8, [&](int first, int last) {
    for (int i = first; i < last; i++) {
      const size_t at = size_t(i) * ffn;
      const float one = 1, weight = e.weight[size_t(e.row[i]) * e.stride];
      kernels().lora_shrink_f32(d_act + at, ffn, 1, act + at, ffn, &one, 1, ffn, e.d_weight + i, 1);
      for (int f = 0; f < ffn; f++) d_act[at + f] *= weight;
      (dims.gelu ? kernels().gelu_mul_backward : kernels().silu_mul_backward)(e.gate + at, e.up + at, d_act + at, ffn,
                                                                              d_gate + at, d_up + at);
    }
  });
  const LinearBackwardJob in[] = {{&e.w_gate, kGate, d_gate, ffn, e.u[kGate]}, {&e.w_up, kUp, d_up, ffn, e.u[kUp]}};
  float* d_input = engine.pair_dy.get<float>(rows * width);
  linear_backward(engine, e.input, in, 2, batch, 0, d_input, width);
  for_rows(e.rows, 8, [&](int first, int last) {
    for (int i = first; i < last; i++) kernels().axpy(d_input + size_t(i) * width, 1, width, dh + size_t(e.row[i]) * width);
  });
}

// d logit_e = weight_e (d weight_e - sum over the experts used of weight * d weight), where d weight is 0 for the others; then
// through the router, added to dh.
void router_backward(Engine& engine, const Layer& own, const Pairs& pairs, const int32_t* chosen, const float* weights,
                     const float* d_weights, int rows, float* dh) {
  const int width = padded(engine.dims.width), stride = padded(own.experts), used = engine.experts_used;
  float* d_logits = engine.routing.get<float>(size_t(rows) * stride);
  for_rows(rows, 16, [&](int first, int last) {
    for (size_t m = size_t(first); m < size_t(last); m++) {
      const float* weight = weights + m * stride;
      float* out = d_logits + m * stride;
      float mean = 0;
      for (size_t j = m * used; j < (m + 1) * used; j++) mean += weight[chosen[j]] * d_weights[pairs.place[j]];
      for (int e = 0; e < stride; e++) out[e] = -weight[e] * mean;
      for (size_t j = m * used; j < (m + 1) * used; j++) out[chosen[j]] = weight[chosen[j]] * (d_weights[pairs.place[j]] - mean);
    }
  });
  const Activations input{Mode::f32, rows, width, 0, nullptr, nullptr, nullptr, nullptr};
  const LinearBackwardJob job[] = {{&own.router, kTargets, d_logits, stride, nullptr}};
  const Batch plain;
  float* from_router = engine.pair_dy.get<float>(size_t(rows) * width);
  linear_backward(engine, input, job, 1, plain, 0, from_router, width);
  for_rows(rows, 16, [&](int first, int last) {
    for (int m = first; m < last; m++) kernels().axpy(from_router + size_t(m) * width, 1, width, dh + size_t(m) * width);
  });
}

// As an expert of all rows; then d z = d weight * weight (1 - weight) through weight = sigmoid(shared_router . h).
void shared_backward(Engine& engine, int layer, Mode mode, const Activations& input, const Batch& batch, const LayerTape& tape,
                     const float* dx, float* dh) {
  const Layer& own = engine.layers[size_t(layer)];
  const int width = padded(engine.dims.width), ffn = padded(own.shared);
  const size_t rows = size_t(batch.rows);
  std::vector<int> row(rows);
  std::iota(row.begin(), row.end(), 0);
  const float* weight = tape.shared_weight.data<float>();
  float* d_weight = engine.d_routing.get<float>(rows);
  ExpertBackward all{own.w[kSharedGate],
                     own.w[kSharedUp],
                     own.w[kSharedDown],
                     load_rows(mode, tape.shared_gate, rows * ffn, engine.gate),
                     load_rows(mode, tape.shared_up, rows * ffn, engine.up),
                     row.data(),
                     weight,
                     d_weight,
                     input,
                     {},
                     batch.rows,
                     1};
  LoraSet set(1);
  for (const Target target : {kGate, kUp, kDown}) {
    const Target shared = Target(target - kGate + kSharedGate);
    if (batch.lora()) set[0][target] = (*batch.lora())[size_t(layer)][shared];
    if (set[0][target].rank) all.u[target] = tape.u[shared].data<float>();
  }
  expert_backward(engine, all, &set, dx, dh);
  for_rows(batch.rows, 8, [&](int first, int last) {
    for (int m = first; m < last; m++)
      kernels().axpy(own.shared_router, d_weight[m] * weight[m] * (1 - weight[m]), width, dh + size_t(m) * width);
  });
}

}  // namespace

void moe_backward(Engine& engine, int layer, Mode mode, float* dx, const Batch& batch, const LayerTape& tape) {
  const Layer& own = engine.layers[size_t(layer)];
  const int width = padded(engine.dims.width), ffn = padded(own.ffn), stride = padded(own.experts), used = engine.experts_used;
  const size_t rows = size_t(batch.rows), count = rows * size_t(used);
  const float* d_branch = branch_backward(engine, mode, own.mlp_post_norm, tape.mlp_branch, batch.rows, dx);
  const int32_t* chosen = tape.chosen.data<int32_t>();
  const float* weights = tape.routing.data<float>();
  const Pairs pairs = sort_by_expert(chosen, batch.rows, used, own.experts);
  const float *gate = load_rows(mode, tape.gate, count * ffn, engine.gate),
              *up = load_rows(mode, tape.up, count * ffn, engine.up);
  float *dh = engine.dx.get<float>(rows * width), *d_weights = engine.d_routing.get<float>(count);
  std::memset(dh, 0, rows * width * sizeof(float));
  const float* x = load_rows(mode, tape.middle, rows * width, engine.x_wide);
  const LoraSet* set = batch.lora();                                                     // a training step has one
  Activations input{mode, pairs.count(), width, 0, nullptr, nullptr, nullptr, nullptr};  // only adapters need more of it
  Activations shared_input{mode, batch.rows, width, 0, nullptr, nullptr, nullptr, nullptr};
  if (adapted(set, layer, {kGate, kUp, kSharedGate, kSharedUp})) {
    const float* h = normed(engine, x, own.mlp_norm, own.mlp_norm_bias, batch.rows);
    shared_input = prepare(mode, 0, h, batch.rows, width, engine.normed_low, engine.q8, engine.blocks);
    if (adapted(set, layer, {kGate, kUp})) input = gather(engine, shared_input, pairs, false);
  }
  for (int e = 0; e < own.experts; e++) {
    const size_t first = size_t(pairs.start[size_t(e)]);
    const LoraSet own_set = set ? expert_set(engine.dims, own, *set, layer, e) : LoraSet(1);
    ExpertBackward expert{own.expert(kGate, e),
                          own.expert(kUp, e),
                          own.expert(kDown, e),
                          gate + first * ffn,
                          up + first * ffn,
                          pairs.row.data() + first,
                          weights + e,
                          d_weights + first,
                          input.part(int(first), pairs.of(e)),
                          {},
                          pairs.of(e),
                          stride};
    for (const Target target : {kGate, kUp, kDown})
      if (const int rank = own_set[0][target].rank) expert.u[target] = tape.u[target].data<float>() + first * size_t(rank);
    if (expert.rows) expert_backward(engine, expert, &own_set, d_branch, dh);
  }
  router_backward(engine, own, pairs, chosen, weights, d_weights, batch.rows, dh);
  if (own.shared) shared_backward(engine, layer, mode, shared_input, batch, tape, d_branch, dh);
  normed_backward(engine, rows_of(x, width), own.mlp_norm, dh, batch.rows, dx);
}

}  // namespace nomoat
