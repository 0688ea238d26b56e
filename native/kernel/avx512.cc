// AVX-512 with VNNI and BF16 (Zen 4 and later, Cooper Lake).

#include "kernel/attend_bf16.h"

namespace nomoat {

namespace {

constexpr Kernels make_avx512_kernels() {
  Kernels k = make_kernels<Avx512>(Level::avx512);
  k.attend_backward_bf16 = attend_backward_low<VectorProducts>;
  return k;
}

constexpr Kernels kTable = make_avx512_kernels();

}  // namespace

const Kernels* avx512_kernels() { return &kTable; }

}  // namespace nomoat
