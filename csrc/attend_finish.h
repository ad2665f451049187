// Partial results of the same rows: joined by their log-sum-exp (ops/attend/merge.py), divided, turned
// back into the model's basis and stored.
#pragma once
#include "item.h"
#include "rows.h"

namespace CONCAT(isa_, SUFFIX) {

static void join(int64_t rows, int64_t dim, const Partial* into, const Partial* from) {
  for (int64_t r = 0; r < rows; r++) {
    // Select, never multiply, an empty part.
    if (from->total[r] == 0) continue;
    float* to = into->acc + r * dim;
    const float* other = from->acc + r * dim;
    if (into->total[r] == 0) {
      into->peak[r] = from->peak[r];
      into->total[r] = from->total[r];
      memcpy(to, other, 4 * dim);
      continue;
    }
    const float peak = into->peak[r] > from->peak[r] ? into->peak[r] : from->peak[r];
    const float mine = __builtin_expf(into->peak[r] - peak), its = __builtin_expf(from->peak[r] - peak);
    into->peak[r] = peak;
    into->total[r] = into->total[r] * mine + from->total[r] * its;
    for (int64_t c = 0; c < dim; c += VW) storef(to + c, loadf(to + c) * splat(mine) + loadf(other + c) * splat(its));
  }
}

static void finish_row(const Attend& a, int64_t head, int64_t row, int64_t out_row, const Partial* parts,
                       int64_t count) {
  const int64_t dim = values_of(a).head_dim;
  alignas(64) float acc[512];
  float peak = a.sinks ? a.sinks[head] : -__builtin_inff();
  for (int64_t i = 0; i < count; i++) peak = parts[i].peak[row] > peak ? parts[i].peak[row] : peak;
  // The sink is one more key, with no value.
  float total = a.sinks ? __builtin_expf(a.sinks[head] - peak) : 0.f;
  for (int64_t c = 0; c < dim; c += VW) storef(acc + c, splat(0.f));
  for (int64_t i = 0; i < count; i++) {
    const Partial& p = parts[i];
    if (p.total[row] == 0) continue;
    const float weight = __builtin_expf(p.peak[row] - peak);
    total += weight * p.total[row];
    const float* from = p.acc + row * dim;
    for (int64_t c = 0; c < dim; c += VW) storef(acc + c, loadf(acc + c) + splat(weight) * loadf(from + c));
  }
  if (a.lse) a.lse[out_row] = total == 0 ? -__builtin_inff() : peak + __builtin_logf(total);
  // Nothing seen: acc is 0 and stays so.
  const vf times = splat(total == 0 ? 0.f : 1.f / total);
  for (int64_t c = 0; c < dim; c += VW) storef(acc + c, loadf(acc + c) * times);
  if (a.model_basis && values_of(a).rotated) rotate_row(acc, dim);
  write_numbers(acc, dim, a.out + out_row * dim * (a.out_type == F32 ? 4 : 2), a.out_type);
}

static void finish(const Attend* a, int64_t kv_head, int64_t first, int64_t tokens, const Partial* parts,
                   int64_t count) {
  const int64_t group = a->q_heads / a->kv_heads;
  for (int64_t row = 0; row < tokens * group; row++) {
    const int64_t head = kv_head * group + row % group;
    finish_row(*a, head, row, (first + row / group) * a->q_heads + head, parts, count);
  }
}

}  // namespace
