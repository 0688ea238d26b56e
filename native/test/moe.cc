// Mixture of experts against plain loops in double: which experts a row gets, what they add to it, and the gradient.

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>

#include "op/engine.h"
#include "test/test.h"

namespace nomoat {

namespace {

constexpr int kExperts = 6;
constexpr float kEps = 1e-5f;

using Doubles = std::vector<double>;

int width_of(Format format) { return block_of(format) == 256 ? 256 : 64; }
int ffn_of(Format format) { return is_float(format) ? 48 : block_of(format) == 256 ? 256 : 96; }  // 48: a row ends inside a tile

Dims dims_of(Format format) {
  Dims d{};
  d.layers = 1;
  d.width = width_of(format);
  d.eps = kEps;
  return d;
}

struct Model {
  Engine engine;
  Weights router, gate, up, down;
  Floats norm;

  Model(Format format, int used, bool expert_norm)
      : engine(dims_of(format)),
        router(random_weights(Format::F32, kExperts, width_of(format), 400)),
        gate(random_weights(format, kExperts * ffn_of(format), width_of(format), 401)),
        up(random_weights(format, kExperts * ffn_of(format), width_of(format), 402)),
        down(random_weights(format, kExperts * width_of(format), ffn_of(format), 403)) {
    norm = Random(404).floats(size_t(padded(engine.dims.width)), 0.5f, 1.5f);
    engine.experts_used = used;
    engine.expert_norm = expert_norm;
    engine.digits.fill(2);  // sharp enough to tell a wrong product from noise
    Layer& own = engine.layers[0];
    own.experts = kExperts;
    own.ffn = ffn_of(format);
    own.router = router.matrix;
    own.w[kGate] = gate.matrix;
    own.w[kUp] = up.matrix;
    own.w[kDown] = down.matrix;
    own.mlp_norm = norm.data();
  }

  // What the block adds to one row. `margin`: how far the best expert left out is from the worst one used, in logits.
  Doubles expected(const Doubles& x, double* margin = nullptr) const {
    const int width = engine.dims.width, ffn = engine.layers[0].ffn, used = engine.experts_used;
    double squares = 0;
    for (double v : x) squares += v * v;
    Doubles h(x);
    for (int k = 0; k < width; k++) h[size_t(k)] *= double(norm[size_t(k)]) / std::sqrt(squares / width + double(kEps));
    const Doubles logits = product(router, 0, kExperts, h);
    std::vector<int> order(kExperts);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[size_t(a)] > logits[size_t(b)]; });
    if (margin && used < kExperts) *margin = logits[size_t(order[size_t(used) - 1])] - logits[size_t(order[size_t(used)])];
    double all = 0, some = 0;
    for (int i = 0; i < kExperts; i++) (i < used ? some : all) += std::exp(logits[size_t(order[size_t(i)])]);
    Doubles y(x.size());
    for (int i = 0; i < used; i++) {
      const int e = order[size_t(i)];
      Doubles act = product(gate, e * ffn, ffn, h);
      const Doubles raised = product(up, e * ffn, ffn, h);
      for (size_t f = 0; f < act.size(); f++) act[f] *= raised[f] / (1 + std::exp(-act[f]));
      const Doubles out = product(down, e * width, width, act);
      const double weight = std::exp(logits[size_t(e)]) / (engine.expert_norm ? some : all + some);
      for (size_t k = 0; k < y.size(); k++) y[k] += weight * out[k];
    }
    return y;
  }

  static Doubles product(const Weights& w, int first, int rows, const Doubles& x) {
    Doubles y(static_cast<size_t>(rows));
    for (int n = 0; n < rows; n++)
      for (int k = 0; k < w.cols; k++) y[size_t(n)] += double(w.at(first + n, k)) * x[size_t(k)];
    return y;
  }

  Doubles row_of(const Floats& x, int row) const {
    const auto begin = x.begin() + row * padded(engine.dims.width);
    return Doubles(begin, begin + engine.dims.width);
  }
};

Floats input(const Model& model, int rows) {
  return Random(405).floats(size_t(rows * padded(model.engine.dims.width)));  // widths here are multiples of 32: no padding
}

Batch batch_of(int rows) {
  Batch batch;
  batch.rows = rows;
  return batch;
}

