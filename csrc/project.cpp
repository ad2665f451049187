// Projections, the second half of a block, and programs of steps.
#include <initializer_list>

#include "library.h"
#include "products.h"
#include "steps.h"

// Rows of a weight that a thread takes at once, and into how many pieces a large one is cut for each.
constexpr int64_t ROWS = 32, PIECES = 32;
// Numbers of a result that a thread takes at once.
constexpr int64_t NUMBERS = 2048;
// Bytes of a thread's next weights that are asked for before it may begin with them.
constexpr int64_t AHEAD = 8192;

// Tokens from which on each thread prepares its own part of them for all, at the price of one more wait a product.
constexpr int64_t DIVIDED = 16;

// Tokens that go through a stage together: what they need of each other stays in the second-level cache.
constexpr int64_t MOST = 128;

// Floats on a cache line that live until the same thread asks again for the same slot.
static float* scratch(int slot, int64_t count) {
  static thread_local std::vector<float> kept[4];
  constexpr int64_t LINE = 64 / sizeof(float);
  if ((int64_t)kept[slot].size() < count + LINE) kept[slot].resize(count + LINE);
  return (float*)(((uintptr_t)kept[slot].data() + 63) / 64 * 64);
}
// So many floats as begin and end on a cache line.
static int64_t lines(int64_t floats) { return (floats + 15) / 16 * 16; }

// Products of x with weights whose rows stand side by side in out [tokens, all rows].
struct Work {
  const Products* kernels;
  int64_t code, type, tokens;

  // Floats of what `arrange` makes.
  int64_t floats(int64_t width) const { return lines(tokens * kernels->arranged(code, width) / 4); }
  bool divided(const Team& team) const { return team.threads > 1 && tokens >= DIVIDED; }
  // The tokens that this thread prepares: all, or its part.
  int64_t first(const Team& team) const { return divided(team) ? tokens * team.id / team.threads : 0; }
  int64_t count(const Team& team) const {
    return divided(team) ? tokens * (team.id + 1) / team.threads - first(team) : tokens;
  }
  // Ask for the thread's first rows of weights that it will multiply after the next wait.
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
  // What `multiply` reads, of x: the thread's own tokens' floats. room: floats() that all threads share.
  const uint8_t* arrange(const Team& team, const float* x, int64_t width, float* room) const {
    uint8_t* to = (uint8_t*)(divided(team) ? room : scratch(3, floats(width)));
    kernels->arrange(x, code, count(team), width, to + first(team) * kernels->arranged(code, width));
    if (divided(team)) team.wait();
    return to;
  }
  // then(first, count): of the rows that are done.
  template <class Then>
  void multiply(const Team& team, std::initializer_list<Weight> weights, const uint8_t* x, int64_t width, float* out,
                const Then& then) const {
    int64_t all = 0;
    for (const Weight& each : weights) all += each.rows;
    const int64_t step = std::max(ROWS, all / (team.threads * PIECES) / ROWS * ROWS);
    team.share(all, step, [&](int64_t first, int64_t count) {
      int64_t begin = 0;
      for (const Weight& each : weights) {
        const int64_t low = std::max(first, begin), high = std::min(first + count, begin + each.rows);
        if (low < high) kernels->multiply(&each, code, type, width, x, tokens, low - begin, high - low, out + low, all);
        begin += each.rows;
      }
      then(first, count);
    });
  }
  void multiply(const Team& team, std::initializer_list<Weight> weights, const uint8_t* x, int64_t width,
                float* out) const {
    multiply(team, weights, x, width, out, [](int64_t, int64_t) {});
  }
};

static int64_t size_of(int64_t type) { return type == F32 ? 4 : 2; }

