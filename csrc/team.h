// The threads of one call, and where they meet. OpenMP where the compiler has it (torch's own runtime,
// loaded before us); without it every call has one thread.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

struct alignas(64) Counter {
  std::atomic<int64_t> next{0};
};

using Clock = std::chrono::steady_clock;

// What the threads of one call share.
class Shared {
 public:
  Shared(int64_t threads, float* room) : floats(room), counters(threads) {}

  // Floats that the caller gave them.
  float* const floats;
  // Partial results of attention, which thread 0 has made room for.
  float* partials = nullptr;
  // How long thread 0 has slept.
  Clock::duration lost{0};

  void wait(int64_t id, int64_t threads) {
    const int64_t mine = number.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1) + 1 == threads) {
      for (Counter& each : counters) each.next.store(0, std::memory_order_relaxed);
      arrived.store(0, std::memory_order_relaxed);
      number.store(mine + 1);
      if (!asleep.load()) return;
      { std::lock_guard<std::mutex> held(lock); }
      woken.notify_all();
      return;
    }
    for (int64_t i = 0; i < AWAKE; i++) {
      if (number.load(std::memory_order_acquire) != mine) return;
      pause();
    }
    const Clock::time_point begin = Clock::now();
    {
      std::unique_lock<std::mutex> held(lock);
      asleep++;
      woken.wait(held, [&] { return number.load() != mine; });
      asleep--;
    }
    if (id == 0) lost += Clock::now() - begin;
  }
  int64_t take(int64_t counter, int64_t step) {
    return counters[counter].next.fetch_add(step, std::memory_order_relaxed);
  }

 private:
  // Looks at the others before a thread sleeps: tens of microseconds, more than the threads of a quiet
  // machine come apart in a stage of a decode step. Where other programs hold a core, the thread that all
  // wait for needs the core of one that waits.
  static constexpr int64_t AWAKE = 2000;
  static void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }

  std::vector<Counter> counters;
  alignas(64) std::atomic<int64_t> arrived{0};
  alignas(64) std::atomic<int64_t> number{0};
  std::atomic<int64_t> asleep{0};
  std::mutex lock;
  std::condition_variable woken;
};

// A thread of a call. All of a call runs in one parallel region: waking threads for each product would
// cost as much as a small one takes. Every thread comes to the same sequence of stages: `share` or
// `in_turn`, then `wait` before the next.
struct Team {
  int64_t id, threads;
  Shared* shared;

  void wait() const {
    if (threads > 1) shared->wait(id, threads);
  }
  // The first of all that is the thread's own, so that it reads memory in order.
  int64_t begin_of(int64_t thread, int64_t all) const { return all * thread / threads / 4 * 4; }
  // body(first, count) for `step` of all at a time: a thread's own, then what others have left.
  template <class Body> void share(int64_t all, int64_t step, const Body& body) const {
    if (threads == 1) {
      if (all) body(0, all);
      return;
    }
    for (int64_t i = 0; i < threads; i++) {
      const int64_t owner = (id + i) % threads, begin = begin_of(owner, all);
      const int64_t end = owner + 1 == threads ? all : begin_of(owner + 1, all);
      for (;;) {
        const int64_t first = begin + shared->take(owner, step);
        if (first >= end) break;
        body(first, std::min(step, end - first));
      }
    }
  }
  // body(i) for all in order, each by whoever is free.
  template <class Body> void in_turn(int64_t all, const Body& body) const {
    if (threads == 1)
      for (int64_t i = 0; i < all; i++) body(i);
    else
      for (int64_t i; (i = shared->take(0, 1)) < all;) body(i);
  }
};

// Where other programs hold the cores of our threads, the others wait for their turn there, whole slices of
// the system's time, and one thread is faster than all. So after a call that lost much of its time to waiting
// the next ones do without the others, for a time that grows fourfold as long as that goes on: one call that
// lost its time by chance costs little.
class Patience {
 public:
  bool alone() const { return Clock::now().time_since_epoch().count() < until.load(std::memory_order_relaxed); }
  void judge(Clock::time_point begin, Clock::duration lost) {
    const Clock::time_point now = Clock::now();
    const int64_t pause = rest.load(std::memory_order_relaxed);
    if (lost < LEAST || lost * 3 < now - begin) return rest.store(std::max(pause / 2, FIRST), std::memory_order_relaxed);
    until.store((now.time_since_epoch() + std::chrono::milliseconds(pause)).count(), std::memory_order_relaxed);
    rest.store(std::min(4 * pause, LAST), std::memory_order_relaxed);
  }

 private:
  static constexpr std::chrono::microseconds LEAST{500};
  static constexpr int64_t FIRST = 10, LAST = 640;
  std::atomic<int64_t> until{0}, rest{FIRST};
};

inline Patience patience;

// body(team) in each of so many threads, 0 or what failed; the caller's own thread alone where it is one of
// a region already. floats: for Shared.
template <class Body> int64_t in_team(int64_t threads, float* floats, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && !omp_in_parallel() && !patience.alone()) {
    const Clock::time_point begin = Clock::now();
    Shared shared(threads, floats);
    int64_t failed = 0;
#pragma omp parallel num_threads((int)threads) reduction(max : failed)
    {
      // OpenMP may give fewer than were asked for.
      const Team team{omp_get_thread_num(), omp_get_num_threads(), &shared};
      failed = body(team);
      team.wait();
    }
    patience.judge(begin, shared.lost);
    return failed;
  }
#endif
  Shared alone(1, floats);
  return body(Team{0, 1, &alone});
}
