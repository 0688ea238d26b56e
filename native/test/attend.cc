// Attention over a paged cache and its backward: against naive sums in double, with windows, chunks and page borders.

#include <cmath>
#include <cstring>

#include "quant/half.h"
#include "test/test.h"

namespace nomoat {

namespace {

enum Pages { kF32, kBf16, kInt8 };
constexpr Pages kPages[] = {kF32, kBf16, kInt8};

// One kv head: queries, keys, values of `count` positions, in float32 and in pages whose unused slots hold NaN.
struct Case {
  int count, heads, dim, window, stride;
  float cap;
  Floats q, k, v;
  std::vector<std::vector<uint8_t>> key_pages[3], value_pages[3];

  Case(int n, int h, int d, int w, float c, uint64_t seed) : count(n), heads(h), dim(d), window(w), stride(h * d + 16), cap(c) {
    Random random(seed);
    q = random.floats(size_t(n * stride));
    for (Floats* rows : {&k, &v}) {  // what all kinds of pages can hold: a whole number below 128 times a power of two
      *rows = random.floats(size_t(n * d));
      for (size_t i = 0; i < rows->size(); i++) (*rows)[i] = std::round((*rows)[i] * 127) * step(int(i) / d);
    }
    const size_t values = size_t(kPageTokens * d);
    for (Pages kind : kPages) {
      std::vector<uint8_t> page(values * 4);
      for (size_t i = 0; i < values; i++) {
        if (kind == kF32) std::memcpy(page.data() + 4 * i, &kNan, 4);
        if (kind == kBf16) reinterpret_cast<bf16*>(page.data())[i] = float_to_bf16(NAN);
      }
      if (kind == kInt8)
        for (int slot = 0; slot < kPageTokens; slot++) scale(page, slot) = NAN;
      key_pages[kind].assign(size_t((n + kPageTokens - 1) / kPageTokens), page);
      value_pages[kind] = key_pages[kind];
    }
    for (int p = 0; p < n; p++)
      for (int i = 0; i < d; i++) put(p, i);
  }

  static constexpr float kNan = NAN;
  static float step(int position) { return 1.0f / float(64 << position % 3); }

  float& scale(std::vector<uint8_t>& page, int slot) const {
    return reinterpret_cast<float*>(page.data() + size_t(kPageTokens * dim))[slot];
  }

  void put(int position, int i) {
    const size_t page = size_t(position / kPageTokens), at = size_t(position * dim + i);
    const int slot = position % kPageTokens;
    const size_t block = size_t(slot / 16 * 16 * dim), lane = size_t(slot % 16), value = size_t(slot * dim + i);
    const size_t paired = block + 16 * size_t(i / 2 * 2) + 2 * lane + size_t(i % 2), key = block + 16 * size_t(i) + lane;
    reinterpret_cast<float*>(key_pages[kF32][page].data())[key] = k[at];
    reinterpret_cast<float*>(value_pages[kF32][page].data())[value] = v[at];
    reinterpret_cast<bf16*>(key_pages[kBf16][page].data())[paired] = float_to_bf16(k[at]);
    reinterpret_cast<bf16*>(value_pages[kBf16][page].data())[value] = float_to_bf16(v[at]);
    put_int8(key_pages[kInt8][page], slot, k[at], step(position), key);
    put_int8(value_pages[kInt8][page], slot, v[at], step(position), value);
  }

  void put_int8(std::vector<uint8_t>& page, int slot, float x, float step, size_t at) const {
    page[at] = std::isfinite(x) ? uint8_t(int8_t(x / step)) : 0;
    scale(page, slot) = std::isfinite(x) ? step : NAN;
  }

  int start(int position) const { return window && position >= window ? position - window + 1 : 0; }

  static std::vector<const uint8_t*> addresses(const std::vector<std::vector<uint8_t>>& pages) {
    std::vector<const uint8_t*> found;
    for (const auto& page : pages) found.push_back(page.data());
    return found;
  }

