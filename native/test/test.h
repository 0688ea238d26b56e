#pragma once
// The whole test framework: TEST registers, CHECK fails the test it stands in, main.cc runs all.

#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel/table.h"

namespace nomoat {

struct Test {
  const char* name;
  void (*body)();
};

std::vector<Test>& tests();

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// printf's arguments say what was found.
[[noreturn]] __attribute__((format(printf, 3, 4))) void fail(const char* file, int line, const char* format, ...);

// Calls body once a level that this machine can execute, with the level in use and its name in the message of a failure.
void for_levels(const std::function<void(const Kernels&)>& body);

// Restores the number of threads at the end of a test.
struct Threads {
  explicit Threads(int count);
  ~Threads();
  int before;
};

using Floats = std::vector<float>;

struct Random : std::mt19937_64 {
  using std::mt19937_64::mt19937_64;
  int below(int limit) { return int(operator()() % uint64_t(limit)); }
  float uniform(float low, float high) { return low + (high - low) * float(double(operator()() >> 11) * 0x1p-53); }
  Floats floats(size_t count, float low = -1, float high = 1);
};

// The largest |found - expected|, infinite where one of them is NaN and the other is not.
double distance(const float* found, const float* expected, size_t count);
bool same_bits(const void* a, const void* b, size_t bytes);
bool same_bits(const Floats& a, const Floats& b);

// Half the distance from 1 to the next float32: the largest relative error of one rounding. Of bf16: 8 bits of mantissa.
constexpr double kRound = 0x1p-24, kRoundBf16 = 0x1p-9;

// Random GGUF rows with finite scales of either sign, packed, and their values by the definition of the format.
struct Weights {
  Format format;
  int rows, cols;
  std::vector<uint8_t> gguf, packed;
  Floats values;  // [rows][cols]
  Floats sizes;   // |scale * code| + |min|: what rounding errors of a product are measured by
  Matrix matrix;

  float at(int row, int col) const { return row < rows && col < cols ? values[size_t(row) * cols + col] : 0.0f; }
};

Weights random_weights(Format format, int rows, int cols, uint64_t seed);

constexpr Format kFormats[] = {Format::F32,  Format::F16,    Format::BF16,   Format::Q4_0, Format::Q4_1, Format::Q5_0,
                               Format::Q5_1, Format::Q8_0,   Format::Q2_K,   Format::Q3_K, Format::Q4_K, Format::Q5_K,
                               Format::Q6_K, Format::IQ4_NL, Format::IQ4_XS, Format::MXFP4};
inline bool is_float(Format f) { return f == Format::F32 || f == Format::F16 || f == Format::BF16; }
inline int block_of(Format f) {
  return is_float(f) ? 1 : (f >= Format::Q2_K && f <= Format::Q6_K) || f == Format::IQ4_XS ? 256 : 32;
}

}  // namespace nomoat

#define NOMOAT_JOIN2(a, b) a##b
#define NOMOAT_JOIN(a, b) NOMOAT_JOIN2(a, b)
#define TEST(name)                                                                                                             \
  static void NOMOAT_JOIN(body_, __LINE__)();                                                                                  \
  static const bool NOMOAT_JOIN(known_, __LINE__) = (::nomoat::tests().push_back({name, NOMOAT_JOIN(body_, __LINE__)}), true); \
  static void NOMOAT_JOIN(body_, __LINE__)()
#define CHECK(condition, ...) ((condition) ? (void)0 : ::nomoat::fail(__FILE__, __LINE__, __VA_ARGS__))
