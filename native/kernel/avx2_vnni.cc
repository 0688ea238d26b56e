// AVX2 with the 256-bit VNNI dot: laptops without AVX-512 (Alder Lake and later).

#include "kernel/avx2.h"

namespace nomoat {

namespace {
constexpr Kernels kTable = make_kernels<Avx2>(Level::avx2_vnni);
}

const Kernels* avx2_vnni_kernels() { return &kTable; }

}  // namespace nomoat
