// native_tests [WORD]: runs the tests whose name holds WORD, prints failures and the totals, returns 1 if any failed.

#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "base/threads.h"
#include "test/test.h"

namespace nomoat {

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

void fail(const char* file, int line, const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const char* name = std::strrchr(file, '/');
  throw Failure(std::string(name ? name + 1 : file) + ":" + std::to_string(line) + ": " + text);
}

void for_levels(const std::function<void(const Kernels&)>& body) {
  struct Restore {
    Level level = kernels().level;
    ~Restore() { set_level(level); }
  } restore;
  for (Level level : usable_levels()) {
    set_level(level);
    try {
      body(kernels());
    } catch (const Failure& failure) {
      throw Failure(std::string(level_name(level)) + ", " + failure.what());
    }
  }
}

Threads::Threads(int count) : before(threads()) { set_threads(count); }
Threads::~Threads() { set_threads(before); }

Floats Random::floats(size_t count, float low, float high) {
  Floats x(count);
  for (float& value : x) value = uniform(low, high);
  return x;
}

double distance(const float* found, const float* expected, size_t count) {
  double most = 0;
  for (size_t i = 0; i < count; i++) {
    if (std::isnan(found[i]) != std::isnan(expected[i])) return INFINITY;
    if (found[i] == expected[i] || std::isnan(found[i])) continue;
    const double apart = std::fabs(double(found[i]) - double(expected[i]));
    most = apart > most ? apart : most;
  }
  return most;
}

bool same_bits(const void* a, const void* b, size_t bytes) { return std::memcmp(a, b, bytes) == 0; }
bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && same_bits(a.data(), b.data(), a.size() * sizeof(float));
}

}  // namespace nomoat

int main(int count, char** arguments) {
  int passed = 0, failed = 0;
  const auto begin = std::chrono::steady_clock::now();
  for (const nomoat::Test& test : nomoat::tests()) {
    if (count > 1 && !std::strstr(test.name, arguments[1])) continue;
    try {
      test.body();
      passed++;
    } catch (const std::exception& error) {
      failed++;
      std::printf("FAILED %s\n  %s\n", test.name, error.what());
    }
    std::fflush(stdout);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  std::printf("%d passed, %d failed in %.1f s; levels:", passed, failed, seconds);
  for (nomoat::Level level : nomoat::usable_levels()) std::printf(" %s", nomoat::level_name(level));
  std::printf("\n");
  return failed || !passed;
}