Floats forward(Model& model, Mode mode, const Floats& x, LayerTape* tape = nullptr) {
  Floats y(x);
  moe_forward(model.engine, 0, mode, y.data(), batch_of(int(x.size()) / padded(model.engine.dims.width)), tape);
  return y;
}

// Distance over length of what was added. bf16: three products in a row, each with both factors rounded to 2^-9. int8: two
// digits, 1 / 32,512 of the largest of 32. f32: sums of up to 256 terms.
double allowed(Mode mode) { return mode == Mode::bf16 ? 0.02 : mode == Mode::int8 ? 1e-3 : 1e-5; }

void check_forward(Model& model, Mode mode, int rows) {
  const int width = padded(model.engine.dims.width);
  const Floats x = input(model, rows), y = forward(model, mode, x);
  for (int m = 0; m < rows; m++) {
    double margin = 1, error = 0, length = 0;
    const Doubles expected = model.expected(model.row_of(x, m), &margin);
    CHECK(margin > 1e-3, "row %d is nearly a tie (%g): the test wants another seed", m, margin);
    for (int k = 0; k < model.engine.dims.width; k++) {
      const size_t at = size_t(m * width + k);
      const double found = double(y[at]) - double(x[at]);
      error += (found - expected[size_t(k)]) * (found - expected[size_t(k)]);
      length += expected[size_t(k)] * expected[size_t(k)];
    }
    CHECK(std::sqrt(error / length) < allowed(mode), "mode %d, %d experts of %d rows: row %d is off by %g", int(mode),
          model.engine.experts_used, rows, m, std::sqrt(error / length));
  }
}

TEST("moe: every level, format and precision adds what plain loops add") {
  for (Format format : {Format::F32, Format::F16, Format::Q8_0, Format::Q4_1, Format::Q4_K, Format::Q6_K}) {
    Model model(format, 2, true);
    for_levels([&](const Kernels&) {
      for (Mode mode : {Mode::int8, Mode::bf16, Mode::f32}) check_forward(model, mode, 9);
    });
  }
}

TEST("moe: one expert, all experts, weights as they are") {
  for (int used : {1, 3, kExperts})
    for (bool expert_norm : {true, false}) {
      Model model(Format::Q8_0, used, expert_norm);
      for (int rows : {1, 40}) check_forward(model, Mode::int8, rows);
    }
}

TEST("moe: rows of one batch are what they are alone, on any number of threads") {
  for_levels([](const Kernels&) {
    for (Format format : {Format::F32, Format::Q4_1})
      for (Mode mode : {Mode::int8, Mode::bf16, Mode::f32}) {
        Model model(format, 2, true);
        const size_t width = size_t(padded(model.engine.dims.width));
        const Floats x = input(model, 70), together = forward(model, mode, x);
        for (int count : {1, 3}) {
          const Threads set(count);
          CHECK(same_bits(forward(model, mode, x), together), "mode %d: %d threads", int(mode), count);
          for (size_t m = 0; m < 70; m += 7) {
            const Floats alone = forward(model, mode, Floats(&x[m * width], &x[m * width] + width));
            CHECK(same_bits(alone.data(), &together[m * width], width * sizeof(float)), "mode %d: row %zu", int(mode), m);
          }
        }
      }
  });
}

TEST("moe: where logits are equal the lower index is taken") {
  Model model(Format::F32, 2, true);
  std::fill(model.router.packed.begin(), model.router.packed.end(), uint8_t(0));
  LayerTape tape;
  forward(model, Mode::f32, input(model, 5), &tape);
  for (int i = 0; i < 10; i++) CHECK(tape.chosen.data<int32_t>()[i] == i % 2, "slot %d", i);
  for (int m = 0; m < 5; m++)
    for (int e = 0; e < padded(kExperts); e++)
      CHECK(tape.routing.data<float>()[m * padded(kExperts) + e] == (e < 2 ? 0.5f : 0.0f), "row %d, expert %d", m, e);
}

