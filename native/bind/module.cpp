#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <optional>

#include "bind/bind.h"
#include "op/rounded.h"

namespace {

struct PyLora {
  explicit PyLora(int layers) : set(size_t(layers)) {}
  PyLora(PyLora&&) = default;

  LoraSet set;
  RoundedLoras rounded;
};

struct PyBatch {
  // Lists, not arrays: in a step of decode they are short, and NumPy's code has to come from memory each time.
  PyBatch(const std::vector<int>& counts, const std::vector<int>& positions, const std::vector<std::vector<int>>& pages,
          const std::vector<PyLora*>& loras, int prefix, const std::optional<std::vector<int32_t>>& read) {
    const size_t n = counts.size();
    require(positions.size() == n && pages.size() == n && (loras.empty() || loras.size() == n), "batch lists disagree in length");
    size_t all = 0;
    for (const std::vector<int>& table : pages) all += table.size();
    batch.page_tables.reserve(all);  // segments point into it
    for (size_t i = 0; i < n; i++) {
      const int count = counts[i], position = positions[i];
      require(count > 0 && position >= 0, "segments must be non-empty, at positions from 0 on");
      require(int64_t(pages[i].size()) * kPageTokens >= int64_t(position) + count, "page table too short for the segment");
      const int* table = batch.page_tables.data() + batch.page_tables.size();
      for (const int page : pages[i]) {
        require(page >= 0, "negative page");
        highest_page = std::max(highest_page, page);
        batch.page_tables.push_back(page);
      }
      batch.segments.push_back({batch.rows, count, position, table, loras.empty() || !loras[i] ? nullptr : &loras[i]->set});
      require(prefix == 0 || (i == 0 ? position == 0 && count == prefix : position == prefix),
              "with a prefix, the first segment holds it and the others start behind it");
      batch.rows += count;
    }
    batch.prefix = prefix;
    batch.read = read;
    for (size_t i = 0; read && i < read->size(); i++)
      require((i ? (*read)[i - 1] : -1) < (*read)[i] && (*read)[i] < batch.rows, "rows that are read must ascend, below ",
              batch.rows);
  }
  int read() const { return batch.read ? int(batch.read->size()) : batch.rows; }

  Batch batch;
  int highest_page = -1;
};

struct PyEngine : Engine {
  using Engine::Engine;

