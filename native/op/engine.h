#pragma once
// What the ops share: a model's weights and dimensions, the rows of one step, the tape of a training step, scratch memory.
//
// Dimension letters: M rows, D width, H query heads, K kv heads, d head dimension (padded to 16 inside attention), F ffn width,
// V vocabulary, R adapter rank. Row strides are rounded up to 32 elements and the padding is zero.

#include <array>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "base/buffer.h"
#include "base/threads.h"
#include "kernel/table.h"

namespace nomoat {

enum class Mode : int { int8, bf16, f32 };  // activations of the products with weights

enum Target { kQ, kK, kV, kO, kGate, kUp, kDown, kSharedGate, kSharedUp, kSharedDown, kTargets };

inline int padded(int n) { return round_up(n, 32); }

enum class QkNorm : int { none, head, row };  // over the d values of a head, or over all heads of a row

// What all layers have in common.
struct Dims {
  int layers, width, head_dim, vocab, context;
  float eps, score_scale;
  float score_cap = 0, logit_cap = 0;  // 0 = none
  float logit_scale = 1, embed_scale = 1, residual_scale = 1;
  bool layer_norm = false, gelu = false, gated = true;
  QkNorm qk_norm = QkNorm::none;

  int head_stride() const { return round_up(head_dim, 16); }
};

// y += sum_r scale[r] * bt[r, :] * (a[r, :] . x): adapters of one linear, stacked by rank. Gradients accumulate into da and dbt
// [rank - trained, ...] for the ranks from `trained` on; null when nothing is trained. Adapters of experts lie side by side in
// each rank, [rank][experts][K]: so the trained ranks are one piece of memory for them too.
struct Lora {
  const float *a = nullptr, *bt = nullptr, *scale = nullptr;
  const bf16 *a_low = nullptr, *bt_low = nullptr;  // both rounded, for inference: see rounded.h. Null: not there
  float *da = nullptr, *dbt = nullptr;
  int rank = 0, trained = 0;
  int lda = 0, ldb = 0;  // from one rank to the next, of a and da, of bt and dbt

  // The adapter of one expert, whose weight has these rows and columns.
  Lora expert(int index, int rows, int cols) const {
    Lora one = *this;
    one.a += size_t(index) * size_t(cols), one.bt += size_t(index) * size_t(rows);
    if (a_low) one.a_low += size_t(index) * size_t(cols) * kLoraRanks, one.bt_low += size_t(index) * size_t(rows) * size_t(rank);
    if (da) one.da += size_t(index) * size_t(cols), one.dbt += size_t(index) * size_t(rows);
    return one;
  }
};

using LoraSet = std::vector<std::array<Lora, kTargets>>;  // [layer][target]

// A run of consecutive rows that belong to one sequence.
struct Segment {
  int row, count, position;
  const int32_t* pages;  // page table of the sequence, for positions [0, position + count)
  const LoraSet* lora;   // null = base model
};

// With `prefix`, the first segment is the beginning of all others: it has `prefix` rows, and they start at that position.
struct Batch {
  int rows = 0, prefix = 0;
  std::vector<Segment> segments;
  std::vector<int32_t> page_tables;
  std::optional<std::vector<int32_t>> read;  // rows of x, ascending, that are read after the last layer; none = all
  const LoraSet* lora() const { return segments.empty() ? nullptr : segments[0].lora; }
};

enum class KvType : int { bf16, f32, int8 };  // int8: each key and value has a scale of its own

// Paged keys and values. One page holds kPageTokens positions of every layer: per layer and kv head, keys then values.
class KvCache {
 public:
  KvCache(const Dims& dims, const std::vector<int>& kv_heads, KvType type);  // one count a layer
  KvCache(KvCache&&) = default;
  void reserve(int pages);
  size_t page_bytes() const { return begins_.back(); }
  int pages() const { return int(pages_.size()); }
  KvType type() const { return type_; }
  bool holds(int layer, int kv_heads) const {
    return layer + 1 < int(begins_.size()) && size_t(kv_heads) * head_bytes_ <= begins_[layer + 1] - begins_[layer];
  }

