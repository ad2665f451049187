// Cuts a step into items, runs them on threads and merges the parts.
//
// How a row's keys are cut depends on its request alone, never on threads or on the rest of the
// batch, so that results do not either.
#include <algorithm>
#include <memory>
#include <vector>

#include "library.h"
#include "steps.h"

namespace {

constexpr int64_t ROWS = 64;
// A request with at most this many new tokens has its keys split over items.
constexpr int64_t FEW_TOKENS = 16;

struct Interval {
  int64_t low, high;
};

// Which of the keys that the mask shows come from a source (ops/attend/params.py).
enum Part { ALL, BODY, EXACT };
struct Source {
  const Pages *key, *value, *rotary;
  const int32_t* table;
  int64_t stride;
  Part part;
};

// Rows of some kv_heads over one stretch of keys.
struct Work {
  int64_t request, head, heads, first, tokens, low, high;
  // Place of the partial result; -1: the only part, goes straight to the output.
  int64_t partial;
};
// The parts of the same rows: work[begin, end).
struct Group {
  int64_t begin, end;
};

// Bytes on a cache line, kept from call to call.
struct Buffer {
  std::unique_ptr<uint8_t[]> bytes;
  int64_t size = 0;
  uint8_t* take(int64_t wanted) {
    if (wanted > size) {
      bytes.reset(new uint8_t[wanted + 64]);
      size = wanted;
    }
    return (uint8_t*)(((uintptr_t)bytes.get() + 63) / 64 * 64);
  }
};
struct Memory {
  std::vector<Interval> seen, all;
  // Token t sees seen[bounds[t], bounds[t + 1]); cursor[t] is the first that may reach the run.
  std::vector<int64_t> bounds, cursor;
  // By head, and of the next item's first tile.
  std::vector<Run> runs[HEADS + 1];
  std::vector<uint16_t> bits[HEADS + 1];
  std::vector<Partial> parts;
  Buffer scratch, results, partials;
  // Of which rows the scratch has the queries, as they are for which source; of this step.
  const Source* prepared_for = nullptr;
  int64_t prepared = 0;
};
thread_local Memory memory;

// Pages whose heads lie as near to each other as this are read head by head: beyond it what the processor
// fetches by itself behind a head's rows is soon of no use.
constexpr int64_t NEAR = 4096;

// Keys of an item: about so many items a request, and none too short to be worth its beginning.
int64_t split_size(int64_t context, int64_t parts, int64_t items) {
  int64_t size = 256;
  while (size < 2048 && size * items < context * parts) size *= 2;
  return size;
}

void add(std::vector<Interval>& to, int64_t low, int64_t high, int64_t from, int64_t until) {
  low = std::max(low, from);
  high = std::min(high, until);
  if (low < high) to.push_back({low, high});
}

// Keys of the source within [low, high). Exact are the first page, the page
// that the query stands in and the one before it: [0, page) and [near, past).
void add_part(const Attend& a, Part part, std::vector<Interval>& to, int64_t position, int64_t low, int64_t high,
              const Work& w) {
  const int64_t page = a.step.page_size, own = position / page * page;
  const int64_t near = std::max(own - page, page), past = own + page;
  if (part == ALL) {
    add(to, low, high, w.low, w.high);
  } else if (part == BODY) {
    add(to, std::max(low, page), std::min(high, near), w.low, w.high);
    add(to, std::max(low, past), high, w.low, w.high);
  } else {
    add(to, low, std::min(high, page), w.low, w.high);
    add(to, std::max(low, near), std::min(high, past), w.low, w.high);
  }
}

// What one query sees of [w.low, w.high), sorted and disjoint.
void add_seen(const Attend& a, Part part, std::vector<Interval>& to, const Work& w, int64_t token, int64_t context) {
  const int64_t position = context - (a.step.query_starts[w.request + 1] - token);
  if (a.mask == FULL) {
    add_part(a, part, to, position, 0, context, w);
  } else if (a.mask == CAUSAL) {
    const int64_t end = position + 1, start = a.window > 0 ? std::max<int64_t>(0, end - a.window) : 0;
    const int64_t sinks = std::min(a.sink_tokens, start);
    if (sinks > 0) add_part(a, part, to, position, 0, sinks, w);
    add_part(a, part, to, position, start, end, w);
  } else {
    const int64_t row = (a.per_head ? w.head * a.tokens : 0) + token;
    for (int64_t i = a.starts[row]; i < a.starts[row + 1]; i++)
      add_part(a, part, to, position, a.low[i], std::min<int64_t>(a.high[i], context), w);
  }
}

// What each row sees, and the union of it in m.all.
void unite_seen(const Attend& a, const Source& from, const Work& w, Memory& m) {
  m.seen.clear();
  m.bounds.assign(1, 0);
  for (int64_t t = 0; t < w.tokens; t++) {
    add_seen(a, from.part, m.seen, w, w.first + t, a.step.context_lens[w.request]);
    m.bounds.push_back((int64_t)m.seen.size());
  }
  m.all = m.seen;
  std::sort(m.all.begin(), m.all.end(), [](const Interval& x, const Interval& y) { return x.low < y.low; });
  size_t kept = 0;
  for (const Interval next : m.all) {
    if (kept && next.low <= m.all[kept - 1].high) m.all[kept - 1].high = std::max(m.all[kept - 1].high, next.high);
    else m.all[kept++] = next;
  }
  m.all.resize(kept);
}

// Who sees what of the keys [at, at + count): a bit a key for each row; whether all see all.
bool mark_seen(int64_t at, int64_t count, int64_t tokens, Memory& m, std::vector<uint16_t>& to) {
  const uint32_t full = (1u << count) - 1;
  bool all = true;
  for (int64_t t = 0; t < tokens; t++) {
    while (m.cursor[t] < m.bounds[t + 1] && m.seen[m.cursor[t]].high <= at) m.cursor[t]++;
    uint32_t bits = 0;
    for (int64_t i = m.cursor[t]; i < m.bounds[t + 1] && m.seen[i].low < at + count; i++) {
      const int64_t low = std::max(m.seen[i].low, at) - at, high = std::min(m.seen[i].high, at + count) - at;
      bits |= ((1u << high) - 1) & ~((1u << low) - 1);
    }
    all &= bits == full;
    to.push_back((uint16_t)bits);
  }
  return all;
}

// Where a slot of a page lies in every plane.
Run find_slot(const Source& from, int64_t id, int64_t head, int64_t slot) {
  auto at = [&](const uint8_t* plane, int64_t by_page, int64_t by_head, int64_t by_row) {
    return plane ? plane + id * by_page + head * by_head + slot * by_row : nullptr;
  };
  auto scale = [&](const Pages& p) { return at(p.scale, p.scale_page, p.scale_head, p.scale_row); };
  auto zero = [&](const Pages& p) { return at(p.zero, p.zero_page, p.zero_head, p.zero_row); };
  const Pages &k = *from.key, &v = *from.value;
  const uint8_t* key = at(k.codes, k.page_stride, k.head_stride, k.row_stride);
  const uint8_t* value = at(v.codes, v.page_stride, v.head_stride, v.row_stride);
  Run run = {key, value, scale(k), zero(k), scale(v), zero(v), nullptr, nullptr, nullptr, 0, 1};
  if (const Pages* r = from.rotary) {
    run.rotary = at(r->codes, r->page_stride, r->head_stride, r->row_stride);
    run.rotary_scale = scale(*r);
    run.rotary_zero = zero(*r);
  }
  return run;
}
// The same, `rows` later in the page.
void advance(Run& run, const Source& from, int64_t rows) {
  auto step = [&](const uint8_t*& plane, int64_t by_row) { plane += plane ? rows * by_row : 0; };
  const Pages &k = *from.key, &v = *from.value;
  step(run.k, k.row_stride);
  step(run.v, v.row_stride);
  step(run.k_scale, k.scale_row);
  step(run.k_zero, k.zero_row);
  step(run.v_scale, v.scale_row);
  step(run.v_zero, v.zero_row);
  if (!from.rotary) return;
  step(run.rotary, from.rotary->row_stride);
  step(run.rotary_scale, from.rotary->scale_row);
  step(run.rotary_zero, from.rotary->zero_row);
}

// Runs over the union of what the rows see, and who sees what where they differ; of a head, `most` at most.
void list_runs(const Attend& a, const Source& from, const Work& w, int64_t head, size_t most, std::vector<Run>& runs,
               std::vector<uint16_t>& bits, Memory& m) {
  runs.clear();
  bits.clear();
  m.cursor.assign(m.bounds.begin(), m.bounds.end() - 1);
  const int64_t page = a.step.page_size;
  for (const Interval& part : m.all) {
    for (int64_t at = part.low; at < part.high && runs.size() < most;) {
      const int64_t slot = at % page, end = std::min(part.high, at + page - slot);
      Run run = find_slot(from, from.table[w.request * from.stride + at / page], head, slot);
      while (true) {
        run.count = (int32_t)std::min<int64_t>(end - at, RUN);
        run.all = w.tokens == 1 || mark_seen(at, run.count, w.tokens, m, bits);
        runs.push_back(run);
        at += run.count;
        if (at == end) break;
        advance(run, from, RUN);
      }
    }
  }
}

struct Plan {
  const Attend& a;
  const Kernels& kernels;
  std::vector<Source> sources;
  std::vector<Work> work;
  std::vector<Group> groups;
  int64_t partial_floats = 0;
  float* partials = nullptr;
  int64_t group, dim;
  // Heads of an item of a few tokens.
  int64_t joined = 1;