static int64_t rows_of(const Project& p) { return p.weights[0].rows + p.weights[1].rows + p.weights[2].rows; }
// Floats that the threads of a step share, results and what is arranged for the next product: where each begins.
struct ProjectRoom {
  int64_t arranged, all;
  ProjectRoom(const Project& p, const Work& work) {
    arranged = lines(p.tokens * rows_of(p));
    all = arranged + work.floats(p.width);
  }
};
struct FinishRoom {
  int64_t both, out, sum, arranged, all;
  FinishRoom(const Finish& f, const Work& work) {
    both = lines(f.tokens * f.width);
    out = both + lines(f.tokens * 2 * f.gate.rows);
    sum = out + lines(f.tokens * f.width);
    arranged = sum + lines(f.tokens * f.width);
    all = arranged + work.floats(std::max({f.attended_width, f.width, f.gate.rows}));
  }
};
// The tokens first to first + count of a step.
static Project part_of(Project p, int64_t first, int64_t count) {
  const int64_t size = size_of(p.type), turn = first * p.head_dim * size;
  p.x += first * p.width * size;
  p.out += first * rows_of(p) * size;
  if (p.cos) p.cos += turn, p.sin += turn;
  p.tokens = count;
  return p;
}
static Finish part_of(Finish f, int64_t first, int64_t count) {
  const int64_t size = size_of(f.type);
  f.attended += first * f.attended_width * size;
  f.residual += first * f.width * size;
  f.out += first * f.width * size;
  f.tokens = count;
  return f;
}
// body(part) of a step, about as many tokens each and MOST at most.
template <class Call, class Body> static int64_t in_parts(const Call& call, const Body& body) {
  const int64_t parts = (call.tokens + MOST - 1) / MOST;
  int64_t failed = 0;
  for (int64_t i = 0; i < parts && !failed; i++) {
    const int64_t first = call.tokens * i / parts;
    failed = body(part_of(call, first, call.tokens * (i + 1) / parts - first));
  }
  return failed;
}
// None for an instruction set that this machine does not run: such a call fails.
template <class Room, class Call> static int64_t floats_of(Call call) {
  const Products* k = find_products(call.isa);
  call.tokens = std::min(call.tokens, MOST);
  return k ? Room(call, {k, call.code, call.type, call.tokens}).all : 0;
}

static int64_t project_part(const Project& p, const Team& team) {
  const Products* k = find_products(p.isa);
  if (!k) return 1;
  const int64_t rows = rows_of(p), size = size_of(p.type);
  const Work work = {k, p.code, p.type, p.tokens};
  const ProjectRoom room(p, work);
  const int64_t first = work.first(team), count = work.count(team);
  work.fetch(team, {p.weights[0], p.weights[1], p.weights[2]}, p.width);
  team.wait();
  float *x = scratch(1, count * p.width), *out = team.shared->floats;
  k->read(p.x + first * p.width * size, p.type, count * p.width, x);
  if (p.norm) k->norm(x, p.norm, p.type, count, p.width, (float)p.eps);
  const uint8_t* read = work.arrange(team, x, p.width, out + room.arranged);
  const auto store = [&](int64_t first, int64_t count) {
    for (int64_t t = 0; t < p.tokens; t++)
      k->write(out + t * rows + first, p.type, count, p.out + (t * rows + first) * size);
  };
  if (!p.cos || !p.rotated) {
    work.multiply(team, {p.weights[0], p.weights[1], p.weights[2]}, read, p.width, out, store);
    return 0;
  }
  work.multiply(team, {p.weights[0], p.weights[1], p.weights[2]}, read, p.width, out);
  team.wait();
  // Heads of a token, and what is left of its row.
  const int64_t dim = p.head_dim, heads = (rows + dim - 1) / dim;
  team.share(p.tokens * heads, 1, [&](int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; i++) {
      const int64_t t = i / heads, head = i % heads, at = t * rows + head * dim, turn = t * dim * size;
      if (head < p.rotated) k->rotate(out + at, p.cos + turn, p.sin + turn, p.type, dim);
      k->write(out + at, p.type, std::min(dim, rows - head * dim), p.out + at * size);
    }
  });
  return 0;
}

