// One item: some rows (queries of one kv_head) against a list of runs of keys, by online softmax
// (FlashAttention, arXiv 2205.14135) in float32.
#pragma once
#include "attend_weights.h"

namespace CONCAT(isa_, SUFFIX) {

// ---- tiles -----------------------------------------------------------------------------------------
// Dynamic scales or zeros of one run, times what codes are read too small by; lanes past its end get 0.
static inline void load_plane(const Pages& p, const uint8_t* from, int64_t row_stride, int64_t count, float times,
                              float* to) {
  const int64_t size = p.scale_type == F32 ? 4 : 2;
  if (count == RUN && row_stride == size) {
    for (int i = 0; i < RUN; i += VW)
      storef(to + i, (p.scale_type == F32 ? load<vf>(from + 4 * i) : halves(from + 2 * i)) * splat(times));
    return;
  }
  for (int64_t i = 0; i < RUN; i++) to[i] = i < count ? number(from + i * row_stride, p.scale_type, 0) * times : 0.f;
}

template <int64_t CODE, int64_t DIM> static void keys_of_run(const Scratch& s, const Run& run, int64_t stride) {
  const int64_t dim = DIM ? DIM : s.key_dim, bytes = row_bytes(CODE, dim);
  if (CODE == INT8 && run.count == RUN && stride == bytes) {
    // Rows without gaps are one long row.
    key_words<INT8>(run.k, RUN * dim, s.words);
    return;
  }
  const uint8_t* from = run.k;
  for (int64_t j = 0; j < RUN; j++) {
    // All rows before the first is read: a load that spans several stores waits for them.
    if constexpr (CODE == INT6 || CODE == INT3) spread_row(CODE, from, dim, s.key_bytes + j * dim);
    else if constexpr (CODE == INT8 || CODE == INT4) key_words<CODE>(from, dim, s.words + j * dim);
    else key_floats<CODE>(from, dim, s.floats + j * dim);
    // Rows past the end of a short run repeat its last one.
    if (j + 1 < run.count) from += stride;
  }
  if constexpr (CODE == INT6 || CODE == INT3) key_words<INT8>(s.key_bytes, RUN * dim, s.words);
}
template <int64_t CODE> static void keys_of_run(const Scratch& s, const Run& run, int64_t stride) {
  if (s.key_dim == 128) keys_of_run<CODE, 128>(s, run, stride);
  else if (s.key_dim == 64) keys_of_run<CODE, 64>(s, run, stride);
  else keys_of_run<CODE, 0>(s, run, stride);
}

// Few channels beside the rows': as floats, whatever their format.
static void score_rotary(const Item& item, const Scratch& s, const Run& run, int64_t lane) {
  const Pages& rotary = *item.rotary;
  for (int64_t j = 0; j < RUN; j++) {
    const int64_t row = j < run.count ? j : run.count - 1;
    dequantize_row(rotary, item.kv_head, run.rotary + row * rotary.row_stride, run.rotary_scale + row * rotary.scale_row,
                   run.rotary_zero + row * rotary.zero_row, s.rotary_keys + j * s.rotary_dim);
  }
  float_scores(s.rotary_keys, s.rotary_dim, s.rotary_query, s.rows, s.rotary_scores + lane);
}

static void score_integers(const Item& item, const Scratch& s, const Run& run, float* to) {
  const Pages& key = *item.key;
#if VW == 16
  if (s.by_bytes) {
    const uint8_t* rows = run.k;
    int64_t stride = key.row_stride;
    if (planed(key.code) || run.count < RUN) {
      // Codes in planes are spread; past the end of a short run stands its last row.
      const int64_t bytes = row_bytes(spread_code(key.code), s.key_dim);
      for (int64_t j = 0; j < RUN; j++, rows += j < run.count ? stride : 0)
        if (planed(key.code)) spread_row(key.code, rows, s.key_dim, s.key_bytes + j * bytes);
        else memcpy(s.key_bytes + j * bytes, rows, bytes);
      rows = s.key_bytes;
      stride = bytes;
    }
    const auto scores = [&](auto code) {
      constexpr int64_t CODE = decltype(code)::value;
      const auto some = s.key_dim == 128  ? byte_scores<CODE, 128>
                        : s.key_dim == 64 ? byte_scores<CODE, 64>
                                          : byte_scores<CODE, 0>;
      some(rows, stride, s.key_dim, s.query8, s.query_unit, s.rows, to);
    };
    if (key.code == INT4) scores(Fixed<INT4>());
    else scores(Fixed<INT8>());
    return;
  }
#endif
  switch (key.code) {
    case INT8: keys_of_run<INT8>(s, run, key.row_stride); break;
    case INT4: keys_of_run<INT4>(s, run, key.row_stride); break;
    case INT6: keys_of_run<INT6>(s, run, key.row_stride); break;
    default: keys_of_run<INT3>(s, run, key.row_stride);
  }
#if VW == 16
  const auto many = s.key_dim == 128 ? many_scores<128> : s.key_dim == 64 ? many_scores<64> : many_scores<0>;
  many(s.words, s.key_dim, s.turned, s.query16, s.query_unit, s.rows, to);
#else
  const auto some = s.key_dim == 128 ? integer_scores<128> : s.key_dim == 64 ? integer_scores<64> : integer_scores<0>;
  some(s.words, s.key_dim, s.query16, s.query_unit, s.rows, to);
#endif
}
static void score_floats(const Item& item, const Scratch& s, const Run& run, float* to) {
  const Pages& key = *item.key;
  if (grouped(key)) {
    for (int64_t j = 0; j < RUN; j++) {
      const int64_t row = j < run.count ? j : run.count - 1;
      dequantize_row(key, item.kv_head, run.k + row * key.row_stride, run.k_scale + row * key.scale_row,
                     run.k_zero + row * key.zero_row, s.floats + j * s.key_dim);
    }
  } else {
    switch (key.code) {
      case F32: keys_of_run<F32>(s, run, key.row_stride); break;
      case BF16: keys_of_run<BF16>(s, run, key.row_stride); break;
      case F16: keys_of_run<F16>(s, run, key.row_stride); break;
      case INT8: keys_of_run<INT8>(s, run, key.row_stride); break;
      case INT4: keys_of_run<INT4>(s, run, key.row_stride); break;
      default: keys_of_run<FP8>(s, run, key.row_stride);
    }
  }
  float_scores(s.floats, s.key_dim, s.query32, s.rows, to);
}

static void score_run(const Item& item, const Scratch& s, const Run& run, int64_t lane) {
  const Pages &key = *item.key, &value = *item.value;
  (s.key_words ? score_integers : score_floats)(item, s, run, s.scores + lane);
  if (item.rotary) score_rotary(item, s, run, lane);
  if (key.scale && key.dynamic && !grouped(key)) {
    load_plane(key, run.k_scale, key.scale_row, run.count, code_unit(key), s.key_scale + lane);
    if (key.zero) load_plane(key, run.k_zero, key.zero_row, run.count, 1.f, s.key_zero + lane);
  }
  if (value.scale && value.dynamic && !grouped(value)) {
    load_plane(value, run.v_scale, value.scale_row, run.count, code_unit(value), s.value_scale + lane);
    if (value.zero) load_plane(value, run.v_zero, value.zero_row, run.count, 1.f, s.value_zero + lane);
  }
}

// Rows of codes in planes, spread once for all that reads them in this tile.
static void spread_values(const Pages& value, const Scratch& s, int64_t lanes) {
  for (int64_t i = 0; i < lanes; i++) {
    uint8_t* to = s.value_bytes + i * s.value_dim;
    spread_row(value.code, s.value_rows[i], s.value_dim, to);
    s.value_rows[i] = to;
  }
}

// What a tile of a head reads. Scales and zeros are a few lines, which are asked for at once.
static Ahead list_tile(const Item& item, const Scratch& s, const Run* runs, int64_t num_runs) {
  for (const auto side : {&Run::k_scale, &Run::k_zero, &Run::v_scale, &Run::v_zero})
    for (int64_t r = 0; r < num_runs && runs->*side; r++) __builtin_prefetch(runs[r].*side, 0, 3);
  int64_t listed = 0;
  const auto list = [&](const Pages& p, const uint8_t* Run::*side) {
    const int64_t bytes = row_bytes(p.code, p.head_dim);
    for (int64_t r = 0; r < num_runs; r++) listed = list_blocks(runs[r].*side, bytes, p.row_stride, s.blocks, listed);
  };
  list(*item.key, &Run::k);
  if (item.value != item.key) list(*item.value, &Run::v);
  if (item.rotary) list(*item.rotary, &Run::rotary);
  return {s.blocks, s.blocks + listed};
}

template <int64_t CODE, bool HALVES> static void add_few_integers(const Scratch& s, int64_t lanes, Ahead& ahead) {
  const int64_t bytes = row_bytes(CODE, s.value_dim), width = s.width;
  float* acc = s.acc;
  for (int64_t byte = 0; byte < bytes; byte += VW * 4, acc += vectors<CODE>() * VW) {
    const int64_t left = bytes - byte;
    auto add = [&](auto rows) {
      integer_piece<CODE, decltype(rows)::value, HALVES>(s.value_rows, lanes, byte, left, s.weights, s.unit, acc, width,
                                                         ahead);
    };
    switch (s.rows) {
      case 1: add(Fixed<1>()); break;
      case 2: add(Fixed<2>()); break;
      case 3: add(Fixed<3>()); break;
      default: add(Fixed<4>());
    }
  }
}
template <int64_t CODE, bool HALVES> static void add_many_integers(const Scratch& s, int64_t lanes) {
  constexpr int64_t KEYS = HALVES ? 4 : 2;
  const int64_t bytes = row_bytes(CODE, s.value_dim);
  // 64 keys at a time: their words stay in the first-level cache while all rows use them.
  for (int64_t base = 0; base < lanes; base += 64) {
    const int64_t steps = (lanes - base < 64 ? lanes - base : 64) / KEYS;
    for (int64_t i = 0; i < steps; i++)
      for (int64_t byte = 0; byte < bytes; byte += VW * 4)
        row_words<CODE, HALVES>(s.value_rows + base + KEYS * i, byte, bytes - byte,
                                (vh*)(s.value_pairs + i * s.width + byte / (VW * 4) * vectors<CODE>() * VW));
    for (int64_t r = 0; r < s.rows; r += 4)
      integer_words<CODE, 4, HALVES>(s.value_pairs, steps, s.width, s.weights + r * (TILE / 2) + base / 2,
                                     s.unit + r, s.acc + r * s.width);
  }
}
template <int64_t CODE, bool HALVES> static void add_integers(const Scratch& s, int64_t lanes, Ahead& ahead) {
  if (s.rows <= 4) add_few_integers<CODE, HALVES>(s, lanes, ahead);
  else add_many_integers<CODE, HALVES>(s, lanes);
}
template <int64_t CODE>
static void add_floats(const Scratch& s, const uint8_t* const* rows, int64_t lanes, int64_t first, int64_t count,
                       Ahead& next) {
  float* acc = s.acc + first * s.width;
  const float* w = s.scores + first * TILE;
  switch (count) {
    case 1: float_values<CODE, 1>(rows, lanes, w, acc, s.width, next); break;
    case 2: float_values<CODE, 2>(rows, lanes, w, acc, s.width, next); break;
    case 3: float_values<CODE, 3>(rows, lanes, w, acc, s.width, next); break;
    default: float_values<CODE, 4>(rows, lanes, w, acc, s.width, next);
  }
}

// Values that are not finite, of keys that not every row sees: added to the rows that see them, and
// gone before a weight of 0 meets them.
static void take_out_odd(const Item& item, const Scratch& s, const Run* runs, int64_t num_runs, int64_t first_run) {
  const int64_t group = s.rows / item.tokens;
  for (int64_t i = 0; i < num_runs * RUN; i++) {
    float* value = s.value_floats + i * s.value_dim;
    const Run& run = runs[i / RUN];
    vf nothing = splat(0.f);
    for (int64_t c = 0; c < s.value_dim; c += VW) nothing += loadf(value + c) * splat(0.f);
    if (run.all || hsum(nothing) == 0) continue;
    for (int64_t r = 0; r < s.rows && i % RUN < run.count; r++) {
      if (!(item.seen[(first_run + i / RUN) * item.tokens + r / group] >> i % RUN & 1)) continue;
      float* acc = s.acc + r * s.width;
      const vf weight = splat(s.scores[r * TILE + i]);
      for (int64_t c = 0; c < s.value_dim; c += VW) storef(acc + c, loadf(acc + c) + weight * loadf(value + c));
    }
    memset(value, 0, 4 * s.value_dim);
  }
}

static void add_values(const Item& item, const Scratch& s, const Run* runs, int64_t num_runs, int64_t first_run,
                       Ahead& ahead) {
  const Pages& value = *item.value;
  const int64_t lanes = num_runs * RUN;
  if (s.value_words) {
    auto add = s.halves ? add_integers<INT8, true> : add_integers<INT8, false>;
    if (value.code == INT4) add = s.halves ? add_integers<INT4, true> : add_integers<INT4, false>;
    add(s, lanes, ahead);
    return;
  }
  int64_t code = value.code;
  bool differ = false;
  for (int64_t r = 0; r < num_runs; r++) differ |= !runs[r].all;
  if (s.rows > 4 || differ || grouped(value)) {
    for (int64_t r = 0; r < num_runs; r++)
      for (int64_t j = 0; j < RUN; j++) {
        float* to = s.value_floats + (r * RUN + j) * s.value_dim;
        const int64_t row = j < runs[r].count ? j : runs[r].count - 1;
        if (grouped(value)) {
          dequantize_row(value, item.kv_head, s.value_rows[r * RUN + j], runs[r].v_scale + row * value.scale_row,
                         runs[r].v_zero + row * value.zero_row, to);
        } else switch (code) {
          case F32: key_floats<F32>(s.value_rows[r * RUN + j], s.value_dim, to); break;
          case BF16: key_floats<BF16>(s.value_rows[r * RUN + j], s.value_dim, to); break;
          case F16: key_floats<F16>(s.value_rows[r * RUN + j], s.value_dim, to); break;
          default: key_floats<FP8>(s.value_rows[r * RUN + j], s.value_dim, to);
        }
      }
    if (differ) take_out_odd(item, s, runs, num_runs, first_run);
    for (int64_t i = 0; i < lanes; i++) s.value_rows[i] = (const uint8_t*)(s.value_floats + i * s.value_dim);
    code = F32;
  }
  for (int64_t r = 0; r < s.rows; r += 4) {
    const int64_t count = s.rows - r < 4 ? s.rows - r : 4;
    switch (code) {
      case F32: add_floats<F32>(s, s.value_rows, lanes, r, count, ahead); break;
      case BF16: add_floats<BF16>(s, s.value_rows, lanes, r, count, ahead); break;
      case F16: add_floats<F16>(s, s.value_rows, lanes, r, count, ahead); break;
      default: add_floats<FP8>(s, s.value_rows, lanes, r, count, ahead);
    }
  }
}

// ---- after the last tile ---------------------------------------------------------------------------
static void hand_back(const Item& item, const Scratch& s, const Partial& out) {
  const Pages& value = *item.value;
  for (int64_t r = 0; r < s.rows; r++) {
    out.peak[r] = s.peak[r];
    out.total[r] = hsum(loadf(s.total + r * VW));
    float* to = out.acc + r * s.value_dim;
    const float* acc = s.acc + r * s.width;
    const float zero = hsum(loadf(s.zero_sum + r * VW)), lift = hsum(loadf(s.lift + r * VW));
    if (!s.value_words)
      for (int64_t c = 0; c < s.value_dim; c += VW) storef(to + c, loadf(acc + c) + splat(zero));
    else if (value.code == INT4) put_back<INT4>(acc, s.value_dim, s.halves, zero, lift, to);
    else put_back<INT8>(acc, s.value_dim, s.halves, zero, lift, to);
    if (!value.scale || value.dynamic) continue;
    for (int64_t c = 0; c < s.value_dim; c++) {
      to[c] *= static_number(value, value.scale, value.scale_head, item.kv_head, c);
      if (value.zero) to[c] += out.total[r] * static_number(value, value.zero, value.zero_head, item.kv_head, c);
    }
  }
}

// One tile of one head. Meanwhile what is ahead is asked for.
static void attend_tile(const Item& item, const Scratch& s, int64_t at, int64_t n, Ahead ahead) {
  const Pages& value = *item.value;
  const Run* runs = item.runs + at;
  ahead.spread(3 * s.rows + (1 + s.value_passes) * n);
  const Rows rows(value.row_stride);
  for (int64_t r = 0; r < n; r++) {
    ahead.fetch();
    score_run(item, s, runs[r], r * RUN);
    rows.list(runs[r].v, runs[r].count, s.value_rows + r * RUN);
  }
  if (s.value_words && planed(value.code)) spread_values(value, s, n * RUN);
  const bool again = soften(item, s, runs, n, at, ahead);
  add_values(item, s, runs, n, at, ahead);
  if (!again) return;
  round_remainders(s, n * RUN);
  add_values(item, s, runs, n, at, ahead);
}

// Heads of the same runs, tile by tile: so that what of a page lies side by side is read one after the other.
static int64_t attend_items(const Item* items, const Partial* outs, int64_t heads, uint8_t* memory, int64_t size) {
  const Item& first = items[0];
  const int64_t group = first.call->q_heads / first.call->kv_heads;
  // Where things lie stands first.
  const Scratch* scratch = (const Scratch*)memory;
  if (!first.prepared) {
    Scratch planned[HEADS];
    int64_t bytes = (sizeof planned + 63) / 64 * 64;
    for (int64_t h = 0; h < heads; h++) {
      planned[h] = plan_scratch(items[h], first.tokens * group, memory + bytes);
      bytes += planned[h].bytes;
    }
    if (bytes > size) return bytes;
    memcpy(memory, planned, heads * sizeof *planned);
  }
  const auto length = [](const Item& item, int64_t at) {
    return item.num_runs - at < RUNS ? item.num_runs - at : (int64_t)RUNS;
  };
  // The item before may have asked for the first tile, or another thread's.
  Ahead ahead = list_tile(first, scratch[0], first.runs, length(first, 0));
  ahead.spread(1);
  ahead.fetch();
  for (int64_t h = 0; h < heads; h++) {
    if (!first.prepared) prepare_rows(items[h], scratch[h]);
    clear_sums(scratch[h]);
  }
  for (int64_t at = 0; at < first.num_runs; at += RUNS)
    for (int64_t h = 0; h < heads; h++) {
      const Item* next = h + 1 < heads ? &items[h + 1] : &first;
      int64_t then = h + 1 < heads ? at : at + RUNS;
      if (then >= next->num_runs) next = first.then, then = 0;
      ahead = next ? list_tile(*next, scratch[h], next->runs + then, length(*next, then)) : Ahead{};
      attend_tile(items[h], scratch[h], at, length(items[h], at), ahead);
    }
  for (int64_t h = 0; h < heads; h++) hand_back(items[h], scratch[h], outs[h]);
  return 0;
}

}  // namespace
