// Row plumbing shared by the blocks: rope tables, the tape's element types, the cache, embedding rows.

#include <cmath>

#include "op/engine.h"

namespace nomoat {

// Angles are computed in double: float32 products lose 1e-4 radians at 8k positions.
const float* Engine::rope_table(int positions) {
  const int half = dims.rope_dim / 2;
  int known = int(rope_.size()) / (2 * (half ? half : 1));
  if (known < positions) {
    const int wanted = round_up(positions, 256);
    rope_.resize(size_t(wanted) * half * 2);
    for (; known < wanted; known++)
      for (int i = 0; i < half; i++) {
        const double angle = double(known) * double(inv_freq[i]);
        rope_[(size_t(known) * half + i) * 2] = float(std::cos(angle)) * dims.rope_magnitude;
        rope_[(size_t(known) * half + i) * 2 + 1] = float(std::sin(angle)) * dims.rope_magnitude;
      }
  }
  return rope_.data();
}

KvCache::KvCache(int layers, const Dims& dims, bool f32) : layers_(size_t(layers)), f32_(f32) {
  head_bytes_ = size_t(2) * kPageTokens * dims.head_stride() * (f32 ? 4 : 2);
  layer_bytes_ = head_bytes_ * size_t(dims.kv_heads);
}

void KvCache::reserve(int pages) {
  while (int(pages_.size()) < pages) {
    pages_.emplace_back();
    pages_.back().get<uint8_t>(page_bytes());
  }
}

const float* normed(Engine& engine, const float* x, const float* weight, int rows) {
  const int width = padded(engine.dims.width);
  float* h = engine.normed.get<float>(size_t(rows) * width);
  for_rows(rows, 8, [&](int first, int last) {
    for (int m = first; m < last; m++)
      kernels().rms_norm(x + size_t(m) * width, weight, engine.dims.width, engine.dims.eps, h + size_t(m) * width);
  });
  return h;
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
    for (int m = first; m < last; m++) kernels().read_row(engine.embed, tokens[m], x + size_t(m) * width);
  });
}

}  // namespace nomoat