static int64_t finish_part(const Finish& f, const Team& team) {
  const Products* k = find_products(f.isa);
  if (!k) return 1;
  const int64_t inner = f.gate.rows, width = f.width, size = size_of(f.type), tokens = f.tokens;
  const Work work = {k, f.code, f.type, tokens};
  const FinishRoom room(f, work);
  float *y = team.shared->floats, *both = y + room.both, *out = y + room.out, *arranged = y + room.arranged;
  const int64_t first = work.first(team), count = work.count(team);
  work.fetch(team, {f.output}, f.attended_width);
  team.wait();
  float* x = scratch(1, count * std::max({f.attended_width, width, inner}));
  k->read(f.attended + first * f.attended_width * size, f.type, count * f.attended_width, x);
  work.multiply(team, {f.output}, work.arrange(team, x, f.attended_width, arranged), f.attended_width, y);
  work.fetch(team, {f.gate, f.up}, width);
  float *sum = work.divided(team) ? y + room.sum : scratch(2, tokens * width), *own = sum + first * width;
  k->read(f.residual + first * width * size, f.type, count * width, own);
  team.wait();
  for (int64_t i = 0; i < count * width; i++) own[i] += y[first * width + i];
  std::copy(own, own + count * width, x);
  k->norm(x, f.norm, f.type, count, width, (float)f.eps);
  work.multiply(team, {f.gate, f.up}, work.arrange(team, x, width, arranged), width, both);
  work.fetch(team, {f.down}, inner);
  team.wait();
  k->gate(both + first * 2 * inner, count, inner, x);
  work.multiply(team, {f.down}, work.arrange(team, x, inner, arranged), inner, out);
  team.wait();
  team.share(tokens * width, NUMBERS, [&](int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; i++) sum[i] += out[i];
    k->write(sum + first, f.type, count, f.out + first * size);
  });
  return 0;
}

int64_t project(const Project& p, const Team& team) {
  return in_parts(p, [&](const Project& part) { return project_part(part, team); });
}
int64_t finish(const Finish& f, const Team& team) {
  return in_parts(f, [&](const Finish& part) { return finish_part(part, team); });
}

int64_t normalize(const Norm& n, const Team& team) {
  const Products* k = find_products(n.isa);
  if (!k) return 1;
  team.wait();
  team.in_turn(n.tokens, [&](int64_t t) {
    float* x = scratch(1, n.width);
    uint8_t* row = n.x + t * n.width * size_of(n.type);
    k->read(row, n.type, n.width, x);
    k->norm(x, n.weight, n.type, 1, n.width, (float)n.eps);
    k->write(x, n.type, n.width, row);
  });
  return 0;
}

EXPORT int64_t quantpage_project(const Project* call) {
  return in_team(call->threads, scratch(0, floats_of<ProjectRoom>(*call)), [&](const Team& team) { return project(*call, team); });
}

EXPORT int64_t quantpage_finish(const Finish* call) {
  return in_team(call->threads, scratch(0, floats_of<FinishRoom>(*call)), [&](const Team& team) { return finish(*call, team); });
}

// A step of a program: its kind, its size in bytes, the record.
struct Head {
  int64_t kind, size;
  const void* record() const { return this + 1; }
  const Head* next() const { return (const Head*)((const uint8_t*)(this + 1) + size); }
};

static int64_t run_step(const Head& step, const Team& team) {
  switch (step.kind) {
    case PROJECT: return project(*(const Project*)step.record(), team);
    case WRITE: return write(*(const Write*)step.record(), team);
    case ATTEND: return attend(*(const Attend*)step.record(), team);
    case FINISH: return finish(*(const Finish*)step.record(), team);
    case NORM: return normalize(*(const Norm*)step.record(), team);
  }
  return 1;
}

// Steps one after the other, all in one parallel region.
EXPORT int64_t quantpage_run(const uint8_t* program, int64_t size, int64_t threads) {
  const Head *first = (const Head*)program, *end = (const Head*)(program + size);
  int64_t floats = 0;
  for (const Head* step = first; step < end; step = step->next()) {
    if (step->kind == PROJECT) floats = std::max(floats, floats_of<ProjectRoom>(*(const Project*)step->record()));
    if (step->kind == FINISH) floats = std::max(floats, floats_of<FinishRoom>(*(const Finish*)step->record()));
  }
  return in_team(threads, scratch(0, floats), [&](const Team& team) {
    int64_t failed = 0;
    for (const Head* step = first; step < end && !failed; step = step->next()) failed = run_step(*step, team);
    return failed;
  });
}
