#include "base/profile.h"

namespace nomoat {

namespace {
std::vector<std::pair<std::string, double>> stages;
}

namespace detail {

bool profiling = false;

void add_time(const char* stage, double seconds) {
  for (auto& [name, sum] : stages)
    if (name == stage) {
      sum += seconds;
      return;
    }
  stages.emplace_back(stage, seconds);
}

}  // namespace detail

void profile(bool on) {
  if (on) stages.clear();
  detail::profiling = on;
}

std::vector<std::pair<std::string, double>> profiled() { return stages; }

}  // namespace nomoat
