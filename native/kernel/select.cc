#include "kernel/table.h"

namespace nomoat {

namespace {

const Kernels* of(Level level) {
  switch (level) {
#if defined(__x86_64__)
    case Level::avx2:
      return avx2_kernels();
    case Level::avx2_vnni:
      return avx2_vnni_kernels();
    case Level::avx512:
      return avx512_kernels();
    case Level::amx:
      return amx_kernels();
#elif defined(__aarch64__)
    case Level::neon:
      return neon_kernels();
#endif
    default:
      return scalar_kernels();
  }
}

const Kernels* current = nullptr;

}  // namespace

const Kernels& kernels() {
  if (!current) current = of(usable_levels().back());
  return *current;
}

void set_level(Level level) { current = of(level); }

}  // namespace nomoat