  Plan(const Attend& call, const Kernels& with)
      : a(call), kernels(with), group(call.q_heads / call.kv_heads), dim(values_of(call).head_dim) {
    const Layer& l = a.layer;
    const bool near = l.exact_key.codes != nullptr;
    add_source(l.key, l.value, a.step.page_table, a.step.table_stride, near ? BODY : ALL);
    // Under a mask of its own each head sees other keys.
    if (!a.per_head && l.key.head_stride <= NEAR) joined = std::min<int64_t>(a.kv_heads, HEADS);
    if (near) add_source(l.exact_key, l.exact_value, a.step.exact_table, a.step.exact_stride, EXACT);
  }

  void add_source(const Pages& key, const Pages& value, const int32_t* table, int64_t stride, Part part) {
    sources.push_back({&key, a.latent ? &key : &value, a.latent ? &value : nullptr, table, stride, part});
  }
  int64_t size(const Work& w) const { return w.tokens * group * (dim + 2); }

  void cut() {
    for (int64_t r = 0; r < a.step.requests; r++) {
      const int64_t start = a.step.query_starts[r], end = a.step.query_starts[r + 1], context = a.step.context_lens[r];
      const int64_t fit = std::max<int64_t>(1, ROWS / group);
      // Late queries see most: they go first.
      for (int64_t tile = (end - start + fit - 1) / fit; tile-- > 0;) {
        const int64_t first = start + tile * fit, tokens = std::min(fit, end - first);
        cut_tile(r, first, tokens, end - start, context);
      }
    }
  }
  void cut_tile(int64_t r, int64_t first, int64_t tokens, int64_t fresh, int64_t context) {
    const int64_t position = context - (a.step.query_starts[r + 1] - first), last = position + tokens - 1;
    int64_t low = 0, high = a.mask == CAUSAL ? last + 1 : context;
    if (a.mask == CAUSAL && a.window > 0 && a.sink_tokens == 0)
      low = std::max<int64_t>(0, position + 1 - a.window);
    const bool few = fresh <= FEW_TOKENS;
    const int64_t together = few ? joined : 1;
    const int64_t items = together > 1 ? 16 : 32;
    const int64_t part = few ? split_size(context, (a.kv_heads + together - 1) / together, items) : context + 1;
    for (int64_t h = 0; h < a.kv_heads; h += together) {
      const int64_t begin = (int64_t)work.size();
      int64_t at = low / part * part;
      do {
        const int64_t heads = std::min(together, a.kv_heads - h);
        work.push_back({r, h, heads, first, tokens, std::max(at, low), std::min(at + part, high), -1});
        at += part;
      } while (at < high);
      const int64_t count = (int64_t)work.size() - begin;
      if (count > 1)
        for (int64_t i = begin; i < begin + count; i++) {
          work[i].partial = partial_floats;
          partial_floats += work[i].heads * size(work[i]);
        }
      groups.push_back({begin, begin + count});
    }
  }
  // The numerator first: its rows stay on cache lines.
  Partial place(const Work& w, float* from) const {
    const int64_t rows = w.tokens * group;
    return {from + rows * dim, from + rows * dim + rows, from};
  }
  Partial place(const Work& w, int64_t h) const { return place(w, partials + w.partial + h * size(w)); }

