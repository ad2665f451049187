// rope_write and gather over threads.
#include <algorithm>

#include "library.h"
#include "threads.h"

EXPORT int64_t quantpage_write(const Write* call) {
  const Kernels* kernels = find_kernels(call->isa);
  if (!kernels) return 1;
  // Waking threads costs more than a few tokens.
  const int64_t numbers = call->tokens * (call->q_heads + 2 * call->kv_heads) * call->layer.key.head_dim;
  parallel(call->tokens, numbers < 16384 ? 1 : call->threads, 1, [&](int64_t t) { kernels->write(call, t); });
  return 0;
}

// [context, kv_heads, head_dim] of one request.
EXPORT int64_t quantpage_gather(const Gather* call) {
  const Gather& g = *call;
  const Kernels* kernels = find_kernels(g.isa);
  if (!kernels) return 1;
  const Pages& p = g.pages;
  const int64_t pages = (g.context + g.page_size - 1) / g.page_size, size = g.out_type == F32 ? 4 : 2;
  parallel(pages * g.kv_heads, g.threads, 1, [&](int64_t i) {
    const int64_t page = i / g.kv_heads, head = i % g.kv_heads, id = g.page_table[page];
    const int64_t count = std::min(g.page_size, g.context - page * g.page_size);
    const uint8_t* scale = p.scale ? p.scale + id * p.scale_page + head * p.scale_head : nullptr;
    const uint8_t* zero = p.zero ? p.zero + id * p.zero_page + head * p.zero_head : nullptr;
    uint8_t* out = g.out + (page * g.page_size * g.kv_heads + head) * p.head_dim * size;
    kernels->dequantize(&p, head, p.codes + id * p.page_stride + head * p.head_stride, scale, zero, count, out,
                        g.out_type, g.kv_heads * p.head_dim);
  });
  return 0;
}
