#pragma once
// Which instruction sets this process may use: CPUID says what the processor has, XGETBV what the system saves.

#include <string>
#include <vector>

namespace nomoat {

enum class Level : int { scalar, avx2, avx2_vnni, avx512, amx, neon, count };

const char* level_name(Level level);

// Every level that was built and that this machine can execute, slowest first.
std::vector<Level> usable_levels();

// Throws std::invalid_argument naming the usable levels when `name` is not one of them.
Level level_from_name(const std::string& name);

}  // namespace nomoat
