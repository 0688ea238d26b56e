// op/sample.cc: greedy, the filters, penalties, seeds; frequencies of 20,000 draws against the distribution.

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "op/engine.h"
#include "test/test.h"

namespace nomoat {

namespace {

constexpr Sampling kPlain{.temperature = 1,
                          .top_p = 1,
                          .min_p = 0,
                          .repetition_penalty = 1,
                          .presence_penalty = 0,
                          .frequency_penalty = 0,
                          .top_k = 0,
                          .seed = 7};

int draw(const Floats& logits, const Sampling& o, uint64_t step = 0, const std::vector<int32_t>& recent = {}) {
  return sample(logits.data(), int(logits.size()), o, recent, step);
}

std::vector<double> probabilities(const Floats& logits, double temperature) {
  std::vector<double> p;
  double sum = 0;
  for (float logit : logits) sum += p.emplace_back(std::exp(logit / temperature));
  for (double& value : p) value /= sum;
  return p;
}

// Draws 20,000 times and compares with `expected`, whose zeros must never come up. With probability p the count spreads by
// sqrt(n p (1 - p)): six of those are exceeded by chance once in 10^9.
void check_frequencies(const Floats& logits, const Sampling& o, std::vector<double> expected) {
  constexpr int n = 20000;
  double total = 0;
  for (double p : expected) total += p;
  std::vector<int> counts(logits.size());
  for (uint64_t step = 0; step < n; step++) counts[size_t(draw(logits, o, step))]++;
  for (size_t t = 0; t < counts.size(); t++) {
    const double p = expected[t] / total, spread = std::sqrt(n * p * (1 - p));
    CHECK(std::fabs(counts[t] - n * p) <= 6 * spread + 1e-6, "token %zu: %d of %d draws, expected %.0f", t, counts[t], n, n * p);
  }
}

const Floats kLogits = {1.0f, -2.0f, 2.5f, 0.0f, 2.0f, -0.5f, 1.5f, -30.0f, 0.7f, 2.4f};

TEST("sample: temperature 0 takes the largest logit, the first of equals") {
  Sampling o = kPlain;
  o.temperature = 0;
  CHECK(draw(kLogits, o) == 2, "token %d", draw(kLogits, o));
  CHECK(draw({0, 3, 1, 3, 3}, o) == 1, "ties: token %d", draw({0, 3, 1, 3, 3}, o));
  CHECK(draw({-5}, o) == 0, "one token");
}

TEST("sample: temperature 0 finds the largest, or what is none, at every place of every number of logits") {
  Sampling o = kPlain;
  o.temperature = 0;
  for (size_t n : {1, 15, 16, 17, 40}) {
    CHECK(draw(Floats(n, -INFINITY), o) == 0, "%zu logits, all -infinity", n);
    for (size_t at = 0; at < n; at++) {
      Floats logits(n, -1.0f);
      logits[at] = logits[n - 1] = 2;
      CHECK(draw(logits, o) == int(at), "%zu logits: token %d, not %zu", n, draw(logits, o), at);
      for (float bad : {NAN, INFINITY}) {
        logits[at] = bad;
        CHECK(draw(logits, o) == int(at), "%zu logits: token %d, not %zu, which is %g", n, draw(logits, o), at, double(bad));
      }
    }
  }
}

TEST("sample: draws follow the distribution at every temperature") {
  for (float temperature : {0.25f, 1.0f, 3.0f}) {
    Sampling o = kPlain;
    o.temperature = temperature;
    check_frequencies(kLogits, o, probabilities(kLogits, temperature));
  }
}

TEST("sample: top_k keeps the k largest, lower tokens first among equals") {
  Sampling o = kPlain;
  o.top_k = 3;
  std::vector<double> expected = probabilities(kLogits, 1);
  for (size_t t : {0, 1, 3, 5, 6, 7, 8}) expected[t] = 0;
  check_frequencies(kLogits, o, expected);
  o.top_k = 1;
  for (uint64_t step = 0; step < 100; step++) CHECK(draw(kLogits, o, step) == 2, "top_k = 1, step %d", int(step));
  o.top_k = 2;
  check_frequencies({1, 1, 1, 1}, o, {1, 1, 0, 0});
  o.top_k = 100;
  check_frequencies(kLogits, o, probabilities(kLogits, 1));
}

TEST("sample: top_p keeps the fewest tokens that reach the mass") {
  const std::vector<double> all = probabilities(kLogits, 1);
  std::vector<size_t> order(all.size());
  for (size_t t = 0; t < all.size(); t++) order[t] = t;
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return all[a] > all[b]; });
  for (float top_p : {0.0f, 0.1f, 0.5f, 0.9f, 0.999f}) {
    std::vector<double> expected(all.size());
    double mass = 0;
    for (size_t i = 0; i < order.size() && (i == 0 || mass < double(top_p)); i++) mass += expected[order[i]] = all[order[i]];
    Sampling o = kPlain;
    o.top_p = top_p;
    check_frequencies(kLogits, o, expected);
  }
}