  uint8_t* keys(int page, int layer, int head) const { return pages_[page] + begins_[layer] + head * head_bytes_; }
  uint8_t* values(int page, int layer, int head) const { return keys(page, layer, head) + head_bytes_ / 2; }

 private:
  size_t head_bytes_;
  std::vector<size_t> begins_;  // bytes of a page before each layer, then of the whole page
  KvType type_;
  std::vector<uint8_t*> pages_;
  // What they lie in, up to 8 MB each: in memory pages of 4 KB, an address would be looked up for every 64 lines that are read.
  std::vector<Buffer> slabs_;
};

// What backward needs of one layer; what the model has no use for stays empty. Element type: bf16 or float by mode.
struct LayerTape {
  Buffer x, q, k, v, mixed, lse, middle, gate, up;  // q and k: rotated and scaled; before their norms where they have norms
  Buffer attn_branch, mlp_branch;                   // before their post-norms
  Buffer routing, chosen;                           // of experts: op/moe.cc; gate and up then have a row for each pair
  Buffer shared_gate, shared_up, shared_weight;     // of the shared expert
  std::array<Buffer, kTargets> u;                   // rank-r intermediates, float32
};

struct Layer {
  int heads = 0, kv_heads = 0, ffn = 0;
  int window = 0;   // keys that a row sees; 0 = all
  int rope = 0;     // which of the engine's rotations; -1 = none
  int experts = 0;  // 0 = one dense MLP
  int shared = 0;   // width of the expert that every row goes through; 0 = none
  // With experts, gate, up and down hold all of them, one below the other: [experts * N][K].
  std::array<Matrix, kTargets> w;
  Matrix router;                              // [experts][D]
  std::array<const float*, kTargets> bias{};  // null = none
  const float *attn_norm = nullptr, *attn_norm_bias = nullptr, *attn_post_norm = nullptr;
  const float *mlp_norm = nullptr, *mlp_norm_bias = nullptr, *mlp_post_norm = nullptr;
  const float *q_norm = nullptr, *k_norm = nullptr;
  const float* shared_router = nullptr;  // [D]

  // The first targets, which the layer may have.
  int targets() const { return shared ? kTargets : kSharedGate; }

  // One expert's weight as a matrix of its own: its rows are a multiple of a strip's.
  Matrix expert(Target target, int index) const {
    Matrix one = w[target];
    one.rows /= experts;
    one.data += size_t(index) * size_t(one.rows / kStripRows) * one.strip_bytes;
    return one;
  }
};

// Rows and columns of a target's weight; with experts, of all of them one below the other.
inline std::pair<int, int> linear_shape(const Dims& dims, const Layer& layer, int target) {
  const int experts = layer.experts ? layer.experts : 1, q = layer.heads * dims.head_dim, kv = layer.kv_heads * dims.head_dim;
  const int wide = dims.width, ffn = experts * layer.ffn, shared = layer.shared;
  const int rows[] = {q, kv, kv, wide, ffn, ffn, experts * wide, shared, shared, shared ? wide : 0};
  const int cols[] = {wide, wide, wide, q, wide, wide, layer.ffn, wide, wide, shared};
  return {rows[target], cols[target]};
}

// A rotation of pairs (2i, 2i + 1) or (i, i + pairs), with its angles per position.
struct Rope {
  bool interleaved = false;
  float magnitude = 1;
  std::vector<float> inv_freq;

  int pairs() const { return int(inv_freq.size()); }
  // cosines, then sines of positions [0, n), grown on demand: [n][2][pairs]
  const float* table(int positions);

 private:
  std::vector<float> table_;
};

struct Engine {
  explicit Engine(const Dims& d) : dims(d), layers(size_t(d.layers)) {}
  Engine(Engine&&) = default;

