#include "base/threads.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nomoat {

namespace {

inline void pause_cpu() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// A decode step has five parallel regions a layer, microseconds apart: workers spin that long before they sleep.
// 4,000 pauses are 40-150 microseconds on the processors measured.
constexpr int kSpins = 4000;

// Tasks of a region that lie together, the one after the last in the upper half, the next to claim in the lower.
struct alignas(64) Share {
  std::atomic<uint64_t> claims{0};
  std::atomic<const uint8_t*> next{nullptr};  // what the thread reads in the region after this one
};

// Fetched of what a thread reads next, while it waits: a second-level cache has 256 KB or more.
constexpr int kFetched = 128 << 10;

// A thread that waits: it pauses, and memory, which would be idle, brings what the thread reads next.
struct Wait {
  const uint8_t *at, *end;

  explicit Wait(Share& share) : at(share.next.exchange(nullptr, std::memory_order_relaxed)), end(at ? at + kFetched : at) {}

  void pause() {
    for (int line = 0; line < 4 && at != end; line++, at += 64) __builtin_prefetch(at, 0, 2);
    pause_cpu();
  }
};

struct Pool {
  explicit Pool(int workers) : shares(size_t(workers) + 1) {
    for (int i = 0; i < workers; i++) threads.emplace_back([this, i] { work(i + 1); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stopping.store(true);
      generation.fetch_add(1);
    }
    wake.notify_all();
    for (std::thread& t : threads) t.join();
  }

  // Returns when all tasks are done, which does not need every worker: one that the system has not woken yet, because other
  // programs run, finds nothing left to claim.
  void run(int count, void (*function)(void*, int, int), void* argument, std::span<const uint8_t* const> next) {
    call = function;
    context = argument;
    failure = nullptr;
    done.store(0, std::memory_order_relaxed);
    const int parts = int(shares.size());
    for (size_t i = 0; i < shares.size() && i < next.size(); i++) shares[i].next.store(next[i], std::memory_order_relaxed);
    for (int i = 0; i < parts; i++)
      shares[size_t(i)].claims.store(uint64_t(share_begin(count, i + 1, parts)) << 32 | uint64_t(share_begin(count, i, parts)),
                                     std::memory_order_release);
    {
      std::lock_guard<std::mutex> lock(mutex);
      generation.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
    drain(0);
    Wait wait(shares[0]);
    for (int i = 0; done.load(std::memory_order_acquire) != count; i++) {
      if (i < kSpins)
        wait.pause();
      else
        std::this_thread::yield();  // a worker may be waiting for this very core
    }
    if (failure) std::rethrow_exception(failure);
  }

  // A thread takes its own share first: neighbouring tasks read neighbouring weights, which are fetched ahead. Then it takes what
  // others have left. While a claimed task is not done, run() does not return: `call` and `context` belong to that claim.
  void drain(int thread) {
    int mine = 0;
    for (size_t i = 0; i < shares.size(); i++) {
      std::atomic<uint64_t>& claims = shares[(size_t(thread) + i) % shares.size()].claims;
      while (left(claims.load(std::memory_order_relaxed))) {
        const uint64_t claim = claims.fetch_add(1, std::memory_order_acq_rel);
        if (!left(claim)) break;
        mine++;
        try {
          call(context, int(uint32_t(claim)), thread);
        } catch (...) {
          std::lock_guard<std::mutex> lock(mutex);
          if (!failure) failure = std::current_exception();
        }
      }
    }
    if (mine) done.fetch_add(mine, std::memory_order_release);
  }

  static bool left(uint64_t claim) { return uint32_t(claim) < uint32_t(claim >> 32); }

  void work(int thread) {
    uint64_t seen = 0;
    for (;;) {
      Wait wait(shares[size_t(thread)]);
      for (int i = 0; i < kSpins && generation.load(std::memory_order_acquire) == seen; i++) wait.pause();
      if (generation.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex);
        wake.wait(lock, [&] { return generation.load(std::memory_order_acquire) != seen; });
      }
      seen = generation.load(std::memory_order_acquire);
      if (stopping.load()) return;
      drain(thread);
    }
  }

  std::vector<std::thread> threads;
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<Share> shares;                        // one a thread
  alignas(64) std::atomic<uint64_t> generation{0};  // workers spin on it: on a cache line of its own
  std::atomic<bool> stopping{false};
  alignas(64) std::atomic<int> done{0};
  void (*call)(void*, int, int) = nullptr;
  void* context = nullptr;
  std::exception_ptr failure;
};

std::unique_ptr<Pool> pool;
std::atomic<int> wanted{1};
// Held by the caller whose tasks run, and while the pool is replaced. On the heap: see forget_pool.
std::mutex* turn = new std::mutex;

#if defined(__unix__) || defined(__APPLE__)
// The child of a fork has none of the parent's threads: it forgets the pool (its destructor would join
// threads that do not exist) and builds its own at the first parallel region. Whoever held the turn may be gone too.
void forget_pool() {
  (void)pool.release();
  turn = new std::mutex;
}

const int kForkHandler = pthread_atfork(nullptr, nullptr, forget_pool);
#endif

}  // namespace

void set_threads(int count) {
  std::lock_guard<std::mutex> lock(*turn);
  wanted = count < 1 ? 1 : count;
  if (pool && int(pool->threads.size()) + 1 != wanted) pool.reset();
}

int threads() { return wanted; }

namespace detail {

void run(int tasks, void (*call)(void*, int, int), void* context, std::span<const uint8_t* const> next) {
  if (tasks <= 0) return;
  if (threads() == 1 || tasks == 1) {
    for (int i = 0; i < tasks; i++) call(context, i, 0);
    return;
  }
#if defined(__unix__) || defined(__APPLE__)
  (void)kForkHandler;
#endif
  std::lock_guard<std::mutex> lock(*turn);
  if (!pool) pool = std::make_unique<Pool>(wanted - 1);
  pool->run(tasks, call, context, next);
}

}  // namespace detail

}  // namespace nomoat
