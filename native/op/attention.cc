// x += [norm] Wo attend(rope([norm] Wq h), rope([norm] Wk h), Wv h), h = [norm] x: causal attention with grouped heads over a
// paged cache. Backward reads the tape: x, the rotated and scaled q and k (before their norms, where they have norms), v, the
// attended values, the log-sum-exp of every row and head, and what a post-norm needs.

#include <algorithm>

#include "base/profile.h"
#include "op/engine.h"

namespace nomoat {

namespace {

// One layer's heads: how they are rotated, and how wide rows of them are.
struct Heads {
  const Dims& dims;
  const Layer& own;
  Rope& rope;
  const float* angles;                     // rope.table of every position of the batch
  int d, q, kv, heads_q, heads_kv, group;  // padded residual, q and kv product widths; [heads][head_stride] widths

  Heads(Engine& engine, int layer, const Batch& batch)
      : dims(engine.dims), own(engine.layers[size_t(layer)]), rope(engine.rope_of(own)) {
    int furthest = 0;
    for (const Segment& s : batch.segments) furthest = std::max(furthest, s.position + s.count);
    angles = rope.table(furthest);
    d = padded(dims.width);
    q = padded(own.heads * dims.head_dim);
    kv = padded(own.kv_heads * dims.head_dim);
    heads_q = own.heads * dims.head_stride();
    heads_kv = own.kv_heads * dims.head_stride();
    group = own.heads / own.kv_heads;
  }
};

// One head: from[head_dim] -> to[head_stride], rotated by `sign` times its position's angles and multiplied by `factor`.
void rotate(const Heads& h, const float* __restrict from, int position, float sign, float factor, float* __restrict to) {
  const int half = h.rope.pairs();
  const float *cosines = h.angles + size_t(position) * half * 2, *sines = cosines + half;
  auto turn = [&](int i, int a, int b) {
    const float c = cosines[i], s = sign * sines[i], x = from[a], y = from[b];
    to[a] = (x * c - y * s) * factor;
    to[b] = (x * s + y * c) * factor;
  };
  if (h.rope.interleaved)
    for (int i = 0; i < half; i++) turn(i, 2 * i, 2 * i + 1);
  else
    for (int i = 0; i < half; i++) turn(i, i, i + half);
  for (int i = 2 * half; i < h.dims.head_dim; i++) to[i] = from[i] * factor;
}

// A norm over each head's values or over the whole row: how many parts a row has, and how long they are.
struct NormParts {
  int count, cols, room;  // room = cols padded to 16

