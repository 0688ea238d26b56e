#pragma once
// Adapters rounded to bf16, which inference reads instead of float32: half the bytes, in the order in which they are read.

#include <algorithm>
#include <utility>
#include <vector>

#include "base/buffer.h"
#include "kernel/table.h"
#include "quant/half.h"

namespace nomoat {

class RoundedLoras {
 public:
  // A of x[rank][cols], and B^T; both live as long as this object. What is added one after the other lies one behind the other.
  const bf16* a(const float* x, int rank, int cols) { return interleaved(x, rank, cols, kLoraRanks); }
  const bf16* bt(const float* x, int rank, int cols) { return interleaved(x, rank, cols, rank); }

 private:
  const bf16* interleaved(const float* x, int rank, int cols, int group) {
    const size_t width = size_t(round_up(cols, kLoraCols));
    bf16* to = room(size_t((rank + group - 1) / group * group) * width);
    for (int r = 0; r < rank; r++)
      for (int c = 0; c < cols; c++)
        to[size_t(r - r % group) * width + size_t(c / kLoraCols * group + r % group) * kLoraCols + size_t(c % kLoraCols)] =
            float_to_bf16(x[size_t(r) * size_t(cols) + size_t(c)]);
    return to;
  }

  bf16* room(size_t count) {
    if (chunks.empty() || taken + count > chunks.back().bytes() / sizeof(bf16)) {
      const size_t twice = chunks.empty() ? 0 : chunks.back().bytes() / sizeof(bf16) * 2;  // a small adapter takes little
      chunks.emplace_back().get<bf16>(std::max(count, std::min(twice, kHugePage / sizeof(bf16))));
      taken = 0;
    }
    return chunks.back().data<bf16>() + std::exchange(taken, taken + count);
  }

  std::vector<Buffer> chunks;
  size_t taken = 0;  // of the last one
};

}  // namespace nomoat
