// What an item keeps between its tiles, and what is done before the first of them.
#pragma once
#include "attend_bytes.h"
#include "rows.h"

namespace CONCAT(isa_, SUFFIX) {

// How much the codes of a value row say: UNKNOWN as long as nobody asked, EMPTY all zero, FAINT all
// small against the range of codes, LOUD anything else.
enum Content : uint8_t { UNKNOWN, EMPTY, FAINT, LOUD };

// Where things lie in the scratch memory of a thread; every part starts on a cache line.
struct Scratch {
  int64_t rows, padded, key_dim, value_dim, rotary_dim, width;
  // How often values are gone through.
  int64_t value_passes;
  // Whether keys are multiplied as words (if not, as floats), and those as they lie, byte by byte.
  bool key_words, by_bytes, value_words, halves;
  int16_t* query16;
  uint8_t* query8;
  float *query32, *query_unit, *query_sum, *lift_keys, *constant;
  int16_t* words;
  int32_t* turned;
  float* floats;
  float *scores, *key_scale, *key_zero, *value_scale, *value_zero;
  int32_t *weights, *value_pairs;
  float* value_floats;
  float *acc, *peak, *unit, *top, *sum;
  // Static values by channel: scale and zero over the largest scale; null where one scale is all.
  float *channel_scale, *channel_zero;
  // Of latent rows: queries, a run's keys and the scores of the rotary channels.
  float *rotary_query, *rotary_keys, *rotary_scores;
  // Codes in planes, spread: a run's keys', and a tile's values'.
  uint8_t *key_bytes, *value_bytes;
  // What is known of the codes of the tile's value rows.
  Content* content;
  // Sums over lanes that are added up at the end, a vector a row.
  float *total, *zero_sum, *lift;
  const uint8_t** value_rows;
  Block* blocks;
  int64_t bytes;
};

static bool integer_path(const Pages& p) {
  return (p.code == INT8 || p.code == INT4 || planed(p.code)) && (!p.dynamic || p.groups == 1) && p.head_dim <= 512;
}
static bool grouped(const Pages& p) {
  return p.scale && !integer_path(p) && p.dynamic && (p.groups > 1 || p.zero || p.code != FP8);
}

// Whether channels of values differ in what a code stands for.
static bool by_channel(const Pages& p) { return p.scale && !p.dynamic && (p.groups > 1 || p.zero); }

static Scratch plan_scratch(const Item& item, int64_t rows, uint8_t* base) {
  const Pages &key = *item.key, &value = *item.value;
  Scratch s;
  int64_t at = 0;
  auto take = [&](auto*& to, int64_t count) {
    to = (decltype(+to))(base + at);
    at = (at + count * (int64_t)sizeof(*to) + 63) / 64 * 64;
  };
  s.rows = rows;
  // Rows are summed in groups of four, many in blocks.
  s.padded = rows >= MANY_ROWS ? (rows + 15) / 16 * 16 : (rows + 3) / 4 * 4;
  s.key_dim = key.head_dim;
  s.value_dim = value.head_dim;
  s.rotary_dim = item.rotary ? item.rotary->head_dim : 0;
  s.key_words = integer_path(key);
  s.by_bytes = VW == 16 && s.key_words && rows < MANY_ROWS;
  s.value_words = integer_path(value);
  const int64_t value_code = spread_code(value.code);
  s.halves = in_halves(value_code, s.value_dim);
  s.width = s.value_words ? value_width(value_code, s.value_dim) : s.value_dim;
  s.value_passes = s.value_words ? (rows <= 4 ? s.width / (VW * (value_code == INT4 ? 8 : 4)) : 0) : s.padded / 4;
  take(s.query16, s.by_bytes ? 0 : s.padded * s.key_dim);
#if VW == 16
  take(s.query8, s.by_bytes ? rows * query_bytes(spread_code(key.code), s.key_dim) : 0);
#endif
  take(s.query32, s.padded * s.key_dim);
  for (float** each : {&s.query_unit, &s.query_sum, &s.lift_keys, &s.constant, &s.peak, &s.unit, &s.top,
                       &s.sum})
    take(*each, s.padded);
  for (float** each : {&s.total, &s.zero_sum, &s.lift}) take(*each, s.padded * VW);
  take(s.words, s.key_words && !s.by_bytes ? RUN * s.key_dim : 0);
  take(s.turned, s.key_words && rows >= MANY_ROWS ? RUN * s.key_dim / 2 : 0);
  take(s.floats, s.key_words ? 0 : RUN * s.key_dim);
  take(s.scores, s.padded * TILE);
  for (float** each : {&s.key_scale, &s.key_zero, &s.value_scale, &s.value_zero}) take(*each, TILE);
  take(s.weights, s.padded * TILE / 2);
  take(s.value_pairs, s.value_words && rows > 4 ? TILE / 2 * s.width : 0);
  take(s.value_floats, !s.value_words && (rows > 4 || item.tokens > 1 || grouped(value)) ? TILE * s.value_dim : 0);
  const bool channels = s.value_words && by_channel(value);
  for (float** each : {&s.channel_scale, &s.channel_zero}) take(*each, channels ? s.value_dim : 0);
  if (!channels) s.channel_scale = s.channel_zero = nullptr;
  take(s.rotary_query, s.padded * s.rotary_dim);
  take(s.rotary_keys, RUN * s.rotary_dim);
  take(s.rotary_scores, s.rotary_dim ? s.padded * TILE : 0);
  take(s.key_bytes, s.by_bytes || planed(key.code) ? RUN * s.key_dim : 0);
  take(s.value_bytes, s.value_words && planed(value.code) ? TILE * s.value_dim : 0);
  take(s.content, TILE);
  take(s.acc, s.padded * s.width);
  take(s.value_rows, TILE);
  take(s.blocks, BLOCKS);
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
    q[c] *= static_number(key, key.scale, key.scale_head, head, c) * code_unit(key);
  }
  return constant;
}