  // Rows [first, first + rows) into out[count][stride] and lse[count][heads + 1].
  void run(const Kernels& kernels, Pages kind, int first, int rows, Floats& out, Floats& lse, bool in_parts = false) const {
    const auto keys = addresses(key_pages[kind]), values = addresses(value_pages[kind]);
    Floats scratch(attend_scratch(rows, heads, first + rows), NAN);
    AttendArgs a;
    a.q = q.data() + first * stride;
    a.rows = rows;
    a.heads = heads;
    a.dim = dim;
    a.q_stride = stride;
    a.first_position = first;
    a.window = window;
    a.cap = cap;
    a.k = keys.data();
    a.v = values.data();
    a.out = out.data() + first * stride;
    a.lse = lse.data() + first * (heads + 1);
    a.lse_stride = heads + 1;
    a.scratch = scratch.data();
    const auto attend = kind == kF32 ? kernels.attend_f32 : kind == kBf16 ? kernels.attend_bf16 : kernels.attend_int8;
    if (!in_parts) return attend(a);
    const auto part = [&](AttendPart what, int count, int piece) {
      for (a.part = what, a.begin = 0; a.begin < count; a.begin += piece) a.end = a.begin + piece, attend(a);
    };
    part(AttendPart::scores, round_up(first + rows, 16), 48);
    part(AttendPart::weights, rows * heads, 1);
    part(AttendPart::values, dim, 16);
  }
};

struct Exact {
  std::vector<double> weights, slopes;  // by key - start; slopes of the cap
  double lse = 0, size = 0;             // size: the largest sum of |q| |k| of any key
};

Exact soften(const Case& c, int position, int head) {
  Exact e;
  double top = -INFINITY, sum = 0;
  for (int key = c.start(position); key <= position; key++) {
    double score = 0, size = 0;
    for (int i = 0; i < c.dim; i++) {
      const double term = double(c.q[size_t(position * c.stride + head * c.dim + i)]) * c.k[size_t(key * c.dim + i)];
      score += term;
      size += std::fabs(term);
    }
    const double t = c.cap ? std::tanh(score / c.cap) : 0;
    if (c.cap) score = c.cap * t;
    e.weights.push_back(score);
    e.slopes.push_back(1 - t * t);
    e.size = std::fmax(e.size, size);
    top = std::fmax(top, score);
  }
  for (double& w : e.weights) sum += w = std::exp(w - top);
  for (double& w : e.weights) w /= sum;
  e.lse = top + std::log(sum);
  return e;
}

// Relative error of a weight before it is divided by the sum: the score's roundings, the subtraction of the largest score,
// the exponential; a cap rounds a dozen times.
double weight_error(const Case& c, const Exact& e, double of_factors = 0) {
  return e.size * of_factors + ((c.dim + 4 + (c.cap ? 12 : 0)) * e.size + 4) * kRound;
}

// `of_factors`: by how much the products' factors are rounded.
void check_forward(const Case& c, const Floats& out, const Floats& lse, double of_factors) {
  for (int p = 0; p < c.count; p++)
    for (int h = 0; h < c.heads; h++) {
      const Exact e = soften(c, p, h);
      const double keys = double(e.weights.size()), error = weight_error(c, e, of_factors), sums = (keys / 16 + 24) * kRound;
      const double found = lse[size_t(p * (c.heads + 1) + h)];
      CHECK(std::fabs(found - e.lse) <= error + sums + std::fabs(e.lse) * kRound, "lse of row %d, head %d: %g, exact %g", p, h,
            found, e.lse);
      for (int i = 0; i < c.dim; i++) {
        double exact = 0, size = 0;
        for (size_t key = 0; key < e.weights.size(); key++) {
          const double term = e.weights[key] * c.v[(size_t(c.start(p)) + key) * size_t(c.dim) + size_t(i)];
          exact += term;
          size += std::fabs(term);
        }
        const double value = out[size_t(p * c.stride + h * c.dim + i)];
        CHECK(std::fabs(value - exact) <= (2 * error + of_factors + sums + keys * kRound) * size,
              "row %d, head %d, [%d]: %g, exact %g", p, h, i, value, exact);
      }
    }
}

struct Shape {
  int count, heads, dim, window;
  float cap = 0;
};
constexpr Shape kShapes[] = {{1, 1, 16, 0},        {5, 3, 48, 0},     {16, 4, 16, 0},  {17, 2, 64, 0},    {64, 1, 32, 0},
                             {65, 3, 16, 0},       {131, 2, 32, 0},   {131, 3, 16, 7}, {40, 5, 16, 1},    {70, 16, 16, 64},
                             {70, 3, 48, 0, 1.5f}, {70, 3, 16, 9, 2}, {9, 64, 16, 0},  {20, 2, 512, 0, 3}};

TEST("attend: against double, over page borders, with windows; slots that hold no token do not matter") {
  uint64_t seed = 90;
  for (const Shape& s : kShapes) {
    const Case c(s.count, s.heads, s.dim, s.window, s.cap, ++seed);
    for_levels([&](const Kernels& k) {
      for (Pages kind : kPages) {
        Floats out(c.q.size(), 7.0f), lse(size_t(s.count * (s.heads + 1)), 7.0f);
        c.run(k, kind, 0, s.count, out, lse);
        check_forward(c, out, lse, k.bf16_dots && kind == kBf16 ? 1.0 / 512 : 0);
        for (int p = 0; p < s.count; p++)
          CHECK(out[size_t(p * c.stride + s.heads * s.dim)] == 7 && lse[size_t(p * (s.heads + 1) + s.heads)] == 7,
                "row %d was written past its heads", p);
      }
    });
  }
}

TEST("attend: a row's bits do not depend on the chunk it is computed in") {
  for (const Shape& s : {Shape{131, 3, 16, 0}, Shape{90, 5, 16, 9}, Shape{90, 3, 16, 21, 1.5f}}) {
    const Case c(s.count, s.heads, s.dim, s.window, s.cap, 110);
    for_levels([&](const Kernels& k) {
      for (Pages kind : kPages) {
        Floats whole(c.q.size()), whole_lse(size_t(s.count * (s.heads + 1)));
        c.run(k, kind, 0, s.count, whole, whole_lse);
        for (int chunk : {1, 2, 3, 7, 16, 17, 64}) {
          Floats out(whole.size()), lse(whole_lse.size());
          for (int first = 0; first < s.count; first += chunk)
            c.run(k, kind, first, s.count - first < chunk ? s.count - first : chunk, out, lse);
          CHECK(same_bits(out, whole) && same_bits(lse, whole_lse), "chunks of %d rows", chunk);
        }
      }
    });
  }
}

TEST("attend: step by step, in pieces, it gives the bits of the whole") {
  for (const Shape& s : {Shape{131, 3, 16, 0}, Shape{90, 5, 48, 9}, Shape{90, 3, 64, 21, 1.5f}}) {
    const Case c(s.count, s.heads, s.dim, s.window, s.cap, 120);
    for_levels([&](const Kernels& k) {
      for (Pages kind : kPages)
        for (auto [first, rows] : {std::pair(0, s.count), std::pair(s.count - 1, 1), std::pair(40, 6)}) {
          Floats whole(c.q.size()), whole_lse(size_t(s.count * (s.heads + 1))), out(whole), lse(whole_lse);
          c.run(k, kind, first, rows, whole, whole_lse);
          c.run(k, kind, first, rows, out, lse, true);
          CHECK(same_bits(out, whole) && same_bits(lse, whole_lse), "rows %d to %d", first, first + rows);
        }
    });
  }
}

TEST("attend: a NaN or infinite key or value makes every later row NaN") {
  for_levels([](const Kernels& k) {
    for (float bad : {NAN, INFINITY})
      for (bool in_key : {true, false}) {
        Case c(40, 2, 16, 0, 0, 120);
        (in_key ? c.k : c.v)[10 * 16 + 3] = bad;
        for (int h = 0; h < 2; h++)
          for (int p = 0; p < 40; p++) c.q[size_t(p * c.stride + h * 16 + 3)] = 0.5f;  // +inf, not -inf, as a score
        c.put(10, 3);
        for (Pages kind : kPages) {
          Floats out(c.q.size()), lse(40 * 3);
          c.run(k, kind, 0, 40, out, lse);
          for (int p = 10; p < 40; p++)
            for (int h = 0; h < 2; h++)
              CHECK(!std::isfinite(out[size_t(p * c.stride + h * 16 + 3)]), "row %d: %g", p,
                    double(out[size_t(p * c.stride + h * 16 + 3)]));
        }
      }
  });
}

struct Gradients {
  std::vector<double> dq, dk, dv, dq_size, dk_size, dv_size;
  double error = 0;