  NormParts(const Dims& dims, int heads)
      : count(dims.qk_norm == QkNorm::row ? 1 : heads),
        cols(dims.qk_norm == QkNorm::row ? heads * dims.head_dim : dims.head_dim),
        room(round_up(cols, 16)) {}
};

// norm(x) of the heads of one row, in `spare`; x itself where there is no norm.
const float* norm_heads(const Dims& dims, const float* x, const float* weight, int heads, std::vector<float>& spare) {
  if (!weight) return x;
  const NormParts parts(dims, heads);
  spare.assign(size_t(parts.count) * parts.cols + 2 * parts.room, 0.0f);
  float *y = spare.data(), *part = y + parts.count * parts.cols + parts.room;  // one part with zeros behind it
  for (int i = 0; i < parts.count; i++) {
    std::memcpy(part, x + i * parts.cols, size_t(parts.cols) * sizeof(float));
    kernels().rms_norm(part, weight, parts.cols, dims.eps, y + i * parts.cols);  // the next part overwrites the padding
  }
  return y;
}

// In place: the gradient of every row's norm_heads becomes that of x.
void norm_heads_backward(const Dims& dims, const float* x, const float* weight, int rows, int heads, int stride, float* d) {
  const NormParts parts(dims, heads);
  for_rows(rows, 8, [&](int first, int last) {
    std::vector<float> spare(size_t(3) * parts.room);
    float *own = spare.data(), *dy = own + parts.room, *dx = dy + parts.room;
    const size_t bytes = size_t(parts.cols) * sizeof(float);
    for (int m = first; m < last; m++)
      for (int i = 0; i < parts.count; i++) {
        const size_t at = size_t(m) * stride + size_t(i) * parts.cols;
        std::memcpy(own, x + at, bytes);
        std::memcpy(dy, d + at, bytes);
        std::fill(dx, dx + parts.room, 0.0f);
        kernels().rms_norm_backward(own, weight, dy, parts.cols, dims.eps, dx);
        std::memcpy(d + at, dx, bytes);
      }
  });
}

// q and k of one row, [heads * head_dim] -> [heads][head_stride]: normed, rotated by its position, the scores' scale in q.
void turn_row(const Heads& h, int position, const float* q, const float* k, float* q_to, float* k_to, std::vector<float>& spare) {
  const int dim = h.dims.head_dim, stride = h.dims.head_stride();
  q = norm_heads(h.dims, q, h.own.q_norm, h.own.heads, spare);
  for (int i = 0; i < h.own.heads; i++) rotate(h, q + i * dim, position, 1, h.dims.score_scale, q_to + i * stride);
  k = norm_heads(h.dims, k, h.own.k_norm, h.own.kv_heads, spare);
  for (int i = 0; i < h.own.kv_heads; i++) rotate(h, k + i * dim, position, 1, 1, k_to + i * stride);
}

// The scales behind a page's int8 keys or values.
float* scales_of(uint8_t* page, int dim) { return reinterpret_cast<float*>(page + size_t(kPageTokens) * dim); }

void write_key(const KvCache& cache, const float* key, int dim, uint8_t* page, int slot) {
  const int block = slot / 16, lane = slot % 16;
  if (cache.type() == KvType::f32) {
    float* to = reinterpret_cast<float*>(page) + size_t(block) * 16 * dim;
    for (int d = 0; d < dim; d++) to[16 * d + lane] = key[d];
  } else if (cache.type() == KvType::int8) {
    int8_t* to = reinterpret_cast<int8_t*>(page) + size_t(block) * 16 * dim;
    int8_t low[kMostHeadDim];
    scales_of(page, dim)[slot] = kernels().to_int8(key, dim, low);
    for (int d = 0; d < dim; d++) to[16 * d + lane] = low[d];
  } else {
    bf16* to = reinterpret_cast<bf16*>(page) + size_t(block) * 16 * dim;
    bf16 low[kMostHeadDim];
    kernels().to_bf16(key, dim, low);
    for (int d = 0; d < dim; d += 2) {
      to[16 * d + 2 * lane] = low[d];
      to[16 * d + 2 * lane + 1] = low[d + 1];
    }
  }
}

void write_value(const KvCache& cache, const float* value, int dim, uint8_t* page, int slot) {
  if (cache.type() == KvType::f32)
    std::memcpy(reinterpret_cast<float*>(page) + size_t(slot) * dim, value, size_t(dim) * sizeof(float));
  else if (cache.type() == KvType::int8)
    scales_of(page, dim)[slot] = kernels().to_int8(value, dim, reinterpret_cast<int8_t*>(page) + size_t(slot) * dim);
  else
    kernels().to_bf16(value, dim, reinterpret_cast<bf16*>(page) + size_t(slot) * dim);
}

// Turns q and k, puts the rows' keys and values into the cache.
void place(Engine& engine, const Batch& batch, const KvCache& cache, int cache_layer, const Heads& h) {
  const int dim = h.dims.head_dim, stride = h.dims.head_stride();
  float *q = engine.attn_q.data<float>(), *k = engine.attn_k.data<float>(), *v = engine.attn_v.data<float>();
  auto place_row = [&](const Segment& s, int row, std::vector<float>& spare) {
    const size_t m = size_t(row);
    const int position = s.position + row - s.row, page = s.pages[position / kPageTokens], slot = position % kPageTokens;
    turn_row(h, position, engine.q.data<float>() + m * h.q, engine.k.data<float>() + m * h.kv, q + m * h.heads_q,
             k + m * h.heads_kv, spare);
    for (int head = 0; head < h.own.kv_heads; head++) {
      float *key = k + m * h.heads_kv + head * stride, *value = v + m * h.heads_kv + head * stride;
      std::memcpy(value, engine.v.data<float>() + m * h.kv + head * dim, size_t(dim) * sizeof(float));
      write_key(cache, key, stride, cache.keys(page, cache_layer, head), slot);
      write_value(cache, value, stride, cache.values(page, cache_layer, head), slot);
    }
  };
  for_rows(batch.rows, 8, [&](int first, int last) {
    std::vector<float> spare;
    for (const Segment& s : batch.segments)
      for (int row = std::max(first, s.row); row < std::min(last, s.row + s.count); row++) place_row(s, row, spare);
  });
  // Whole pages of a shared prefix are shared; each segment has a copy of what the prefix puts into its first own page.
  for (size_t i = 1; batch.prefix && i < batch.segments.size(); i++)
    for (int position = batch.prefix / kPageTokens * kPageTokens; position < batch.prefix; position++)
      for (int head = 0; head < h.own.kv_heads; head++) {
        const size_t at = size_t(position) * h.heads_kv + size_t(head) * stride;
        const int page = batch.segments[i].pages[position / kPageTokens], slot = position % kPageTokens;
        write_key(cache, k + at, stride, cache.keys(page, cache_layer, head), slot);
        write_value(cache, v + at, stride, cache.values(page, cache_layer, head), slot);
      }
}

// Rows of one segment that attend together, with one kv head.
struct AttendTask {
  const Segment* segment;
  int first, count, kv_head;

