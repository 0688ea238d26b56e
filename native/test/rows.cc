// Kernels on rows and flat arrays: against definitions in double, and the scalar level's bits at every level.

#include <cfloat>
#include <cmath>
#include <numbers>

#include "op/engine.h"
#include "op/rounded.h"
#include "quant/half.h"
#include "test/test.h"

namespace nomoat {

namespace {

// A row of `count` values in memory padded to `multiple` with zeros, and nothing behind it.
Floats row(Random& random, int count, int multiple, float low = -1, float high = 1) {
  Floats x(size_t(round_up(count, multiple)));
  for (int i = 0; i < count; i++) x[size_t(i)] = random.uniform(low, high);
  return x;
}

void check_close(const char* what, int i, double found, double exact, double bound) {
  CHECK(std::fabs(found - exact) <= bound, "%s[%d]: %.9g, exact %.9g, off by %.3g, allowed %.3g", what, i, found, exact,
        std::fabs(found - exact), bound);
}

TEST("rows: quantize is its definition, with the same integers at every level") {
  Random random(31);
  constexpr int blocks = 9, cols = blocks * kTileCols;
  Floats x = random.floats(cols, -5, 5);
  for (int c = 0; c < 32; c++) x[size_t(32 + c)] = 0;
  x[64 + 5] = 1e4f;                                                        // an outlier: the rest rounds to zero
  for (int c = 0; c < 32; c++) x[size_t(96 + c)] *= 1e-30f;                // small, still normal
  for (int c = 0; c < 32; c++) x[size_t(128 + c)] = c % 2 ? -1.5f : 0.5f;  // ties: -127, 42.33
  for (int c = 0; c < 32; c++) x[size_t(160 + c)] = float(c) - 16;
  x[192] = -FLT_MAX;
  for_levels([&](const Kernels& k) {
    for (int digits : {1, 2}) {
      const float range = digits == 1 ? 127.0f : 127.0f * 128.0f;
      std::vector<int8_t> q(size_t(cols * digits));
      std::vector<ActBlock> found(blocks);
      k.quantize(x.data(), cols, digits, q.data(), found.data());
      for (int b = 0; b < blocks; b++) {
        float peak = 0;
        for (int c = 0; c < 32; c++) peak = std::fmax(peak, std::fabs(x[size_t(32 * b + c)]));
        int sum[2] = {0, 0};
        for (int c = 0; c < 32; c++) {
          const int code = peak > 0 ? int(std::nearbyint(x[size_t(32 * b + c)] * (range / peak))) : 0;
          const int8_t* at = &q[size_t(32 * b * digits + c)];
          const int value = digits == 1 ? at[0] : 128 * at[0] + at[32];
          CHECK(value == code, "%d digits, block %d, column %d: %d, expected %d", digits, b, c, value, code);
          CHECK(digits == 1 || std::abs(at[32]) <= 64, "low digit %d", at[32]);
          sum[c / 16] += code;
        }
        const ActBlock& a = found[size_t(b)];
        CHECK(a.scale == peak / range, "block %d: scale %g", b, double(a.scale));
        CHECK(a.sum[0] == sum[0] && a.sum[1] == sum[1], "block %d: sums %d, %d", b, int(a.sum[0]), int(a.sum[1]));
        CHECK(a.scaled_sum == a.scale * float(sum[0] + sum[1]), "block %d: scaled sum %g", b, double(a.scaled_sum));
      }
    }
  });
}

TEST("rows: to_int8 is its definition, with the same bits at every level; NaN and infinity make the scale NaN") {
  for (int count : {16, 32, 64, 80, 512})
    for (float size : {0.0f, 1e-38f, 1e-3f, 1.0f, 1e30f}) {
      Floats x = Random(uint64_t(count) + 5).floats(size_t(count), -size, size);
      float peak = 0;
      for (float value : x) peak = std::fmax(peak, std::fabs(value));
      for_levels([&](const Kernels& k) {
        std::vector<int8_t> found(size_t(count), 1);
        CHECK(k.to_int8(x.data(), count, found.data()) == peak / 127, "scale of %d values up to %g", count, double(peak));
        const float factor = peak > 1e-30f ? 127 / peak : 0;
        for (int i = 0; i < count; i++)
          CHECK(found[size_t(i)] == int(std::nearbyint(x[size_t(i)] * factor)), "[%d] of %g: %d", i, double(x[size_t(i)]),
                found[size_t(i)]);
        for (float bad : {NAN, INFINITY, -INFINITY})
          for (int at : {0, 7, count - 1}) {
            Floats broken = x;
            broken[size_t(at)] = bad;
            CHECK(std::isnan(k.to_int8(broken.data(), count, found.data())), "%g at %d goes unseen", double(bad), at);
          }
      });
    }
}

TEST("rows: quantize makes a block with NaN or infinity NaN, wherever it stands, and takes subnormal peaks for zero") {
  for_levels([](const Kernels& k) {
    for (int digits : {1, 2}) {
      int8_t q[192];
      ActBlock blocks[3];
      for (float bad : {NAN, -NAN, INFINITY, -INFINITY})
        for (int place = 0; place < 32; place++) {
          Floats x = Random(uint64_t(place) + 1).floats(96);
          x[size_t(32 + place)] = bad;
          k.quantize(x.data(), 96, digits, q, blocks);
          CHECK(std::isnan(blocks[1].scale) && std::isnan(blocks[1].scaled_sum), "%g at %d: scale %g, scaled sum %g", double(bad),
                place, double(blocks[1].scale), double(blocks[1].scaled_sum));
          for (int b : {0, 2}) CHECK(std::isfinite(blocks[b].scale), "%g at %d: block %d suffers", double(bad), place, b);
        }
      for (float peak : {1e-45f, 1e-40f, FLT_MIN}) {
        Floats x(32);
        x[3] = -peak;
        k.quantize(x.data(), 32, digits, q, blocks);
        CHECK(blocks[0].scale <= peak && std::fabs(blocks[0].scaled_sum) <= 2 * peak, "peak %g: scale %g, scaled sum %g",
              double(peak), double(blocks[0].scale), double(blocks[0].scaled_sum));
        for (int c = 0; c < 32 * digits; c++)
          CHECK(c % 32 == 3 || q[c] == 0, "peak %g: code %d in column %d", double(peak), q[c], c);
      }
    }
  });
}

TEST("rows: rms_norm and its backward") {
  for (int cols : {1, 15, 16, 17, 40, 577}) {
    Random random(uint64_t(cols) + 40);
    const Floats x = row(random, cols, 16), w = row(random, cols, 16, 0.5f, 2), dy = row(random, cols, 16),
                 before = row(random, cols, 16);
    const float eps = 1e-5f;
    double squares = 0, dots = 0, sizes = 0;
    for (int i = 0; i < cols; i++) {
      const size_t at = size_t(i);
      squares += double(x[at]) * x[at];
      dots += double(w[at]) * dy[at] * x[at];
      sizes += std::fabs(double(w[at]) * dy[at] * x[at]);
    }
    const double r = 1 / std::sqrt(squares / cols + eps);
    Floats y1, dx1;
    for_levels([&](const Kernels& k) {
      Floats y(x.size(), 9.0f), dx = before;
      k.rms_norm(x.data(), w.data(), cols, eps, y.data());
      k.rms_norm_backward(x.data(), w.data(), dy.data(), cols, eps, dx.data());
      if (k.level == Level::scalar) y1 = y, dx1 = dx;
      CHECK(same_bits(y, y1) && same_bits(dx, dx1), "%d columns: other bits than the scalar level", cols);
      // a sum of squares rounds cols / 16 + 4 times, its root half of that; a few roundings for the rest
      const double norm = (cols / 32 + 10) * kRound, sum = (cols / 16 + 10) * kRound;
      for (int i = 0; i < int(y.size()); i++) {
        const size_t at = size_t(i);
        check_close("y", i, y[at], x[at] * w[at] * r, norm * std::fabs(x[at] * w[at] * r));
        const double own = w[at] * dy[at] * r, shift = x[at] * r * r * r / cols;
        check_close("dx", i, dx[at], before[at] + own - shift * dots,
                    (3 * norm + sum) * (std::fabs(own) + std::fabs(shift) * sizes + std::fabs(before[at])));
      }
    });
  }
}

TEST("rows: layer norm and its backward, of center and rms_norm, with and without a bias") {
  for (int cols : {1, 15, 16, 17, 40, 577}) {
    Random random(uint64_t(cols) + 45);
    const Floats x = row(random, cols, 32, 3, 5), w = row(random, cols, 32, 0.5f, 2), b = row(random, cols, 32),
                 dy = row(random, cols, 32), before = row(random, cols, 32);
    Dims dims{};
    dims.width = cols;
    dims.eps = 1e-3f;
    dims.layer_norm = true;
    double mean = 0, squares = 0, g_mean = 0, g_dot = 0;
    for (int i = 0; i < cols; i++) mean += double(x[size_t(i)]) / cols;
    for (int i = 0; i < cols; i++) squares += (x[size_t(i)] - mean) * (x[size_t(i)] - mean) / cols;
    const double r = 1 / std::sqrt(squares + 1e-3f);
    for (int i = 0; i < cols; i++) {
      const double g = double(w[size_t(i)]) * dy[size_t(i)];
      g_mean += g / cols;
      g_dot += g * (x[size_t(i)] - mean) * r / cols;
    }
    Floats y1, dx1;
    for_levels([&](const Kernels& k) {
      Floats plain(x.size(), 9.0f), y = x, dx = before;
      norm_row(dims, x.data(), w.data(), nullptr, plain.data());
      norm_row(dims, y.data(), w.data(), b.data(), y.data());  // in place
      norm_row_backward(dims, x.data(), w.data(), dy.data(), dx.data());
      if (k.level == Level::scalar) y1 = y, dx1 = dx;
      CHECK(same_bits(y, y1) && same_bits(dx, dx1), "%d columns: other bits than the scalar level", cols);
      // The mean is about 4 and rounds cols / 16 + 20 times; r is at most 32. The rest are a few roundings of values up to 2 r.
      const double error = (cols / 16 + 40) * kRound * 8 * r;
      for (int i = 0; i < cols; i++) {
        const size_t at = size_t(i);
        const double hat = (x[at] - mean) * r, own = double(w[at]) * dy[at];
        check_close("y", i, y[at], hat * w[at] + b[at], 2 * error);
        check_close("y without bias", i, plain[at], hat * w[at], 2 * error);
        check_close("dx", i, dx[at], before[at] + r * (own - g_mean - hat * g_dot), 8 * error * (1 + r));
      }
      for (size_t i = size_t(cols); i < size_t(round_up(cols, 16)); i++)
        CHECK(y[i] == 0 && plain[i] == 0 && dx[i] == 0, "%d columns: padding [%zu] is not zero", cols, i);
    });
  }
}

TEST("rows: gelu, its backward and the caps") {
  constexpr int n = 2048;
  Random random(55);
  Floats x = random.floats(n, -12, 12), up = random.floats(n, -3, 3), d = random.floats(n);
  for (size_t i = 0; i < 512; i++) x[i] /= 100;
  x[0] = 0, x[1] = -0.0f, x[2] = 300, x[3] = -300, x[4] = 1e-30f;
  Floats first[8];
  for_levels([&](const Kernels& k) {
    Floats act(n), alone(n), d_gate(n), d_up(n), d_alone(n), capped = x, slope = d, silu(n);
    k.gelu_mul(x.data(), up.data(), n, act.data());
    k.gelu_mul(x.data(), nullptr, n, alone.data());
    k.gelu_mul_backward(x.data(), up.data(), d.data(), n, d_gate.data(), d_up.data());
    k.gelu_mul_backward(x.data(), nullptr, d.data(), n, d_alone.data(), nullptr);
    k.silu_mul(x.data(), nullptr, n, silu.data());
    k.soft_cap(capped.data(), 5, n);
    k.soft_cap_backward(capped.data(), 5, n, slope.data());
    const Floats found[8] = {act, alone, d_gate, d_up, d_alone, silu, capped, slope};
    for (int i = 0; i < 8; i++) {
      if (k.level == Level::scalar) first[i] = found[i];
      CHECK(same_bits(found[i], first[i]), "output %d: other bits than the scalar level", i);
    }
    for (int i = 0; i < n; i++) {
      const size_t at = size_t(i);
      const double g = x[at], u = up[at], dy = d[at], c = std::sqrt(2 / std::numbers::pi);
      const double z = c * (g + 0.044715 * g * g * g), s = 1 / (1 + std::exp(-2 * z)), value = g * s;
      const double derivative = s + value * (1 - s) * 2 * c * (1 + 3 * 0.044715 * g * g);
      // sigmoid(2 z) is known up to the roundings of 2 z times 1 - s, and its own
      const double error = (12 + 16 * std::fabs(z) * (1 - s)) * kRound, tiny = 1e-35;
      check_close("gelu", i, alone[at], value, error * std::fabs(value) + tiny);
      check_close("gelu * up", i, act[at], value * u, (error + kRound) * std::fabs(value * u) + tiny);
      check_close("d_up", i, d_up[at], dy * value, (error + kRound) * std::fabs(dy * value) + tiny);
      const double sizes = s + std::fabs(derivative - s);
      // 1 - s loses what s has rounded
      const double slope_error = 3 * error * sizes + 4 * kRound * std::fabs(value) * (2 + g * g);
      // at -300, where vexp stays at its end, s is 1e-38 and z' is 2e4
      check_close("d of gelu", i, d_alone[at], dy * derivative, slope_error * std::fabs(dy) + 1e-31);
      check_close("d_gate", i, d_gate[at], dy * u * derivative, (slope_error + kRound) * std::fabs(dy * u) + 1e-31);
      check_close("silu alone", i, silu[at], g / (1 + std::exp(-g)), 12 * kRound * std::fabs(g / (1 + std::exp(-g))) + tiny);
      const double t = std::tanh(g / 5);
      check_close("cap", i, capped[at], 5 * t, 10 * kRound * std::fabs(5 * t));
      check_close("slope of the cap", i, slope[at], dy * (1 - t * t), 24 * kRound * std::fabs(dy));
    }
    Floats bad = {NAN, INFINITY, -INFINITY, 3e38f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    k.soft_cap(bad.data(), 2, 16);
    CHECK(std::isnan(bad[0]) && bad[1] == 2 && bad[2] == -2 && bad[3] == 2, "caps of NaN and infinity: %g %g %g %g",
          double(bad[0]), double(bad[1]), double(bad[2]), double(bad[3]));
  });
}

TEST("rows: the exponential, silu and softmax") {
  Random random(51);
  Floats x = random.floats(2048, -87, 88), up = random.floats(2048, -3, 3), d = random.floats(2048);
  for (size_t i = 0; i < 1024; i++) x[i] /= 10;
  x[0] = 0, x[1] = -0.0f, x[2] = 200, x[3] = -200, x[4] = -87.3f, x[5] = 88;
  constexpr int n = 2048;
  Floats first[5];
  for_levels([&](const Kernels& k) {
    Floats e(n), act(n), d_gate(n), d_up(n), scaled(n);
    std::vector<bf16> low(n);
    k.softmax_f32(x.data(), 0, 1, n, e.data());
    k.softmax_f32(x.data(), 20.5f, -0.25f, n, scaled.data());
    k.softmax_bf16(x.data(), 20.5f, -0.25f, n, low.data());
    k.silu_mul(x.data(), up.data(), n, act.data());
    k.silu_mul_backward(x.data(), up.data(), d.data(), n, d_gate.data(), d_up.data());
    const Floats found[5] = {e, act, d_gate, d_up, scaled};
    for (int i = 0; i < 5; i++) {
      if (k.level == Level::scalar) first[i] = found[i];
      CHECK(same_bits(found[i], first[i]), "output %d: other bits than the scalar level", i);
    }
    for (int i = 0; i < n; i++) {
      const size_t at = size_t(i);
      const double g = x[at], s = 1 / (1 + std::exp(-g)), u = up[at], dy = d[at];
      // vexp: two units in the last place; beyond its range it stays at the end, 1e-38 or 2e38
      if (g > -87.3 && g < 88) check_close("exp", i, e[at], std::exp(g), 4 * kRound * std::exp(g));
      if (g < -87.3) CHECK(e[at] <= 1.3e-38f, "exp(%g) = %g", g, double(e[at]));
      const double tiny = 1e-35;
      check_close("silu", i, act[at], g * s * u, 12 * kRound * std::fabs(g * s * u) + tiny);
      check_close("d_up", i, d_up[at], dy * g * s, 12 * kRound * std::fabs(dy * g * s) + tiny);
      check_close("d_gate", i, d_gate[at], dy * u * s * (1 + g * (1 - s)),
                  16 * kRound * std::fabs(dy * u) * s * (1 + std::fabs(g)) + 1e-34);
      if (scaled[at] != 0 && std::fabs(scaled[at]) > FLT_MIN)
        CHECK(low[at] == float_to_bf16(scaled[at]), "softmax_bf16[%d]: 0x%04x", i, unsigned(low[at]));
    }
  });
}

TEST("rows: log_sum_exp of any number of logits") {
  for (int count : {1, 2, 15, 16, 17, 31, 32, 33, 1000}) {
    Random random(uint64_t(count) + 60);
    const Floats x = random.floats(size_t(count), -30, 30);
    double sum = 0;
    for (float value : x) sum += std::exp(double(value));
    float first = 0;
    for_levels([&](const Kernels& k) {
      const float found = k.log_sum_exp(x.data(), count);
      if (k.level == Level::scalar) first = found;
      CHECK(found == first, "%d logits: other bits than the scalar level", count);
      check_close("lse", count, found, std::log(sum), (count / 16 + 12 + std::fabs(std::log(sum))) * kRound);
      Floats bad = x;
      bad[size_t(count / 2)] = NAN;
      CHECK(std::isnan(k.log_sum_exp(bad.data(), count)), "%d logits, one NaN: finite", count);
    });
  }
}

TEST("rows: axpy, sum_squares") {
  Random random(71);
  const Floats y = random.floats(64), x = random.floats(64), many = random.floats(100003, -1e3f, 1e3f);
  double exact = 0;
  for (float value : many) exact += double(value) * value;
  for_levels([&](const Kernels& k) {
    Floats found = x;
    k.axpy(y.data(), 0.3f, 64, found.data());
    for (size_t i = 0; i < 64; i++) CHECK(found[i] == std::fma(y[i], 0.3f, x[i]), "axpy[%zu]", i);
    check_close("sum_squares", 0, k.sum_squares(many.data(), int64_t(many.size())), exact, double(many.size()) * 0x1p-53 * exact);
    CHECK(k.sum_squares(many.data(), 3) == double(many[0]) * many[0] + double(many[1]) * many[1] + double(many[2]) * many[2],
          "three squares");
    CHECK(k.sum_squares(many.data(), 0) == 0, "no squares");
  });
}

TEST("rows: adamw is its definition, with the same bits at every level") {
  constexpr int n = 37;
  Random random(81);
  const Floats w0 = random.floats(n), g = random.floats(n);
  Floats first;
  for_levels([&](const Kernels& k) {
    Floats w = w0, m(n), v(n);
    std::vector<double> w64(w0.begin(), w0.end()), m64(n), v64(n);
    for (int step = 1; step <= 4; step++) {
      const double lr = 1e-2, one = 1 - std::pow(0.9, step), two = 1 - std::pow(0.99, step);
      k.adamw(w.data(), g.data(), m.data(), v.data(), n, 0.5f, 0.9f, 0.99f, float(lr / one), float(1 / std::sqrt(two)), 1e-8f,
              float(1 - lr * 0.1));
      for (size_t i = 0; i < n; i++) {
        const double gradient = g[i] * 0.5;
        m64[i] = 0.9 * m64[i] + 0.1 * gradient;
        v64[i] = 0.99 * v64[i] + 0.01 * gradient * gradient;
        w64[i] = w64[i] * (1 - lr * 0.1) - lr * (m64[i] / one) / (std::sqrt(v64[i] / two) + 1e-8);
      }
    }
    if (k.level == Level::scalar) first = w;
    CHECK(same_bits(w, first), "other bits than the scalar level");
    // m / sqrt(v) is about 1: four steps of lr, each rounded a dozen times (0.99f alone is off by 2^-25 / 0.01)
    for (size_t i = 0; i < n; i++)
      check_close("w", int(i), w[i], w64[i], 4 * 1e-2 * 200 * kRound + 8 * kRound * std::fabs(w64[i]));
  });
}

TEST("rows: lora_shrink and lora_expand, any rank, width, range and number of rows") {
  for (int rank : {1, 3, 8, 17})
    for (int cols : {5, 16, 40, 77}) {
      constexpr int rows = 6;  // four at once, two alone
      Random random(uint64_t(100 * rank + cols));
      const Floats x = random.floats(size_t(rows * cols)), a = random.floats(size_t(rank * cols)),
                   scale = random.floats(size_t(rank)), u = random.floats(size_t(rows * rank)),
                   y0 = random.floats(size_t(rows * cols));
      Floats first;
      for_levels([&](const Kernels& k) {
        Floats found(static_cast<size_t>(rows * rank));
        k.lora_shrink_f32(x.data(), cols, rows, a.data(), cols, scale.data(), rank, cols, found.data(), rank);
        if (k.level == Level::scalar) first = found;
        CHECK(same_bits(found, first), "rank %d, %d columns: other bits than the scalar level", rank, cols);
        for (int m = 0; m < rows; m++)
          for (int r = 0; r < rank; r++) {
            double sum = 0, size = 0;
            for (int c = 0; c < cols; c++) {
              sum += double(x[size_t(m * cols + c)]) * a[size_t(r * cols + c)];
              size += std::fabs(double(x[size_t(m * cols + c)]) * a[size_t(r * cols + c)]);
            }
            check_close("u", r, found[size_t(m * rank + r)], scale[size_t(r)] * sum,
                        (cols + 2) * kRound * std::fabs(scale[size_t(r)]) * size);
          }
        for (int begin : {0, 3}) {
          Floats y = y0;
          k.lora_expand_f32(u.data(), rank, rows, a.data(), cols, rank, begin, cols - 1, y.data(), cols);
          for (int i = 0; i < rows * cols; i++) {
            const int m = i / cols, c = i % cols;
            double sum = 0, size = std::fabs(y0[size_t(i)]);
            for (int r = 0; r < rank && c >= begin && c < cols - 1; r++) {
              sum += double(u[size_t(m * rank + r)]) * a[size_t(r * cols + c)];
              size += std::fabs(double(u[size_t(m * rank + r)]) * a[size_t(r * cols + c)]);
            }
            check_close("y", i, y[size_t(i)], y0[size_t(i)] + sum, (2 * rank + 2) * kRound * size);
          }
        }
      });
    }
}

TEST("rows: adapters in bf16 give the bits of the same numbers in float32, rows together those of each alone") {
  constexpr int rank = 5, rows = 7;
  for (int cols : {5, 32, 77}) {
    const int padded = round_up(cols, kLoraCols);
    Random random{uint64_t(cols)};
    const size_t count = size_t(rank * cols);
    const Floats x = random.floats(size_t(rows * cols)), scale = random.floats(rank), u = random.floats(rows * rank);
    Floats wide(count);
    for (float& value : wide) value = bf16_to_float(float_to_bf16(random.uniform(-1, 1)));
    RoundedLoras rounded;
    const bf16 *a = rounded.a(wide.data(), rank, cols), *bt = rounded.bt(wide.data(), rank, cols);
    for_levels([&](const Kernels& k) {
      Floats found(rows * rank), expected(rows * rank), y(x), y_expected(x);
      k.lora_shrink_bf16(x.data(), cols, rows, a, padded, scale.data(), rank, cols, found.data(), rank);
      k.lora_expand_bf16(u.data(), rank, rows, bt, padded, rank, 0, cols, y.data(), cols);
      for (int m = 0; m < rows; m++) {
        const size_t at = size_t(m * cols), u_at = size_t(m * rank);
        k.lora_shrink_f32(x.data() + at, cols, 1, wide.data(), cols, scale.data(), rank, cols, expected.data() + u_at, rank);
        k.lora_expand_f32(u.data() + u_at, rank, 1, wide.data(), cols, rank, 0, cols, y_expected.data() + at, cols);
      }
      CHECK(same_bits(found, expected), "shrink, %d columns", cols);
      CHECK(same_bits(y, y_expected), "expand, %d columns", cols);
    });
  }
}

TEST("rows: outer products of any number of rows, rank and column range") {
  constexpr int cols = 77, ldx = 96, ldu = 20;
  for (int rows : {1, 2, 16, 17})
    for (int rank : {1, 7, 8, 17}) {
      Random random(uint64_t(100 * rows + rank));
      const Floats u = random.floats(size_t(rows * ldu));
      Floats x(size_t(rows * ldx)), first;
      std::vector<bf16> low(x.size());
      for (size_t i = 0; i < x.size(); i++) x[i] = bf16_to_float(low[i] = float_to_bf16(random.uniform(-1, 1)));
      const Floats before = random.floats(size_t(rank * cols));
      for_levels([&](const Kernels& k) {
        Floats wide = before, narrow = before;
        for (int begin : {0, 64}) {  // as two tasks would
          const int end = begin ? cols : 64;
          k.outer_f32(u.data() + 1, ldu, rank, x.data(), ldx, rows, begin, end, wide.data(), cols);
          k.outer_bf16(u.data() + 1, ldu, rank, low.data(), ldx, rows, begin, end, narrow.data(), cols);
        }
        if (k.level == Level::scalar) first = wide;
        CHECK(same_bits(wide, first), "%d rows, rank %d: other bits than the scalar level", rows, rank);
        const bool split = k.level == Level::amx;  // u is two bf16 there: 16 bits
        CHECK(split || same_bits(narrow, wide), "%d rows, rank %d: bf16 rows give other bits than the same rows in float32", rows,
              rank);
        for (int r = 0; r < rank; r++)
          for (int c = 0; c < cols; c++) {
            double sum = before[size_t(r * cols + c)], size = std::fabs(sum);
            for (int m = 0; m < rows; m++) {
              const double term = double(u[size_t(m * ldu + 1 + r)]) * x[size_t(m * ldx + c)];
              sum += term;
              size += std::fabs(term);
            }
            const double bound = (rows + 1) * kRound * size;
            check_close("outer", r * cols + c, wide[size_t(r * cols + c)], sum, bound);
            check_close("outer of bf16", r * cols + c, narrow[size_t(r * cols + c)], sum, bound + split * size / 65536);
          }
      });
    }
}

}  // namespace

}  // namespace nomoat
