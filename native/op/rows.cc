// Row plumbing shared by the blocks: rope tables, the tape's element types, the cache, embedding rows.

#include <algorithm>
#include <cmath>

#include "op/engine.h"

namespace nomoat {

namespace {

int most_kv_heads(const Engine& engine) {
  int most = 0;
  for (const Layer& layer : engine.layers) most = std::max(most, layer.kv_heads);
  return most;
}

}  // namespace

// Angles are computed in double: float32 products lose 1e-4 radians at 8k positions.
const float* Rope::table(int positions) {
  const int half = pairs();
  int known = int(table_.size()) / (2 * (half ? half : 1));
  if (known < positions) {
    const int wanted = round_up(positions, 256);
    table_.resize(size_t(wanted) * half * 2);
    for (; known < wanted; known++)
      for (int i = 0; i < half; i++) {
        const double angle = double(known) * double(inv_freq[i]);
        float* row = &table_[size_t(known) * half * 2];
        row[i] = float(std::cos(angle)) * magnitude;
        row[half + i] = float(std::sin(angle)) * magnitude;
      }
  }
  return table_.data();
}

KvCache::KvCache(const Dims& dims, const std::vector<int>& kv_heads, KvType type) : begins_(1, 0), type_(type) {
  const size_t stride = size_t(dims.head_stride());
  const size_t row =
      type == KvType::int8 ? stride + sizeof(float) : stride * (type == KvType::f32 ? sizeof(float) : sizeof(bf16));
  head_bytes_ = 2 * kPageTokens * row;
  for (int heads : kv_heads) begins_.push_back(begins_.back() + size_t(heads) * head_bytes_);
}

void KvCache::reserve(int pages) {
  const size_t most = std::max<size_t>(1, 4 * kHugePage / std::max<size_t>(1, page_bytes()));
  while (int(pages_.size()) < pages) {  // as many as are missing, or as there are: a short text takes little
    const size_t count = std::min(most, std::max(size_t(pages) - pages_.size(), pages_.size())), bytes = count * page_bytes();
    uint8_t* first = slabs_.emplace_back().get<uint8_t>(bytes);
    for (size_t i = 0; i < count; i++) pages_.push_back(first + i * page_bytes());
  }
}

Tape::Tape(const Engine& engine, Mode mode)
    : kept(engine.layers.size()),
      inputs(engine.layers.size()),
      keep(engine.layers.size(), 1),
      scratch(engine.dims, {most_kv_heads(engine)}, mode == Mode::f32 ? KvType::f32 : KvType::bf16) {}

void clear_padding(float* x, int rows, int used, int stride) {
  for (int m = 0; m < rows && used < stride; m++)
    std::memset(x + size_t(m) * stride + used, 0, size_t(stride - used) * sizeof(float));
}

Rows rows_for_products(Mode mode, int rows, int cols, Buffer& wide, Buffer& low) {
  if (!low_products(mode)) return {wide.get<float>(size_t(rows) * size_t(cols)), nullptr, cols, cols};
  const int ld = low_stride(cols);
  return {nullptr, low.get<bf16>(size_t(rows) * size_t(ld)), cols, ld};
}

Rows rows_on_tape(Mode mode, int cols, const Buffer& tape) {
  if (mode == Mode::bf16) return {nullptr, tape.data<bf16>(), cols, cols};
  return {tape.data<float>(), nullptr, cols, cols};
}

Rows rows_on_tape(Mode mode, int rows, int cols, Buffer& tape) {
  const size_t count = size_t(rows) * size_t(cols);
  if (mode == Mode::bf16)
    tape.get<bf16>(count);
  else
    tape.get<float>(count);
  return rows_on_tape(mode, cols, tape);
}

void save_rows(Mode mode, const float* x, size_t count, Buffer& into) {
  constexpr int grain = 1 << 15;  // elements a task
  bf16* low = mode == Mode::bf16 ? into.get<bf16>(count) : nullptr;
  float* wide = mode == Mode::bf16 ? nullptr : into.get<float>(count);
  for_rows(int((count + grain - 1) / grain), 1, [&](int first, int last) {
    const size_t begin = size_t(first) * grain, end = size_t(last) * grain < count ? size_t(last) * grain : count;
    if (low)
      kernels().to_bf16(x + begin, int(end - begin), low + begin);
    else
      std::memcpy(wide + begin, x + begin, (end - begin) * sizeof(float));
  });
}

const float* load_rows(Mode mode, const Buffer& saved, size_t count, Buffer& wide) {
  if (mode != Mode::bf16) return saved.data<float>();
  constexpr int grain = 1 << 15;
  const bf16* from = saved.data<bf16>();
  float* to = wide.get<float>(count);
  for_rows(int((count + grain - 1) / grain), 1, [&](int first, int last) {
    const size_t begin = size_t(first) * grain, end = size_t(last) * grain < count ? size_t(last) * grain : count;
    kernels().to_f32(from + begin, int(end - begin), to + begin);
  });
  return to;
}

void embed_rows(Engine& engine, const int32_t* tokens, int rows, float* x) {
  const int width = padded(engine.dims.width);
  for_rows(rows, 8, [&](int first, int last) {
    for (int m = first; m < last; m++) {
      float* row = x + size_t(m) * width;
      kernels().read_row(engine.embed, tokens[m], row);
      for (int i = 0; engine.dims.embed_scale != 1 && i < width; i++) row[i] *= engine.dims.embed_scale;
    }
  });
}

}  // namespace nomoat
