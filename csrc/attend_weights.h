// From scores to the weights that values are multiplied with: mask, online softmax, rounding.
#pragma once
#include "attend_scratch.h"

namespace CONCAT(isa_, SUFFIX) {

static inline vi lanes_seen(uint32_t bits, int shift) {
  return -(((splati((int32_t)bits) >> (iota() + splati(shift))) & splati(1)));
}

// Scores of one row: scale, cap, mask; returns the highest (a NaN among them may be lost here). The
// three steps from scores to weights run over all rows one after the other, so that the waits of one
// row are filled by the next. `whole`: every row sees every key of the tile. Most tiles are, and have a scale
// a token and nothing else.
static float finish_scores(const Item& item, const Scratch& s, int64_t row, const Run* runs, int64_t num_runs,
                           int64_t first_run, bool whole) {
  const Attend& a = *item.call;
  const Pages& key = *item.key;
  const int64_t token = row / (a.q_heads / a.kv_heads);
  const bool scaled = key.scale && key.dynamic && !grouped(key), zeroed = scaled && key.zero;
  float* x = s.scores + row * TILE;
  const bool moved = s.lift_keys[row] != 0 || s.constant[row] != 0;
  const vf lift = splat(s.lift_keys[row]), constant = splat(s.constant[row]), sum = splat(s.query_sum[row]);
  const vf cap = splat((float)a.softcap), per_cap = splat(a.softcap > 0 ? (float)(1 / a.softcap) : 0.f);
  vf highest = splat(-__builtin_inff());
  if (whole && scaled && !zeroed && !moved && !item.rotary && !(a.softcap > 0)) {
    for (int64_t i = 0; i < num_runs * RUN; i += VW) {
      const vf v = loadf(x + i) * loadf(s.key_scale + i);
      highest = vmax(highest, v);
      storef(x + i, v);
    }
    return hmax(highest);
  }
  for (int64_t r = 0; r < num_runs; r++) {
    uint32_t bits = (1u << runs[r].count) - 1;
    if (!runs[r].all) bits &= item.seen[(first_run + r) * item.tokens + token];
    for (int j = 0; j < RUN; j += VW) {
      const int64_t i = r * RUN + j;
      vf v = loadf(x + i);
      if (moved) v = v + lift;
      if (scaled) v = v * loadf(s.key_scale + i);
      if (zeroed) v = v + loadf(s.key_zero + i) * sum;
      if (item.rotary) v = v + loadf(s.rotary_scores + row * TILE + i);
      if (moved) v = v + constant;
      if (a.softcap > 0) v = vtanh(v * per_cap) * cap;
      if (bits != 0xffff) v = select(lanes_seen(bits, j), v, splat(-__builtin_inff()));
      highest = vmax(highest, v);
      storef(x + i, v);
    }
  }
  return hmax(highest);
}

// Whether a score of a row is NaN.
static bool any_nan(const float* x, int64_t lanes) {
  vi odd = splati(0);
  for (int64_t i = 0; i < lanes; i += VW) odd = odd | (loadf(x + i) != loadf(x + i));
  return any(odd);
}

// The online softmax: weights take the scores' place; returns the largest, 0 where the row sees
// nothing of the tile.
static float weigh_row(const Item& item, const Scratch& s, int64_t row, int64_t lanes, float top) {
  const Pages& value = *item.value;
  float* x = s.scores + row * TILE;
  // A score that is NaN or infinite makes its row's output and log-sum-exp NaN, through the total:
  // here, or below by its own weight.
  if (!(__builtin_fabsf(top) < __builtin_inff())) {
    if (top == __builtin_inff() || any_nan(x, lanes)) storef(s.total + row * VW, splat(__builtin_nanf("")));
    memset(x, 0, 4 * lanes);
    return s.sum[row] = 0;
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
  const bool raised = value.code == FP8 && value.scale && !value.dynamic;
  vf total = loadf(s.total + row * VW), zero_sum = loadf(s.zero_sum + row * VW), most = splat(0.f), all = splat(0.f);
  const auto weigh = [&](bool weighed, bool zeroed, bool raised) __attribute__((always_inline)) {
    for (int64_t i = 0; i < lanes; i += VW) {
      vf e = vexp(loadf(x + i) - peak);
      total += e;
      if (weighed) {
        // Select, do not multiply by zero: scales of keys that the row does not see may be NaN.
        const vi none = e == splat(0.f);
        if (zeroed) zero_sum += select(none, splat(0.f), e * loadf(s.value_zero + i));
        e = select(none, splat(0.f), e * loadf(s.value_scale + i));
      }
      if (raised) e = e * splat(code_unit(value));
      most = vmax(most, e);
      all += e;
      storef(x + i, e);
    }
  };
  // Most formats have a scale a token and nothing else.
  if (weighed && !zeroed && !raised) weigh(true, false, false);
  else weigh(weighed, zeroed, raised);
  storef(s.total + row * VW, total);
  storef(s.zero_sum + row * VW, zero_sum);
  if (!s.value_words) return 0;
  s.sum[row] = hsum(all);
  return hmax(most);
}

// The smallest code that says something, against codes of a few hundred rows, whose errors add up to
// sqrt(rows) of a code's own.
static uint8_t faint_code(const Pages& value) { return value.code == INT8 ? 8 : value.code == INT6 ? 2 : 1; }

typedef uint8_t sixteen __attribute__((vector_size(16)));
INLINE bool any_of(sixteen bytes) { return (load<uint64_t>(&bytes) | load<uint64_t>((uint8_t*)&bytes + 8)) != 0; }
INLINE sixteen loud_codes(sixteen codes, uint8_t faint) {
  const sixteen less = (sixteen){} + (uint8_t)(faint - 1);
  return (sixteen)(codes + less > less + less);
}
// Eight bytes of nibbles that stand for 0.
constexpr uint64_t QUIET_NIBBLES = 0x8888888888888888u;

static Content find_by_channel(const Pages& value, const Scratch& s, const uint8_t* row) {
  const float faint = faint_code(value);
  bool any = false;
  for (int64_t c = 0; c < s.value_dim; c++) {
    const int code = value.code == INT4 ? (row[c / 2] >> 4 * (c % 2) & 15) - 8 : (int8_t)row[c];
    const float number = (float)code * s.channel_scale[c] + s.channel_zero[c];
    if (number >= faint || number <= -faint) return LOUD;
    any |= code != 0;
  }
  return any ? FAINT : EMPTY;
}
// What the codes of a value row say.
static Content find_content(const Pages& value, const Scratch& s, const uint8_t* row) {
  if (s.channel_scale) return find_by_channel(value, s, row);
  if (value.code == INT4) {
    for (int64_t b = 0; b < s.value_dim / 2; b += 8)
      if (load<uint64_t>(row + b) != QUIET_NIBBLES) return LOUD;
    return EMPTY;
  }
  sixteen every = {};
  for (int64_t c = 0; c < s.value_dim; c += 16) {
    const sixteen codes = load<sixteen>(row + c);
    if (any_of(loud_codes(codes, faint_code(value)))) return LOUD;
    every |= codes;
  }
  return any_of(every) ? FAINT : EMPTY;
}

// Whether all rows of the tile are LOUD; if not, what each says is known. Most are by their first channels.
static bool all_loud(const Pages& value, const Scratch& s, int64_t lanes) {
  bool all = !s.channel_scale;
  if (all && value.code == INT4)
    for (int64_t i = 0; i < lanes; i++) all &= load<uint64_t>(s.value_rows[i]) != QUIET_NIBBLES;
  else if (all)
    for (int64_t i = 0; i < lanes; i++) all &= any_of(loud_codes(load<sixteen>(s.value_rows[i]), faint_code(value)));
  if (all) return true;
  all = true;
  for (int64_t i = 0; i < lanes; i++) {
    s.content[i] = find_content(value, s, s.value_rows[i]);
    all &= s.content[i] == LOUD;
  }
  return all;
}

static float largest_of(const float* x, int64_t lanes) {
  vf most = splat(0.f);
  for (int64_t i = 0; i < lanes; i += VW) most = vmax(most, loadf(x + i));
  return hmax(most);
}

// The first lane in which x is `wanted`, which is there.
static int64_t find_lane(const float* x, float wanted) {
  int64_t at = 0;
  while (!any(loadf(x + at) == splat(wanted))) at += VW;
  while (x[at] != wanted) at++;
  return at;
}

// Whether scales of the tile's value rows are so unlike that one row may outweigh the others by its
// scale. A scale of 1 is what rows of zeros had in pages of version 0.1.
static bool scales_differ(const Pages& value, const Scratch& s, int64_t lanes) {
  if (!value.dynamic) return true;
  vf least = splat(__builtin_inff()), most = splat(0.f);
  vi ones = splati(0);
  for (int64_t i = 0; i < lanes; i += VW) {
    const vf scale = loadf(s.value_scale + i);
    // Lanes past the end of a run hold 0.
    least = select((scale > splat(0.f)) & (scale < least), scale, least);
    most = vmax(most, scale);
    ones = ones | (scale == splat(1.f));
  }
  return any(ones) || hmax(most) > -8.f * hmax(-least);
}

// The largest weight that the others may be rounded against: 15 bits of it are enough beside what its
// own row adds to the output, if that row says anything. Rows whose codes are all 0 lose their
// weight; for a faint one `faint` asks for the remainders too.
static float settle_largest(const Pages& value, const Scratch& s, int64_t row, int64_t lanes, float largest, bool& faint) {
  float* x = s.scores + row * TILE;
  while (largest > 1e-30f) {
    const int64_t at = find_lane(x, largest);
    if (s.content[at] == UNKNOWN) s.content[at] = find_content(value, s, s.value_rows[at]);
    faint = s.content[at] == FAINT;
    if (s.content[at] != EMPTY) break;
    x[at] = 0;
    largest = largest_of(x, lanes);
  }
  return largest;
}

// Weights as words of 15 bits of the largest. KEEP: what rounding leaves takes the weights' place.
template <bool KEEP> static void round_weights(const Scratch& s, int64_t row, int64_t lanes, float largest) {
  float* x = s.scores + row * TILE;
  int16_t* weights = (int16_t*)(s.weights + row * (TILE / 2));
  s.unit[row] = 0;
  if (!(largest > 1e-30f)) {
    memset(weights, 0, 2 * lanes);
    return;
  }
  const vf inverse = splat(32767.f / largest), unit = splat(largest / 32767.f), magic = splat(12582912.f);
  vi rounded = {};
  for (int64_t i = 0; i < lanes; i += VW) {
    const vf nearest = loadf(x + i) * inverse + magic;
    const vi w = (vi)nearest - (vi)magic;
    rounded += w;
    store_words(weights + i, w);
    if (KEEP) storef(x + i, loadf(x + i) - (nearest - magic) * unit);
  }
  s.unit[row] = largest / 32767.f;
  storef(s.lift + row * VW, loadf(s.lift + row * VW) + __builtin_convertvector(rounded, vf) * unit);
}

// Weights of the tile. True: some rows have remainders that count, `round_remainders` makes weights of
// them for a second sum over the same values.
static bool soften(const Item& item, const Scratch& s, const Run* runs, int64_t num_runs, int64_t first_run,
                   Ahead& ahead) {
  const int64_t lanes = num_runs * RUN;
  bool whole = true;
  for (int64_t r = 0; r < num_runs; r++) whole &= runs[r].all && runs[r].count == RUN;
  for (int64_t row = 0; row < s.rows; row++) {
    ahead.fetch();
    s.top[row] = finish_scores(item, s, row, runs, num_runs, first_run, whole);
  }
  for (int64_t row = 0; row < s.rows; row++) {
    ahead.fetch();
    s.top[row] = weigh_row(item, s, row, lanes, s.top[row]);
  }
  if (!s.value_words) return false;
  memset(s.content, UNKNOWN, lanes);
  // One look at a tile's rows is less than many searches for the row of the largest weight.
  const bool loud = s.rows > 4 && all_loud(*item.value, s, lanes);
  const bool differ = !loud && scales_differ(*item.value, s, lanes);
  bool again = false;
  for (int64_t row = 0; row < s.rows; row++) {
    ahead.fetch();
    bool faint = false;
    float largest = s.top[row];
    // Searching costs as much as a tenth of the tile: only where few keys have all the weight.
    if (!loud && (differ || s.sum[row] < 4 * largest))
      largest = settle_largest(*item.value, s, row, lanes, largest, faint);
    if (faint) round_weights<true>(s, row, lanes, largest);
    else round_weights<false>(s, row, lanes, largest);
    s.top[row] = faint ? largest / 32767.f : 0.f;
    again |= faint;
  }
  return again;
}
static void round_remainders(const Scratch& s, int64_t lanes) {
  // A remainder is at most half a unit, and rounding it against a whole one cannot overflow.
  for (int64_t row = 0; row < s.rows; row++) round_weights<false>(s, row, lanes, s.top[row]);
}

}  // namespace
