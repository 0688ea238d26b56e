// x += Wo attend(rope(Wq h), rope(Wk h), Wv h), h = norm(x): causal attention with grouped heads over a paged cache.
// Backward reads the tape: x, the rotated and scaled q, k, v, the attended values, the log-sum-exp of every row and head.

#include <cmath>

#include "op/engine.h"

namespace nomoat {

namespace {

// One head: from[head_dim] -> to[head_stride], rotated by `sign` times its position's angles and multiplied by `factor`.
void rotate(const Dims& dims, const float* from, const float* table, float sign, float factor, float* to) {
  const int half = dims.rope_dim / 2;
  for (int i = 0; i < half; i++) {
    const int a = dims.interleaved ? 2 * i : i, b = dims.interleaved ? 2 * i + 1 : i + half;
    const float c = table[2 * i], s = sign * table[2 * i + 1], x = from[a], y = from[b];
    to[a] = (x * c - y * s) * factor;
    to[b] = (x * s + y * c) * factor;
  }
  for (int i = 2 * half; i < dims.head_dim; i++) to[i] = from[i] * factor;
}

void write_key(const KvCache& cache, const float* key, int dim, uint8_t* page, int slot) {
  const int block = slot / 16, lane = slot % 16;
  if (cache.f32()) {
    float* to = reinterpret_cast<float*>(page) + size_t(block) * 16 * dim;
    for (int d = 0; d < dim; d++) to[16 * d + lane] = key[d];
  } else {
    bf16* to = reinterpret_cast<bf16*>(page) + size_t(block) * 16 * dim;
    bf16 low[512];
    kernels().to_bf16(key, dim, low);
    for (int d = 0; d < dim; d += 2) {
      to[16 * d + 2 * lane] = low[d];
      to[16 * d + 2 * lane + 1] = low[d + 1];
    }
  }
}

void write_value(const KvCache& cache, const float* value, int dim, uint8_t* page, int slot) {
  if (cache.f32())
    std::memcpy(reinterpret_cast<float*>(page) + size_t(slot) * dim, value, size_t(dim) * sizeof(float));
  else
    kernels().to_bf16(value, dim, reinterpret_cast<bf16*>(page) + size_t(slot) * dim);
}

struct Widths {
  int d, q, kv, heads_q, heads_kv;  // padded residual, q and kv product widths; [heads][head_stride] widths