  void check_rows(const nb::ndarray<>& x, int rows, int width, const char* what) const {
    require(x.ndim() == 2 && int(x.shape(0)) == rows && int(x.shape(1)) == padded(width), what, " must be [", rows, ", ",
            padded(width), "] float32");
  }
  void check_layer(int layer) const { require(layer >= 0 && layer < dims.layers, "layer ", layer, " of ", dims.layers); }
  // Everything that a layer cannot run without has been set.
  void check_complete(int layer) const {
    const Layer& own = layers[size_t(layer)];
    for (int target = 0; target < own.targets(); target++)
      require(own.w[size_t(target)].data || (target == kGate && !dims.gated), "layer ", layer, ": weight ", target,
              " has not been set");
    require((!own.experts || own.router.data) && (!own.shared || own.shared_router), "layer ", layer,
            ": the router has not been set");
    require(!own.q_norm == !own.k_norm, "layer ", layer, ": norms of q and k come together");
  }
  void check_tokens(const std::vector<int32_t>& tokens) const {
    check_ids(tokens, dims.vocab, "token");
    require(embed.data, "the embedding has not been set");
  }
  void check_head() const { require(head.data && final_norm, "the head or its norm has not been set"); }
};

void init_engine(PyEngine* self, int layers, int width, int head_dim, int vocab, int context, float eps, bool layer_norm,
                 bool gelu, bool gated, int qk_norm, std::optional<float> score_scale, float score_cap, float logit_cap,
                 float logit_scale, float embed_scale, float residual_scale, int experts_used, bool expert_norm) {
  require(layers > 0 && width > 0 && head_dim > 0 && vocab > 0, "dimensions must be positive");
  require(head_dim % 2 == 0 && head_dim <= kMostHeadDim, "head dimension must be even and at most ", kMostHeadDim);
  require(qk_norm >= 0 && qk_norm <= 2, "qk_norm: expected 0, 1 or 2");
  require(score_cap >= 0 && logit_cap >= 0, "caps must not be negative");
  const float scale = score_scale.value_or(1.0f / std::sqrt(float(head_dim)));
  new (self) PyEngine(Dims{layers, width, head_dim, vocab, context, eps, scale, score_cap, logit_cap, logit_scale, embed_scale,
                           residual_scale, layer_norm, gelu, gated, QkNorm(qk_norm)});
  self->experts_used = experts_used;
  self->expert_norm = expert_norm;
}

void add_rope(PyEngine& e, bool interleaved, const ConstFloats& inv_freq, float magnitude) {
  require(int(inv_freq.size()) * 2 <= e.dims.head_dim, "rope dimension exceeds the head dimension");
  Rope rope;
  rope.interleaved = interleaved;
  rope.magnitude = magnitude;
  rope.inv_freq.assign(inv_freq.data(), inv_freq.data() + inv_freq.size());
  e.ropes.push_back(std::move(rope));
}

void set_layer(PyEngine& e, int layer, int heads, int kv_heads, int ffn, int window, int rope, int experts, int shared) {
  e.check_layer(layer);
  require(heads > 0 && kv_heads > 0 && ffn > 0, "dimensions must be positive");
  require(heads % kv_heads == 0 && heads / kv_heads <= kMaxGroup, "query heads must be 1 to ", kMaxGroup, " times the kv heads");
  require(window >= 0 && experts >= 0 && shared >= 0, "window, experts and shared must not be negative");
  require(experts || !shared, "a shared expert is one beside others");
  require(rope >= -1 && rope < int(e.ropes.size()), "rope ", rope, " of ", e.ropes.size());
  require(!experts || (e.dims.gated && ffn % kStripRows == 0 && e.dims.width % kStripRows == 0),
          "experts must have a gate, and rows that are a multiple of 16");
  require(!experts || (e.experts_used > 0 && e.experts_used <= experts), e.experts_used, " experts used of ", experts);
  Layer& own = e.layers[size_t(layer)] = Layer{};  // its weights come later
  own.heads = heads, own.kv_heads = kv_heads, own.ffn = ffn;
  own.window = window, own.rope = rope, own.experts = experts, own.shared = shared;
}

void set_linear(PyEngine& e, int layer, int target, int format, const ConstBytes& packed) {
  e.check_layer(layer);
  Layer& own = e.layers[size_t(layer)];
  require(target >= 0 && target < own.targets(), "unknown target");
  const auto [rows, cols] = linear_shape(e.dims, own, target);
  own.w[size_t(target)] = matrix_view(format, rows, cols, packed);
}

void set_router(PyEngine& e, int layer, int format, const ConstBytes& packed) {
  e.check_layer(layer);
  Layer& own = e.layers[size_t(layer)];
  own.router = matrix_view(format, own.experts, e.dims.width, packed);
}

// Vectors of a layer by the last part of their engine name: those as wide as the residual stream, biases by target.
constexpr std::pair<const char*, const float* Layer::*> kWide[] = {
    {"attn_norm", &Layer::attn_norm},           {"attn_norm_bias", &Layer::attn_norm_bias},
    {"attn_post_norm", &Layer::attn_post_norm}, {"mlp_norm", &Layer::mlp_norm},
    {"mlp_norm_bias", &Layer::mlp_norm_bias},   {"mlp_post_norm", &Layer::mlp_post_norm},
    {"shared_router", &Layer::shared_router},
};
constexpr const char* kBias[] = {"q_bias", "k_bias", "v_bias", "o_bias", "gate_bias", "up_bias", "down_bias"};

void set_vector(PyEngine& e, int layer, const std::string& name, const ConstFloats& values) {
  const float** place = nullptr;
  int length = e.dims.width;
  if (layer == -1) {
    place = name == "final_norm" ? &e.final_norm : name == "final_norm_bias" ? &e.final_norm_bias : nullptr;
  } else {
    e.check_layer(layer);
    Layer& own = e.layers[size_t(layer)];
    for (auto [known, member] : kWide)
      if (name == known) place = &(own.*member);
    for (int target = 0; target <= kDown; target++)
      if (name == kBias[target]) place = &own.bias[size_t(target)], length = linear_shape(e.dims, own, target).first;
    if (name == "q_norm" || name == "k_norm") {
      require(e.dims.qk_norm != QkNorm::none, "vector '", name, "', but qk_norm is 0");
      place = name == "q_norm" ? &own.q_norm : &own.k_norm;
      length = (e.dims.qk_norm == QkNorm::head ? 1 : name == "q_norm" ? own.heads : own.kv_heads) * e.dims.head_dim;
    }
  }
  require(place, "vector '", name, "' of layer ", layer, " is not known");
  require(length > 0 && int(values.size()) == padded(length), "vector '", name, "': ", values.size(), " values, expected ",
          padded(length));
  *place = values.data();
}

void set_table(PyEngine& e, bool head, int format, const ConstBytes& packed) {
  (head ? e.head : e.embed) = matrix_view(format, e.dims.vocab, e.dims.width, packed);
}

void set_lora(PyLora& lora, int layer, int target, const ConstFloats& a, const ConstFloats& bt, const ConstFloats& scale,
              std::optional<Floats> da, std::optional<Floats> dbt) {
  require(layer >= 0 && layer < int(lora.set.size()) && target >= 0 && target < kTargets, "unknown layer or target");
  const size_t axes = a.ndim();  // [rank, K], or of experts [rank, experts, K]
  require((axes == 2 || axes == 3) && bt.ndim() == axes && a.shape(0) == bt.shape(0) && scale.size() == a.shape(0) &&
              a.shape(0) > 0 && (axes == 2 || a.shape(1) == bt.shape(1)),
          "A, B^T and scale must agree in rank, and in the number of experts");
  Lora l;
  l.a = a.data(), l.bt = bt.data(), l.scale = scale.data();
  l.rank = int(a.shape(0)), l.lda = int(a.size() / a.shape(0)), l.ldb = int(bt.size() / bt.shape(0));
  if (da && dbt) {
    require(da->ndim() == axes && dbt->ndim() == axes && da->shape(axes - 1) == a.shape(axes - 1) &&
                dbt->shape(axes - 1) == bt.shape(axes - 1) && da->shape(0) == dbt->shape(0) && da->shape(0) <= a.shape(0) &&
                (axes == 2 || (da->shape(1) == a.shape(1) && dbt->shape(1) == a.shape(1))),
            "gradients must have the columns of A and B^T");
    l.trained = l.rank - int(da->shape(0));
    l.da = da->data(), l.dbt = dbt->data();
  } else if (axes == 2 || (a.shape(2) % kLoraCols == 0 && bt.shape(2) % kLoraCols == 0)) {
    l.a_low = lora.rounded.a(l.a, l.rank, l.lda), l.bt_low = lora.rounded.bt(l.bt, l.rank, l.ldb);
  }
  lora.set[size_t(layer)][size_t(target)] = l;
}

struct PyTape : Tape {
  PyTape(const PyEngine& e, const std::string& precision) : Tape(e, mode_of(precision)), mode(mode_of(precision)) {
    require(mode != Mode::int8, "a tape needs precision bf16 or f32");
  }
  Mode mode;
};

// The two halves of a layer, one after the other.
void run_layer(PyEngine& e, int layer, Mode mode, float* x, const Batch& batch, const KvCache& cache, int cache_layer,
               LayerTape* tape) {
  attention_forward(e, layer, mode, x, batch, cache, cache_layer, tape);
  feed_forward(e, layer, mode, x, batch, tape);
}

// Looks for Ctrl-C ten times a second while no thread of Python has to wait for the engine.
class Interrupts {
 public:
  void check() {
    if (Clock::now() < next_) return;
    nb::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals()) throw nb::python_error();
    next_ = Clock::now() + kEvery;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kEvery{100};
  Clock::time_point next_ = Clock::now() + kEvery;
};

// x = the tokens after all layers, or, without x, logits of the rows that the batch reads. One call: between two, what Python
// runs has to come from memory again.
void forward(PyEngine& e, const std::string& precision, const std::vector<int32_t>& tokens, const PyBatch& b, KvCache& cache,
             const std::optional<Floats>& x, const std::optional<Floats>& logits) {
  require(int(tokens.size()) == b.batch.rows, tokens.size(), " tokens for ", b.batch.rows, " rows");
  require(bool(x) != bool(logits), "either x or logits");
  const Mode mode = mode_of(precision);
  if (x) e.check_rows(nb::ndarray<>(*x), b.batch.rows, e.dims.width, "x");
  if (logits) e.check_rows(nb::ndarray<>(*logits), b.read(), e.dims.vocab, "logits");
  e.check_tokens(tokens);
  if (logits) e.check_head();
  for (int layer = 0; layer < e.dims.layers; layer++) {
    e.check_complete(layer);
    require(cache.holds(layer, e.layers[size_t(layer)].kv_heads), "the cache was made for an engine with other layers");
  }
  nb::gil_scoped_release release;
  Interrupts interrupts;
  cache.reserve(b.highest_page + 1);
  float* rows = x ? x->data() : e.hidden.get<float>(tokens.size() * size_t(padded(e.dims.width)));
  embed_rows(e, tokens.data(), int(tokens.size()), rows);
  for (int layer = 0; layer < e.dims.layers; layer++) {
    run_layer(e, layer, mode, rows, b.batch, cache, layer, nullptr);
    interrupts.check();
  }
  if (logits) head_logits(e, mode, rows, b.batch.read ? b.batch.read->data() : nullptr, b.read(), logits->data());
}

void record_layer(PyEngine& e, int layer, const Floats& x, const PyBatch& b, PyTape& tape) {
  e.check_layer(layer);
  e.check_rows(nb::ndarray<>(x), b.batch.rows, e.dims.width, "x");
  e.check_complete(layer);
  require(tape.scratch.holds(0, e.layers[size_t(layer)].kv_heads), "the tape was made for an engine with other layers");
  nb::gil_scoped_release release;
  tape.scratch.reserve(b.highest_page + 1);
  const bool keep = tape.keep[size_t(layer)];
  if (!keep) save_rows(Mode::f32, x.data(), size_t(b.batch.rows) * padded(e.dims.width), tape.inputs[size_t(layer)]);
  LayerTape* own = keep ? &tape.kept[size_t(layer)] : nullptr;
  run_layer(e, layer, tape.mode, x.data(), b.batch, tape.scratch, 0, own);
}

void backward_layer(PyEngine& e, int layer, const Floats& dx, const PyBatch& b, PyTape& tape, bool need_dx) {
  e.check_layer(layer);
  e.check_rows(nb::ndarray<>(dx), b.batch.rows, e.dims.width, "dx");
  e.check_complete(layer);
  nb::gil_scoped_release release;
  const LayerTape* own = &tape.kept[size_t(layer)];
  if (!tape.keep[size_t(layer)]) {
    run_layer(e, layer, tape.mode, tape.inputs[size_t(layer)].data<float>(), b.batch, tape.scratch, 0, &tape.again);
    own = &tape.again;
  }
  feed_forward_backward(e, layer, tape.mode, dx.data(), b.batch, *own);
  attention_backward(e, layer, tape.mode, dx.data(), b.batch, *own, need_dx);
}

void bind_state(nb::module_& m) {
  nb::class_<PyLora>(m, "LoraSet")
      .def(nb::init<int>(), nb::arg("layers"))
      .def("set", &set_lora, nb::arg("layer"), nb::arg("target"), array("a"), array("bt"), array("scale"),
           array("da").none() = nb::none(), array("dbt").none() = nb::none());
  nb::class_<PyBatch>(m, "Batch")
      .def(nb::init<const std::vector<int>&, const std::vector<int>&, const std::vector<std::vector<int>>&,
                    const std::vector<PyLora*>&, int, const std::optional<std::vector<int32_t>>&>(),
           nb::arg("counts"), nb::arg("positions"), nb::arg("pages"), nb::arg("loras"), nb::arg("prefix") = 0,
           nb::arg("read") = nb::none(), nb::keep_alive<1, 5>())
      .def_prop_ro("rows", [](const PyBatch& b) { return b.batch.rows; });
  nb::class_<KvCache>(m, "KvCache")
      .def(
          "__init__",
          [](KvCache* self, const PyEngine& e, const std::string& type) {
            require(type == "bf16" || type == "f32" || type == "int8", "keys and values are bf16, f32 or int8, not " + type);
            std::vector<int> kv_heads;
            for (const Layer& layer : e.layers) kv_heads.push_back(layer.kv_heads);
            new (self) KvCache(e.dims, kv_heads, type == "f32" ? KvType::f32 : type == "int8" ? KvType::int8 : KvType::bf16);
          },
          nb::arg("engine"), nb::arg("type") = "bf16")
      .def("reserve", &KvCache::reserve, nb::arg("pages"))
      .def_prop_ro("pages", &KvCache::pages)
      .def_prop_ro("page_bytes", &KvCache::page_bytes);
  m.attr("PAGE_TOKENS") = kPageTokens;
  nb::class_<PyTape>(m, "Tape")
      .def(nb::init<const PyEngine&, const std::string&>(), nb::arg("engine"), nb::arg("precision"))
      .def("keep", [](PyTape& t, int layer, bool keep) { t.keep.at(size_t(layer)) = keep; }, nb::arg("layer"), nb::arg("keep"));
}

void bind_engine(nb::module_& m) {
  nb::class_<PyEngine>(m, "Engine")
      .def("__init__", &init_engine, nb::arg("layers"), nb::arg("width"), nb::arg("head_dim"), nb::arg("vocab"),
           nb::arg("context"), nb::arg("eps"), nb::arg("layer_norm") = false, nb::arg("gelu") = false, nb::arg("gated") = true,
           nb::arg("qk_norm") = 0, nb::arg("score_scale") = nb::none(), nb::arg("score_cap") = 0.0f, nb::arg("logit_cap") = 0.0f,
           nb::arg("logit_scale") = 1.0f, nb::arg("embed_scale") = 1.0f, nb::arg("residual_scale") = 1.0f,
           nb::arg("experts_used") = 0, nb::arg("expert_norm") = true)
      .def("add_rope", &add_rope, nb::arg("interleaved"), array("inv_freq"), nb::arg("magnitude") = 1.0f)
      .def("set_layer", &set_layer, nb::arg("layer"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("ffn"),
           nb::arg("window") = 0, nb::arg("rope") = 0, nb::arg("experts") = 0, nb::arg("shared") = 0)
      .def(
          "set_digits",
          [](PyEngine& e, int product, int digits) {
            require(product >= 0 && product < 5 && (digits == 1 || digits == 2), "products 0 to 4, digits 1 or 2");
            e.digits[size_t(product)] = digits;
          },
          nb::arg("product"), nb::arg("digits"))
      .def("set_linear", &set_linear, nb::arg("layer"), nb::arg("target"), nb::arg("format"), array("packed"))
      .def("set_router", &set_router, nb::arg("layer"), nb::arg("format"), array("packed"))
      .def("set_vector", &set_vector, nb::arg("layer"), nb::arg("name"), array("values"))
      .def("set_table", &set_table, nb::arg("head"), nb::arg("format"), array("packed"))
      .def(
          "embed",
          [](PyEngine& e, const std::vector<int32_t>& tokens, const Floats& x) {
            e.check_rows(nb::ndarray<>(x), int(tokens.size()), e.dims.width, "x");
            e.check_tokens(tokens);
            nb::gil_scoped_release release;
            embed_rows(e, tokens.data(), int(tokens.size()), x.data());
          },
          nb::arg("tokens"), array("x"))
      .def("forward", &forward, nb::arg("precision"), nb::arg("tokens"), nb::arg("batch"), nb::arg("cache"),
           array("x").none() = nb::none(), array("logits").none() = nb::none())
      .def("record_layer", &record_layer, nb::arg("layer"), array("x"), nb::arg("batch"), nb::arg("tape"))
      .def("backward_layer", &backward_layer, nb::arg("layer"), array("dx"), nb::arg("batch"), nb::arg("tape"),
           nb::arg("need_dx"))
      .def(
          "logprobs",
          [](PyEngine& e, const std::string& precision, const ConstFloats& x, const ConstInts& rows, const ConstInts& targets,
             const Floats& logp, std::optional<ConstFloats> d_logp, std::optional<Floats> dx) {
            require(x.ndim() == 2 && int(x.shape(1)) == padded(e.dims.width), "x must be [rows, width padded to 32]");
            check_ids(span_of(rows), int(x.shape(0)), "row");
            check_ids(span_of(targets), e.dims.vocab, "target");
            const size_t n = rows.shape(0);
            require(targets.shape(0) == n && logp.size() == n, "rows, targets and logp must agree in length");
            require(bool(d_logp) == bool(dx), "d_logp and dx come together");
            if (dx) {
              require(d_logp->size() == n, "d_logp must have one value a row");
              e.check_rows(nb::ndarray<>(*dx), int(x.shape(0)), e.dims.width, "dx");
            }
            e.check_head();
            const Mode mode = mode_of(precision);
            nb::gil_scoped_release release;
            head_logprobs(e, mode, x.data(), rows.data(), targets.data(), int(n), logp.data(), d_logp ? d_logp->data() : nullptr,
                          dx ? dx->data() : nullptr);
          },
          nb::arg("precision"), array("x"), array("rows"), array("targets"), array("logp"), array("d_logp").none() = nb::none(),
          array("dx").none() = nb::none());
}

}  // namespace

NB_MODULE(_native, m) {
  bind_kernels(m);
  bind_state(m);
  bind_engine(m);
}
