// logits = cap(logit_scale * Whead norm(x)), and the cross-entropy over the rows that carry loss: log-probabilities out,
// gradients back.

#include <algorithm>
#include <cmath>

#include "op/engine.h"
#include "quant/half.h"

namespace nomoat {

namespace {

// Rows whose logits, `stride` floats each, are alive at once. Each chunk decodes the head's weights twice, so they may take 40 %
// of what all weights take: of SmolLM2-135M 192 rows, 38 MB; of a 1B with 128k tokens 600 rows.
int chunk_rows(const Engine& engine, int stride) {
  size_t weights = packed_bytes(engine.head);
  for (const Layer& layer : engine.layers)
    for (const Matrix& w : layer.w) weights += packed_bytes(w);
  return int(std::clamp<size_t>(weights * 2 / 5 / (size_t(stride) * sizeof(float)), 192, 1024));
}

// norm(x[rows[i]]), or norm(x[i]) where rows is null.
const float* gather_normed(Engine& engine, const float* x, const int32_t* rows, int count) {
  const int width = padded(engine.dims.width);
  float* h = engine.head_x.get<float>(size_t(count) * width);
  for_rows(count, 4, [&](int first, int last) {
    for (int i = first; i < last; i++)
      norm_row(engine.dims, x + size_t(rows ? rows[i] : i) * width, engine.final_norm, engine.final_norm_bias,
               h + size_t(i) * width);
  });
  return h;
}

// Rows of logits are `stride` apart.
Activations project(Engine& engine, Mode mode, const float* h, int count, float* logits, int stride) {
  const Batch plain;  // no adapters on the head
  const Activations input =
      prepare(mode, engine.digits[4], h, count, padded(engine.dims.width), engine.normed_low, engine.q8, engine.blocks);
  const LinearJob job[] = {{&engine.head, kTargets, logits, stride, false, nullptr}};
  linear(engine, input, job, 1, plain, 0);
  const float scale = engine.dims.logit_scale, cap = engine.dims.logit_cap;
  if (scale == 1 && cap == 0) return input;
  constexpr int grain = 1 << 13;  // logits a task, a multiple of every row's padding
  const int64_t all = int64_t(count) * stride;
  parallel_for(int((all + grain - 1) / grain), [&](int task, int) {
    float* own = logits + int64_t(task) * grain;
    const int n = int(std::min<int64_t>(grain, all - int64_t(task) * grain));
    for (int i = 0; i < n; i++) own[i] *= scale;
    if (cap != 0) kernels().soft_cap(own, cap, n);
  });
  return input;
}

// dlogits = d_logp * (onehot(target) - softmax(logits)), times the slopes of cap and scale, in place of the logits. With `low`
// they are bf16, at the beginning of each row.
void logits_backward(Engine& engine, bool low, float* logits, int stride, const float* lse, const int32_t* targets,
                     const float* d_logp, int count) {
  const int vocab = padded(engine.dims.vocab);
  const float cap = engine.dims.logit_cap;
  parallel_for(count, [&](int i, int thread) {
    float* row = logits + size_t(i) * stride;
    const float logp = row[targets[i]] - lse[i], factor = d_logp[i] * engine.dims.logit_scale,
                of_target = factor * -std::expm1(logp);
    if (low && cap == 0) {
      bf16* d = reinterpret_cast<bf16*>(row);
      kernels().softmax_bf16(row, lse[i], -factor, vocab, d);  // what it writes it has read
      d[targets[i]] = float_to_bf16(of_target);
      std::fill(d + engine.dims.vocab, d + vocab, bf16(0));
      return;
    }
    float* d = cap != 0 ? engine.thread_scratch[size_t(thread)].get<float>(size_t(vocab)) : row;
    kernels().softmax_f32(row, lse[i], -factor, vocab, d);
    d[targets[i]] = of_target;
    std::fill(d + engine.dims.vocab, d + vocab, 0.0f);
    if (cap == 0) return;
    kernels().soft_cap_backward(row, cap, vocab, d);
    if (low)
      kernels().to_bf16(d, vocab, reinterpret_cast<bf16*>(row));
    else
      std::memcpy(row, d, size_t(vocab) * sizeof(float));
  });
}

}  // namespace

void head_logits(Engine& engine, Mode mode, const float* x, const int32_t* rows, int count, float* logits) {
  if (count) project(engine, mode, gather_normed(engine, x, rows, count), count, logits, padded(engine.dims.vocab));
}

void head_logprobs(Engine& engine, Mode mode, const float* x, const int32_t* rows, const int32_t* targets, int count, float* logp,
                   const float* d_logp, float* dx) {
  const int width = padded(engine.dims.width), stride = low_stride(2 * padded(engine.dims.vocab)) / 2;  // bf16 take their place
  const int chunk = chunk_rows(engine, stride);
  for (int first = 0; first < count; first += chunk) {
    const int n = std::min(chunk, count - first);
    const float* h = gather_normed(engine, x, rows + first, n);
    float* logits = engine.logits.get<float>(size_t(n) * stride);
    float* lse = engine.lse.get<float>(size_t(n));
    const Activations input = project(engine, mode, h, n, logits, stride);
    for_rows(n, 1, [&](int a, int b) {
      for (int i = a; i < b; i++) {
        const float* row = logits + size_t(i) * stride;
        lse[i] = kernels().log_sum_exp(row, engine.dims.vocab);
        logp[first + i] = row[targets[first + i]] - lse[i];
      }
    });
    if (!d_logp) continue;
    const bool low = low_products(mode);
    logits_backward(engine, low, logits, stride, lse, targets + first, d_logp + first, n);
    const Batch plain;
    LinearBackwardJob job[] = {{&engine.head, kTargets, logits, stride, nullptr}};
    if (low) job[0] = {&engine.head, kTargets, nullptr, 2 * stride, nullptr, reinterpret_cast<const bf16*>(logits)};
    float* dh = engine.head_dx.get<float>(size_t(n) * width);
    linear_backward(engine, input, job, 1, plain, 0, dh, width);
    for_rows(n, 8, [&](int a, int b) {
      for (int i = a; i < b; i++) {
        const size_t at = size_t(rows[first + i]) * width;
        norm_row_backward(engine.dims, x + at, engine.final_norm, dh + size_t(i) * width, dx + at);
      }
    });
  }
}

}  // namespace nomoat
