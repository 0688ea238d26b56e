// AVX2, FMA and F16C: every x86-64 processor since 2013 (Haswell) and 2017 (Zen).

#include "kernel/avx2.h"

namespace nomoat {

namespace {
constexpr Kernels kTable = make_kernels<Avx2>(Level::avx2);
}

const Kernels* avx2_kernels() { return &kTable; }

}  // namespace nomoat
