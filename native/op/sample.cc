// Choosing the next token: penalties, top-k, top-p, min-p, temperature, one draw. The draw depends on the seed and the step only.

#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "op/engine.h"

namespace nomoat {

namespace {

// splitmix64 (Steele, Lea, Flood 2014): a counter in, well-mixed bits out.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

struct Candidate {
  float logit;
  int token;
};

bool unordered(float logit) { return !(logit < INFINITY); }

// The highest logit, or +infinity if one is NaN or +infinity. Sixteen maxima side by side, in which the compiler sees vectors:
// one that carries an index from logit to logit took 200 microseconds for 49,152 of them, a twentieth of a token's time.
float top_logit(const float* logits, int vocab) {
  float top[16];
  int32_t bad[16] = {};
  std::fill_n(top, 16, -INFINITY);
  for (int t = 0; t + 16 <= vocab; t += 16)
    for (int i = 0; i < 16; i++) {
      bad[i] |= unordered(logits[t + i]);
      top[i] = logits[t + i] > top[i] ? logits[t + i] : top[i];
    }
  for (int t = vocab / 16 * 16; t < vocab; t++) {
    bad[0] |= unordered(logits[t]);
    top[0] = logits[t] > top[0] ? logits[t] : top[0];
  }
  return std::count(bad, bad + 16, 0) < 16 ? INFINITY : *std::max_element(top, top + 16);
}

bool before(const Candidate& a, const Candidate& b) { return a.logit > b.logit || (a.logit == b.logit && a.token < b.token); }

}  // namespace

int sample(const float* logits, int vocab, const Sampling& o, const int32_t* recent, int recent_count, uint64_t step) {
  const bool penalized = o.repetition_penalty != 1 || o.presence_penalty != 0 || o.frequency_penalty != 0;
  // NaN has no order to sort by: the caller looks at the logit of what it gets.
  const float highest = top_logit(logits, vocab);
  if (!(highest < INFINITY)) return int(std::find_if(logits, logits + vocab, unordered) - logits);
  if (o.temperature <= 0 && !penalized) return int(std::find(logits, logits + vocab, highest) - logits);
  std::vector<Candidate> all(static_cast<size_t>(vocab));
  for (int t = 0; t < vocab; t++) all[size_t(t)] = {logits[t], t};
  if (penalized) {
    std::unordered_map<int, int> seen;
    for (int i = 0; i < recent_count; i++) seen[recent[i]]++;
    for (const auto& [token, count] : seen) {
      float& logit = all[size_t(token)].logit;
      logit = logit > 0 ? logit / o.repetition_penalty : logit * o.repetition_penalty;
      logit -= o.presence_penalty + o.frequency_penalty * float(count);
    }
  }
  if (o.temperature <= 0) return std::min_element(all.begin(), all.end(), before)->token;
  const float top = penalized ? std::min_element(all.begin(), all.end(), before)->logit : highest;
  if (o.top_k > 0 && size_t(o.top_k) < all.size()) {
    std::nth_element(all.begin(), all.begin() + o.top_k, all.end(), before);
    all.resize(size_t(o.top_k));
  }
  if (o.min_p > 0) std::erase_if(all, [&](const Candidate& c) { return std::exp(c.logit - top) < o.min_p; });
  double total = 0;
  if (o.top_p < 1) {
    for (const Candidate& c : all) total += std::exp(double(c.logit - top));
    // The likeliest tokens that together reach top_p. Few are needed as a rule: sort 64, then four times as many.
    double mass = 0;
    size_t n = 0, sorted = 0;
    while (n == 0 || (n < all.size() && mass < double(o.top_p) * total)) {
      if (n == sorted) {
        const size_t more = std::min(all.size(), sorted ? 4 * sorted : 64);
        std::partial_sort(all.begin() + std::ptrdiff_t(sorted), all.begin() + std::ptrdiff_t(more), all.end(), before);
        sorted = more;
      }
      mass += std::exp(double(all[n++].logit - top));
    }
    all.resize(n);
  }
  total = 0;
  for (const Candidate& c : all) total += std::exp(double((c.logit - top) / o.temperature));
  const double draw = double(mix(mix(o.seed) + step) >> 11) * 0x1p-53 * total;
  double sum = 0;
  for (const Candidate& c : all) {
    sum += std::exp(double((c.logit - top) / o.temperature));
    if (draw < sum) return c.token;
  }
  return all.back().token;
}

}  // namespace nomoat
