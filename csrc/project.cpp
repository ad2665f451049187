// Projections and the second half of a block over threads. All of a call runs in one parallel
// region: waking threads for each product would cost as much as a small one takes.
#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <vector>

#include "library.h"
#include "products.h"
#include "threads.h"

EXPORT int64_t quantpage_write(const Write*);
EXPORT int64_t quantpage_attend(const Attend*);

// Rows of a weight and numbers of a result that a thread takes at once.
constexpr int64_t ROWS = 32, NUMBERS = 2048;
// Bytes of a thread's next weights that are asked for before it may begin with them.
constexpr int64_t AHEAD = 8192;

struct alignas(64) Counter {
  std::atomic<int64_t> next{0};
};

// The threads of one call. Every thread comes to the same sequence of products and barriers.
struct Team {
  int64_t id, threads;
  Counter* counters;

  void wait() const {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp barrier
    }
#endif
  }
  // The first of all that is the thread's own, so that it reads memory in order.
  int64_t begin_of(int64_t thread, int64_t all) const { return all * thread / threads / 4 * 4; }
  // body(first, count) for `step` of all at a time: a thread's own, then what others have left.
  template <class Body> void share(int stage, int64_t all, int64_t step, const Body& body) const {
    for (int64_t i = 0; i < threads; i++) {
      const int64_t owner = (id + i) % threads, begin = begin_of(owner, all);
      const int64_t end = owner + 1 == threads ? all : begin_of(owner + 1, all);
      Counter& counter = counters[stage * threads + owner];
      for (;;) {
        const int64_t first = begin + counter.next.fetch_add(step, std::memory_order_relaxed);
        if (first >= end) break;
        body(first, std::min(step, end - first));
      }
    }
  }
};

template <class Body> static void in_team(int64_t threads, const Body& body) {
  constexpr int64_t STAGES = 4;
#ifdef _OPENMP
  if (threads > 1 && !omp_in_parallel()) {
    std::vector<Counter> counters(STAGES * threads);
#pragma omp parallel num_threads((int)threads)
    body(Team{omp_get_thread_num(), omp_get_num_threads(), counters.data()});
    return;
  }
#endif
  Counter counters[STAGES];
  body(Team{0, 1, counters});
}

// Floats that live until the same thread asks again for the same slot.
static float* scratch(int slot, int64_t count) {
  static thread_local std::vector<float> kept[3];
  if ((int64_t)kept[slot].size() < count) kept[slot].resize(count);
  return kept[slot].data();
}

// Products of x with weights whose rows stand side by side in out [tokens, all rows].
struct Work {
  const Products* kernels;
  int64_t code, type, tokens;

  // Ask for the thread's first rows of weights that it will multiply after the next barrier.
  void fetch(const Team& team, std::initializer_list<Weight> weights, int64_t width) const {
    int64_t all = 0;
    for (const Weight& each : weights) all += each.rows;
    int64_t first = team.begin_of(team.id, all);
    for (const Weight& each : weights) {
      if (first < each.rows) {
        const uint8_t* from = each.numbers + first * width * (code == F32 ? 4 : code == INT8 ? 1 : 2);
        for (int64_t i = 0; i < AHEAD; i += 64) __builtin_prefetch(from + i);
        return;
      }
      first -= each.rows;
    }
  }
  void multiply(const Team& team, int stage, std::initializer_list<Weight> weights, const float* x, int64_t width,
                float* out) const {
    int64_t all = 0;
    for (const Weight& each : weights) all += each.rows;
    team.share(stage, all, ROWS, [&](int64_t first, int64_t count) {
      int64_t begin = 0;
      for (const Weight& each : weights) {
        const int64_t low = std::max(first, begin), high = std::min(first + count, begin + each.rows);
        if (low < high)
          kernels->multiply(&each, code, type, width, x, tokens, low - begin, high - low, out + low, all);
        begin += each.rows;
      }
    });
  }
};

static int64_t size_of(int64_t type) { return type == F32 ? 4 : 2; }

