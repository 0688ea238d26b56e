// The ops on a small random model: a tape that keeps layers or runs them again, threads, wide adapters, weights with NaN.

#include <cmath>
#include <memory>

#include "op/engine.h"
#include "test/test.h"

namespace nomoat {

namespace {

// Grouped heads, a head dimension that is padded, widths that end inside a strip or a panel where the format allows it.
Dims dims_of(Format format) {
  Dims d{};
  d.layers = 3;
  d.width = is_float(format) ? 56 : 64;
  d.head_dim = 24;
  d.vocab = 70;
  d.context = 256;
  d.eps = 1e-5f;
  d.score_scale = 1 / std::sqrt(24.0f);
  return d;
}

// What only some families of models have; each layer has another shape, window and rotation. Or experts in all layers but one.
enum class Kind { plain, head_norms, row_norms, experts };

bool enriched(Kind kind) { return kind == Kind::head_norms || kind == Kind::row_norms; }

struct Model {
  Engine engine;
  std::vector<std::unique_ptr<Weights>> weights;  // by layer and target, then the embedding, which is the head too
  Floats norm;
  std::vector<std::unique_ptr<Floats>> vectors;

  explicit Model(Format format, Kind kind = Kind::plain) : engine(dims_of(format)), norm(size_t(padded(engine.dims.width))) {
    if (enriched(kind)) enrich(kind);
    engine.experts_used = 2;
    const Dims& d = engine.dims;
    for (int i = 0; i < d.width; i++) norm[size_t(i)] = 1 + 0.01f * float(i % 7);
    Rope rope;
    rope.interleaved = true;
    for (int i = 0; i < d.head_dim / 2; i++) rope.inv_freq.push_back(std::pow(1e4f, -2.0f * float(i) / float(d.head_dim)));
    engine.ropes.push_back(rope);
    for (int layer = 0; layer < d.layers; layer++) {
      Layer& own = engine.layers[size_t(layer)];
      if (!own.heads) own.heads = 4, own.kv_heads = 2, own.ffn = 96;
      own.experts = kind == Kind::experts && layer != 1 ? 3 : 0;
      own.shared = own.experts && layer == 2 ? 64 : 0;
      for (int t = 0; t < own.targets(); t++) {
        const auto [rows, cols] = linear_shape(d, own, t);
        own.w[size_t(t)] = add(format, rows, cols);
      }
      if (own.experts) own.router = add(format, own.experts, d.width);
      if (own.shared) own.shared_router = vector(d.width, 0);
      own.attn_norm = own.mlp_norm = norm.data();
      if (enriched(kind)) add_vectors(own, d);
    }
    engine.embed = engine.head = add(format, d.vocab, d.width);
    engine.final_norm = norm.data();
  }

  void enrich(Kind kind) {
    Dims& d = engine.dims;
    d.qk_norm = kind == Kind::head_norms ? QkNorm::head : QkNorm::row;
    d.layer_norm = d.gelu = kind == Kind::row_norms;
    d.gated = kind == Kind::head_norms;
    d.score_cap = 2, d.logit_cap = 3;
    d.score_scale = 0.3f, d.logit_scale = 0.5f, d.embed_scale = 2, d.residual_scale = 0.7f;
    const int heads[] = {6, 3, 2}, kv_heads[] = {3, 1, 2}, ffn[] = {32, 96, 64};
    for (size_t i = 0; i < engine.layers.size(); i++) {
      Layer& own = engine.layers[i];
      own.heads = heads[i], own.kv_heads = kv_heads[i], own.ffn = ffn[i];
      own.window = i == 1 ? 5 : 0;
      own.rope = i == 2 ? -1 : 0;
    }
  }

  const float* vector(int length, float around) {
    Floats values(size_t(padded(length)));
    Random random(400 + vectors.size());
    for (int i = 0; i < length; i++) values[size_t(i)] = around + random.uniform(-0.3f, 0.3f);
    return vectors.emplace_back(std::make_unique<Floats>(std::move(values)))->data();
  }

  void add_vectors(Layer& own, const Dims& d) {
    for (int t = 0; t <= kDown; t++) own.bias[size_t(t)] = vector(linear_shape(d, own, t).first, 0);
    own.attn_post_norm = vector(d.width, 1);
    own.mlp_post_norm = vector(d.width, 1);
    if (d.layer_norm) own.attn_norm_bias = vector(d.width, 0);
    own.q_norm = vector(d.qk_norm == QkNorm::row ? own.heads * d.head_dim : d.head_dim, 1);
    own.k_norm = vector(d.qk_norm == QkNorm::row ? own.kv_heads * d.head_dim : d.head_dim, 1);
  }