  int keys() const { return segment->position + first + count; }
  int pages() const { return (keys() + kPageTokens - 1) / kPageTokens; }
  // Memory in floats: scores, then, in whole cache lines, the addresses of the pages' keys and values.
  size_t scores(int group) const { return (attend_scratch(count, group, keys()) + 15) / 16 * 16; }
  size_t room(int group) const { return scores(group) + (size_t(4 * pages()) + 15) / 16 * 16; }
};

AttendArgs attend_args(Engine& engine, const AttendTask& t, const KvCache& cache, int cache_layer, const Heads& h, float* lse,
                       float* memory) {
  const int pages = t.pages(), head = t.kv_head * h.group;
  const uint8_t** k = reinterpret_cast<const uint8_t**>(memory + t.scores(h.group));
  const uint8_t** v = k + pages;
  for (int p = 0; p < pages; p++) {
    k[p] = cache.keys(t.segment->pages[p], cache_layer, t.kv_head);
    v[p] = cache.values(t.segment->pages[p], cache_layer, t.kv_head);
  }
  const int stride = h.dims.head_stride();
  const size_t row = size_t(t.segment->row + t.first), offset = row * h.heads_q + size_t(head) * stride;
  AttendArgs a;
  a.q = engine.attn_q.data<float>() + offset;
  a.rows = t.count;
  a.heads = h.group;
  a.dim = stride;
  a.q_stride = h.heads_q;
  a.first_position = t.segment->position + t.first;
  a.window = h.own.window;
  a.cap = h.dims.score_cap;
  a.k = k;
  a.v = v;
  a.out = engine.mixed.data<float>() + offset;
  a.lse = lse ? lse + row * h.own.heads + head : nullptr;
  a.lse_stride = h.own.heads;
  a.scratch = memory;
  return a;
}

using AttendKernel = void (*)(const AttendArgs&);

// One step of attention for all tasks, each cut into pieces of `piece` of what `extent` says.
template <class Extent>
void attend_part(const std::vector<AttendArgs>& tasks, AttendKernel attend, AttendPart part, int piece, Extent extent) {
  std::vector<AttendArgs> pieces;
  for (AttendArgs a : tasks)
    for (a.part = part, a.begin = 0; a.begin < extent(a); a.begin += piece) {
      a.end = std::min(a.begin + piece, extent(a));
      pieces.push_back(a);
    }
  parallel_for(int(pieces.size()), [&](int index, int) { attend(pieces[size_t(index)]); });
}

// A few rows that see many keys: threads share the keys, then the rows, then the dimensions, because kv heads alone are few and
// not always a multiple of the threads.
void attend_long(const std::vector<AttendArgs>& tasks, AttendKernel attend) {
  constexpr int kKeys = 512, kDimensions = 32;  // 512 keys of 64 bf16 are 64 KB; 32 values of bf16 are a cache line
  attend_part(tasks, attend, AttendPart::scores, kKeys,
              [](const AttendArgs& a) { return round_up(a.first_position + a.rows, 16); });
  attend_part(tasks, attend, AttendPart::weights, 1, [](const AttendArgs& a) { return a.rows * a.heads; });
  attend_part(tasks, attend, AttendPart::values, kDimensions, [](const AttendArgs& a) { return a.dim; });
}

void attend_all(Engine& engine, const Batch& batch, const KvCache& cache, int cache_layer, const Heads& h, float* lse) {
  const Timed timed("attention");
  constexpr int kRows = 16, kLong = 1024;  // rows a task; keys from which on a step is worth three parallel regions
  std::vector<AttendTask> tasks;
  int furthest = 0;
  size_t room = 0;
  for (const Segment& s : batch.segments)
    for (int first = 0; first < s.count; first += kRows)
      for (int head = 0; head < h.own.kv_heads; head++) {
        tasks.push_back({&s, first, std::min(s.count - first, kRows), head});
        furthest = std::max(furthest, tasks.back().keys());
        room += tasks.back().room(h.group);
      }
  const Kernels& level = kernels();
  const AttendKernel attend = cache.type() == KvType::f32    ? level.attend_f32
                              : cache.type() == KvType::int8 ? level.attend_int8
                                                             : level.attend_bf16;
  if (threads() > 1 && furthest >= kLong && int(tasks.size()) < 4 * threads()) {
    std::vector<AttendArgs> all;
    float* memory = engine.scores.get<float>(room);
    for (const AttendTask& t : tasks) {
      all.push_back(attend_args(engine, t, cache, cache_layer, h, lse, memory));
      memory += t.room(h.group);
    }
    return attend_long(all, attend);
  }
  parallel_for(int(tasks.size()), [&](int index, int thread) {
    const AttendTask& t = tasks[size_t(index)];
    float* memory = engine.thread_scratch[size_t(thread)].get<float>(t.room(h.group));
    attend(attend_args(engine, t, cache, cache_layer, h, lse, memory));
  });
}

// One row: [heads][head_stride] -> [padded heads * head_dim]
void flatten(const Heads& h, const float* from, float* to) {
  const int dim = h.dims.head_dim, stride = h.dims.head_stride(), used = h.own.heads * dim;
  for (int i = 0; i < h.own.heads; i++) std::memcpy(to + i * dim, from + i * stride, size_t(dim) * sizeof(float));
  std::fill(to + used, to + h.q, 0.0f);
}

// The other way, of all rows; `from` itself where heads have no padding.
const float* spread(const Heads& h, const float* from, int rows, Buffer& into) {
  const int dim = h.dims.head_dim, stride = h.dims.head_stride();
  if (dim == stride && h.q == h.heads_q) return from;
  float* to = into.get<float>(size_t(rows) * h.heads_q);
  for_rows(rows, 32, [&](int first, int last) {
    for (int m = first; m < last; m++)
      for (int i = 0; i < h.own.heads; i++)
        std::memcpy(to + size_t(m) * h.heads_q + i * stride, from + size_t(m) * h.q + i * dim, size_t(dim) * sizeof(float));
  });
  return to;
}

// What the tape and the output product give to attention's backward; widths as in `Heads`.
struct AttentionGradients {
  const float *q, *k, *v, *mixed, *d_mixed, *lse;
};

// Gradients of one row's key and value, in the cache's layout, become those of the products: the rotation is undone.
void put_key_value(Engine& engine, const Heads& h, int row, int position, int kv_head, const float* dk, const float* dv) {
  const size_t at = size_t(row) * h.kv + size_t(kv_head) * h.dims.head_dim;
  rotate(h, dk, position, -1, 1, engine.dk.data<float>() + at);
  std::memcpy(engine.dv.data<float>() + at, dv, size_t(h.dims.head_dim) * sizeof(float));
}

// dq, dk, dv of one segment and kv head. `shared` takes what it adds to the keys and values of a shared prefix,
// [prefix][dim] of each; for the prefix itself that is all of it.
void backward_task(Engine& engine, Mode mode, const Batch& batch, int index, int kv_head, const Heads& h,
                   const AttentionGradients& g, float* shared, int thread) {
  const Segment& s = batch.segments[size_t(index)];
  const int before = index ? batch.prefix : 0, key_count = before + s.count;
  const int dim = h.dims.head_stride(), keys = round_up(key_count, 16), group = h.group;
  const size_t rows = size_t(keys) * dim;
  float* own = engine.thread_scratch[thread].get<float>(4 * rows + size_t(attend_backward_scratch(key_count, group, dim)));
  float *k_rows = own, *v_rows = own + rows, *dk = own + 2 * rows, *dv = own + 3 * rows;
  std::memset(dk, 0, 2 * rows * sizeof(float));
  for (int i = 0; i < key_count; i++) {
    const int row = i < before ? i : s.row + i - before;
    const size_t at = size_t(row) * h.heads_kv + size_t(kv_head) * dim;
    std::memcpy(k_rows + size_t(i) * dim, g.k + at, size_t(dim) * sizeof(float));
    std::memcpy(v_rows + size_t(i) * dim, g.v + at, size_t(dim) * sizeof(float));
  }
  const size_t offset = size_t(s.row) * h.heads_q + size_t(kv_head) * group * dim;
  AttendBackwardArgs a;
  a.q = g.q + offset;
  a.out = g.mixed + offset;
  a.d_out = g.d_mixed + offset;
  a.k = k_rows;
  a.v = v_rows;
  a.lse = g.lse + size_t(s.row) * h.own.heads + size_t(kv_head) * group;
  a.count = s.count;
  a.before = before;
  a.heads = group;
  a.dim = dim;
  a.q_stride = h.heads_q;
  a.lse_stride = h.own.heads;
  a.window = h.own.window;
  a.scale = h.dims.score_scale;
  a.cap = h.dims.score_cap;
  a.dq = engine.mixed.data<float>() + offset;
  a.dk = dk;
  a.dv = dv;
  a.scratch = own + 4 * rows;
  (mode == Mode::bf16 ? kernels().attend_backward_bf16 : kernels().attend_backward)(a);
  for (int i = 0; i < s.count; i++) {
    const size_t m = size_t(s.row + i);
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++)
      rotate(h, engine.mixed.data<float>() + m * h.heads_q + size_t(head) * dim, s.position + i, -1, 1,
             engine.dq.data<float>() + m * h.q + head * h.dims.head_dim);
  }
  if (batch.prefix) {
    std::memcpy(shared, dk, size_t(batch.prefix) * dim * sizeof(float));
    std::memcpy(shared + size_t(batch.prefix) * dim, dv, size_t(batch.prefix) * dim * sizeof(float));
  }
  for (int i = batch.prefix && !index ? s.count : 0; i < s.count; i++)
    put_key_value(engine, h, s.row + i, s.position + i, kv_head, dk + size_t(before + i) * dim, dv + size_t(before + i) * dim);
}

// Adds up, in order of segments, what all of them gave to the keys and values of the shared prefix.
void gather_shared(Engine& engine, const Batch& batch, const Heads& h, float* shared, size_t block) {
  const int kv_heads = h.own.kv_heads, dim = h.dims.head_stride();
  parallel_for(kv_heads, [&](int head, int) {
    float* sum = shared + size_t(head) * block;
    for (size_t i = 1; i < batch.segments.size(); i++)
      kernels().axpy(shared + (i * size_t(kv_heads) + size_t(head)) * block, 1, int(block), sum);
    for (int i = 0; i < batch.prefix; i++)
      put_key_value(engine, h, i, i, head, sum + size_t(i) * dim, sum + size_t(batch.prefix + i) * dim);
  });
}

// Gradients of the products q, k and v, in engine.dq, dk and dv, from that of the attended values.
void attend_all_backward(Engine& engine, Mode mode, const Batch& batch, const Heads& h, const LayerTape& tape, const float* flat,
                         const float* d_flat) {
  const Timed timed("attention: backward");
  const Layer& own = h.own;
  const size_t rows = size_t(batch.rows);
  const float *mixed = spread(h, flat, batch.rows, engine.attn_q), *d_mixed = spread(h, d_flat, batch.rows, engine.attn_k);
  const bool norms = own.q_norm;
  const float* kept_q = load_rows(mode, tape.q, rows * (norms ? h.q : h.heads_q), engine.q);
  const float* kept_k = load_rows(mode, tape.k, rows * (norms ? h.kv : h.heads_kv), engine.k);
  const float *q = kept_q, *k = kept_k, *v = load_rows(mode, tape.v, rows * h.heads_kv, engine.v);
  if (norms) {
    float *q_to = engine.turned_q.get<float>(rows * h.heads_q), *k_to = engine.turned_k.get<float>(rows * h.heads_kv);
    for (const Segment& s : batch.segments)
      for_rows(s.count, 16, [&](int first, int last) {
        std::vector<float> spare;
        for (size_t m = size_t(s.row + first); m < size_t(s.row + last); m++)
          turn_row(h, s.position + int(m) - s.row, kept_q + m * h.q, kept_k + m * h.kv, q_to + m * h.heads_q,
                   k_to + m * h.heads_kv, spare);
      });
    q = q_to, k = k_to;
  }
  engine.mixed.get<float>(rows * h.heads_q);
  float *dq = engine.dq.get<float>(rows * h.q), *dk = engine.dk.get<float>(rows * h.kv), *dv = engine.dv.get<float>(rows * h.kv);
  const int segments = int(batch.segments.size());
  const size_t block = size_t(2) * batch.prefix * h.dims.head_stride();
  float* shared = engine.shared.get<float>(size_t(segments) * own.kv_heads * block + 1);
  const AttentionGradients gradients{q, k, v, mixed, d_mixed, tape.lse.data<float>()};
  parallel_for(segments * own.kv_heads, [&](int task, int thread) {
    backward_task(engine, mode, batch, task / own.kv_heads, task % own.kv_heads, h, gradients, shared + size_t(task) * block,
                  thread);
  });
  if (batch.prefix) gather_shared(engine, batch, h, shared, block);
  if (norms) {
    norm_heads_backward(h.dims, kept_q, own.q_norm, batch.rows, own.heads, h.q, dq);
    norm_heads_backward(h.dims, kept_k, own.k_norm, batch.rows, own.kv_heads, h.kv, dk);
  }
  clear_padding(dq, batch.rows, own.heads * h.dims.head_dim, h.q);
  for (float* d : {dk, dv}) clear_padding(d, batch.rows, own.kv_heads * h.dims.head_dim, h.kv);
}

}  // namespace