EXPORT int64_t quantpage_project(const Project* call) {
  const Project& p = *call;
  const Products* k = find_products(p.isa);
  if (!k) return 1;
  const int64_t rows = p.weights[0].rows + p.weights[1].rows + p.weights[2].rows, size = size_of(p.type);
  float* out = scratch(0, p.tokens * rows);
  const Work work = {k, p.code, p.type, p.tokens};
  in_team(p.threads, [&](const Team& team) {
    work.fetch(team, {p.weights[0], p.weights[1], p.weights[2]}, p.width);
    float* x = scratch(1, p.tokens * p.width);
    k->read(p.x, p.type, p.tokens * p.width, x);
    if (p.norm) k->norm(x, p.norm, p.type, p.tokens, p.width, (float)p.eps);
    k->arrange(x, p.code, p.tokens, p.width);
    work.multiply(team, 0, {p.weights[0], p.weights[1], p.weights[2]}, x, p.width, out);
    team.wait();
    const int64_t heads = p.cos ? p.rotated : 0;
    team.share(1, p.tokens * heads, 1, [&](int64_t first, int64_t count) {
      for (int64_t i = first; i < first + count; i++) {
        const int64_t at = i / heads * p.head_dim * size;
        k->rotate(out + i / heads * rows + i % heads * p.head_dim, p.cos + at, p.sin + at, p.type, p.head_dim);
      }
    });
    if (heads) team.wait();
    team.share(2, p.tokens * rows, NUMBERS, [&](int64_t first, int64_t count) {
      k->write(out + first, p.type, count, p.out + first * size);
    });
  });
  return 0;
}

EXPORT int64_t quantpage_finish(const Finish* call) {
  const Finish& f = *call;
  const Products* k = find_products(f.isa);
  if (!k) return 1;
  const int64_t inner = f.gate.rows, size = size_of(f.type), tokens = f.tokens;
  float* shared = scratch(0, tokens * (2 * f.width + 2 * inner));
  float *y = shared, *both = y + tokens * f.width, *out = both + tokens * 2 * inner;
  const Work work = {k, f.code, f.type, tokens};
  in_team(f.threads, [&](const Team& team) {
    work.fetch(team, {f.output}, f.attended_width);
    float* x = scratch(1, tokens * std::max({f.attended_width, f.width, inner}));
    k->read(f.attended, f.type, tokens * f.attended_width, x);
    k->arrange(x, f.code, tokens, f.attended_width);
    work.multiply(team, 0, {f.output}, x, f.attended_width, y);
    work.fetch(team, {f.gate, f.up}, f.width);
    team.wait();
    float* sum = scratch(2, tokens * f.width);
    k->read(f.residual, f.type, tokens * f.width, sum);
    for (int64_t i = 0; i < tokens * f.width; i++) sum[i] += y[i];
    std::copy(sum, sum + tokens * f.width, x);
    k->norm(x, f.norm, f.type, tokens, f.width, (float)f.eps);
    k->arrange(x, f.code, tokens, f.width);
    work.multiply(team, 1, {f.gate, f.up}, x, f.width, both);
    work.fetch(team, {f.down}, inner);
    team.wait();
    k->gate(both, tokens, inner, x);
    k->arrange(x, f.code, tokens, inner);
    work.multiply(team, 2, {f.down}, x, inner, out);
    team.wait();
    team.share(3, tokens * f.width, NUMBERS, [&](int64_t first, int64_t count) {
      for (int64_t i = first; i < first + count; i++) sum[i] += out[i];
      k->write(sum + first, f.type, count, f.out + first * size);
    });
  });
  return 0;
}

// Calls one after the other: each is its kind and size in bytes, then the record.
EXPORT int64_t quantpage_run(const uint8_t* program, int64_t size) {
  for (int64_t at = 0; at < size;) {
    const int64_t* head = (const int64_t*)(program + at);
    const void* record = head + 2;
    int64_t failed = 1;
    switch (head[0]) {
      case PROJECT: failed = quantpage_project((const Project*)record); break;
      case WRITE: failed = quantpage_write((const Write*)record); break;
      case ATTEND: failed = quantpage_attend((const Attend*)record); break;
      case FINISH: failed = quantpage_finish((const Finish*)record); break;
    }
    if (failed) return failed;
    at += 16 + head[1];
  }
  return 0;
}