  explicit Widths(const Dims& dims)
      : d(padded(dims.width)),
        q(padded(dims.q_width())),
        kv(padded(dims.kv_width())),
        heads_q(dims.heads * dims.head_stride()),
        heads_kv(dims.kv_heads * dims.head_stride()) {}
};

// Rotates q and k, puts the rows' keys and values into the cache.
void place(Engine& engine, const Batch& batch, const KvCache& cache, int cache_layer, const Widths& w) {
  const Dims& dims = engine.dims;
  const int stride = dims.head_stride(), half = dims.rope_dim / 2;
  int furthest = 0;
  for (const Segment& s : batch.segments) furthest = s.position + s.count > furthest ? s.position + s.count : furthest;
  const float* table = engine.rope_table(furthest);
  const float scale = 1.0f / std::sqrt(float(dims.head_dim));
  float *q = engine.attn_q.data<float>(), *k = engine.attn_k.data<float>(), *v = engine.attn_v.data<float>();
  for (const Segment& s : batch.segments)
    for_rows(s.count, 16, [&](int first, int last) {
      for (int i = first; i < last; i++) {
        const size_t m = size_t(s.row + i);
        const int position = s.position + i, page = s.pages[position / kPageTokens], slot = position % kPageTokens;
        const float* angles = table + size_t(position) * half * 2;
        for (int h = 0; h < dims.heads; h++)
          rotate(dims, engine.q.data<float>() + m * w.q + h * dims.head_dim, angles, 1, scale, q + m * w.heads_q + h * stride);
        for (int h = 0; h < dims.kv_heads; h++) {
          float *key = k + m * w.heads_kv + h * stride, *value = v + m * w.heads_kv + h * stride;
          rotate(dims, engine.k.data<float>() + m * w.kv + h * dims.head_dim, angles, 1, 1, key);
          std::memcpy(value, engine.v.data<float>() + m * w.kv + h * dims.head_dim, size_t(dims.head_dim) * sizeof(float));
          write_key(cache, key, stride, cache.keys(page, cache_layer, h), slot);
          write_value(cache, value, stride, cache.values(page, cache_layer, h), slot);
        }
      }
    });
}

void attend_all(Engine& engine, const Batch& batch, const KvCache& cache, int cache_layer, const Widths& w, float* lse) {
  const Dims& dims = engine.dims;
  constexpr int chunk = 16;  // rows a task
  struct Task {
    int segment, first, count, head;
  };
  std::vector<Task> tasks;
  for (int i = 0; i < int(batch.segments.size()); i++)
    for (int first = 0; first < batch.segments[i].count; first += chunk)
      for (int head = 0; head < dims.kv_heads; head++) {
        const int left = batch.segments[i].count - first;
        tasks.push_back({i, first, left < chunk ? left : chunk, head});
      }
  parallel_for(int(tasks.size()), [&](int index, int thread) {
    const Task& t = tasks[index];
    const Segment& s = batch.segments[t.segment];
    const int last = s.position + t.first + t.count, pages = (last + kPageTokens - 1) / kPageTokens;
    const size_t scores = size_t(t.count) * dims.group() * round_up(last, 16);
    float* scratch = engine.thread_scratch[thread].get<float>(scores + size_t(pages) * 4);
    const uint8_t** k = reinterpret_cast<const uint8_t**>(scratch + scores);  // scores is a multiple of 16 floats
    const uint8_t** v = k + pages;
    for (int p = 0; p < pages; p++) {
      k[p] = cache.keys(s.pages[p], cache_layer, t.head);
      v[p] = cache.values(s.pages[p], cache_layer, t.head);
    }
    const int stride = dims.head_stride(), head = t.head * dims.group();
    const size_t row = size_t(s.row + t.first), offset = row * w.heads_q + size_t(head) * stride;
    AttendArgs a;
    a.q = engine.attn_q.data<float>() + offset;
    a.rows = t.count;
    a.heads = dims.group();
    a.dim = stride;
    a.q_stride = w.heads_q;
    a.first_position = s.position + t.first;
    a.window = dims.window;
    a.k = k;
    a.v = v;
    a.out = engine.mixed.data<float>() + offset;
    a.lse = lse ? lse + row * dims.heads + head : nullptr;
    a.lse_stride = dims.heads;
    a.scratch = scratch;
    (cache.f32() ? kernels().attend_f32 : kernels().attend_bf16)(a);
  });
}

// [M][heads][head_stride] <-> [M][padded heads * head_dim]
void flatten(const Dims& dims, const float* from, int rows, const Widths& w, float* to) {
  for_rows(rows, 32, [&](int first, int last) {
    for (int m = first; m < last; m++)
      for (int h = 0; h < dims.heads; h++)
        std::memcpy(to + size_t(m) * w.q + h * dims.head_dim, from + size_t(m) * w.heads_q + h * dims.head_stride(),
                    size_t(dims.head_dim) * sizeof(float));
  });
}

void spread(const Dims& dims, const float* from, int rows, const Widths& w, float* to) {
  for_rows(rows, 32, [&](int first, int last) {
    for (int m = first; m < last; m++)
      for (int h = 0; h < dims.heads; h++)
        std::memcpy(to + size_t(m) * w.heads_q + h * dims.head_stride(), from + size_t(m) * w.q + h * dims.head_dim,
                    size_t(dims.head_dim) * sizeof(float));
  });
}

// dq, dk, dv of one segment and kv head, in float32.
void backward_task(Engine& engine, const Segment& s, int kv_head, const Widths& w, const float* q, const float* k, const float* v,
                   const float* mixed, const float* d_mixed, const float* lse, int thread) {
  const Dims& dims = engine.dims;
  const int dim = dims.head_stride(), keys = round_up(s.count, 16), group = dims.group();
  const size_t rows = size_t(keys) * dim;
  float* own = engine.thread_scratch[thread].get<float>(4 * rows + size_t(attend_backward_scratch(s.count, group, dim)));
  float *k_rows = own, *v_rows = own + rows, *dk = own + 2 * rows, *dv = own + 3 * rows;
  std::memset(dk, 0, 2 * rows * sizeof(float));
  for (int i = 0; i < s.count; i++) {
    const size_t at = size_t(s.row + i) * w.heads_kv + size_t(kv_head) * dim;
    std::memcpy(k_rows + size_t(i) * dim, k + at, size_t(dim) * sizeof(float));
    std::memcpy(v_rows + size_t(i) * dim, v + at, size_t(dim) * sizeof(float));
  }
  const size_t offset = size_t(s.row) * w.heads_q + size_t(kv_head) * group * dim;
  AttendBackwardArgs a;
  a.q = q + offset;
  a.out = mixed + offset;
  a.d_out = d_mixed + offset;
  a.k = k_rows;
  a.v = v_rows;
  a.lse = lse + size_t(s.row) * dims.heads + size_t(kv_head) * group;
  a.count = s.count;
  a.heads = group;
  a.dim = dim;
  a.q_stride = w.heads_q;
  a.lse_stride = dims.heads;
  a.window = dims.window;
  a.scale = 1.0f / std::sqrt(float(dims.head_dim));
  a.dq = engine.mixed.data<float>() + offset;
  a.dk = dk;
  a.dv = dv;
  a.scratch = own + 4 * rows;
  kernels().attend_backward(a);
  const float* table = engine.rope_table(s.position + s.count);
  for (int i = 0; i < s.count; i++) {  // undo the rotation: rows of the products' gradients
    const float* angles = table + size_t(s.position + i) * (dims.rope_dim / 2) * 2;
    const size_t m = size_t(s.row + i);
    for (int h = 0; h < group; h++) {
      const int head = kv_head * group + h;
      rotate(dims, engine.mixed.data<float>() + m * w.heads_q + size_t(head) * dim, angles, -1, 1,
             engine.dq.data<float>() + m * w.q + head * dims.head_dim);
    }
    rotate(dims, dk + size_t(i) * dim, angles, -1, 1, engine.dk.data<float>() + m * w.kv + kv_head * dims.head_dim);
    std::memcpy(engine.dv.data<float>() + m * w.kv + kv_head * dims.head_dim, dv + size_t(i) * dim,
                size_t(dims.head_dim) * sizeof(float));
  }
}

}  // namespace

void attention_forward(Engine& engine, int layer, Mode mode, float* x, const Batch& batch, const KvCache& cache, int cache_layer,
                       LayerTape* tape) {
  const Dims& dims = engine.dims;
  const Layer& own = engine.layers[layer];
  const Widths w(dims);
  const size_t rows = size_t(batch.rows);
  const float* h = normed(engine, x, own.attn_norm, batch.rows);
  const Activations input = prepare(mode, engine.digits[0], h, batch.rows, w.d, engine.normed_low, engine.q8, engine.blocks);
  if (tape) save_rows(mode, x, rows * w.d, tape->x);
  const LinearJob jobs[] = {
      {&own.w[kQ], kQ, engine.q.get<float>(rows * w.q), w.q, false, tape ? &tape->u[kQ] : nullptr},
      {&own.w[kK], kK, engine.k.get<float>(rows * w.kv), w.kv, false, tape ? &tape->u[kK] : nullptr},
      {&own.w[kV], kV, engine.v.get<float>(rows * w.kv), w.kv, false, tape ? &tape->u[kV] : nullptr},
  };
  linear(engine, input, jobs, 3, batch, layer);
  engine.attn_q.get<float>(rows * w.heads_q);
  engine.attn_k.get<float>(rows * w.heads_kv);
  engine.attn_v.get<float>(rows * w.heads_kv);
  engine.mixed.get<float>(rows * w.heads_q);
  place(engine, batch, cache, cache_layer, w);
  attend_all(engine, batch, cache, cache_layer, w, tape ? tape->lse.get<float>(rows * dims.heads) : nullptr);
  float* flat = engine.mixed_flat.get<float>(rows * w.q);
  flatten(dims, engine.mixed.data<float>(), batch.rows, w, flat);
  if (tape) {
    save_rows(mode, engine.attn_q.data<float>(), rows * w.heads_q, tape->q);
    save_rows(mode, engine.attn_k.data<float>(), rows * w.heads_kv, tape->k);
    save_rows(mode, engine.attn_v.data<float>(), rows * w.heads_kv, tape->v);
    save_rows(mode, flat, rows * w.q, tape->mixed);
  }
  const Activations mixed = prepare(mode, engine.digits[1], flat, batch.rows, w.q, engine.normed_low, engine.q8, engine.blocks);
  const LinearJob out[] = {{&own.w[kO], kO, x, w.d, true, tape ? &tape->u[kO] : nullptr}};
  linear(engine, mixed, out, 1, batch, layer);
}

void attention_backward(Engine& engine, int layer, Mode mode, float* dx, const Batch& batch, const LayerTape& tape,
                        bool need_dx) {
  const Dims& dims = engine.dims;
  const Layer& own = engine.layers[layer];
  const Widths w(dims);
  const size_t rows = size_t(batch.rows);
  // through the output product
  const float* flat = load_rows(mode, tape.mixed, rows * w.q, engine.mixed_flat);
  Activations mixed{mode, batch.rows, w.q, 0, flat, tape.mixed.data<bf16>(), nullptr, nullptr};
  const LinearBackwardJob out[] = {{&own.w[kO], kO, dx, w.d, tape.u[kO].data<float>()}};
  float* d_flat = engine.dmixed.get<float>(rows * w.q);
  linear_backward(engine, mixed, out, 1, batch, layer, d_flat, w.q);
  // through the attention itself
  float *mixed_heads = engine.attn_q.get<float>(rows * w.heads_q), *d_mixed_heads = engine.attn_k.get<float>(rows * w.heads_q);
  spread(dims, flat, batch.rows, w, mixed_heads);
  spread(dims, d_flat, batch.rows, w, d_mixed_heads);
  const float* q = load_rows(mode, tape.q, rows * w.heads_q, engine.q);
  const float* k = load_rows(mode, tape.k, rows * w.heads_kv, engine.k);
  const float* v = load_rows(mode, tape.v, rows * w.heads_kv, engine.v);
  engine.mixed.get<float>(rows * w.heads_q);
  engine.dq.get<float>(rows * w.q);
  engine.dk.get<float>(rows * w.kv);
  engine.dv.get<float>(rows * w.kv);
  int furthest = 0;
  for (const Segment& s : batch.segments) furthest = s.position + s.count > furthest ? s.position + s.count : furthest;
  engine.rope_table(furthest);  // grown here, read by the tasks
  const int segments = int(batch.segments.size());
  parallel_for(segments * dims.kv_heads, [&](int task, int thread) {
    backward_task(engine, batch.segments[task / dims.kv_heads], task % dims.kv_heads, w, q, k, v, mixed_heads, d_mixed_heads,
                  tape.lse.data<float>(), thread);
  });
  // through the input products and the norm
  const float* x = load_rows(mode, tape.x, rows * w.d, engine.x_wide);
  const float* h = normed(engine, x, own.attn_norm, batch.rows);
  const Activations input = prepare(mode, engine.digits[0], h, batch.rows, w.d, engine.normed_low, engine.q8, engine.blocks);
  const LinearBackwardJob jobs[] = {
      {&own.w[kQ], kQ, engine.dq.data<float>(), w.q, tape.u[kQ].data<float>()},
      {&own.w[kK], kK, engine.dk.data<float>(), w.kv, tape.u[kK].data<float>()},
      {&own.w[kV], kV, engine.dv.data<float>(), w.kv, tape.u[kV].data<float>()},
  };
  float* dh = need_dx ? engine.dx.get<float>(rows * w.d) : nullptr;
  linear_backward(engine, input, jobs, 3, batch, layer, dh, w.d);
  if (!need_dx) return;
  for_rows(batch.rows, 8, [&](int first, int last) {
    for (int m = first; m < last; m++)
      kernels().rms_norm_backward(x + size_t(m) * w.d, own.attn_norm, dh + size_t(m) * w.d, dims.width, dims.eps,
                                  dx + size_t(m) * w.d);
  });
}

}  // namespace nomoat