void attention_forward(Engine& engine, int layer, Mode mode, float* x, const Batch& batch, const KvCache& cache, int cache_layer,
                       LayerTape* tape) {
  const Heads h(engine, layer, batch);
  const Layer& own = h.own;
  const size_t rows = size_t(batch.rows);
  const Rows kept = tape ? rows_on_tape(mode, batch.rows, h.d, tape->x) : Rows{};
  const Activations input =
      prepare_normed(engine, mode, engine.digits[0], rows_of(x, h.d), own.attn_norm, own.attn_norm_bias, batch.rows, kept);
  const LinearJob jobs[] = {
      {&own.w[kQ], kQ, engine.q.get<float>(rows * h.q), h.q, false, tape ? &tape->u[kQ] : nullptr, own.bias[kQ]},
      {&own.w[kK], kK, engine.k.get<float>(rows * h.kv), h.kv, false, tape ? &tape->u[kK] : nullptr, own.bias[kK]},
      {&own.w[kV], kV, engine.v.get<float>(rows * h.kv), h.kv, false, tape ? &tape->u[kV] : nullptr, own.bias[kV]},
  };
  linear(engine, input, jobs, 3, batch, layer);
  engine.attn_q.get<float>(rows * h.heads_q);
  engine.attn_k.get<float>(rows * h.heads_kv);
  engine.attn_v.get<float>(rows * h.heads_kv);
  engine.mixed.get<float>(rows * h.heads_q);
  {
    const Timed timed("rotation and cache");
    place(engine, batch, cache, cache_layer, h);
  }
  attend_all(engine, batch, cache, cache_layer, h, tape ? tape->lse.get<float>(rows * own.heads) : nullptr);
  const Rows flat = rows_for_products(mode, batch.rows, h.q, engine.mixed_flat, engine.normed_low),
             kept_flat = tape ? rows_on_tape(mode, batch.rows, h.q, tape->mixed) : Rows{};
  const Activations mixed = room_for(mode, engine.digits[1], flat, batch.rows, engine.q8, engine.blocks);
  for_each_row(engine, batch.rows, size_t(h.q), [&](int m, float* scratch) {
    float* row = flat.begin(m, scratch);
    flatten(h, engine.mixed.data<float>() + size_t(m) * h.heads_q, row);
    flat.end(m, row);
    kept_flat.put(m, row);
    quantize_row(mixed, m, 0, h.q);
  });
  if (tape) {
    const bool norms = own.q_norm;
    save_rows(mode, (norms ? engine.q : engine.attn_q).data<float>(), rows * (norms ? h.q : h.heads_q), tape->q);
    save_rows(mode, (norms ? engine.k : engine.attn_k).data<float>(), rows * (norms ? h.kv : h.heads_kv), tape->k);
    save_rows(mode, engine.attn_v.data<float>(), rows * h.heads_kv, tape->v);
  }
  const Branch branch = branch_of(engine, own.attn_post_norm, x, batch.rows);
  const LinearJob out[] = {{&own.w[kO], kO, branch.to, h.d, branch.direct, tape ? &tape->u[kO] : nullptr, own.bias[kO]}};
  linear(engine, mixed, out, 1, batch, layer);
  join(engine, mode, branch, own.attn_post_norm, batch.rows, x, tape ? &tape->attn_branch : nullptr);
}