TEST("moe: a NaN in the router or in an expert reaches the rows that use it, and only them") {
  for (Mode mode : {Mode::int8, Mode::bf16, Mode::f32}) {
    Model model(Format::F32, 2, true);
    const size_t width = size_t(padded(model.engine.dims.width));
    const Floats x = input(model, 20);
    LayerTape tape;
    const Floats clean = forward(model, Mode::f32, x, &tape);
    const std::vector<int32_t> chosen(tape.chosen.data<int32_t>(), tape.chosen.data<int32_t>() + 40);
    const uint8_t nan[] = {0, 0, 0xc0, 0x7f};
    std::copy(nan, nan + 4, &model.gate.gguf[4 * size_t((3 * model.engine.layers[0].ffn + 5) * model.gate.cols)]);
    pack_strips(model.gate.matrix, model.gate.gguf.data(), 0, model.gate.matrix.strips(), model.gate.packed.data());
    const Floats y = forward(model, mode, x);
    for (size_t m = 0; m < 20; m++) {
      const bool uses = chosen[2 * m] == 3 || chosen[2 * m + 1] == 3;
      for (size_t k = 0; k < width; k++) CHECK(std::isnan(y[m * width + k]) == uses, "mode %d: row %zu", int(mode), m);
    }
    Floats bad = x;
    bad[width + 1] = NAN;
    const Floats z = forward(model, mode, bad);
    for (size_t k = 0; k < width; k++) CHECK(std::isnan(z[width + k]), "mode %d: a row with NaN became a number", int(mode));
  }
}

// dx of sum(c * y) against differences of the plain loops, in both forms of the weights.
TEST("moe: the gradient is that of the forward pass") {
  for (int used : {1, 2, kExperts})
    for (bool expert_norm : {true, false}) {
      Model model(Format::Q8_0, used, expert_norm);
      const int rows = 7, width = padded(model.engine.dims.width);
      const Floats x = input(model, rows), c = Random(406).floats(x.size());
      LayerTape tape;
      forward(model, Mode::f32, x, &tape);
      Floats dx = c;
      moe_backward(model.engine, 0, Mode::f32, dx.data(), batch_of(rows), tape);
      double error = 0, length = 0;
      for (int m = 0; m < rows; m++)
        for (int k = 0; k < model.engine.dims.width; k++) {
          Doubles ahead = model.row_of(x, m), behind = ahead;
          const double step = 1e-5;
          ahead[size_t(k)] += step;
          behind[size_t(k)] -= step;
          const Doubles a = model.expected(ahead), b = model.expected(behind);
          double slope = double(c[size_t(m * width + k)]);
          for (size_t i = 0; i < a.size(); i++) slope += double(c[size_t(m * width) + i]) * (a[i] - b[i]) / (2 * step);
          const double found = double(dx[size_t(m * width + k)]);
          error += (found - slope) * (found - slope);
          length += slope * slope;
        }
      CHECK(std::sqrt(error / length) < 1e-5, "%d experts, norm %d: off by %g", used, int(expert_norm),
            std::sqrt(error / length));
    }
}

TEST("moe: what scratch memory held before changes nothing") {
  for (Mode mode : {Mode::int8, Mode::bf16, Mode::f32}) {
    Floats found[2];
    for (int used_before : {0, 1}) {
      Model model(Format::F32, 2, true);
      Engine& e = model.engine;
      constexpr size_t count = 1 << 16;
      for (Buffer* scratch : {&e.gate, &e.up, &e.act, &e.dgate, &e.dup, &e.pair_x, &e.pair_out, &e.dx, &e.routing, &e.d_routing})
        if (used_before) std::fill_n(scratch->get<float>(count), count, NAN);
      const Floats x = input(model, 9);
      LayerTape tape;
      Floats all = forward(model, mode, x, &tape), dx = Random(406).floats(x.size());
      if (mode != Mode::int8) moe_backward(e, 0, mode, dx.data(), batch_of(9), tape);
      all.insert(all.end(), dx.begin(), dx.end());
      found[used_before] = all;
    }
    CHECK(same_bits(found[0], found[1]), "mode %d", int(mode));
  }
}

TEST("moe: threads and repetition do not change the gradient") {
  for (Mode mode : {Mode::bf16, Mode::f32}) {
    Model model(Format::Q4_1, 2, false);
    const Floats x = input(model, 50), c = Random(406).floats(x.size());
    Floats first;
    for (int count : {1, 1, 3}) {
      const Threads set(count);
      LayerTape tape;
      forward(model, mode, x, &tape);
      Floats dx = c;
      moe_backward(model.engine, 0, mode, dx.data(), batch_of(50), tape);
      if (first.empty()) first = dx;
      CHECK(same_bits(dx, first), "mode %d: %d threads", int(mode), count);
    }
  }
}

}  // namespace

}  // namespace nomoat