  Item item(const Source& from, const Work& w, int64_t head, int64_t slot, const Item* then) const {
    const Memory& m = memory;
    return {&a, from.key, from.value, from.rotary, head, w.first, w.tokens, m.runs[slot].data(),
            (int64_t)m.runs[slot].size(), m.bits[slot].data(), then, false};
  }
  void attend(const Source& from, int64_t index, const Item* then, const Partial* outs) const {
    Memory& m = memory;
    const Work &w = work[index], &before = work[m.prepared];
    const bool prepared = m.prepared_for == &from && before.first == w.first && before.head == w.head;
    m.prepared_for = &from;
    m.prepared = index;
    Item items[HEADS];
    for (int64_t h = 0; h < w.heads; h++) {
      items[h] = item(from, w, w.head + h, h, then);
      items[h].prepared = prepared;
    }
    const int64_t wanted = kernels.attend(items, outs, w.heads, m.scratch.take(0), m.scratch.size);
    if (wanted) kernels.attend(items, outs, w.heads, m.scratch.take(wanted), wanted);
  }
  void run(int64_t index) const {
    const Work& w = work[index];
    Memory& m = memory;
    const int64_t rows = w.tokens * group, lines = (size(w) + 15) / 16 * 16;
    float* own = (float*)m.results.take(4 * 2 * HEADS * lines);
    Partial outs[HEADS], more[HEADS];
    for (int64_t h = 0; h < w.heads; h++) {
      outs[h] = w.partial < 0 ? place(w, own + h * lines) : place(w, h);
      more[h] = place(w, own + (HEADS + h) * lines);
    }
    // Threads take their own items one after the other (Team::share).
    Item next;
    const bool follows = index + 1 < (int64_t)work.size() && work[index + 1].tokens <= FEW_TOKENS;
    if (follows) {
      const Work& after = work[index + 1];
      unite_seen(a, sources[0], after, m);
      list_runs(a, sources[0], after, after.head, RUNS, m.runs[HEADS], m.bits[HEADS], m);
      next = item(sources[0], after, after.head, HEADS, nullptr);
    }
    bool any = false;
    for (const Source& from : sources) {
      unite_seen(a, from, w, m);
      for (int64_t h = 0; h < w.heads; h++)
        list_runs(a, from, w, w.head + h, (size_t)-1, m.runs[h], m.bits[h], m);
      if (m.runs[0].empty()) continue;
      attend(from, index, follows && &from == &sources.back() ? &next : nullptr, any ? more : outs);
      for (int64_t h = 0; any && h < w.heads; h++) kernels.join(rows, dim, &outs[h], &more[h]);
      any = true;
    }
    for (int64_t h = 0; h < w.heads; h++) {
      if (!any) {
        std::fill(outs[h].peak, outs[h].peak + rows, -__builtin_inff());
        std::fill(outs[h].total, outs[h].total + rows, 0.f);
      }
      if (w.partial < 0) kernels.finish(&a, w.head + h, w.first, w.tokens, &outs[h], 1);
    }
  }
  void merge(const Group& g) const {
    if (g.end - g.begin == 1) return;
    const Work& w = work[g.begin];
    std::vector<Partial>& parts = memory.parts;
    for (int64_t h = 0; h < w.heads; h++) {
      parts.clear();
      for (int64_t i = g.begin; i < g.end; i++) parts.push_back(place(work[i], h));
      kernels.finish(&a, w.head + h, w.first, w.tokens, parts.data(), g.end - g.begin);
    }
  }
};

}  // namespace

int64_t attend(const Attend& call, const Team& team) {
  const Kernels* kernels = find_kernels(call.isa);
  if (!kernels) return 1;
  // Each thread cuts the step, into the same items.
  Plan plan(call, *kernels);
  plan.cut();
  memory.prepared_for = nullptr;
  memory.prepared = 0;
  team.wait();
  if (plan.partial_floats) {
    if (team.id == 0) team.shared->partials = (float*)memory.partials.take(4 * plan.partial_floats);
    team.wait();
    plan.partials = team.shared->partials;
  }
  team.share((int64_t)plan.work.size(), 1, [&](int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; i++) plan.run(i);
  });
  if (plan.partial_floats == 0) return 0;
  team.wait();
  team.in_turn((int64_t)plan.groups.size(), [&](int64_t i) { plan.merge(plan.groups[i]); });
  return 0;
}

EXPORT int64_t quantpage_attend(const Attend* call) {
  return in_team(call->threads, nullptr, [&](const Team& team) { return attend(*call, team); });
}