// The largest word of a query: two signed bytes hold it.
constexpr float WORD = 127 * 256 + 127;

// The query's channels as 15-bit words, eight of a row in each lane, or as bytes. Whether all of them are finite.
static bool round_query(const Scratch& s, int64_t r, int64_t code) {
  const int64_t dim = s.key_dim;
  const float* q = s.query32 + r * dim;
  // Sizes of floats are ordered as their bits are, and what is not finite is above all others.
  vi most = splati(0);
  for (int64_t c = 0; c < dim; c += VW) {
    const vi size = (vi)loadf(q + c) & splati(0x7fffffff);
    most = size > most ? size : most;
  }
  const int32_t top = hmax(most);
  const float largest = load<float>(&top), unit = largest / WORD;
  const vf inverse = splat(largest > 1e-30f ? WORD / largest : 0.f);
  vi rounded = {};
  alignas(64) int16_t words[512], ordered[512];
  if (dim % 32) memset(words + dim, 0, 32);
  for (int64_t c = 0; c < dim; c += VW) {
    const vf magic = splat(12582912.f);
    const vi w = (vi)(loadf(q + c) * inverse + magic) - (vi)magic;
    rounded += w;
    store_words(words + c, w);
  }
  int32_t sum = 0;
  for (int j = 0; j < VW; j++) sum += rounded[j];
#if VW == 16
  if (s.by_bytes) arrange_query(code, dim, words, sum, s.query8 + r * query_bytes(code, dim));
#endif
  if (!s.by_bytes) {
    order_query(code, dim, words, ordered);
    int16_t* to = s.query16 + (r / LANES * LANES) * dim + r % LANES * 8;
    for (int64_t i = 0; i < dim; i += 8) memcpy(to + i * LANES, ordered + i, 16);
  }
  s.query_unit[r] = unit;
  if (code == INT4) s.lift_keys[r] = -8.f * unit * (float)sum;
  return top < 0x7f800000;
}

static vf sum_over(const float* q, int64_t dim, float times) {
  vf sum = splat(0.f);
  for (int64_t c = 0; c < dim; c += VW) sum += loadf(q + c) * splat(times);
  return sum;
}

static void prepare_channels(const Item& item, const Scratch& s) {
  const Pages& value = *item.value;
  float largest = 0;
  for (int64_t c = 0; c < s.value_dim; c++) {
    s.channel_scale[c] = static_number(value, value.scale, value.scale_head, item.kv_head, c);
    s.channel_zero[c] = value.zero ? static_number(value, value.zero, value.zero_head, item.kv_head, c) : 0.f;
    largest = s.channel_scale[c] > largest ? s.channel_scale[c] : largest;
  }
  for (float* each : {s.channel_scale, s.channel_zero})
    for (int64_t c = 0; c < s.value_dim; c++) each[c] /= largest;
}

// Sums of an item begin.
static void clear_sums(const Scratch& s) {
  memset(s.acc, 0, 4 * s.padded * s.width);
  for (int64_t r = 0; r < s.padded; r++) {
    s.peak[r] = -__builtin_inff();
    for (float* sums : {s.total, s.zero_sum, s.lift}) storef(sums + r * VW, splat(0.f));
  }
}

static void prepare_rows(const Item& item, const Scratch& s) {
  const Attend& a = *item.call;
  const Pages& key = *item.key;
  const int64_t group = a.q_heads / a.kv_heads, dim = s.key_dim;
  const int64_t item_size = a.q_type == F32 ? 4 : 2;
  if (s.channel_scale) prepare_channels(item, s);
  if (s.key_words && !s.by_bytes) memset(s.query16, 0, 2 * s.padded * dim);
  for (int64_t r = 0; r < s.padded; r++) {
    s.unit[r] = s.query_sum[r] = s.lift_keys[r] = s.constant[r] = s.query_unit[r] = 0;
    if (r >= s.rows) continue;
    const int64_t head = item.kv_head * group + r % group;
    float* q = s.query32 + r * dim;
    const uint8_t* from = a.q + ((item.first + r / group) * a.q_token + head * a.q_head) * item_size;
    load_query(from, a.q_type, dim, (float)a.softmax_scale, q);
    if (key.zero && key.dynamic) s.query_sum[r] = hsum(sum_over(q, dim, 1.f));
    if (key.scale && !key.dynamic) s.constant[r] = fold_static(key, item.kv_head, q);
    bool finite = s.key_words ? round_query(s, r, spread_code(key.code)) : hsum(sum_over(q, dim, 0.f)) == 0;
    if (item.rotary) {
      float* rotary = s.rotary_query + r * s.rotary_dim;
      load_query(from + dim * item_size, a.q_type, s.rotary_dim, (float)a.softmax_scale, rotary);
      finite &= hsum(sum_over(rotary, s.rotary_dim, 0.f)) == 0;
    }
    // Each score of a query that is not finite is to be NaN.
    if (!finite) s.constant[r] = __builtin_nanf("");
  }
  // Weights of rows that only pad a group of four stay 0.
  for (int64_t r = s.rows; r < s.padded; r++) {
    memset(s.weights + r * (TILE / 2), 0, 2 * TILE);
    memset(s.scores + r * TILE, 0, 4 * TILE);
  }
}

}  // namespace
