// rope_write and gather over threads.
#include "library.h"
#include "steps.h"

// A thread that has to come for a few tokens takes longer than they do.
static bool few(const Write& w) {
  return w.tokens * (w.q_heads + 2 * w.kv_heads) * w.layer.key.head_dim < 16384;
}

int64_t write(const Write& w, const Team& team) {
  const Kernels* kernels = find_kernels(w.isa);
  if (!kernels) return 1;
  team.wait();
  if (!few(w)) team.in_turn(w.tokens, [&](int64_t t) { kernels->write(&w, t); });
  else if (team.id == 0)
    for (int64_t t = 0; t < w.tokens; t++) kernels->write(&w, t);
  return 0;
}

EXPORT int64_t quantpage_write(const Write* call) {
  return in_team(few(*call) ? 1 : call->threads, nullptr, [&](const Team& team) { return write(*call, team); });
}

// [context, kv_heads, head_dim] of one request.
EXPORT int64_t quantpage_gather(const Gather* call) {
  const Gather& g = *call;
  const Kernels* kernels = find_kernels(g.isa);
  if (!kernels) return 1;
  const Pages& p = g.pages;
  const int64_t pages = (g.context + g.page_size - 1) / g.page_size, size = g.out_type == F32 ? 4 : 2;
  const auto body = [&](int64_t i) {
    const int64_t page = i / g.kv_heads, head = i % g.kv_heads, id = g.page_table[page];
    const int64_t count = std::min(g.page_size, g.context - page * g.page_size);
    const uint8_t* scale = p.scale ? p.scale + id * p.scale_page + head * p.scale_head : nullptr;
    const uint8_t* zero = p.zero ? p.zero + id * p.zero_page + head * p.zero_head : nullptr;
    uint8_t* out = g.out + (page * g.page_size * g.kv_heads + head) * p.head_dim * size;
    kernels->dequantize(&p, head, p.codes + id * p.page_stride + head * p.head_stride, scale, zero, count, out,
                        g.out_type, g.kv_heads * p.head_dim);
  };
  return in_team(g.threads, nullptr, [&](const Team& team) {
    team.in_turn(pages * g.kv_heads, body);
    return 0;
  });
}
