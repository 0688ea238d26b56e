#pragma once
// A small fork-join pool. No result may depend on which thread runs a task: tasks write disjoint outputs,
// and every sum is taken inside one task in a fixed order.

#include <cstdint>
#include <span>
#include <type_traits>

namespace nomoat {

// Number of threads that share parallel work, the caller included. Takes effect at the next parallel_for.
void set_threads(int count);
int threads();

// The first task of a thread's own share of a region, out of `shares`, one a thread; the share after the last begins at `tasks`.
constexpr int share_begin(int tasks, int share, int shares) { return int(int64_t(tasks) * share / shares); }

namespace detail {
void run(int tasks, void (*call)(void* context, int task, int thread), void* context, std::span<const uint8_t* const> next);
}

// Calls body(task, thread) for task in [0, tasks), thread in [0, threads()). Returns when all are done.
// The first exception that a task throws is rethrown here. Callers on several threads take turns. Not reentrant: tasks must
// not call it. `next`: an address for each thread, null or where it reads on afterwards, which it fetches while it waits.
template <class Body>
void parallel_for(int tasks, Body&& body, std::span<const uint8_t* const> next = {}) {
  using Plain = std::remove_reference_t<Body>;
  auto call = [](void* context, int task, int thread) { (*static_cast<Plain*>(context))(task, thread); };
  detail::run(tasks, call, const_cast<std::remove_const_t<Plain>*>(&body), next);
}

}  // namespace nomoat