  Matrix add(Format format, int rows, int cols) {
    weights.push_back(std::make_unique<Weights>(random_weights(format, rows, cols, 200 + weights.size())));
    return weights.back()->matrix;
  }

  // The scale of the first block of a row becomes `bits`, an fp16.
  void poison(int layer, int target, int row, uint16_t bits) {
    Weights& w = *weights[size_t(layer * kSharedGate + target)];
    uint8_t* block = w.gguf.data() + size_t(row) * gguf_row_bytes(w.format, w.cols);
    block[0] = uint8_t(bits);
    block[1] = uint8_t(bits >> 8);
    pack_strips(w.matrix, w.gguf.data(), 0, w.matrix.strips(), w.packed.data());
  }
};

// An adapter of every linear with gradients for its last `trained` ranks.
struct Adapter {
  LoraSet set;
  std::vector<std::unique_ptr<Floats>> parts;

  Adapter(const Model& model, int rank, int trained) : set(model.engine.layers.size()) {
    Random random(300);
    for (size_t layer = 0; layer < set.size(); layer++)
      for (size_t t = 0; t < size_t(model.engine.layers[layer].targets()); t++) {
        const Layer& own = model.engine.layers[layer];
        const Matrix& w = own.w[t];
        Lora& l = set[layer][t];
        l.rank = rank;
        l.trained = rank - trained;
        l.lda = w.cols * (own.experts && t >= kGate && t <= kDown ? own.experts : 1);
        l.ldb = w.rows;  // those of all experts
        l.a = add(random.floats(size_t(rank * l.lda), -0.2f, 0.2f));
        l.bt = add(random.floats(size_t(rank * l.ldb), -0.2f, 0.2f));
        l.scale = add(random.floats(size_t(rank), 0.5f, 2));
        l.da = add(Floats(size_t(trained * l.lda)));
        l.dbt = add(Floats(size_t(trained * l.ldb)));
      }
  }
  float* add(Floats values) { return parts.emplace_back(std::make_unique<Floats>(std::move(values)))->data(); }
  Floats gradients() const {
    Floats all;
    for (size_t i = 0; i < parts.size(); i++)
      if (i % 5 > 2) all.insert(all.end(), parts[i]->begin(), parts[i]->end());
    return all;
  }
};

// With a prefix, the first segment is the beginning of the others: they start behind it and share its whole pages.
Batch batch_of(const std::vector<int>& lengths, const LoraSet* lora, int prefix = 0) {
  Batch b;
  b.prefix = prefix;
  b.page_tables.resize(lengths.size() * 4);
  for (size_t i = 0; i < b.page_tables.size(); i++) b.page_tables[i] = int32_t(int(i % 4) < prefix / kPageTokens ? i % 4 : i);
  for (size_t i = 0; i < lengths.size(); i++) {
    b.segments.push_back({b.rows, lengths[i], i ? prefix : 0, b.page_tables.data() + 4 * i, lora});
    b.rows += lengths[i];
  }
  return b;
}

Floats embedded(Model& model, int rows) {
  std::vector<int32_t> tokens(static_cast<size_t>(rows));
  for (int m = 0; m < rows; m++) tokens[size_t(m)] = (m * 31 + 7) % model.engine.dims.vocab;
  Floats x(size_t(rows * padded(model.engine.dims.width)));
  embed_rows(model.engine, tokens.data(), rows, x.data());
  return x;
}

Floats logits(Model& model, Mode mode, const Batch& batch) {
  Engine& e = model.engine;
  std::vector<int> kv_heads;
  for (const Layer& layer : e.layers) kv_heads.push_back(layer.kv_heads);
  KvCache cache(e.dims, kv_heads, mode == Mode::f32 ? KvType::f32 : KvType::bf16);
  cache.reserve(int(batch.page_tables.size()));
  Floats x = embedded(model, batch.rows);
  for (int layer = 0; layer < e.dims.layers; layer++) {
    attention_forward(e, layer, mode, x.data(), batch, cache, layer, nullptr);
    feed_forward(e, layer, mode, x.data(), batch, nullptr);
  }
  std::vector<int32_t> rows(static_cast<size_t>(batch.rows));
  for (int m = 0; m < batch.rows; m++) rows[size_t(m)] = m;
  if (batch.read) rows = *batch.read;
  Floats out(rows.size() * size_t(padded(e.dims.vocab)));
  head_logits(e, mode, x.data(), rows.data(), int(rows.size()), out.data());
  return out;
}

struct Step {
  Floats logp, gradients, dx;
};

// As bind/module.cpp records a step and takes it back.
Step train(Model& model, Adapter& adapter, Mode mode, const Batch& batch, const std::vector<char>& keep) {
  Engine& e = model.engine;
  Tape tape(e, mode);
  tape.keep = keep;
  tape.scratch.reserve(int(batch.page_tables.size()));
  Floats x = embedded(model, batch.rows);
  auto forward = [&](size_t layer, float* rows, LayerTape* own) {
    attention_forward(e, int(layer), mode, rows, batch, tape.scratch, 0, own);
    feed_forward(e, int(layer), mode, rows, batch, own);
  };
  for (size_t layer = 0; layer < keep.size(); layer++) {
    if (!keep[layer]) save_rows(Mode::f32, x.data(), x.size(), tape.inputs[layer]);
    forward(layer, x.data(), keep[layer] ? &tape.kept[layer] : nullptr);
  }
  std::vector<int32_t> rows, targets;
  for (int m = 0; m < batch.rows; m += 2) rows.push_back(m), targets.push_back(m % e.dims.vocab);
  Step step{Floats(rows.size()), {}, Floats(x.size())};
  const Floats d_logp = Random(301).floats(rows.size());
  head_logprobs(e, mode, x.data(), rows.data(), targets.data(), int(rows.size()), step.logp.data(), d_logp.data(),
                step.dx.data());
  for (size_t layer = keep.size(); layer-- > 0;) {
    LayerTape* own = &tape.kept[layer];
    if (!keep[layer]) forward(layer, tape.inputs[layer].data<float>(), own = &tape.again);
    feed_forward_backward(e, int(layer), mode, step.dx.data(), batch, *own);
    attention_backward(e, int(layer), mode, step.dx.data(), batch, *own, true);
  }
  step.gradients = adapter.gradients();
  return step;
}

Step fresh_step(Model& model, Mode mode, int rank, int trained, const std::vector<int>& lengths, const std::vector<char>& keep,
                int prefix = 0) {
  Adapter adapter(model, rank, trained);
  return train(model, adapter, mode, batch_of(lengths, &adapter.set, prefix), keep);
}

bool all_finite(const Floats& x) {
  for (float value : x)
    if (!std::isfinite(value)) return false;
  return true;
}

const std::vector<int> kLengths = {20, 1, 37};

void check_kept_and_again(Model& model, Mode mode, const std::vector<int>& lengths, int prefix) {
  const Step whole = fresh_step(model, mode, 5, 5, lengths, {1, 1, 1}, prefix);
  CHECK(all_finite(whole.gradients) && all_finite(whole.logp), "mode %d: a gradient is not finite", int(mode));
  double size = 0;
  for (float g : whole.gradients) size += std::fabs(g);
  CHECK(size > 0, "mode %d: all gradients are zero", int(mode));
  for (int count : {1, 3})
    for (const std::vector<char>& keep : {std::vector<char>{0, 0, 0}, {0, 1, 1}, {1, 0, 1}}) {
      const Threads set(count);
      const Step step = fresh_step(model, mode, 5, 5, lengths, keep, prefix);
      CHECK(same_bits(step.logp, whole.logp), "mode %d, %d threads: other log-probabilities", int(mode), count);
      CHECK(same_bits(step.gradients, whole.gradients), "mode %d, %d threads: other gradients", int(mode), count);
      CHECK(same_bits(step.dx, whole.dx), "mode %d, %d threads: other dx", int(mode), count);
    }
}

TEST("tape: layers that are kept and layers that are run again give the same bits, on any number of threads") {
  for (Format format : {Format::Q4_1, Format::F16}) {
    Model model(format);
    for (Mode mode : {Mode::bf16, Mode::f32}) check_kept_and_again(model, mode, kLengths, 0);
  }
}

TEST("tape: so do segments that share a prefix, within a page and over its border") {
  Model model(Format::Q8_0);
  for (int prefix : {10, 64, 70}) check_kept_and_again(model, Mode::bf16, {prefix, 9, 1, 20}, prefix);
}

TEST("tape: so do models with norms of heads, biases, caps, windows and layers of their own") {
  for (Kind kind : {Kind::head_norms, Kind::row_norms}) {
    Model model(Format::F16, kind);
    for (Mode mode : {Mode::bf16, Mode::f32}) check_kept_and_again(model, mode, kLengths, 0);
    check_kept_and_again(model, Mode::f32, {70, 9, 1, 20}, 70);
  }
}

TEST("tape: so do adapters on experts") {
  Model model(Format::Q8_0, Kind::experts);
  for (Mode mode : {Mode::bf16, Mode::f32}) check_kept_and_again(model, mode, kLengths, 0);
  check_kept_and_again(model, Mode::bf16, {70, 9, 1, 20}, 70);
}

bool nearly_same(const Floats& a, const Floats& b) {
  double largest = 0;
  for (float x : a) largest = std::max(largest, std::fabs(double(x)));
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [&](double x, double y) {  // never with NaN
    return std::fabs(x - y) <= largest / (1 << 20);
  });
}

TEST("tape: rows that nobody reads after the last layer need no second half of it") {
  const std::vector<int> lengths = {70, 9, 1, 20};
  for (Kind kind : {Kind::plain, Kind::head_norms, Kind::row_norms, Kind::experts}) {
    Model model(enriched(kind) ? Format::F16 : Format::Q8_0, kind);
    for (int prefix : {0, 70})
      for (Mode mode : {Mode::bf16, Mode::f32})
        for (char keep : {1, 0}) {
          Adapter all(model, 5, 3), few(model, 5, 3);
          Batch read = batch_of(lengths, &few.set, prefix);
          for (int m = 0; m < read.rows; m += 2) (m ? *read.read : read.read.emplace()).push_back(m);  // those that train() reads
          const Step a = train(model, all, mode, batch_of(lengths, &all.set, prefix), {1, 0, keep}),
                     b = train(model, few, mode, read, {1, 0, keep});
          CHECK(same_bits(a.logp, b.logp) && same_bits(a.dx, b.dx), "kind %d, prefix %d, mode %d, keep %d: another step",
                int(kind), prefix, int(mode), keep);
          // Tiles add rows of gradients in pairs: without those that are zero these are other pairs.
          const bool pairs = mode == Mode::bf16 && kernels().level == Level::amx;
          CHECK(pairs ? nearly_same(a.gradients, b.gradients) : same_bits(a.gradients, b.gradients),
                "kind %d, prefix %d, mode %d, keep %d: other gradients", int(kind), prefix, int(mode), keep);
        }
    Batch batch = batch_of({6, 3}, nullptr);
    const Floats all = logits(model, Mode::int8, batch);
    batch.read = {4, 8};
    const Floats few = logits(model, Mode::int8, batch);
    const size_t width = few.size() / 2;
    for (size_t i = 0; i < 2; i++)
      CHECK(same_bits(&few[i * width], &all[size_t((*batch.read)[i]) * width], width * sizeof(float)), "row %zu", i);
    batch.read->clear();
    CHECK(logits(model, Mode::int8, batch).empty(), "nothing was read");
  }
}

TEST("tape: an engine whose scratch memory has seen other shapes gives the same bits") {
  for (Kind kind : {Kind::plain, Kind::head_norms, Kind::row_norms}) {
    Model used(Format::F16, kind), fresh(Format::F16, kind);
    fresh_step(used, Mode::f32, 3, 3, {1}, {1, 1, 1});
    logits(used, Mode::int8, batch_of({50}, nullptr));
    fresh_step(used, Mode::bf16, 9, 9, {90, 5}, {0, 1, 0});
    const Step a = fresh_step(used, Mode::bf16, 5, 5, kLengths, {1, 0, 1}),
               b = fresh_step(fresh, Mode::bf16, 5, 5, kLengths, {1, 0, 1});
    CHECK(same_bits(a.logp, b.logp) && same_bits(a.gradients, b.gradients) && same_bits(a.dx, b.dx),
          "results depend on the past");
    for (Mode mode : {Mode::int8, Mode::bf16, Mode::f32})
      CHECK(same_bits(logits(used, mode, batch_of({7}, nullptr)), logits(fresh, mode, batch_of({7}, nullptr))),
            "mode %d: logits depend on the past", int(mode));
  }
}

TEST("tape: a step with NaN leaves nothing behind in an engine with layers of other shapes") {
  for (Kind kind : {Kind::plain, Kind::head_norms, Kind::row_norms})
    for (Mode mode : {Mode::int8, Mode::bf16, Mode::f32}) {
      Model used(Format::F16, kind), fresh(Format::F16, kind);
      const float* norm = used.engine.layers[0].attn_norm;
      const Floats broken(size_t(padded(used.engine.dims.width)), NAN);
      used.engine.layers[0].attn_norm = broken.data();
      CHECK(!all_finite(logits(used, mode, batch_of({40}, nullptr))), "mode %d: no NaN", int(mode));
      if (mode != Mode::int8) fresh_step(used, mode, 5, 5, {40}, {1, 1, 1});
      used.engine.layers[0].attn_norm = norm;
      CHECK(same_bits(logits(used, mode, batch_of({9, 30}, nullptr)), logits(fresh, mode, batch_of({9, 30}, nullptr))),
            "mode %d: logits depend on the past", int(mode));
      if (mode == Mode::int8) continue;
      const Step a = fresh_step(used, mode, 5, 5, kLengths, {1, 0, 1}), b = fresh_step(fresh, mode, 5, 5, kLengths, {1, 0, 1});
      CHECK(same_bits(a.gradients, b.gradients) && same_bits(a.dx, b.dx), "mode %d: gradients depend on the past", int(mode));
    }
}

TEST("tape: gradients of the trained ranks do not depend on where the frozen ranks end") {
  Model model(Format::Q8_0);
  const Step all = fresh_step(model, Mode::f32, 7, 7, {9, 4}, {1, 1, 1}),
             some = fresh_step(model, Mode::f32, 7, 3, {9, 4}, {1, 1, 1});
  CHECK(same_bits(all.logp, some.logp) && same_bits(all.dx, some.dx), "freezing ranks changed the step");
  size_t at_all = 0, at_some = 0;
  for (size_t layer = 0; layer < model.engine.layers.size(); layer++)
    for (size_t t = 0; t <= kDown; t++)
      for (int width : {model.engine.layers[layer].w[t].cols, model.engine.layers[layer].w[t].rows}) {
        CHECK(same_bits(&all.gradients[at_all + size_t(4 * width)], &some.gradients[at_some], size_t(3 * width) * sizeof(float)),
              "layer %zu, target %zu", layer, t);
        at_all += size_t(7 * width);
        at_some += size_t(3 * width);
      }
}

TEST("tape: adapters of any rank stay inside their memory") {  // the sanitizers look
  for (Kind kind : {Kind::plain, Kind::experts}) {
    Model model(Format::Q8_0, kind);
    for (int rank : {1, 47, 49, 257, 270, 300})
      for (Mode mode : {Mode::bf16, Mode::f32}) {
        const Step step = fresh_step(model, mode, rank, rank, {5}, {1, 1, 1});
        CHECK(all_finite(step.gradients), "rank %d: a gradient is not finite", rank);
      }
    Adapter wide(model, 270, 1);
    CHECK(all_finite(logits(model, Mode::int8, batch_of({3}, &wide.set))), "rank 270, int8");
  }
}

TEST("tape: rows of one batch are what they are alone") {
  for (Mode mode : {Mode::int8, Mode::bf16, Mode::f32}) {
    for (Kind kind : {Kind::plain, Kind::experts}) {
      Model model(Format::Q4_0, kind);
      Adapter one(model, 4, 1), two(model, 6, 1);
      const Floats mixed = [&] {
        Batch b = batch_of({11, 11}, &one.set);
        b.segments[1].lora = &two.set;
        return logits(model, mode, b);
      }();
      const Floats alone = logits(model, mode, batch_of({11}, &one.set));
      CHECK(same_bits(mixed.data(), alone.data(), alone.size() * sizeof(float)), "mode %d: a neighbour changed a row", int(mode));
      CHECK(!same_bits(mixed.data() + alone.size(), alone.data(), alone.size() * sizeof(float)),
            "the second adapter does nothing");
    }
  }
}

TEST("tape: a NaN or infinite scale in any linear reaches the logits and the log-probabilities") {
  for_levels([](const Kernels& k) {
    for (uint16_t bits : {0x7e00, 0x7c00})  // NaN, infinity
      for (int target = 0; target <= kDown; target++) {
        Model model(Format::Q4_0);
        model.poison(1, target, 5, bits);
        for (Mode mode : {Mode::int8, Mode::bf16, Mode::f32}) {
          const Batch batch = batch_of({9}, nullptr);
          const Floats out = logits(model, mode, batch);
          const int vocab = model.engine.dims.vocab;
          for (int m = 0; m < batch.rows; m++)
            for (int t = 0; t < vocab; t++)
              CHECK(std::isnan(out[size_t(m * padded(vocab) + t)]), "0x%04x in target %d, mode %d: logit %d of row %d is %g",
                    bits, target, int(mode), t, m, double(out[size_t(m * padded(vocab) + t)]));
        }
        if (k.level != Level::scalar) {
          const Step step = fresh_step(model, Mode::bf16, 2, 2, {9}, {1, 1, 1});
          for (float logp : step.logp)
            CHECK(std::isnan(logp), "0x%04x in target %d: log-probability %g", bits, target, double(logp));
        }
      }
  });
}

}  // namespace

}  // namespace nomoat