  // Of the rows from `before` on.
  Gradients(const Case& c, const Floats& d_out, double scale, int before)
      : dq(c.q.size()), dk(c.k.size()), dv(c.v.size()), dq_size(dq), dk_size(dk), dv_size(dv) {
    for (int p = before; p < c.count; p++)
      for (int h = 0; h < c.heads; h++) row(c, d_out, scale, p, h);
    // a weight is known up to weight_error and the rounding of lse; every sum rounds once a term
    error = 2 * error + (3 * c.dim + c.count + c.heads * c.count + 32) * kRound;
  }

  void row(const Case& c, const Floats& d_out, double scale, int p, int h) {
    const Exact e = soften(c, p, h);
    error = std::fmax(error, weight_error(c, e) + (std::fabs(e.lse) + 1) * kRound);
    const size_t own = size_t(p * c.stride + h * c.dim), n = e.weights.size(), first = size_t(c.start(p));
    std::vector<double> dp(n), size(n);
    double delta = 0, delta_size = 0;
    for (size_t key = 0; key < n; key++) {
      for (size_t i = 0; i < size_t(c.dim); i++) {
        const double term = double(d_out[own + i]) * c.v[(first + key) * size_t(c.dim) + i];
        dp[key] += term;
        size[key] += std::fabs(term);
      }
      delta += e.weights[key] * dp[key];
      delta_size += e.weights[key] * size[key];
    }
    for (size_t key = 0; key < n; key++) {
      const double ds = e.weights[key] * (dp[key] - delta) * e.slopes[key], ds_size = e.weights[key] * (size[key] + delta_size);
      for (size_t i = 0; i < size_t(c.dim); i++) {
        const size_t at = (first + key) * size_t(c.dim) + i;
        dq[own + i] += scale * ds * c.k[at];
        dq_size[own + i] += scale * ds_size * std::fabs(c.k[at]);
        dk[at] += ds * c.q[own + i];
        dk_size[at] += ds_size * std::fabs(c.q[own + i]);
        dv[at] += e.weights[key] * d_out[own + i];
        dv_size[at] += e.weights[key] * std::fabs(d_out[own + i]);
      }
    }
  }
};

void check_gradient(const char* name, const Floats& found, const std::vector<double>& exact, const std::vector<double>& size,
                    double error) {
  for (size_t i = 0; i < exact.size(); i++)
    CHECK(std::fabs(found[i] - exact[i]) <= error * size[i], "%s[%zu]: %g, exact %g, off by %g, allowed %g", name, i,
          double(found[i]), exact[i], std::fabs(found[i] - exact[i]), error * size[i]);
}

// Factors in bf16: 0.6 % of the terms' size at most is off, as a whole.
void check_direction(const char* name, const Floats& found, const std::vector<double>& exact, const std::vector<double>& size,
                     double) {
  double off = 0, all = 0;
  for (size_t i = 0; i < exact.size(); i++) {
    off += (found[i] - exact[i]) * (found[i] - exact[i]);
    all += size[i] * size[i];
  }
  CHECK(std::sqrt(off) <= 0.006 * std::sqrt(all), "%s: off by %g of %g", name, std::sqrt(off), std::sqrt(all));
}

// Query rows [before, count) against all keys, as a segment behind a shared prefix of `before` rows has them.
void check_backward(const Shape& s, int before, uint64_t seed) {
  const Case c(s.count, s.heads, s.dim, s.window, s.cap, seed);
  const Floats d_out = Random(seed + 50).floats(c.q.size());
  const Gradients exact(c, d_out, 0.25, before);
  for_levels([&](const Kernels& k) {
    Floats out(c.q.size()), lse(size_t(s.count * (s.heads + 1)));
    c.run(k, kF32, 0, s.count, out, lse);
    Floats scratch(size_t(attend_backward_scratch(s.count, s.heads, s.dim)), NAN);
    const int own = before * c.stride;
    AttendBackwardArgs a{};
    a.q = c.q.data() + own;
    a.out = out.data() + own;
    a.d_out = d_out.data() + own;
    a.k = c.k.data();
    a.v = c.v.data();
    a.lse = lse.data() + before * (s.heads + 1);
    a.count = s.count - before;
    a.before = before;
    a.heads = s.heads;
    a.dim = s.dim;
    a.q_stride = c.stride;
    a.lse_stride = s.heads + 1;
    a.window = s.window;
    a.scale = 0.25f;
    a.cap = s.cap;
    a.scratch = scratch.data();
    for (bool low : {false, true}) {
      Floats dq(c.q.size()), dk(size_t(round_up(s.count, 16) * s.dim)), dv(dk.size());
      a.dq = dq.data() + own;
      a.dk = dk.data();
      a.dv = dv.data();
      (low ? k.attend_backward_bf16 : k.attend_backward)(a);
      auto check = low ? check_direction : check_gradient;
      check("dq", dq, exact.dq, exact.dq_size, exact.error);
      check("dk", dk, exact.dk, exact.dk_size, exact.error);
      check("dv", dv, exact.dv, exact.dv_size, exact.error);
    }
  });
}

TEST("attend: backward against a naive implementation in double") {
  uint64_t seed = 130;
  for (const Shape& s : {Shape{1, 1, 16, 0}, Shape{4, 3, 16, 0}, Shape{15, 2, 48, 0}, Shape{33, 16, 16, 0}, Shape{70, 3, 32, 0},
                         Shape{70, 3, 16, 5}, Shape{37, 2, 16, 1}, Shape{9, 64, 16, 0}, Shape{33, 3, 48, 0, 1.5f},
                         Shape{40, 2, 16, 7, 2}, Shape{9, 2, 512, 0, 3}})
    check_backward(s, 0, ++seed);
}

TEST("attend: backward of the rows behind a shared prefix") {
  uint64_t seed = 150;
  for (int before : {1, 7, 16, 63, 64, 65}) {
    check_backward({70, 3, 16, 0}, before, ++seed);
    check_backward({70, 2, 32, 9, 1.5f}, before, ++seed);
  }
}

}  // namespace

}  // namespace nomoat