  Dims dims;
  std::vector<Layer> layers;
  std::vector<Rope> ropes;
  Rope no_rope;
  Matrix embed, head;
  const float *final_norm = nullptr, *final_norm_bias = nullptr;
  int experts_used = 0;     // of every layer that has experts
  bool expert_norm = true;  // the weights of the experts used are divided by their sum
  // int8 digits of the activations that enter each product in inference: qkv, o, gate and up, down, head. Two bring the logits to
  // those of float32 and take twice the instructions; those of the MLP are three quarters of all, and get one, as does o, where
  // the second would be hardly seen. What each costs: docs/concepts/precision.md.
  std::array<int, 5> digits = {2, 1, 1, 1, 2};

  Rope& rope_of(const Layer& layer) { return layer.rope < 0 ? no_rope : ropes[size_t(layer.rope)]; }

  // scratch, grown on demand; names say who uses them
  Buffer normed, normed_low, blocks, q8, q, k, v, attn_q, attn_k, attn_v, scores, mixed, mixed_flat, gate, up, act, act_low, du,
      logits, lse, dy_low, dx, dgate, dup, dmixed, dq, dk, dv, head_x, head_dx, x_wide, shared, turned_q, turned_k, branch,
      d_branch, hidden, routing, chosen, few, pair_x, pair_dy, pair_low, pair_q, pair_blocks, pair_out, d_routing, shared_weight;
  std::array<Buffer, kTargets> target_u;
  std::vector<Buffer> thread_scratch = std::vector<Buffer>(256);
};

// A training step. Layers that are not kept store their float32 input and are run again before their backward.
struct Tape {
  std::vector<LayerTape> kept;  // by layer; empty buffers where not kept
  std::vector<Buffer> inputs;   // by layer, float32 [M][D], where not kept
  std::vector<char> keep;
  LayerTape again;  // the layer that is being run again
  KvCache scratch;  // keys and values of one layer, of the one with most heads

  Tape(const Engine& engine, Mode mode);
  Tape(Tape&&) = default;
};

// ---- op/linear.cc ----

// Rows prepared for products in one mode; `cols` is padded to 32.
// From one row of bf16 to the next: rows a multiple of 1 KB apart would share few sets of a cache, and evict each other.
constexpr int low_stride(int cols) { return cols % 512 ? cols : cols + 64; }

struct Activations {
  Mode mode;
  int rows, cols, digits;
  const float* f32;  // [rows][cols]
  const bf16* low;   // rows low_ld apart
  int8_t* q;
  ActBlock* blocks;
  int low_ld = cols;

  // `count` rows from `row` on.
  Activations part(int row, int count) const {
    Activations x = *this;
    const size_t at = size_t(row) * size_t(cols);
    x.rows = count;
    if (f32) x.f32 += at;
    if (low) x.low += size_t(row) * size_t(low_ld);
    if (q) x.q += at * size_t(code_bytes(digits));
    if (blocks) x.blocks += at / kTileCols;
    return x;
  }
};

// Rows that are computed one after the other and kept as float32 or as bf16, `ld` apart.
struct Rows {
  float* f32;
  bf16* low;
  int cols, ld;

