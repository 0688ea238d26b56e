#pragma once
// Wall time by stage, as the thread that runs the engine sees it. Off unless asked for; stages do not contain each other.

#include <chrono>
#include <string>
#include <utility>
#include <vector>

namespace nomoat {

// Begins at zero when switched on.
void profile(bool on);
// (stage, seconds) in the order in which they first ran.
std::vector<std::pair<std::string, double>> profiled();

namespace detail {
extern bool profiling;
void add_time(const char* stage, double seconds);
}  // namespace detail

// Counts from here to the end of the scope for `stage`, a name.
class Timed {
 public:
  explicit Timed(const char* stage) : stage_(stage) {
    if (detail::profiling) began_ = Clock::now();
  }
  ~Timed() {
    if (detail::profiling) detail::add_time(stage_, std::chrono::duration<double>(Clock::now() - began_).count());
  }
  Timed(const Timed&) = delete;

 private:
  using Clock = std::chrono::steady_clock;
  const char* stage_;
  Clock::time_point began_{};
};

}  // namespace nomoat
