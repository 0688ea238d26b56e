// AVX-512 with VNNI and BF16 (Zen 4 and later, Cooper Lake).

#include "kernel/avx512.h"

namespace nomoat {

namespace {
constexpr Kernels kTable = make_kernels<Avx512>(Level::avx512);
}

const Kernels* avx512_kernels() { return &kTable; }

}  // namespace nomoat