void attention_backward(Engine& engine, int layer, Mode mode, float* dx, const Batch& batch, const LayerTape& tape,
                        bool need_dx) {
  const Heads h(engine, layer, batch);
  const Layer& own = h.own;
  const size_t rows = size_t(batch.rows);
  // through the output product and the attention itself
  const float* d_branch = branch_backward(engine, mode, own.attn_post_norm, tape.attn_branch, batch.rows, dx);
  const float* flat = load_rows(mode, tape.mixed, rows * h.q, engine.mixed_flat);
  const Activations mixed{mode, batch.rows, h.q, 0, flat, tape.mixed.data<bf16>(), nullptr, nullptr};
  const LinearBackwardJob out[] = {{&own.w[kO], kO, d_branch, h.d, tape.u[kO].data<float>()}};
  float* d_flat = engine.dmixed.get<float>(rows * h.q);
  linear_backward(engine, mixed, out, 1, batch, layer, d_flat, h.q);
  attend_all_backward(engine, mode, batch, h, tape, flat, d_flat);
  // through the input products and the norm
  const Rows x = rows_on_tape(mode, h.d, tape.x);
  const Activations input = prepare_normed(engine, mode, 0, x, own.attn_norm, own.attn_norm_bias, batch.rows);
  const LinearBackwardJob jobs[] = {
      {&own.w[kQ], kQ, engine.dq.data<float>(), h.q, tape.u[kQ].data<float>()},
      {&own.w[kK], kK, engine.dk.data<float>(), h.kv, tape.u[kK].data<float>()},
      {&own.w[kV], kV, engine.dv.data<float>(), h.kv, tape.u[kV].data<float>()},
  };
  float* dh = need_dx ? engine.dx.get<float>(rows * h.d) : nullptr;
  linear_backward(engine, input, jobs, 3, batch, layer, dh, h.d);
  if (need_dx) normed_backward(engine, x, own.attn_norm, dh, batch.rows, dx);
}

}  // namespace nomoat
