#pragma once
// Attention: softmax(q k^T) v over a paged cache, and its backward over one segment.
// Every row adds its keys in order of position, so its result does not depend on the rows taken with it.

#include "kernel/table.h"
#include "kernel/vexp.h"

namespace nomoat {
namespace {

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
inline typename V::F values(const bf16* at) {
  return V::from_bf16(at);
}
template <class V>
inline typename V::F values(const float* at) {
  return V::load(at);
}

// scores[r][0..15] = q[r] . keys, R virtual rows
template <class V, class T, int R>
inline void score_block(const float* const* q, const T* block, int dim, float* const* scores) {
  for (int lane = 0; lane < 16; lane += V::W) {
    typename V::F acc[R];
    for (int r = 0; r < R; r++) acc[r] = V::zero();
    for (int d = 0; d < dim; d += 2) {
      typename V::F even, odd;
      key_pair<V>(block, d, lane, even, odd);
      for (int r = 0; r < R; r++) {
        acc[r] = V::fma(even, V::set1(q[r][d]), acc[r]);
        acc[r] = V::fma(odd, V::set1(q[r][d + 1]), acc[r]);
      }
    }
    for (int r = 0; r < R; r++) V::store(scores[r] + lane, acc[r]);
  }
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
  // sixteen partial sums at every width, so that all levels add in the same order
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

// out[r] = sum over keys of p[r][key] * value[key]; R virtual rows with the same last key or earlier (p is zero beyond it)
template <class V, class T, int R>
inline void mix_values(const float* const* p, const uint8_t* const* pages, int first, int last, int dim, const float* inverse, float* const* out) {
  for (int d = 0; d < dim; d += V::W) {
    typename V::F acc[R];
    for (int r = 0; r < R; r++) acc[r] = V::zero();
    for (int key = first; key <= last; key++) {
      const T* page = reinterpret_cast<const T*>(pages[key / kPageTokens]);
      const typename V::F value = values<V>(page + size_t(key % kPageTokens) * dim + d);
      for (int r = 0; r < R; r++) acc[r] = V::fma(value, V::set1(p[r][key]), acc[r]);
    }
    for (int r = 0; r < R; r++) V::store(out[r] + d, V::mul(acc[r], V::set1(inverse[r])));
  }
}

template <class V, class T, int R>
void attend_rows(const AttendArgs& a, int virtual_row, int padded) {
  const float* q[R];
  float *scores[R], *at[R], *out[R];
  float inverse[R];
  int last = 0, first = 1 << 30;
  for (int r = 0; r < R; r++) {
    const int row = (virtual_row + r) / a.heads, head = (virtual_row + r) % a.heads;
    q[r] = a.q + size_t(row) * a.q_stride + head * a.dim;
    out[r] = a.out + size_t(row) * a.q_stride + head * a.dim;
    scores[r] = a.scratch + size_t(virtual_row + r) * padded;
    const int position = a.first_position + row, start = a.window && position >= a.window ? position - a.window + 1 : 0;
    last = position > last ? position : last;
    first = start < first ? start : first;
  }
  const int begin = first / 16 * 16;
  for (int key = begin; key <= last; key += 16) {
    const T* page = reinterpret_cast<const T*>(a.k[key / kPageTokens]);
    for (int r = 0; r < R; r++) at[r] = scores[r] + key;
    score_block<V, T, R>(q, page + size_t(key % kPageTokens / 16) * 16 * a.dim, a.dim, at);
  }
  const int end = last / 16 * 16 + 16;
  for (int r = 0; r < R; r++) {
    const int row = (virtual_row + r) / a.heads, head = (virtual_row + r) % a.heads, position = a.first_position + row;
    const int start = a.window && position >= a.window ? position - a.window + 1 : 0;
    float maximum;
    const float sum = soften<V>(scores[r] + begin, end - begin, start - begin, position - begin, &maximum);
    inverse[r] = 1.0f / sum;
    if (a.lse) a.lse[size_t(row) * a.lse_stride + head] = maximum + logf(sum);
  }
  mix_values<V, T, R>(const_cast<const float* const*>(scores), a.v, first, last, a.dim, inverse, out);
}

template <class V, class T>
void attend(const AttendArgs& a) {
  const int padded = round_up(a.first_position + a.rows, 16), total = a.rows * a.heads;
  int r = 0;
  for (; r + 4 <= total; r += 4) attend_rows<V, T, 4>(a, r, padded);
  for (; r + 3 <= total; r += 3) attend_rows<V, T, 3>(a, r, padded);
  for (; r < total; r++) attend_rows<V, T, 1>(a, r, padded);
}

template <class V>
void attend_bf16(const AttendArgs& a) {
  attend<V, bf16>(a);
}
template <class V>
void attend_f32(const AttendArgs& a) {
  attend<V, float>(a);
}

// ---- backward --------------------------------------------------------------------------------------------------------
// With p = softmax(s), s = q k^T:  dv = p^T do;  dp = do v^T;  ds = p * (dp - sum(do * out));  dq = ds k;  dk = ds^T q.
// Rows are taken kAttendRows at a time with all heads of the group, so that dk and dv are read and written once for them.

// acc[k] += sum_r c[r][k] x[r] for K keys and one vector of dimensions
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

template <class V>
void attend_backward(const AttendBackwardArgs& a) {
  const int keys = round_up(a.count, 16), group = kAttendRows * a.heads;
  float *k_blocks = a.scratch, *v_blocks = k_blocks + size_t(keys) * a.dim, *p = v_blocks + size_t(keys) * a.dim, *ds = p + size_t(group) * keys;
  for (int key = 0; key < keys; key++)
    for (int d = 0; d < a.dim; d++) {
      const size_t at = (size_t(key / 16) * a.dim + d) * 16 + key % 16;
      k_blocks[at] = key < a.count ? a.k[size_t(key) * a.dim + d] : 0.0f;
      v_blocks[at] = key < a.count ? a.v[size_t(key) * a.dim + d] : 0.0f;
    }
  for (int row = 0; row < a.count; row += kAttendRows) {
    const int rows = a.count - row < kAttendRows ? a.count - row : kAttendRows, total = rows * a.heads, last = row + rows - 1;
    const int begin = a.window && row >= a.window ? (row - a.window + 1) / 16 * 16 : 0;
    const float *q[64], *d_out[64];
    for (int r = 0; r < total; r++) {
      const size_t offset = size_t(row + r / a.heads) * a.q_stride + (r % a.heads) * a.dim;
      q[r] = a.q + offset;
      d_out[r] = a.d_out + offset;
      const float* out = a.out + offset;
      typename V::F dots = V::zero();
      for (int d = 0; d < a.dim; d += V::W) dots = V::fma(V::load(out + d), V::load(d_out[r] + d), dots);
      const float delta = V::sum(dots);
      const int position = row + r / a.heads, start = a.window && position >= a.window ? position - a.window + 1 : 0;
      const typename V::F lse = V::set1(a.lse[size_t(position) * a.lse_stride + r % a.heads]), shift = V::set1(delta);
      float *p_row = p + size_t(r) * keys, *ds_row = ds + size_t(r) * keys;
      for (int key = begin; key <= last; key += 16) {
        const float *qs[1] = {q[r]}, *dos[1] = {d_out[r]};
        float *s_at[1] = {p_row + key}, *dp_at[1] = {ds_row + key};
        score_block<V, float, 1>(qs, k_blocks + size_t(key) * a.dim, a.dim, s_at);
        score_block<V, float, 1>(dos, v_blocks + size_t(key) * a.dim, a.dim, dp_at);
        for (int i = 0; i < 16; i += V::W) {
          const typename V::F weight = vexp<V>(V::sub(V::load(p_row + key + i), lse));
          V::store(p_row + key + i, weight);
          V::store(ds_row + key + i, V::mul(weight, V::sub(V::load(ds_row + key + i), shift)));
        }
      }
      const int end = last / 16 * 16 + 16;
      for (int key = begin; key < end; key++)
        if (key < start || key > position) p_row[key] = ds_row[key] = 0;
    }
    for (int key = begin; key <= last; key += 4) {  // whole groups of four: begin is a multiple of 16, keys are padded to 16
      for (int d = 0; d < a.dim; d += V::W) {
        add_outer<V, 4>(p + key, keys, total, d_out, d, a.dv + size_t(key) * a.dim, a.dim);
        add_outer<V, 4>(ds + key, keys, total, q, d, a.dk + size_t(key) * a.dim, a.dim);
      }
    }
    for (int r = 0; r < total; r++) {
      float* dq = a.dq + size_t(row + r / a.heads) * a.q_stride + (r % a.heads) * a.dim;
      const float* ds_row = ds + size_t(r) * keys;
      for (int d = 0; d < a.dim; d += V::W) {
        typename V::F acc = V::zero();
        for (int key = begin; key <= last; key++) acc = V::fma(V::load(a.k + size_t(key) * a.dim + d), V::set1(ds_row[key]), acc);
        V::store(dq + d, V::mul(acc, V::set1(a.scale)));
      }
    }
  }
}

}  // namespace
}  // namespace nomoat