  // Columns [first, first + count).
  Rows part(int first, int count) const { return {f32 ? f32 + first : nullptr, low ? low + first : nullptr, count, ld}; }
  // Where row m is computed: `scratch` if it is then converted.
  float* begin(int m, float* scratch) const { return f32 ? f32 + size_t(m) * size_t(ld) : scratch; }
  void end(int m, const float* row) const {
    if (low) kernels().to_bf16(row, cols, low + size_t(m) * size_t(ld));
  }
  void put(int m, const float* row) const {
    if (f32) std::memcpy(begin(m, nullptr), row, size_t(cols) * sizeof(float));
    end(m, row);
  }
  const float* read(int m, float* scratch) const {
    if (low) kernels().to_f32(low + size_t(m) * size_t(ld), cols, scratch);
    return begin(m, scratch);
  }
};

// Converts x[rows][cols] (stride cols) as the mode asks: into `low` (bf16, if the level has dots of it) or `q` + `blocks`: int8
// of one or two digits, and for bf16 on the other levels always two, which are exacter and faster than float32 panels. With 0
// digits, as backward takes x, there are none.
Activations prepare(Mode mode, int digits, const float* x, int rows, int cols, Buffer& low, Buffer& q, Buffer& blocks);
// The same of rows_for_products.
Activations prepare(Mode mode, int digits, const Rows& x, int rows, Buffer& q, Buffer& blocks);
// The same in two steps, for rows that are still to be computed: room for all, then what the mode asks for of each row as soon as
// its columns [first, first + count) are there, multiples of kTileCols.
Activations room_for(Mode mode, int digits, const Rows& x, int rows, Buffer& q, Buffer& blocks);
void quantize_row(const Activations& x, int row, int first, int count);

struct LinearJob {
  const Matrix* w;
  int target;  // which adapters apply; kTargets = none
  float* y;    // [rows][ldy]
  int ldy;
  bool add;                     // y += instead of y =
  Buffer* u;                    // where the tape keeps the rank-r intermediate; null = scratch
  const float* bias = nullptr;  // [rows of w, padded to 32]; null = none
  int row = 0, rows = 0;        // rows of x (and of the batch) that it takes and where they begin; 0 = all. Only without bias
};

// y = W x + adapters + bias, for jobs that share their input. Columns of y beyond the rows of W become zero.
void linear(Engine& engine, const Activations& x, const LinearJob* jobs, int count, const Batch& batch, int layer);

struct LinearBackwardJob {
  const Matrix* w;
  int target;
  const float* dy;  // [rows][ldy], padding zero
  int ldy;
  const float* u;  // from the tape; null without adapters
  // dy as bf16, where it is there already, with its own stride; then dy is null. Only where low_products
  const bf16* dy_low = nullptr;
};

// Whether products round their factors to bf16; where not, the mode says what the tape and the cache hold.
inline bool low_products(Mode mode) { return mode == Mode::bf16 && kernels().bf16_dots; }

// dx (+)= sum over jobs of dy W + adapters; accumulates da and dbt. `x` is the forward input. dx may be null (not needed).
void linear_backward(Engine& engine, const Activations& x, const LinearBackwardJob* jobs, int count, const Batch& batch,
                     int layer, float* dx, int ldx);

// ---- op/rows.cc ----

// Runs body(first, last) over row ranges, in parallel when there is enough work. Rows must be independent.
template <class Body>
void for_rows(int rows, int grain, Body&& body) {
  const int chunks = rows <= grain ? 1 : (rows + grain - 1) / grain;
  parallel_for(chunks, [&](int task, int) { body(task * grain, rows < (task + 1) * grain ? rows : (task + 1) * grain); });
}

// Runs body(row, scratch) for every row, with `floats` of the thread's scratch.
template <class Body>
void for_each_row(Engine& engine, int rows, size_t floats, Body&& body) {
  constexpr int grain = 8;
  parallel_for((rows + grain - 1) / grain, [&](int task, int thread) {
    float* scratch = engine.thread_scratch[size_t(thread)].get<float>(floats);
    for (int m = task * grain; m < std::min(rows, (task + 1) * grain); m++) body(m, scratch);
  });
}

// float32 rows, to be read.
inline Rows rows_of(const float* x, int cols) { return {const_cast<float*>(x), nullptr, cols, cols}; }
// What products take: bf16, in `low`, where they round their factors, or else float32, in `wide`, which may be the same buffer.
Rows rows_for_products(Mode mode, int rows, int cols, Buffer& wide, Buffer& low);
// What the tape keeps of them.
Rows rows_on_tape(Mode mode, int rows, int cols, Buffer& tape);
Rows rows_on_tape(Mode mode, int cols, const Buffer& tape);

// Zeroes columns [used, stride) of every row.
void clear_padding(float* x, int rows, int used, int stride);

// Saves float32 rows on the tape as bf16 or float, and reads them back.
void save_rows(Mode mode, const float* x, size_t count, Buffer& into);
const float* load_rows(Mode mode, const Buffer& saved, size_t count, Buffer& wide);

// ---- op/residual.cc: where a half layer meets the residual stream ----

// norm(x) of a row as the model has it; bias may be null. y may be x.
void norm_row(const Dims&, const float* x, const float* weight, const float* bias, float* y);
// dx += d norm(x)/dx applied to dy
void norm_row_backward(const Dims&, const float* x, const float* weight, const float* dy, float* dx);

// norm(x) of every row, in engine.normed; x itself where there is no norm (weight null).
const float* normed(Engine&, const float* x, const float* weight, const float* bias, int rows);
// The same as products take it; x is also put to `kept`.
Activations prepare_normed(Engine&, Mode mode, int digits, const Rows& x, const float* weight, const float* bias, int rows,
                           const Rows& kept = {});
// dx += the gradient of x, given that of normed(x).
void normed_backward(Engine&, const Rows& x, const float* weight, const float* dh, int rows, float* dx);

// x += residual_scale * [post_norm](branch). The branch is added into x by its last product (`direct`), or, where there is
// something to do to it first, written to `to` and added by `join`, which keeps it on the tape for a post-norm.
struct Branch {
  float* to;
  bool direct;
};
Branch branch_of(Engine&, const float* post_norm, float* x, int rows);
void join(Engine&, Mode, const Branch&, const float* post_norm, int rows, float* x, Buffer* tape);
// The gradient of the branch, given that of x after it; it may be dx itself.
const float* branch_backward(Engine&, Mode, const float* post_norm, const Buffer& tape, int rows, const float* dx);

// ---- blocks: forward and backward of one half layer; x and dx are the residual stream, float32 [M][padded D] ----

void attention_forward(Engine&, int layer, Mode, float* x, const Batch&, const KvCache&, int cache_layer, LayerTape*);
void attention_backward(Engine&, int layer, Mode, float* dx, const Batch&, const LayerTape&, bool need_dx);
void feed_forward(Engine&, int layer, Mode, float* x, const Batch&, LayerTape*);
void feed_forward_backward(Engine&, int layer, Mode, float* dx, const Batch&, const LayerTape&);
// what the two above are made of: one dense MLP, or experts where a layer has them
void mlp_forward(Engine&, int layer, Mode, float* x, const Batch&, LayerTape*);
void mlp_backward(Engine&, int layer, Mode, float* dx, const Batch&, const LayerTape&);
void moe_forward(Engine&, int layer, Mode, float* x, const Batch&, LayerTape*);
void moe_backward(Engine&, int layer, Mode, float* dx, const Batch&, const LayerTape&);

void embed_rows(Engine&, const int32_t* tokens, int rows, float* x);
// logits[i, :] = head(norm(x[rows[i]])), or of x[i] where rows is null, float32 [count][vocab padded to 32]
void head_logits(Engine&, Mode, const float* x, const int32_t* rows, int count, float* logits);
// logp[i] = log p(targets[i] | x[rows[i]]); when d_logp is given, dx[rows[i]] += d_logp[i] * d logp[i] / dx.
void head_logprobs(Engine&, Mode, const float* x, const int32_t* rows, const int32_t* targets, int count, float* logp,
                   const float* d_logp, float* dx);

// ---- op/sample.cc ----

struct Sampling {
  float temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  int top_k;
  uint64_t seed;

  bool penalizes() const { return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0; }
};

// Picks a token. `recent` are the tokens that the penalties look at; `step` numbers the draws of one seed. A logit that is NaN
// or +infinity is picked before all others.
int sample(const float* logits, int vocab, const Sampling& options, std::span<const int32_t> recent, uint64_t step);

}  // namespace nomoat
