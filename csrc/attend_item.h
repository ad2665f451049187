// One item: some rows (queries of one kv_head) against a list of runs of keys, by online softmax
// (FlashAttention, arXiv 2205.14135) in float32.
#pragma once
#include "attend_keys.h"
#include "attend_values.h"
#include "rows.h"

namespace CONCAT(isa_, SUFFIX) {

// Where things lie in the scratch memory of a thread; every part starts on a cache line.
struct Scratch {
  int64_t rows, padded, key_dim, value_dim, width;
  // Bytes of a run's values over the products of one run's keys.
  int64_t value_step;
  bool key_words, value_words, halves;
  int16_t* query16;
  float *query32, *query_unit, *query_sum, *lift_keys, *constant;
  int16_t* words;
  float* floats;
  float *scores, *key_scale, *key_zero, *value_scale, *value_zero;
  int32_t *weights, *value_pairs;
  float* value_floats;
  float *acc, *peak, *unit, *top;
  // Sums over lanes that are added up at the end, a vector a row.
  float *total, *zero_sum, *lift;
  const uint8_t **value_rows, **ahead;
  int64_t bytes;
};

static bool integer_path(const Pages& p) {
  return (p.code == INT8 || p.code == INT4) && (!p.dynamic || p.groups == 1) && p.head_dim <= 512;
}
static bool grouped(const Pages& p) {
  return p.scale && !integer_path(p) && p.dynamic && (p.groups > 1 || p.zero || p.code != FP8);
}

static Scratch plan_scratch(const Pages& key, const Pages& value, int64_t rows, uint8_t* base) {
  Scratch s;
  int64_t at = 0;
  auto take = [&](auto*& to, int64_t count) {
    to = (decltype(+to))(base + at);
    at = (at + count * (int64_t)sizeof(*to) + 63) / 64 * 64;
  };
  s.rows = rows;
  s.padded = (rows + 3) / 4 * 4;
  s.key_dim = key.head_dim;
  s.value_dim = value.head_dim;
  s.value_step = STEP * 8 * value.row_stride / s.key_dim;
  s.key_words = integer_path(key);
  s.value_words = integer_path(value);
  s.halves = in_halves(value.code, s.value_dim);
  s.width = s.value_words ? value_width(value.code, s.value_dim) : s.value_dim;
  take(s.query16, s.padded * s.key_dim);
  take(s.query32, s.padded * s.key_dim);
  for (float** each : {&s.query_unit, &s.query_sum, &s.lift_keys, &s.constant, &s.peak, &s.unit, &s.top})
    take(*each, s.padded);
  for (float** each : {&s.total, &s.zero_sum, &s.lift}) take(*each, s.padded * VW);
  take(s.words, s.key_words ? RUN * s.key_dim : 0);
  take(s.floats, s.key_words ? 0 : RUN * s.key_dim);
  take(s.scores, s.padded * TILE);
  for (float** each : {&s.key_scale, &s.key_zero, &s.value_scale, &s.value_zero}) take(*each, TILE);
  take(s.weights, s.padded * TILE / 2);
  take(s.value_pairs, s.value_words && rows > 4 ? TILE / 2 * s.width : 0);
  take(s.value_floats, !s.value_words && (rows > 4 || grouped(value)) ? TILE * s.value_dim : 0);
  take(s.acc, s.padded * s.width);
  take(s.value_rows, TILE);
  take(s.ahead, TILE);
  s.bytes = at;
  return s;
}

// ---- before the first tile -----------------------------------------------------------------------
static void load_query(const uint8_t* from, int64_t type, int64_t dim, float times, float* to) {
  for (int64_t c = 0; c < dim; c += VW) {
    const vf x = type == F32 ? numbers<F32>(from, c) : type == BF16 ? numbers<BF16>(from, c) : numbers<F16>(from, c);
    storef(to + c, x * splat(times));
  }
}

// Static scales and zeros belong to channels: they go into the query and into a constant a row.
static float fold_static(const Pages& key, int64_t head, float* q) {
  float constant = 0;
  for (int64_t c = 0; c < key.head_dim; c++) {
    if (key.zero) constant += q[c] * static_number(key, key.zero, key.zero_head, head, c);
    q[c] *= static_number(key, key.scale, key.scale_head, head, c) * (key.code == FP8 ? 256.f : 1.f);
  }
  return constant;
}

// The query's channels as 15-bit words, eight of a row in each lane.
static void round_query(const Scratch& s, int64_t r, int64_t code) {
  const int64_t dim = s.key_dim;
  const float* q = s.query32 + r * dim;
  vf most = splat(0.f), sum = splat(0.f);
  for (int64_t c = 0; c < dim; c += VW) {
    const vf x = loadf(q + c);
    sum += x;
    most = vmax(most, (vf)((vi)x & splati(0x7fffffff)));
  }
  const float largest = hmax(most);
  // 0 * sum: a query that is not finite must not come out finite.
  const float unit = largest / 32767.f + 0.f * hsum(sum);
  const vf inverse = splat(largest > 1e-30f ? 32767.f / largest : 0.f);
  vi rounded = {};
  alignas(64) int16_t words[512], ordered[512];
  for (int64_t c = 0; c < dim; c += VW) {
    const vf magic = splat(12582912.f);
    const vi w = (vi)(loadf(q + c) * inverse + magic) - (vi)magic;
    rounded += w;
    store_words(words + c, w);
  }
  order_query(code, dim, words, ordered);
  int16_t* to = s.query16 + (r / LANES * LANES) * dim + r % LANES * 8;
  for (int64_t i = 0; i < dim; i += 8) memcpy(to + i * LANES, ordered + i, 16);
  s.query_unit[r] = unit;
  if (code != INT4) return;
  int64_t total = 0;
  for (int j = 0; j < VW; j++) total += rounded[j];
  s.lift_keys[r] = -8.f * unit * (float)total;
}

static void prepare_rows(const Item& item, const Scratch& s) {
  const Attend& a = *item.call;
  const Pages& key = *item.key;
  const int64_t group = a.q_heads / a.kv_heads, dim = s.key_dim;
  const int64_t item_size = a.q_type == F32 ? 4 : 2;
  memset(s.acc, 0, 4 * s.padded * s.width);
  if (s.key_words) memset(s.query16, 0, 2 * s.padded * dim);
  for (int64_t r = 0; r < s.padded; r++) {
    s.peak[r] = -__builtin_inff();
    for (float* sums : {s.total, s.zero_sum, s.lift}) storef(sums + r * VW, splat(0.f));
    s.unit[r] = s.query_sum[r] = s.lift_keys[r] = s.constant[r] = s.query_unit[r] = 0;
    if (r >= s.rows) continue;
    const int64_t head = item.kv_head * group + r % group;
    float* q = s.query32 + r * dim;
    load_query(a.q + ((item.first + r / group) * a.q_token + head * a.q_head) * item_size, a.q_type, dim,
               (float)a.softmax_scale, q);
    if (key.zero && key.dynamic) {
      vf sum = splat(0.f);
      for (int64_t c = 0; c < dim; c += VW) sum += loadf(q + c);
      s.query_sum[r] = hsum(sum);
    }
    if (key.scale && !key.dynamic) s.constant[r] = fold_static(key, item.kv_head, q);
    if (s.key_words) round_query(s, r, key.code);
  }
  // Weights of rows that only pad a group of four stay 0.
  for (int64_t r = s.rows; r < s.padded; r++) {
    memset(s.weights + r * (TILE / 2), 0, 2 * TILE);
    memset(s.scores + r * TILE, 0, 4 * TILE);
  }
}

// ---- tiles -----------------------------------------------------------------------------------------
// Dynamic scales of one run; lanes past its end get 0.
static inline void load_plane(const Pages& p, const uint8_t* from, int64_t row_stride, int64_t count, float* to) {
  const int64_t size = p.scale_type == F32 ? 4 : 2;
  if (count == RUN && row_stride == size) {
    for (int i = 0; i < RUN; i += VW)
      storef(to + i, p.scale_type == F32 ? load<vf>(from + 4 * i) : halves(from + 2 * i));
    return;
  }
  for (int64_t i = 0; i < RUN; i++) to[i] = i < count ? number(from + i * row_stride, p.scale_type, 0) : 0.f;
}

template <int64_t CODE, int64_t DIM> static void keys_of_run(const Scratch& s, const Run& run, const uint8_t* next, int64_t stride) {
  const int64_t dim = DIM ? DIM : s.key_dim, bytes = row_bytes(CODE, dim);
  if (next)
    for (int64_t b = 0; b < RUN * bytes; b += 64) __builtin_prefetch(next + b, 0, 2);
  if (CODE == INT8 && run.count == RUN && stride == bytes) {
    // Rows without gaps are one long row.
    key_words<INT8>(run.k, RUN * dim, s.words);
    return;
  }
  const uint8_t* from = run.k;
  for (int64_t j = 0; j < RUN; j++) {
    if constexpr (CODE == INT8 || CODE == INT4) key_words<CODE>(from, dim, s.words + j * dim);
    else key_floats<CODE>(from, dim, s.floats + j * dim);
    // Rows past the end of a short run repeat its last one.
    if (j + 1 < run.count) from += stride;
  }
}
template <int64_t CODE> static void keys_of_run(const Scratch& s, const Run& run, const uint8_t* next, int64_t stride) {
  if (s.key_dim == 128) keys_of_run<CODE, 128>(s, run, next, stride);
  else if (s.key_dim == 64) keys_of_run<CODE, 64>(s, run, next, stride);
  else keys_of_run<CODE, 0>(s, run, next, stride);
}

// `next`: keys to fetch meanwhile, where there are.
static void score_run(const Item& item, const Scratch& s, const Run& run, const Run* next, int64_t lane) {
  const Pages &key = *item.key, &value = *item.value;
  const uint8_t* ahead = next && next->count == RUN ? next->k : nullptr;
  if (grouped(key)) {
    for (int64_t j = 0; j < RUN; j++) {
      const int64_t row = j < run.count ? j : run.count - 1;
      dequantize_row(key, item.kv_head, run.k + row * key.row_stride, run.k_scale + row * key.scale_row,
                     run.k_zero + row * key.zero_row, s.floats + j * s.key_dim);
    }
  } else {
    switch (key.code) {
      case F32: keys_of_run<F32>(s, run, ahead, key.row_stride); break;
      case BF16: keys_of_run<BF16>(s, run, ahead, key.row_stride); break;
      case F16: keys_of_run<F16>(s, run, ahead, key.row_stride); break;
      case INT8: keys_of_run<INT8>(s, run, ahead, key.row_stride); break;
      case INT4: keys_of_run<INT4>(s, run, ahead, key.row_stride); break;
      default: keys_of_run<FP8>(s, run, ahead, key.row_stride);
    }
  }
  if (s.key_words) {
    // The run's values are wanted after the tile's keys: fetched a little with every product.
    const Ahead values = {run.v, s.value_step};
    float* to = s.scores + lane;
    if (s.key_dim == 128) integer_scores<128>(s.words, 128, s.query16, s.query_unit, s.rows, to, values);
    else if (s.key_dim == 64) integer_scores<64>(s.words, 64, s.query16, s.query_unit, s.rows, to, values);
    else integer_scores<0>(s.words, s.key_dim, s.query16, s.query_unit, s.rows, to, values);
  } else {
    for (int64_t b = 0; b < run.count * value.row_stride; b += 64) __builtin_prefetch(run.v + b, 0, 2);
    float_scores(s.floats, s.key_dim, s.query32, s.rows, s.scores + lane);
  }
  if (key.scale && key.dynamic && !grouped(key)) {
    load_plane(key, run.k_scale, key.scale_row, run.count, s.key_scale + lane);
    if (key.zero) load_plane(key, run.k_zero, key.zero_row, run.count, s.key_zero + lane);
  }
  if (value.scale && value.dynamic && !grouped(value)) {
    load_plane(value, run.v_scale, value.scale_row, run.count, s.value_scale + lane);
    if (value.zero) load_plane(value, run.v_zero, value.zero_row, run.count, s.value_zero + lane);
  }
}

static inline vi lanes_seen(uint32_t bits, int shift) {
  return -(((splati((int32_t)bits) >> (iota() + splati(shift))) & splati(1)));
}

// Scores of one row: scale, cap, mask; returns the highest. The three steps from scores to weights
// run over all rows one after the other, so that the waits of one row are filled by the next.
static float finish_scores(const Item& item, const Scratch& s, int64_t row, const Run* runs, int64_t num_runs,
                           int64_t first_run) {
  const Attend& a = *item.call;
  const Pages& key = *item.key;
  const int64_t token = row / (a.q_heads / a.kv_heads);
  const bool scaled = key.scale && key.dynamic && !grouped(key), zeroed = scaled && key.zero;
  const vf times = splat(key.code == FP8 && scaled ? 256.f : 1.f);
  float* x = s.scores + row * TILE;
  const vf lift = splat(s.lift_keys[row]), constant = splat(s.constant[row]), sum = splat(s.query_sum[row]);
  const vf cap = splat((float)a.softcap), per_cap = splat(a.softcap > 0 ? (float)(1 / a.softcap) : 0.f);
  vf highest = splat(-__builtin_inff());
  for (int64_t r = 0; r < num_runs; r++) {
    uint32_t bits = (1u << runs[r].count) - 1;
    if (!runs[r].all) bits &= item.seen[(first_run + r) * item.tokens + token];
    for (int j = 0; j < RUN; j += VW) {
      const int64_t i = r * RUN + j;
      vf v = loadf(x + i) + lift;
      if (scaled) v = v * (loadf(s.key_scale + i) * times);
      if (zeroed) v = v + loadf(s.key_zero + i) * sum;
      v = v + constant;
      if (a.softcap > 0) v = vtanh(v * per_cap) * cap;
      if (bits != 0xffff) v = select(lanes_seen(bits, j), v, splat(-__builtin_inff()));
      highest = vmax(highest, v);
      storef(x + i, v);
    }
  }
  return hmax(highest);
}

// The online softmax: weights take the scores' place; returns the largest, 0 where the row sees
// nothing of the tile.
static float weigh_row(const Item& item, const Scratch& s, int64_t row, int64_t lanes, float top) {
  const Pages& value = *item.value;
  float* x = s.scores + row * TILE;
  if (top == -__builtin_inff()) {
    memset(x, 0, 4 * lanes);
    return 0;
  }
  if (top > s.peak[row]) {
    if (s.peak[row] != -__builtin_inff()) {
      const vf shrink = vexp(splat(s.peak[row] - top));
      for (float* sums : {s.total, s.zero_sum, s.lift}) storef(sums + row * VW, loadf(sums + row * VW) * shrink);
      float* acc = s.acc + row * s.width;
      for (int64_t c = 0; c < s.width; c += VW) storef(acc + c, loadf(acc + c) * shrink);
    }
    s.peak[row] = top;
  }
  const vf peak = splat(s.peak[row]);
  const bool weighed = value.scale && value.dynamic && !grouped(value), zeroed = weighed && value.zero;
  const vf worth = splat(value.code == FP8 && value.scale && !grouped(value) ? 256.f : 1.f);
  vf total = loadf(s.total + row * VW), zero_sum = loadf(s.zero_sum + row * VW), most = splat(0.f);
  for (int64_t i = 0; i < lanes; i += VW) {
    vf e = vexp(loadf(x + i) - peak);
    total += e;
    if (weighed) {
      // Select, do not multiply by zero: scales of keys that the row does not see may be NaN.
      const vi none = e == splat(0.f);
      if (zeroed) zero_sum += select(none, splat(0.f), e * loadf(s.value_zero + i));
      e = select(none, splat(0.f), e * loadf(s.value_scale + i));
    }
    e = e * worth;
    most = vmax(most, e);
    storef(x + i, e);
  }
  storef(s.total + row * VW, total);
  storef(s.zero_sum + row * VW, zero_sum);
  return s.value_words ? hmax(most) : 0;
}

// Weights as words of 15 bits of the largest.
static void round_weights(const Scratch& s, int64_t row, int64_t lanes, float largest) {
  const float* x = s.scores + row * TILE;
  int16_t* weights = (int16_t*)(s.weights + row * (TILE / 2));
  s.unit[row] = 0;
  if (!(largest > 1e-30f)) {
    memset(weights, 0, 2 * lanes);
    return;
  }
  const vf inverse = splat(32767.f / largest);
  vi rounded = {};
  for (int64_t i = 0; i < lanes; i += VW) {
    const vi w = __builtin_convertvector(loadf(x + i) * inverse + splat(0.5f), vi);
    rounded += w;
    store_words(weights + i, w);
  }
  s.unit[row] = largest / 32767.f;
  storef(s.lift + row * VW, loadf(s.lift + row * VW) + __builtin_convertvector(rounded, vf) * splat(s.unit[row]));
}

static void soften(const Item& item, const Scratch& s, const Run* runs, int64_t num_runs, int64_t first_run) {
  const int64_t lanes = num_runs * RUN;
  for (int64_t row = 0; row < s.rows; row++)
    s.top[row] = finish_scores(item, s, row, runs, num_runs, first_run);
  for (int64_t row = 0; row < s.rows; row++) s.top[row] = weigh_row(item, s, row, lanes, s.top[row]);
  if (!s.value_words) return;
  for (int64_t row = 0; row < s.rows; row++) round_weights(s, row, lanes, s.top[row]);
}

// Both keys of a pair in turn; rows past the end stand for the last one, with weight 0.
static void list_rows(const Run* runs, int64_t num_runs, const uint8_t* Run::*side, int64_t row_stride,
                      const uint8_t** rows) {
  for (int64_t r = 0; r < num_runs; r++) {
    const uint8_t* first = runs[r].*side;
    for (int64_t j = 0; j < RUN; j++) rows[r * RUN + j] = first + j * row_stride;
    for (int64_t j = runs[r].count; j < RUN; j++) rows[r * RUN + j] = first + (runs[r].count - 1) * row_stride;
  }
}

// Scales and zeros of runs to come: few lines, but a quarter of the time goes by waiting for them.
static void fetch_planes(const Run* runs, int64_t num_runs) {
  for (int64_t r = 0; r < num_runs; r++)
    for (const uint8_t* plane : {runs[r].k_scale, runs[r].k_zero, runs[r].v_scale, runs[r].v_zero})
      if (plane) __builtin_prefetch(plane, 0, 2);
}
// What the first tile needs, before the queries are prepared.
static void fetch_first(const Run* runs, int64_t num_runs, int64_t row_stride) {
  fetch_planes(runs, num_runs < RUNS ? num_runs : RUNS);
  for (int64_t r = 0; r < num_runs && r < 2; r++)
    for (int64_t b = 0; b < runs[r].count * row_stride; b += 64) __builtin_prefetch(runs[r].k + b, 0, 2);
}

template <int N> struct Rows {
  static constexpr int value = N;
};

template <int64_t CODE, bool HALVES> static void add_few_integers(const Scratch& s, int64_t lanes, int64_t lines) {
  const int64_t bytes = row_bytes(CODE, s.value_dim), width = s.width;
  const int64_t pieces = (bytes + VW * 4 - 1) / (VW * 4);
  float* acc = s.acc;
  for (int64_t byte = 0; byte < bytes; byte += VW * 4, acc += vectors<CODE>() * VW) {
    const int64_t left = bytes - byte, piece = byte / (VW * 4);
    const AheadRows next = {s.ahead, piece * lines / pieces, (piece + 1) * lines / pieces};
    auto add = [&](auto rows) {
      integer_piece<CODE, decltype(rows)::value, HALVES>(s.value_rows, lanes, byte, left, s.weights, s.unit, acc, width,
                                                         next);
    };
    switch (s.rows) {
      case 1: add(Rows<1>()); break;
      case 2: add(Rows<2>()); break;
      case 3: add(Rows<3>()); break;
      default: add(Rows<4>());
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
template <int64_t CODE, bool HALVES> static void add_integers(const Scratch& s, int64_t lanes, int64_t lines) {
  if (s.rows <= 4) add_few_integers<CODE, HALVES>(s, lanes, lines);
  else add_many_integers<CODE, HALVES>(s, lanes);
}
template <int64_t CODE>
static void add_floats(const Scratch& s, const uint8_t* const* rows, int64_t lanes, int64_t first, int64_t count,
                       int64_t lines) {
  const AheadRows next = {s.ahead, 0, first == 0 ? lines : 0};
  float* acc = s.acc + first * s.width;
  const float* w = s.scores + first * TILE;
  switch (count) {
    case 1: float_values<CODE, 1>(rows, lanes, w, acc, s.width, next); break;
    case 2: float_values<CODE, 2>(rows, lanes, w, acc, s.width, next); break;
    case 3: float_values<CODE, 3>(rows, lanes, w, acc, s.width, next); break;
    default: float_values<CODE, 4>(rows, lanes, w, acc, s.width, next);
  }
}

// `lines` of each row in s.ahead, the next tile's keys, are fetched meanwhile.
static void add_values(const Item& item, const Scratch& s, const Run* runs, int64_t num_runs, int64_t lines) {
  const Pages& value = *item.value;
  const int64_t lanes = num_runs * RUN;
  if (s.value_words) {
    auto add = s.halves ? add_integers<INT8, true> : add_integers<INT8, false>;
    if (value.code == INT4) add = s.halves ? add_integers<INT4, true> : add_integers<INT4, false>;
    add(s, lanes, lines);
    return;
  }
  int64_t code = value.code;
  if (s.rows > 4 || grouped(value)) {
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
    for (int64_t i = 0; i < lanes; i++) s.value_rows[i] = (const uint8_t*)(s.value_floats + i * s.value_dim);
    code = F32;
  }
  for (int64_t r = 0; r < s.rows; r += 4) {
    const int64_t count = s.rows - r < 4 ? s.rows - r : 4;
    switch (code) {
      case F32: add_floats<F32>(s, s.value_rows, lanes, r, count, lines); break;
      case BF16: add_floats<BF16>(s, s.value_rows, lanes, r, count, lines); break;
      case F16: add_floats<F16>(s, s.value_rows, lanes, r, count, lines); break;
      default: add_floats<FP8>(s, s.value_rows, lanes, r, count, lines);
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
    else if (value.code == INT8) put_back<INT8>(acc, s.value_dim, s.halves, zero, lift, to);
    else put_back<INT4>(acc, s.value_dim, s.halves, zero, lift, to);
    if (!value.scale || value.dynamic) continue;
    for (int64_t c = 0; c < s.value_dim; c++) {
      to[c] *= static_number(value, value.scale, value.scale_head, item.kv_head, c);
      if (value.zero) to[c] += out.total[r] * static_number(value, value.zero, value.zero_head, item.kv_head, c);
    }
  }
}

static int64_t attend_item(const Item* item, const Partial* out, uint8_t* memory, int64_t size) {
  const Pages &key = *item->key, &value = *item->value;
  const int64_t group = item->call->q_heads / item->call->kv_heads;
  const Scratch s = plan_scratch(key, value, item->tokens * group, memory);
  if (s.bytes > size) return s.bytes;
  fetch_first(item->runs, item->num_runs, key.row_stride);
  prepare_rows(*item, s);
  for (int64_t at = 0; at < item->num_runs; at += RUNS) {
    const int64_t rest = item->num_runs - at, n = rest < RUNS ? rest : RUNS;
    const Run* runs = item->runs + at;
    // A tile's values are fetched while its keys are multiplied, the next tile's keys while its
    // values are; only the first tile's keys have to fetch each other.
    for (int64_t r = 0; r < n; r++)
      score_run(*item, s, runs[r], at == 0 && r + 2 < n ? runs + r + 2 : nullptr, r * RUN);
    soften(*item, s, runs, n, at);
    list_rows(runs, n, &Run::v, value.row_stride, s.value_rows);
    fetch_planes(runs + n, rest - n < RUNS ? rest - n : RUNS);
    const bool more = rest >= 2 * n;
    if (more) list_rows(runs + RUNS, n, &Run::k, key.row_stride, s.ahead);
    add_values(*item, s, runs, n, more ? (row_bytes(key.code, s.key_dim) + 63) / 64 : 0);
  }
  hand_back(*item, s, *out);
  return 0;
}

}  // namespace
