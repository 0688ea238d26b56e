#include <algorithm>
#include <cmath>

#include "base/profile.h"
#include "bind/bind.h"

namespace {

void pack(int format, int rows, int cols, const ConstBytes& gguf, const Bytes& packed) {
  const Matrix m = packed_matrix(Format(format), rows, cols);
  require(gguf.size() == gguf_row_bytes(m.format, cols) * size_t(rows), "tensor bytes do not match its shape");
  require(packed.size() == packed_bytes(m), "packed buffer has the wrong size");
  nb::gil_scoped_release release;
  pack_matrix(m, gguf.data(), packed.data());
}
void quantize_rows(int format, const nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>& x, const Bytes& out) {
  const Matrix m = packed_matrix(Format(format), int(x.shape(0)), int(x.shape(1)));
  require(out.size() == gguf_row_bytes(m.format, m.cols) * size_t(m.rows), "out has the wrong size");
  nb::gil_scoped_release release;
  encode_rows(m.format, x.data(), m.rows, m.cols, out.data());
}

void read_rows(int format, int rows, int cols, const ConstBytes& packed, const ConstInts& ids, const Floats& out) {
  const Matrix m = matrix_view(format, rows, cols, packed);
  require(out.ndim() == 2 && out.shape(0) == ids.shape(0) && int(out.shape(1)) == padded(cols),
          "out must be [ids, columns padded to 32]");
  for (size_t i = 0; i < ids.shape(0); i++) {
    require(ids.data()[i] >= 0 && ids.data()[i] < rows, "row id out of range");
    kernels().read_row(m, ids.data()[i], out.data() + i * out.shape(1));
  }
}

// y[M, N padded] = x[M, K padded] W^T, and dx = dy W: for tests and the roofline.
void product(int format, int rows, int cols, const ConstBytes& packed, const ConstFloats& x, const Floats& y,
             const std::string& precision, bool backward, int digits) {
  const Matrix m = matrix_view(format, rows, cols, packed);
  const int in = backward ? padded(rows) : padded(cols), out = backward ? padded(cols) : padded(rows), count = int(x.shape(0));
  require(x.ndim() == 2 && y.ndim() == 2 && int(x.shape(1)) == in && int(y.shape(1)) == out && x.shape(0) == y.shape(0),
          "x and y must be [rows, width padded to 32]");
  require(digits == 1 || digits == 2, "digits: expected 1 or 2");
  const Mode mode = mode_of(precision);
  nb::gil_scoped_release release;
  Dims dims{};
  Engine engine(dims);
  const Batch batch;
  if (backward) {
    Activations input{mode, count, padded(cols), 0, nullptr, nullptr, nullptr, nullptr};
    const LinearBackwardJob job[] = {{&m, kTargets, x.data(), in, nullptr}};
    linear_backward(engine, input, job, 1, batch, 0, y.data(), out);
  } else {
    const Activations input = prepare(mode, digits, x.data(), count, in, engine.normed_low, engine.q8, engine.blocks);
    const LinearJob job[] = {{&m, kTargets, y.data(), out, false, nullptr}};
    linear(engine, input, job, 1, batch, 0);
  }
}

// Multiply-adds that all threads do together: `steps` of each.
int64_t peak(const std::string& what, int64_t steps) {
  const char* names[] = {"int8", "int16", "bf16", "f32"};
  for (int kind = 0; kind < 4; kind++)
    if (what == names[kind]) {
      require(steps > 0, "steps: expected a positive number");
      nb::gil_scoped_release release;
      std::vector<int64_t> done(static_cast<size_t>(threads()), 0);
      parallel_for(threads(), [&](int task, int) { done[size_t(task)] = kernels().peak(Peak(kind), steps); });
      int64_t sum = 0;
      for (int64_t count : done) sum += count;
      return sum;
    }
  throw std::invalid_argument("'" + what + "': expected int8, int16, bf16 or f32");
}

// Every thread reads its share of `data`, `times` times.
void read_all(const ConstBytes& data, int times) {
  nb::gil_scoped_release release;
  const int shares = threads();
  const size_t share = data.size() / size_t(shares);
  parallel_for(shares, [&](int task, int) {
    for (int i = 0; i < times; i++) kernels().read_all(data.data() + size_t(task) * share, share);
  });
}

void bind_weights(nb::module_& m) {
  m.def("usable_levels", [] {
    std::vector<std::string> names;
    for (Level level : usable_levels()) names.emplace_back(level_name(level));
    return names;
  });
  m.def("level", [] { return std::string(level_name(kernels().level)); });
  m.def("set_level", [](const std::string& name) { set_level(level_from_name(name)); }, nb::arg("name"));
  m.def("threads", [] { return threads(); });
  m.def(
      "set_threads",
      [](int count) {
        require(count >= 1 && count <= 256, "threads: expected 1 to 256");
        set_threads(count);
      },
      nb::arg("count"));
  m.def(
      "packed_bytes", [](int format, int rows, int cols) { return packed_bytes(packed_matrix(Format(format), rows, cols)); },
      nb::arg("format"), nb::arg("rows"), nb::arg("cols"));
  m.def(
      "checksums",
      [](const std::vector<ConstBytes>& tensors) {
        std::vector<uint64_t> sums(tensors.size());
        nb::gil_scoped_release release;
        parallel_for(int(tensors.size()),
                     [&](int i, int) { sums[size_t(i)] = checksum(tensors[size_t(i)].data(), tensors[size_t(i)].size()); });
        return sums;
      },
      nb::arg("tensors"));
  m.def("pack", &pack, nb::arg("format"), nb::arg("rows"), nb::arg("cols"), array("gguf"), array("packed"));
  m.def("quantize_rows", &quantize_rows, nb::arg("format"), array("x"), array("out"));
  m.def("read_rows", &read_rows, nb::arg("format"), nb::arg("rows"), nb::arg("cols"), array("packed"), array("ids"),
        array("out"));
  m.def("product", &product, nb::arg("format"), nb::arg("rows"), nb::arg("cols"), array("packed"), array("x"), array("y"),
        nb::arg("precision"), nb::arg("backward") = false, nb::arg("digits") = 1);
}

void bind_speed(nb::module_& m) {
  m.def("peak", &peak, nb::arg("what"), nb::arg("steps"));
  m.def("read_all", &read_all, array("data"), nb::arg("times") = 1);
  m.def("profile", [](bool on) { profile(on); }, nb::arg("on"));
  m.def("profiled", [] { return profiled(); });
}

void bind_numbers(nb::module_& m) {
  m.def(
      "sum_squares",  // of each
      [](const std::vector<ConstFloats>& arrays) {
        std::vector<double> sums(arrays.size());
        nb::gil_scoped_release release;
        parallel_for(int(arrays.size()), [&](int i, int) {
          sums[size_t(i)] = kernels().sum_squares(arrays[size_t(i)].data(), int64_t(arrays[size_t(i)].size()));
        });
        return sums;
      },
      array("arrays"));
  m.def(
      "clear",
      [](const std::vector<Floats>& arrays) {
        nb::gil_scoped_release release;
        parallel_for(int(arrays.size()),
                     [&](int i, int) { std::fill_n(arrays[size_t(i)].data(), arrays[size_t(i)].size(), 0.0f); });
      },
      array("arrays"));
  m.def(
      "adamw",
      [](const Floats& w, const ConstFloats& g, const Floats& first, const Floats& second, double lr, double beta1, double beta2,
         double eps, double weight_decay, int64_t step, double grad_scale) {
        require(w.size() == g.size() && w.size() == first.size() && w.size() == second.size(), "adamw: arrays differ in size");
        require(step >= 1, "adamw: step counts from 1");
        const float step_size = float(lr / (1 - std::pow(beta1, double(step)))),
                    root = float(1 / std::sqrt(1 - std::pow(beta2, double(step))));
        nb::gil_scoped_release release;
        constexpr int64_t grain = 1 << 14;  // parameters a task
        const int64_t count = int64_t(w.size());
        parallel_for(int((count + grain - 1) / grain), [&](int task, int) {
          const int64_t at = task * grain;
          kernels().adamw(w.data() + at, g.data() + at, first.data() + at, second.data() + at, std::min(grain, count - at),
                          float(grad_scale), float(beta1), float(beta2), step_size, root, float(eps),
                          float(1 - lr * weight_decay));
        });
      },
      array("param"), array("grad"), array("m"), array("v"), nb::arg("lr"), nb::arg("beta1"), nb::arg("beta2"), nb::arg("eps"),
      nb::arg("weight_decay"), nb::arg("step"), nb::arg("grad_scale") = 1.0);
  nb::class_<Sampling>(m, "Sampling")
      .def(
          "__init__",
          [](Sampling* self, float temperature, int top_k, float top_p, float min_p, float repetition, float presence,
             float frequency,
             uint64_t seed) { new (self) Sampling{temperature, top_p, min_p, repetition, presence, frequency, top_k, seed}; },
          nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"), nb::arg("repetition_penalty"),
          nb::arg("presence_penalty"), nb::arg("frequency_penalty"), nb::arg("seed"))
      .def_prop_ro("penalizes", &Sampling::penalizes);
  // A token from each row: `said` are those before it, of which none need be there if nothing penalizes them, `steps` their
  // number.
  m.def(
      "sample",
      [](const nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>& logits, const std::vector<const Sampling*>& options,
         const std::vector<std::vector<int32_t>>& said, const std::vector<uint64_t>& steps) {
        const size_t rows = logits.shape(0);
        const int vocab = int(logits.shape(1));
        // NumPy gives an array without elements strides of zero.
        require(vocab > 0 && (!rows || logits.stride(1) == 1 || vocab == 1), "sample: logits must be rows side by side");
        require(options.size() == rows && said.size() == rows && steps.size() == rows, "sample: lists disagree in length");
        for (const std::vector<int32_t>& own : said) check_ids(own, vocab, "token");
        for (const Sampling* own : options) require(own, "sample: no options");
        std::vector<int> tokens(rows);
        nb::gil_scoped_release release;
        parallel_for(int(rows), [&](int row, int) {
          const size_t i = size_t(row);
          tokens[i] = sample(logits.data() + int64_t(row) * logits.stride(0), vocab, *options[i], said[i], steps[i]);
        });
        return tokens;
      },
      array("logits"), nb::arg("options"), nb::arg("said"), nb::arg("steps"));
}

}  // namespace

void bind_kernels(nb::module_& m) {
  bind_weights(m);
  bind_numbers(m);
  bind_speed(m);
}
