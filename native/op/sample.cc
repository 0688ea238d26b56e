// Choosing the next token: penalties, top-k, min-p, top-p, temperature, one draw. The draw depends on the seed and the step only.

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
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

// From 0 to 1.
double uniform(uint64_t seed, uint64_t step) { return double(mix(mix(seed) + step) >> 11) * 0x1p-53; }

struct Candidate {
  float logit;
  int token;
};

bool before(const Candidate& a, const Candidate& b) { return a.logit > b.logit || (a.logit == b.logit && a.token < b.token); }

// The `count` first tokens in that order, or as many as have a logit of at least `floor`. The largest of each of many groups are
// at least `count` tokens if so many groups are taken, so the least of these is a floor for all: few are left to sort.
std::vector<Candidate> likeliest(const float* logits, int vocab, size_t count, float floor) {
  constexpr int kLanes = 16, kLength = 32;  // logits of a group, 16 apart, so that the maxima of 16 groups are a vector's work
  std::vector<float> tops(size_t(vocab / (kLanes * kLength) + 1) * kLanes, -INFINITY);
  for (int t = 0; t + kLanes <= vocab; t += kLanes) {
    float* top = &tops[size_t(t / (kLanes * kLength)) * kLanes];
    for (int i = 0; i < kLanes; i++) top[i] = logits[t + i] > top[i] ? logits[t + i] : top[i];
  }
  if (count <= tops.size()) {
    const auto last = tops.begin() + std::ptrdiff_t(count) - 1;
    std::nth_element(tops.begin(), last, tops.end(), std::greater<>());
    floor = std::max(floor, *last);
  }
  std::vector<Candidate> found;
  for (int t = 0; t < vocab; t++)
    if (logits[t] >= floor) found.push_back({logits[t], t});
  if (count < found.size()) {
    std::nth_element(found.begin(), found.begin() + std::ptrdiff_t(count), found.end(), before);
    found.resize(count);
  }
  std::sort(found.begin(), found.end(), before);
  return found;
}

// The first place of a logit, which must be there: blocks are compared as a whole, by vectors.
int place_of(float logit, const float* logits, int vocab) {
  constexpr int kBlock = 64;
  int begin = 0;
  for (; begin + kBlock <= vocab; begin += kBlock) {
    int32_t equal = 0;
    for (int i = 0; i < kBlock; i++) equal |= logits[begin + i] == logit;
    if (equal) break;
  }
  return int(std::find(logits + begin, logits + vocab, logit) - logits);
}

// Leaves the fewest of the first that reach `mass`, at least one; false if all do not.
bool cut(std::vector<Candidate>& sorted, float highest, double mass) {
  double sum = 0;
  for (size_t n = 0; n < sorted.size(); n++) {
    sum += std::exp(double(sorted[n].logit - highest));
    if (sum < mass) continue;
    sorted.resize(n + 1);
    return true;
  }
  return false;
}

int draw_of(const std::vector<Candidate>& from, float highest, float temperature, double at) {
  double total = 0, sum = 0;
  auto weight = [&](const Candidate& c) { return std::exp(double((c.logit - highest) / temperature)); };
  for (const Candidate& c : from) total += weight(c);
  for (const Candidate& c : from)
    if (at * total < (sum += weight(c))) return c.token;
  return from.back().token;
}

// Of all tokens, in their order: weights by vectors, summed in blocks, one of which is then looked through.
int draw_of_all(const float* logits, int vocab, float highest, float temperature, double at) {
  constexpr int kBlock = 1024, kLanes = 16;
  const int blocks = vocab / kBlock + 1;
  const std::unique_ptr<float[]> weights(new float[size_t(blocks) * kBlock]);  // not zeroed
  for (int t = 0; t < vocab; t++) weights[size_t(t)] = (logits[t] - highest) / temperature;
  std::fill(weights.get() + vocab, weights.get() + size_t(blocks) * kBlock, -INFINITY);  // next to no weight
  kernels().softmax_f32(weights.get(), 0, 1, blocks * kBlock, weights.get());
  std::vector<double> sums(static_cast<size_t>(blocks));
  double total = 0;
  for (int b = 0; b < blocks; b++) {
    float lanes[kLanes] = {};
    for (int t = b * kBlock; t < (b + 1) * kBlock; t += kLanes)
      for (int i = 0; i < kLanes; i++) lanes[i] += weights[size_t(t + i)];
    for (const float lane : lanes) sums[size_t(b)] += double(lane);
    total += sums[size_t(b)];
  }
  double sum = 0;
  int chosen = 0, b = 0;
  while (b + 1 < blocks && sum + sums[size_t(b)] <= at * total) sum += sums[size_t(b++)];
  for (int t = b * kBlock; t < std::min(vocab, (b + 1) * kBlock); t++) {
    if (logits[t] == -INFINITY) continue;
    chosen = t;
    if (at * total < (sum += double(weights[size_t(t)]))) break;
  }
  return chosen;
}

}  // namespace

int sample(const float* logits, int vocab, const Sampling& o, std::span<const int32_t> recent, uint64_t step) {
  auto not_finite = [](float logit) { return !(logit < INFINITY); };
  std::vector<float> changed;
  if (o.penalizes() && !recent.empty()) {
    changed.assign(logits, logits + vocab);
    logits = changed.data();
    std::unordered_map<int, int> seen;
    for (const int32_t token : recent) seen[token]++;
    for (const auto& [token, count] : seen) {
      float& logit = changed[size_t(token)];
      logit = logit > 0 ? logit / o.repetition_penalty : logit * o.repetition_penalty;
      logit -= o.presence_penalty + o.frequency_penalty * float(count);
    }
  }
  // NaN has no order to sort by: the caller looks at the logit of what it gets.
  const float highest = kernels().highest(logits, vocab);
  if (!(highest < INFINITY)) return int(std::find_if(logits, logits + vocab, not_finite) - logits);
  if (o.temperature <= 0) return place_of(highest, logits, vocab);
  const double at = uniform(o.seed, step);
  const bool all = o.top_k <= 0 && o.min_p <= 0;
  if (all && o.top_p >= 1) return draw_of_all(logits, vocab, highest, o.temperature, at);
  std::vector<Candidate> kept;
  if (all) {  // few reach top_p as a rule
    const double mass = double(o.top_p) * std::exp(double(kernels().log_sum_exp(logits, vocab) - highest));
    for (size_t count = 64; count == 64 || (kept.size() < size_t(vocab)); count *= 4) {
      kept = likeliest(logits, vocab, count, -INFINITY);
      if (cut(kept, highest, mass)) break;
    }
  } else {
    const float floor = o.min_p > 0 ? highest + std::log(o.min_p) : -INFINITY;
    kept = likeliest(logits, vocab, size_t(o.top_k > 0 ? o.top_k : vocab), floor);
    double mass = 0;
    for (const Candidate& c : kept) mass += double(o.top_p) * std::exp(double(c.logit - highest));
    if (o.top_p < 1) cut(kept, highest, mass);
  }
  return draw_of(kept, highest, o.temperature, at);
}

}  // namespace nomoat