TEST("sample: top_p over a flat distribution of more tokens than are sorted at first") {
  Sampling o = kPlain;
  o.top_p = 0.5f;
  Floats logits(1000);
  for (size_t t = 0; t < logits.size(); t++) logits[t] = float((t * 7919) % 1000) * 1e-3f;  // every value once
  const std::vector<double> p = probabilities(logits, 1);
  std::vector<float> sorted = logits;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  double mass = 0, whole = 0;
  for (float logit : logits) whole += std::exp(double(logit));
  size_t kept = 0;
  while (mass < 0.5) mass += std::exp(double(sorted[kept++])) / whole;
  for (uint64_t step = 0; step < 5000; step++) {
    const float logit = logits[size_t(draw(logits, o, step))];
    CHECK(logit >= sorted[kept - 1], "step %d: logit %g, the smallest that is kept is %g", int(step), double(logit),
          double(sorted[kept - 1]));
  }
}

TEST("sample: min_p drops what is less likely than a share of the likeliest") {
  Sampling o = kPlain;
  o.min_p = 0.3f;
  std::vector<double> expected = probabilities(kLogits, 1);
  const double top = expected[2];
  for (double& p : expected)
    if (p < 0.3 * top) p = 0;
  check_frequencies(kLogits, o, expected);
  o.min_p = 1;
  for (uint64_t step = 0; step < 100; step++) CHECK(draw(kLogits, o, step) == 2, "min_p = 1, step %d", int(step));
}

// Logits of many tokens, a number that is no multiple of anything, with many equals.
Floats many_logits() {
  Floats logits(5003);
  uint32_t bits = 7;
  for (float& x : logits) x = std::round(8 * float((bits = bits * 1664525 + 1013904223) >> 8) * 0x1p-24f * 12) / 8;
  for (size_t t = 0; t < logits.size(); t += 9) logits[t] = -INFINITY;
  return logits;
}

TEST("sample: of many tokens, the filters keep those that sorting all finds") {
  const Floats logits = many_logits();
  struct Token {
    float logit;
    int id;
  };
  for (int top_k : {0, 1, 40, 300, 4000, 6000})
    for (float min_p : {0.0f, 0.01f, 0.5f})
      for (float top_p : {1.0f, 0.9f, 0.3f}) {
        std::vector<Token> kept;
        for (size_t t = 0; t < logits.size(); t++) kept.push_back({logits[t], int(t)});
        std::stable_sort(kept.begin(), kept.end(), [](const Token& a, const Token& b) { return a.logit > b.logit; });
        const float top = kept[0].logit;
        if (top_k) kept.resize(std::min(kept.size(), size_t(top_k)));
        std::erase_if(kept, [&](const Token& t) { return double(t.logit - top) < std::log(double(min_p)); });
        double mass = 0, sum = 0;
        for (const Token& t : kept) mass += std::exp(double(t.logit - top));
        std::set<int> ids;
        for (const Token& t : kept) {
          if (t.logit > -INFINITY) ids.insert(t.id);
          if ((sum += std::exp(double(t.logit - top))) >= double(top_p) * mass) break;
        }
        Sampling o = kPlain;
        o.temperature = 3;  // flat, so that the last ones come up
        o.top_k = top_k, o.min_p = min_p, o.top_p = top_p;
        for (uint64_t step = 0; step < 300; step++) {
          const int token = draw(logits, o, step);
          CHECK(ids.count(token), "top_k %d, min_p %g, top_p %g: token %d of logit %g", top_k, double(min_p), double(top_p),
                token, double(logits[size_t(token)]));
        }
        o.temperature = 0;
        CHECK(draw(logits, o) == *std::find_if(ids.begin(), ids.end(), [&](int t) { return logits[size_t(t)] == top; }),
              "greedy: token %d", draw(logits, o));
      }
}

