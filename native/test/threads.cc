// base/threads.h: every task runs once, exceptions arrive, results do not depend on the number of threads, forks work.

#include "base/threads.h"

#include <atomic>
#include <numeric>
#include <thread>

#include "test/test.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace nomoat {

namespace {

constexpr int kCounts[] = {1, 2, 3, 8};

TEST("threads: every task runs exactly once, on a thread that exists") {
  for (int count : kCounts) {
    const Threads set(count);
    CHECK(threads() == count, "threads() is %d, expected %d", threads(), count);
    for (int tasks : {0, 1, 2, 3, 7, 64, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(tasks));
      std::atomic<int> strangers{0};
      parallel_for(tasks, [&](int task, int thread) {
        runs[size_t(task)]++;
        if (thread < 0 || thread >= count) strangers++;
      });
      for (int i = 0; i < tasks; i++)
        CHECK(runs[size_t(i)] == 1, "%d threads: task %d of %d ran %d times", count, i, tasks, int(runs[size_t(i)]));
      CHECK(strangers == 0, "%d tasks had a thread number outside [0, %d)", int(strangers), count);
    }
  }
  const Threads clamped(-3);
  CHECK(threads() == 1, "set_threads(-3) gave %d threads", threads());
}

TEST("threads: one region after the other, with pauses longer than workers spin") {
  const Threads set(3);
  std::vector<int> sums(16);
  for (int round = 0; round < 300; round++) {
    parallel_for(16, [&](int task, int) { sums[size_t(task)] += task; });
    if (round % 100 == 99) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  for (int task = 0; task < 16; task++) CHECK(sums[size_t(task)] == 300 * task, "task %d: %d", task, sums[size_t(task)]);
}

TEST("threads: what is read next is a hint: any address will do, and tasks run as without") {
  const std::vector<uint8_t> weights(1 << 20);
  const std::vector<const uint8_t*> next = {weights.data(), nullptr, weights.data() + weights.size() - 1};
  for (int count : kCounts) {
    const Threads set(count);
    std::vector<std::atomic<int>> runs(40);
    for (int round = 0; round < 50; round++) parallel_for(40, [&](int task, int) { runs[size_t(task)]++; }, next);
    for (int task = 0; task < 40; task++) CHECK(runs[size_t(task)] == 50, "task %d ran %d times", task, int(runs[size_t(task)]));
  }
}

TEST("threads: a task's exception is rethrown and the pool goes on") {
  for (int count : kCounts) {
    const Threads set(count);
    for (int bad : {0, 5, 31}) {
      std::string caught;
      try {
        parallel_for(32, [&](int task, int) {
          if (task == bad) throw std::invalid_argument("task " + std::to_string(task));
        });
      } catch (const std::invalid_argument& error) {
        caught = error.what();
      }
      CHECK(caught == "task " + std::to_string(bad), "%d threads: caught '%s'", count, caught.c_str());
      std::atomic<int> ran{0};
      parallel_for(32, [&](int, int) { ran++; });
      CHECK(ran == 32, "%d threads: %d of 32 tasks after the exception", count, int(ran));
    }
  }
}

TEST("threads: two callers at once take turns") {
  const Threads set(3);
  auto work = [](int seed, std::vector<long>* sums) {
    for (int round = 0; round < 5000; round++)
      parallel_for(8, [&](int task, int) { (*sums)[size_t(task)] += long(task + seed) * round; });
  };
  std::vector<long> here(8), there(8);
  std::thread other(work, 100, &there);
  work(1, &here);
  other.join();
  for (int task = 0; task < 8; task++) {
    CHECK(here[size_t(task)] == long(task + 1) * 12497500L, "task %d here: %ld", task, here[size_t(task)]);
    CHECK(there[size_t(task)] == long(task + 100) * 12497500L, "task %d there: %ld", task, there[size_t(task)]);
  }
}

#if defined(__unix__) || defined(__APPLE__)
TEST("threads: the child of a fork builds a pool of its own, and the parent's goes on") {
  const Threads set(3);
  auto sum = [] {
    std::vector<int> parts(64);
    parallel_for(64, [&](int task, int) { parts[size_t(task)] = task; });
    return std::accumulate(parts.begin(), parts.end(), 0);
  };
  CHECK(sum() == 2016, "before the fork");
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a child that waits for threads it does not have would wait for ever
    const bool whole = sum() == 2016 && threads() == 3;
    set_threads(2);
    _exit(whole && sum() == 2016 ? 0 : 1);
  }
  CHECK(child > 0, "fork failed");
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status), "the child was killed, status 0x%x", unsigned(status));
  CHECK(WEXITSTATUS(status) == 0, "the child computed something else");
  CHECK(sum() == 2016, "after the fork");
}
#endif

}  // namespace

}  // namespace nomoat
