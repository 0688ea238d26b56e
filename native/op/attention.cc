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
  // Whole pages of a shared prefix are shared; each segment has a copy of what the prefix puts into its first own page.
  for (size_t i = 1; batch.prefix && i < batch.segments.size(); i++)
    for (int position = batch.prefix / kPageTokens * kPageTokens; position < batch.prefix; position++)
      for (int h = 0; h < dims.kv_heads; h++) {
        const size_t at = size_t(position) * w.heads_kv + size_t(h) * stride;
        const int page = batch.segments[i].pages[position / kPageTokens], slot = position % kPageTokens;
        write_key(cache, k + at, stride, cache.keys(page, cache_layer, h), slot);
        write_value(cache, v + at, stride, cache.values(page, cache_layer, h), slot);
      }
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

// What the tape and the output product give to attention's backward; widths as in `Widths`.
struct AttentionGradients {
  const float *q, *k, *v, *mixed, *d_mixed, *lse;
};

// Gradients of one row's key and value, in the cache's layout, become those of the products: the rotation is undone.
void put_key_value(Engine& engine, const Widths& w, int row, int position, int kv_head, const float* dk, const float* dv) {
  const Dims& dims = engine.dims;
  const float* angles = engine.rope_table(position + 1) + size_t(position) * (dims.rope_dim / 2) * 2;
  const size_t at = size_t(row) * w.kv + size_t(kv_head) * dims.head_dim;
  rotate(dims, dk, angles, -1, 1, engine.dk.data<float>() + at);
  std::memcpy(engine.dv.data<float>() + at, dv, size_t(dims.head_dim) * sizeof(float));
}

// dq, dk, dv of one segment and kv head, in float32. `shared` takes what it adds to the keys and values of a shared prefix,
// [prefix][dim] of each; for the prefix itself that is all of it.
void backward_task(Engine& engine, const Batch& batch, int index, int kv_head, const Widths& w, const AttentionGradients& g,
                   float* shared, int thread) {
  const Dims& dims = engine.dims;
  const Segment& s = batch.segments[size_t(index)];
  const int before = index ? batch.prefix : 0, key_count = before + s.count;
  const int dim = dims.head_stride(), keys = round_up(key_count, 16), group = dims.group();
  const size_t rows = size_t(keys) * dim;
  float* own = engine.thread_scratch[thread].get<float>(4 * rows + size_t(attend_backward_scratch(key_count, group, dim)));
  float *k_rows = own, *v_rows = own + rows, *dk = own + 2 * rows, *dv = own + 3 * rows;
  std::memset(dk, 0, 2 * rows * sizeof(float));
  for (int i = 0; i < key_count; i++) {
    const int row = i < before ? i : s.row + i - before;
    const size_t at = size_t(row) * w.heads_kv + size_t(kv_head) * dim;
    std::memcpy(k_rows + size_t(i) * dim, g.k + at, size_t(dim) * sizeof(float));
    std::memcpy(v_rows + size_t(i) * dim, g.v + at, size_t(dim) * sizeof(float));
  }
  const size_t offset = size_t(s.row) * w.heads_q + size_t(kv_head) * group * dim;
  AttendBackwardArgs a;
  a.q = g.q + offset;
  a.out = g.mixed + offset;
  a.d_out = g.d_mixed + offset;
  a.k = k_rows;
  a.v = v_rows;
  a.lse = g.lse + size_t(s.row) * dims.heads + size_t(kv_head) * group;
  a.count = s.count;
  a.before = before;
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
  for (int i = 0; i < s.count; i++) {
    const size_t m = size_t(s.row + i);
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++)
      rotate(dims, engine.mixed.data<float>() + m * w.heads_q + size_t(head) * dim,
             table + size_t(s.position + i) * (dims.rope_dim / 2) * 2, -1, 1,
             engine.dq.data<float>() + m * w.q + head * dims.head_dim);
  }
  if (batch.prefix) {
    std::memcpy(shared, dk, size_t(batch.prefix) * dim * sizeof(float));
    std::memcpy(shared + size_t(batch.prefix) * dim, dv, size_t(batch.prefix) * dim * sizeof(float));
  }
  for (int i = batch.prefix && !index ? s.count : 0; i < s.count; i++)
    put_key_value(engine, w, s.row + i, s.position + i, kv_head, dk + size_t(before + i) * dim, dv + size_t(before + i) * dim);
}

// Adds up, in order of segments, what all of them gave to the keys and values of the shared prefix.
void gather_shared(Engine& engine, const Batch& batch, const Widths& w, float* shared, size_t block) {
  const int kv_heads = engine.dims.kv_heads, dim = engine.dims.head_stride();
  parallel_for(kv_heads, [&](int head, int) {
    float* sum = shared + size_t(head) * block;
    for (size_t i = 1; i < batch.segments.size(); i++)
      kernels().axpy(shared + (i * size_t(kv_heads) + size_t(head)) * block, 1, int(block), sum);
    for (int i = 0; i < batch.prefix; i++)
      put_key_value(engine, w, i, i, head, sum + size_t(i) * dim, sum + size_t(batch.prefix + i) * dim);
  });
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
  const size_t block = size_t(2) * batch.prefix * dims.head_stride();
  float* shared = engine.shared.get<float>(size_t(segments) * dims.kv_heads * block + 1);
  const AttentionGradients gradients{q, k, v, mixed_heads, d_mixed_heads, tape.lse.data<float>()};
  parallel_for(segments * dims.kv_heads, [&](int task, int thread) {
    backward_task(engine, batch, task / dims.kv_heads, task % dims.kv_heads, w, gradients, shared + size_t(task) * block, thread);
  });
  if (batch.prefix) gather_shared(engine, batch, w, shared, block);
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