TEST("sample: of many tokens, draws follow the distribution") {
  constexpr int n = 20000, kGroups = 20;
  const Floats logits = many_logits();
  for (float temperature : {1.0f, 6.0f}) {
    Sampling o = kPlain;
    o.temperature = temperature;
    const std::vector<double> p = probabilities(logits, temperature);
    std::vector<double> expected(kGroups), counts(kGroups);
    for (size_t t = 0; t < p.size(); t++) expected[t * kGroups / p.size()] += p[t];
    for (uint64_t step = 0; step < n; step++) {
      const size_t token = size_t(draw(logits, o, step));
      CHECK(logits[token] > -INFINITY, "a masked token was drawn");
      counts[token * kGroups / p.size()]++;
    }
    for (size_t g = 0; g < kGroups; g++)
      CHECK(std::fabs(counts[g] - n * expected[g]) <= 6 * std::sqrt(n * expected[g] * (1 - expected[g])),
            "temperature %g, group %zu: %.0f of %d draws, expected %.0f", double(temperature), g, counts[g], n, n * expected[g]);
  }
}

TEST("sample: penalties change the logits of recent tokens") {
  Sampling o = kPlain;
  const std::vector<int32_t> recent = {2, 2, 2, 1};
  Floats changed = kLogits;
  o.repetition_penalty = 1.5f;
  changed[2] /= 1.5f;
  changed[1] *= 1.5f;  // negative: pushed down
  o.presence_penalty = 0.5f;
  o.frequency_penalty = 0.25f;
  changed[2] -= 0.5f + 3 * 0.25f;
  changed[1] -= 0.5f + 0.25f;
  for (float temperature : {0.0f, 1.0f}) {
    Sampling plain = kPlain;
    o.temperature = plain.temperature = temperature;
    for (uint64_t step = 0; step < 2000; step++)
      CHECK(draw(kLogits, o, step, recent) == draw(changed, plain, step), "temperature %g, step %d", double(temperature),
            int(step));
  }
  o.temperature = 0;
  CHECK(draw(kLogits, o) == 2 && draw(kLogits, o, 0, recent) == 9, "greedy: 2 gives way to 9");
}

TEST("sample: the draw depends on seed and step only") {
  Sampling other = kPlain;
  other.seed = 8;
  int differ = 0;
  std::vector<int> steps;
  for (uint64_t step = 0; step < 200; step++) {
    CHECK(draw(kLogits, kPlain, step) == draw(kLogits, kPlain, step), "step %d twice", int(step));
    differ += draw(kLogits, kPlain, step) != draw(kLogits, other, step);
    steps.push_back(draw(kLogits, kPlain, step));
  }
  CHECK(differ > 50, "two seeds agree on %d of 200 draws", 200 - differ);
  CHECK(std::set<int>(steps.begin(), steps.end()).size() > 3, "the step does not change the draw");
}

TEST("sample: a logit that is NaN or +infinity is what comes back; -infinity never does") {
  for (float bad : {NAN, INFINITY})
    for (size_t place : {size_t(0), size_t(4), kLogits.size() - 1})
      for (int filter = 0; filter < 5; filter++) {
        Sampling o = kPlain;
        if (filter == 0) o.temperature = 0;
        if (filter == 1) o.top_k = 3;
        if (filter == 2) o.top_p = 0.5f;
        if (filter == 3) o.min_p = 0.5f;
        Floats logits = kLogits;
        logits[place] = bad;
        CHECK(draw(logits, o, 3) == int(place), "%g at %zu, filter %d: token %d", double(bad), place, filter, draw(logits, o, 3));
      }
  Floats many(5000, NAN);  // an order with NaN is none: sorting must not run out of the array
  Sampling o = kPlain;
  o.top_k = 40;
  o.top_p = 0.9f;
  CHECK(std::isnan(many[size_t(draw(many, o))]), "all NaN");
  Floats masked(100, -INFINITY);
  masked[17] = -3;
  for (uint64_t step = 0; step < 50; step++) CHECK(draw(masked, kPlain, step) == 17, "a masked token was drawn");
}

}  // namespace

}  // namespace nomoat
