#include "base/cpu.h"

#include <cstdint>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace nomoat {

namespace {

#if defined(__x86_64__)

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t sub) {
  Registers r;
  if (!__get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}

uint64_t xgetbv() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
}

bool has(uint32_t word, int bit) { return (word >> bit) & 1; }

// Linux gives the 8 KB of tile registers to processes that ask: arch/x86/xstate in its documentation.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Intel SDM volume 2, CPUID; XCR0 bits: 1 SSE, 2 AVX, 5-7 opmask and ZMM state, 17 and 18 tiles.
bool usable(Level level) {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  if (level == Level::scalar) return true;
  if (!has(one.c, 27)) return false;  // OSXSAVE
  const uint64_t saved = xgetbv();
  const bool avx2 = (saved & 0x6) == 0x6 && has(one.c, 28) && has(one.c, 12) && has(one.c, 29) && has(seven.b, 5);
  if (level == Level::avx2) return avx2;
  if (level == Level::avx2_vnni) return avx2 && has(seven_one.a, 4);
  const bool foundation = has(seven.b, 16) && has(seven.b, 17) && has(seven.b, 30) && has(seven.b, 31);
  const bool avx512 = avx2 && (saved & 0xe6) == 0xe6 && foundation && has(seven.c, 1) && has(seven.c, 11) && has(seven_one.a, 5);
  if (level == Level::avx512) return avx512;
  if (level != Level::amx) return false;
  const bool tiles = (saved & 0x60000) == 0x60000 && has(seven.d, 22) && has(seven.d, 24) && has(seven.d, 25);
  return avx512 && tiles && may_use_tiles();
}

constexpr Level kBuilt[] = {Level::scalar, Level::avx2, Level::avx2_vnni, Level::avx512, Level::amx};

#elif defined(__aarch64__)

// Every ARMv8 processor has NEON; the level also needs the dot product.
bool usable(Level level) {
  if (level == Level::scalar) return true;
  if (level != Level::neon) return false;
#if defined(__ARM_FEATURE_DOTPROD)
  return true;  // the target's baseline has it: macOS on Apple M, or -march on the command line
#elif defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return false;
#endif
}

constexpr Level kBuilt[] = {Level::scalar, Level::neon};

#else

bool usable(Level level) { return level == Level::scalar; }

constexpr Level kBuilt[] = {Level::scalar};

#endif

}  // namespace

const char* level_name(Level level) {
  static const char* const names[] = {"scalar", "avx2", "avx2_vnni", "avx512", "amx", "neon"};
  return names[int(level)];
}

std::vector<Level> usable_levels() {
  std::vector<Level> levels;
  for (Level level : kBuilt)
    if (usable(level)) levels.push_back(level);
  return levels;
}

Level level_from_name(const std::string& name) {
  std::string known;
  for (Level level : usable_levels()) {
    if (name == level_name(level)) return level;
    known += std::string(known.empty() ? "" : ", ") + level_name(level);
  }
  throw std::invalid_argument("CPU level '" + name + "' cannot be used on this machine; usable: " + known);
}

}  // namespace nomoat
