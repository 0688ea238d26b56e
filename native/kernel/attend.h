#pragma once
// Attention: softmax(q k^T) v over a paged cache, and its backward over one segment.
// Every row adds its keys in order of position, so its result does not depend on the rows taken with it.

#include <type_traits>

#include "kernel/load.h"
#include "kernel/table.h"
#include "kernel/vexp.h"

namespace nomoat {
namespace {

// The first key that a row at `position` sees.
inline int first_key(int position, int window) { return window && position >= window ? position - window + 1 : 0; }

// Where the values of a virtual row begin in [rows][heads][dim], `stride` from one row to the next.
inline size_t virtual_row_at(int index, int heads, int stride, int dim) {
  return size_t(index / heads) * stride + size_t(index % heads) * dim;
}

// Asks for the values of 16 keys, which come after their scores.
inline void fetch_values(const AttendArgs& a, int key, size_t element_bytes) {
  const uint8_t* value = a.v[key / kPageTokens] + size_t(key % kPageTokens * a.dim) * element_bytes;
  for (size_t line = 0; line < size_t(16 * a.dim) * element_bytes; line += 64) __builtin_prefetch(value + line, 0, 2);
}

// Keys of one block of 16, dimension d: two vectors sets for a pair of dimensions.
template <class V>
inline void key_pair(const bf16* block, int d, int lane, typename V::F& even, typename V::F& odd) {
  V::split_pairs(V::pairs(block + 16 * d + 2 * lane), even, odd);
}
template <class V>
inline void key_pair(const float* block, int d, int lane, typename V::F& even, typename V::F& odd) {
  even = V::load(block + 16 * d + lane);
  odd = V::load(block + 16 * (d + 1) + lane);
}

template <class V>
inline void key_pair(const int8_t* block, int d, int lane, typename V::F& even, typename V::F& odd) {
  even = V::from_s8(block + 16 * d + lane);
  odd = V::from_s8(block + 16 * (d + 1) + lane);
}

// x[key] *= scale of that key, for the 16 keys from `key` on; int8 pages only
template <class V>
inline void scale_keys(const uint8_t* const* pages, int key, int dim, float* x) {
  const float* scales = reinterpret_cast<const float*>(pages[key / kPageTokens] + size_t(kPageTokens) * dim) + key % kPageTokens;
  for (int lane = 0; lane < 16; lane += V::W) V::store(x + lane, V::mul(V::load(x + lane), V::load(scales + lane)));
}

// scores[r][0..15] = q[r] . keys, R virtual rows. Even and odd dimensions have sums of their own: with four rows that makes
// eight independent chains, enough to hide the latency of a fused multiply-add.
template <class V, int R, class T>
inline void score_block(const float* const* q, const T* block, int dim, float* const* scores) {
  for (int lane = 0; lane < 16; lane += V::W) {
    typename V::F even_sum[R], odd_sum[R];
    for (int r = 0; r < R; r++) even_sum[r] = odd_sum[r] = V::zero();
    for (int d = 0; d < dim; d += 2) {
      typename V::F even, odd;
      key_pair<V>(block, d, lane, even, odd);
      for (int r = 0; r < R; r++) {
        even_sum[r] = V::fma(even, V::set1(q[r][d]), even_sum[r]);
        odd_sum[r] = V::fma(odd, V::set1(q[r][d + 1]), odd_sum[r]);
      }
    }
    for (int r = 0; r < R; r++) V::store(scores[r] + lane, V::add(even_sum[r], odd_sum[r]));
  }
}

// The same of queries in bf16.
template <class V, int R>
inline void score_block(const bf16* const* q, const bf16* block, int dim, float* const* scores) {
  for (int lane = 0; lane < 16; lane += V::W) {
    typename V::F sum[R], other_sum[R];
    for (int r = 0; r < R; r++) sum[r] = other_sum[r] = V::zero();
    for (int d = 0; d < dim; d += 4) {
      const typename V::Pairs keys = V::pairs(block + 16 * d + 2 * lane), others = V::pairs(block + 16 * (d + 2) + 2 * lane);
      for (int r = 0; r < R; r++) {
        sum[r] = V::dot_bf16(sum[r], keys, q[r] + d);
        other_sum[r] = V::dot_bf16(other_sum[r], others, q[r] + d + 2);
      }
    }
    for (int r = 0; r < R; r++) V::store(scores[r] + lane, V::add(sum[r], other_sum[r]));
  }
}

template <class V>
inline void cap_scores(float* scores, int count, float cap) {
  for (int k = 0; k < count; k += V::W) V::store(scores + k, capped<V>(V::load(scores + k), cap));
}

// In place: scores -> exp(scores - max), zero outside [first, last]; returns the sum and the max.
template <class V>
inline float soften(float* scores, int padded, int first, int last, float* maximum) {
  for (int k = 0; k < first; k++) scores[k] = -INFINITY;
  for (int k = last + 1; k < padded; k++) scores[k] = -INFINITY;
  typename V::F top = V::set1(-INFINITY);
  for (int k = 0; k < padded; k += V::W) top = V::max(top, V::load(scores + k));
  const float peak = V::max_of(top);
  const typename V::F shift = V::set1(peak);
  // sixteen partial sums at every width; sum() adds them in the same order at every level but the scalar one
  typename V::F sum[16 / V::W];
  for (int i = 0; i < 16 / V::W; i++) sum[i] = V::zero();
  for (int k = 0; k < padded; k += 16)
    for (int i = 0; i < 16 / V::W; i++) {
      const typename V::F e = vexp<V>(V::sub(V::load(scores + k + i * V::W), shift));
      V::store(scores + k + i * V::W, e);
      sum[i] = V::add(sum[i], e);
    }
  for (int k = 0; k < first; k++) scores[k] = 0;
  for (int k = last + 1; k < padded; k++) scores[k] = 0;
  typename V::F all = sum[0];
  for (int i = 1; i < 16 / V::W; i++) all = V::add(all, sum[i]);
  *maximum = peak;
  return V::sum(all);
}

// out[r] = factor[r] * sum over keys of p[r][key] * value[key], for D vectors of dimensions; at(key) is a value's address
template <class V, int R, int D, class At>
inline void mix_tile(const float* const* p, At at, int first, int last, int d, const float* factor, float* const* out) {
  typename V::F acc[R][D];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < D; i++) acc[r][i] = V::zero();
  for (int key = first; key <= last; key++) {
    const auto* value = at(key) + d;
    typename V::F weight[R];  // these stay in registers and one value at a time: R * D + R + 1 are sixteen at most
    for (int r = 0; r < R; r++) weight[r] = V::set1(p[r][key]);
    for (int i = 0; i < D; i++) {
      const typename V::F v = load_as_float<V>(value + i * V::W);
      for (int r = 0; r < R; r++) acc[r][i] = V::fma(v, weight[r], acc[r][i]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < D; i++) V::store(out[r] + d + i * V::W, V::mul(acc[r][i], V::set1(factor[r])));
}

// The same of weights in bf16, two keys at a time from an even one on.
template <class V, int R, int D, class At>
inline void mix_tile(const bf16* const* p, At at, int first, int last, int d, const float* factor, float* const* out) {
  static constexpr bf16 none[D * V::W] = {};  // a slot that no row sees may hold anything
  typename V::F acc[R][D];
  for (int r = 0; r < R; r++)
    for (int i = 0; i < D; i++) acc[r][i] = V::zero();
  for (int key = first / 2 * 2; key <= last; key += 2) {
    typename V::Pairs values[D];
    V::pair_up(key < first ? none : at(key) + d, key < last ? at(key + 1) + d : none, values);
    for (int r = 0; r < R; r++)
      for (int i = 0; i < D; i++) acc[r][i] = V::dot_bf16(acc[r][i], values[i], p[r] + key);
  }
  for (int r = 0; r < R; r++)
    for (int i = 0; i < D; i++) V::store(out[r] + d + i * V::W, V::mul(acc[r][i], V::set1(factor[r])));
}

// Up to 16 accumulators: with three rows of eight lanes, 32 dimensions are a cache line of bf16.
template <class V, int R, class P, class At>
inline void mix(const P* const* p, At at, int first, int last, int begin, int end, const float* factor, float* const* out) {
  int d = begin;
  if constexpr (V::W >= 8 && R <= 3)
    for (; d + 4 * V::W <= end; d += 4 * V::W) mix_tile<V, R, 4>(p, at, first, last, d, factor, out);
  for (; d + 2 * V::W <= end; d += 2 * V::W) mix_tile<V, R, 2>(p, at, first, last, d, factor, out);
  for (; d < end; d += V::W) mix_tile<V, R, 1>(p, at, first, last, d, factor, out);
}

// R virtual rows, the keys that they see, and where their scores are.
template <class V, class T, int R>
struct AttendRows {
  // Levels with dots of bf16 round queries and weights, too, where keys and values are.
  static constexpr bool low = V::kBf16Dots && std::is_same_v<T, bf16>;
  using Factor = std::conditional_t<low, bf16, float>;

  const AttendArgs& a;
  int virtual_row, first = 1 << 30, last = 0;  // keys that any of the rows sees
  float *scores[R], *inverse;                  // [key]; of the sum of each row's exponentials

  AttendRows(const AttendArgs& args, int row, int padded) : a(args), virtual_row(row) {
    for (int r = 0; r < R; r++) {
      scores[r] = a.scratch + size_t(virtual_row + r) * padded;
      first = start(r) < first ? start(r) : first;
      last = position(r) > last ? position(r) : last;
    }
    inverse = a.scratch + size_t(a.rows) * a.heads * padded + virtual_row;
  }
  int row(int r) const { return (virtual_row + r) / a.heads; }
  int head(int r) const { return (virtual_row + r) % a.heads; }
  int position(int r) const { return a.first_position + row(r); }
  int start(int r) const { return first_key(position(r), a.window); }
  size_t at(int r) const { return virtual_row_at(virtual_row + r, a.heads, a.q_stride, a.dim); }

  void score(int from, int to) const {
    const Factor* q[R];
    float* block[R];
    [[maybe_unused]] alignas(64) bf16 rounded[low ? R : 1][kMostHeadDim];
    for (int r = 0; r < R; r++)
      if constexpr (low) {
        for (int d = 0; d < a.dim; d += V::W) V::store_bf16(rounded[r] + d, V::load(a.q + at(r) + d));
        q[r] = rounded[r];
      } else {
        q[r] = a.q + at(r);
      }
    for (int key = from; key < to; key += 16) {
      const T* page = reinterpret_cast<const T*>(a.k[key / kPageTokens]);
      for (int r = 0; r < R; r++) block[r] = scores[r] + key;
      if (virtual_row == 0) fetch_values(a, key, sizeof(T));
      score_block<V, R>(q, page + size_t(key % kPageTokens / 16) * 16 * a.dim, a.dim, block);
      if constexpr (sizeof(T) == 1)
        for (int r = 0; r < R; r++) scale_keys<V>(a.k, key, a.dim, block[r]);
    }
  }

  void weigh(int from, int to) const {
    for (int r = 0; r < R; r++) {
      if (a.cap != 0) cap_scores<V>(scores[r] + from, to - from, a.cap);
      float maximum;
      const float sum = soften<V>(scores[r] + from, to - from, start(r) - from, position(r) - from, &maximum);
      inverse[r] = 1.0f / sum;
      if (a.lse) a.lse[size_t(row(r)) * a.lse_stride + head(r)] = maximum + logf(sum);
      if constexpr (sizeof(T) == 1)
        for (int key = from; key < to; key += 16) scale_keys<V>(a.v, key, a.dim, scores[r] + key);
    }
  }

  // In place: the weights of a row, in the first half of its memory.
  void round_weights(int from, int to) const {
    for (int r = 0; r < R; r++)
      for (int key = from; key < to; key += V::W)
        V::store_bf16(reinterpret_cast<bf16*>(scores[r]) + key, V::load(scores[r] + key));
  }

  void sum_values(int from, int to) const {
    const Factor* weights[R];
    float* out[R];
    for (int r = 0; r < R; r++) {
      weights[r] = reinterpret_cast<const Factor*>(scores[r]);
      out[r] = a.out + at(r);
    }
    auto value = [&](int key) { return reinterpret_cast<const T*>(a.v[key / kPageTokens]) + size_t(key % kPageTokens) * a.dim; };
    mix<V, R>(weights, value, first, last, from, to, inverse, out);
  }

  void run() const {
    const int from = first / 16 * 16, to = last / 16 * 16 + 16;
    switch (a.part) {
      case AttendPart::scores:
        return score(a.begin > from ? a.begin : from, a.end < to ? a.end : to);
      case AttendPart::weights:
        weigh(from, to);
        if constexpr (low) round_weights(from, to);
        return;
      case AttendPart::values:
        return sum_values(a.begin, a.end);
      default:
        score(from, to);
        weigh(from, to);
        if constexpr (low) round_weights(from, to);
        sum_values(0, a.dim);
    }
  }
};

template <class V, class T>
void attend(const AttendArgs& a) {
  const int padded = round_up(a.first_position + a.rows, 16), total = a.rows * a.heads;
  auto run = [&]<int R>(int r) {
    if (a.part != AttendPart::weights || (a.begin <= r && r < a.end)) AttendRows<V, T, R>(a, r, padded).run();
  };
  int r = 0;
  if constexpr (V::W == 16)  // whose 32 registers hold the sums of eight rows
    for (; r + 8 <= total; r += 8) run.template operator()<8>(r);
  for (; r + 4 <= total; r += 4) run.template operator()<4>(r);
  for (; r + 3 <= total; r += 3) run.template operator()<3>(r);
  for (; r < total; r++) run.template operator()<1>(r);
}

template <class V>
void attend_bf16(const AttendArgs& a) {
  attend<V, bf16>(a);
}
template <class V>
void attend_f32(const AttendArgs& a) {
  attend<V, float>(a);
}
template <class V>
void attend_int8(const AttendArgs& a) {
  attend<V, int8_t>(a);
}

// ---- backward --------------------------------------------------------------------------------------------------------
// With p = softmax(s), s = q k^T:  dv = p^T do;  dp = do v^T;  ds = p * (dp - sum(do * out));  dq = ds k;  dk = ds^T q.
// With a cap, p = softmax(y), y = cap tanh(s / cap), and ds has the factor 1 - (y / cap)^2.
// Rows are taken kAttendRows at a time with all heads of the group, so that dk and dv are read and written once for them.

// out[k] += sum_r c[r][k] x[r] for K keys and one vector of dimensions
template <class V, int K>
inline void add_outer(const float* coefficients, int stride, int rows, const float* const* x, int d, float* out, int dim) {
  typename V::F acc[K];
  for (int k = 0; k < K; k++) acc[k] = V::load(out + k * dim + d);
  for (int r = 0; r < rows; r++) {
    const typename V::F v = V::load(x[r] + d);
    for (int k = 0; k < K; k++) acc[k] = V::fma(v, V::set1(coefficients[size_t(r) * stride + k]), acc[k]);
  }
  for (int k = 0; k < K; k++) V::store(out + k * dim + d, acc[k]);
}

// keys[count][dim] -> blocks of 16 keys [dim][16], zero beyond count
inline void block_keys(const float* keys, int count, int dim, float* blocks) {
  for (int key = 0; key < round_up(count, 16); key++)
    for (int d = 0; d < dim; d++)
      blocks[(size_t(key / 16) * dim + d) * 16 + key % 16] = key < count ? keys[size_t(key) * dim + d] : 0.0f;
}

// Rows [row, row + rows) of one segment: p[r][key] and ds[r][key] of their virtual rows.
struct BackwardRows {
  static constexpr int most = kAttendRows * kMaxGroup;
  const float *q[most], *d_out[most];
  float *p[most], *ds[most];
  int row, total, begin, last;  // virtual rows; keys [begin, last], begin a multiple of 16
};

template <class V, int R>
inline void weigh_rows(const AttendBackwardArgs& a, const BackwardRows& b, int r0, const float* k_blocks, const float* v_blocks) {
  for (int key = b.begin; key <= b.last; key += 16) {
    float *p[R], *dp[R];
    for (int r = 0; r < R; r++) {
      p[r] = b.p[r0 + r] + key;
      dp[r] = b.ds[r0 + r] + key;
    }
    score_block<V, R>(b.q + r0, k_blocks + size_t(key) * a.dim, a.dim, p);
    score_block<V, R>(b.d_out + r0, v_blocks + size_t(key) * a.dim, a.dim, dp);
  }
  const int end = b.last / 16 * 16 + 16;
  for (int r = r0; r < r0 + R; r++) {
    const int row = b.row + r / a.heads, position = a.before + row;
    const int start = first_key(position, a.window);
    const float* out = a.out + size_t(row) * a.q_stride + (r % a.heads) * a.dim;
    typename V::F dots = V::zero();
    for (int d = 0; d < a.dim; d += V::W) dots = V::fma(V::load(out + d), V::load(b.d_out[r] + d), dots);
    const typename V::F lse = V::set1(a.lse[size_t(row) * a.lse_stride + r % a.heads]), delta = V::set1(V::sum(dots));
    if (a.cap != 0) cap_scores<V>(b.p[r] + b.begin, end - b.begin, a.cap);
    for (int key = b.begin; key < end; key += V::W) {
      const typename V::F score = V::load(b.p[r] + key), weight = vexp<V>(V::sub(score, lse));
      typename V::F ds = V::mul(weight, V::sub(V::load(b.ds[r] + key), delta));
      if (a.cap != 0) ds = V::mul(ds, cap_slope<V>(score, a.cap));
      V::store(b.p[r] + key, weight);
      V::store(b.ds[r] + key, ds);
    }
    for (int key = b.begin; key < start; key++) b.p[r][key] = b.ds[r][key] = 0;
    for (int key = position + 1; key < end; key++) b.p[r][key] = b.ds[r][key] = 0;
  }
}

template <class V, int R>
inline void query_gradients(const AttendBackwardArgs& a, const BackwardRows& b, int r0) {
  float factor[R], *dq[R];
  for (int r = 0; r < R; r++) {
    factor[r] = a.scale;
    dq[r] = a.dq + size_t(b.row + (r0 + r) / a.heads) * a.q_stride + ((r0 + r) % a.heads) * a.dim;
  }
  mix<V, R>(b.ds + r0, [&](int key) { return a.k + size_t(key) * a.dim; }, b.begin, b.last, 0, a.dim, factor, dq);
}

template <class V>
void attend_backward(const AttendBackwardArgs& a) {
  const int key_count = a.before + a.count, keys = round_up(key_count, 16), group = kAttendRows * a.heads;
  float *k_blocks = a.scratch, *v_blocks = k_blocks + size_t(keys) * a.dim, *p = v_blocks + size_t(keys) * a.dim,
        *ds = p + size_t(group) * keys;
  block_keys(a.k, key_count, a.dim, k_blocks);
  block_keys(a.v, key_count, a.dim, v_blocks);
  for (int row = 0; row < a.count; row += kAttendRows) {
    const int rows = a.count - row < kAttendRows ? a.count - row : kAttendRows;
    BackwardRows b;
    b.row = row;
    b.total = rows * a.heads;
    const int position = a.before + row;
    b.begin = first_key(position, a.window) / 16 * 16;
    b.last = position + rows - 1;
    for (int r = 0; r < b.total; r++) {
      const size_t offset = virtual_row_at(row * a.heads + r, a.heads, a.q_stride, a.dim);
      b.q[r] = a.q + offset;
      b.d_out[r] = a.d_out + offset;
      b.p[r] = p + size_t(r) * keys;
      b.ds[r] = ds + size_t(r) * keys;
    }
    int r = 0;
    for (; r + 4 <= b.total; r += 4) weigh_rows<V, 4>(a, b, r, k_blocks, v_blocks);
    for (; r < b.total; r++) weigh_rows<V, 1>(a, b, r, k_blocks, v_blocks);
    for (int key = b.begin; key <= b.last; key += 8)  // whole groups of eight: begin is a multiple of 16, keys are padded to 16
      for (int d = 0; d < a.dim; d += V::W) {
        add_outer<V, 8>(p + key, keys, b.total, b.d_out, d, a.dv + size_t(key) * a.dim, a.dim);
        add_outer<V, 8>(ds + key, keys, b.total, b.q, d, a.dk + size_t(key) * a.dim, a.dim);
      }
    for (r = 0; r + 4 <= b.total; r += 4) query_gradients<V, 4>(a, b, r);
    for (; r < b.total; r++) query_gradients<V, 1>(a, b, r);
  }
}

}  // namespace
}  // namespace nomoat
