// One instruction set's rows: dequantize, and norm, rotate, quantize, scatter. Compiled without
// fused multiply-adds, so that codes are those of the reference (formats/quantize), which rounds
// after every operation.
#include <cmath>

#include "item.h"
#include "rows.h"

namespace CONCAT(isa_, SUFFIX) {

// |x| <= 448.
static inline uint8_t float_to_fp8(float x) {
  uint32_t bits = load<uint32_t>(&x);
  const uint8_t sign = (uint8_t)(bits >> 24 & 0x80);
  bits &= 0x7fffffff;
  const uint32_t shift = 141u << 23;
  const float moved = load<float>(&bits) + load<float>(&shift);
  const uint32_t small = load<uint32_t>(&moved) - shift;
  const uint32_t large = (bits - (120u << 23) + 0x7ffff + (bits >> 20 & 1)) >> 20;
  return sign | (uint8_t)(bits < (121u << 23) ? small : large);
}

static void read_numbers(const uint8_t* from, int64_t type, int64_t dim, float* to) {
  if (type == F32) memcpy(to, from, 4 * dim);
  else if (type == BF16)
    for (int64_t c = 0; c < dim; c++) {
      const uint32_t bits = (uint32_t)load<uint16_t>(from + 2 * c) << 16;
      to[c] = load<float>(&bits);
    }
  else
    for (int64_t c = 0; c < dim; c++) to[c] = half_to_float(load<uint16_t>(from + 2 * c));
}

void dequantize(const Pages* p, int64_t head, const uint8_t* codes, const uint8_t* scale, const uint8_t* zero,
                int64_t count, uint8_t* out, int64_t out_type, int64_t out_row) {
  alignas(64) float row[512];
  const int64_t size = out_type == F32 ? 4 : 2;
  for (int64_t i = 0; i < count; i++) {
    dequantize_row(*p, head, codes + i * p->row_stride, scale + i * p->scale_row, zero + i * p->zero_row, row);
    write_numbers(row, p->head_dim, out + i * out_row * size, out_type);
  }
}

// ---- writing -----------------------------------------------------------------------------------
static void norm_row(float* x, const float* weight, int64_t dim, float eps) {
  vf sum = splat(0.f);
  for (int64_t c = 0; c < dim; c += VW) sum += loadf(x + c) * loadf(x + c);
  const float times = 1.f / sqrtf(hsum(sum) / (float)dim + eps);
  for (int64_t c = 0; c < dim; c++) x[c] = x[c] * times * weight[c];
}
static void rope_row(float* x, const float* cos, const float* sin, int64_t half, bool interleaved) {
  if (interleaved) {
    for (int64_t i = 0; i < half; i++) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i];
      x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
    return;
  }
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}
static inline float clip(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }
// A NaN as 0, an infinity as the largest number of the type (formats/quantize).
static void make_finite(const float* x, int64_t dim, int64_t type, float* to) {
  const float limit = type == F16 ? 65504.f : type == BF16 ? 0x1.fep127f : 0x1.fffffep127f;
  for (int64_t c = 0; c < dim; c++) to[c] = x[c] == x[c] ? clip(x[c], limit) : 0.f;
}
// Rounded to the plane's dtype and stored; the number that was stored.
static float put_rounded(uint8_t* to, int64_t type, float x) {
  if (type == F32) {
    x = clip(x, 3.402823466e38f);
    store(to, x);
    return x;
  }
  const uint16_t h = float_to_half(clip(x, 65504.f));
  store(to, h);
  return half_to_float(h);
}
// A scale that rounds to 0 becomes the smallest there is (formats/quantize).
static float put_scale(uint8_t* to, int64_t type, float x) {
  const float least = type == F32 ? 0x1p-126f : 0x1p-24f;
  return put_rounded(to, type, x > least ? x : least);
}

// The largest code, and the smallest one of codes with a zero point.
static inline float top_of(int64_t code) {
  return code == INT8 ? 127.f : code == INT6 ? 31.f : code == INT4 ? 7.f : code == INT3 ? 3.f : 448.f;
}
static inline float bottom_of(int64_t code) { return -1.f - top_of(code); }

struct Affine {
  float scale, zero;
};
// A dynamic group: scale (and zero) of `factor` times its range, written into the planes.
static Affine measure(const Pages& p, const float* x, int64_t count, uint8_t* scale, uint8_t* zero,
                      double factor = 1) {
  float low = x[0], high = x[0];
  if (count % VW == 0) {
    vf most = loadf(x), least = -most;
    for (int64_t c = VW; c < count; c += VW) {
      most = vmax(most, loadf(x + c));
      least = vmax(least, -loadf(x + c));
    }
    high = hmax(most);
    low = -hmax(least);
  } else
    for (int64_t c = 0; c < count; c++) {
      low = x[c] < low ? x[c] : low;
      high = x[c] > high ? x[c] : high;
    }
  const float qmax = top_of(p.code);
  if (!p.zero) return {put_scale(scale, p.scale_type, (high > -low ? high : -low) * (float)factor / qmax), 0};
  const float qmin = bottom_of(p.code);
  const float half = high / 2 - low / 2;
  const float step = put_scale(scale, p.scale_type, half * (float)factor / (qmax - qmin) * 2);
  return {step, put_rounded(zero, p.scale_type, low + half * (float)(1 - factor) - qmin * step)};
}
static void encode(const Pages& p, const float* x, int64_t count, Affine by, float* codes) {
  const float top = top_of(p.code), bottom = p.zero ? bottom_of(p.code) : -top;
  for (int64_t c = 0; c < count; c++) {
    float y = (p.zero ? x[c] - by.zero : x[c]) / by.scale;
    y = y > top ? top : y < bottom ? bottom : y;
    codes[c] = y;
  }
  if (p.code == FP8) return;
  // Half to even, as every sum of floats.
  const float magic = 12582912.f;
  for (int64_t c = 0; c < count; c++) codes[c] = (codes[c] + magic) - magic;
}
// One plane of a row: `bits` bits of every code from bit `from` on (formats/spec).
static void put_plane(const uint8_t* lifted, int64_t dim, int64_t from, int64_t bits, uint8_t* to) {
  const int64_t bytes = dim * bits / 8;
  for (int64_t b = 0; b < bytes; b++) {
    uint32_t byte = 0;
    for (int64_t j = 0; j < 8 / bits; j++) byte |= (uint32_t)(lifted[j * bytes + b] >> from & ((1 << bits) - 1)) << j * bits;
    to[b] = (uint8_t)byte;
  }
}
static void put_codes(int64_t code, const float* codes, int64_t dim, uint8_t* to) {
  if (code == INT8)
    for (int64_t c = 0; c < dim; c++) to[c] = (uint8_t)(int8_t)(int32_t)codes[c];
  else if (code == FP8)
    for (int64_t c = 0; c < dim; c++) to[c] = float_to_fp8(codes[c]);
  else if (planed(code)) {
    const int64_t bits = code == INT6 ? 6 : 3, low = code == INT6 ? 4 : 2;
    uint8_t lifted[512];
    for (int64_t c = 0; c < dim; c++) lifted[c] = (uint8_t)((int32_t)codes[c] + (1 << (bits - 1)));
    put_plane(lifted, dim, 0, low, to);
    put_plane(lifted, dim, low, bits - low, to + dim * low / 8);
  } else
    for (int64_t c = 0; c < dim / 2; c++)
      to[c] = (uint8_t)(((int32_t)codes[2 * c] + 8) | ((int32_t)codes[2 * c + 1] + 8) << 4);
}

// Ranges that a row is tried with (formats/feedback).
static const double OF_INT4[] = {0.96, 0.88}, OF_INT3[] = {0.88, 0.8}, WHOLE[] = {1.0};
constexpr int64_t TRIES = 2;
struct Try {
  alignas(64) float target[512];
  alignas(64) float codes[512];
  Affine groups[512];
  uint8_t scale[2048], zero[2048];
  float loss;
};
// Codes and losses of a row by the ranges of `count` tries, in the metric that `factor` is of. A channel
// waits for the one before it, so the tries go side by side.
static void round_in_turn(const Pages& p, const float* x, const float* factor, Try* tries, int64_t count) {
  const int64_t dim = p.head_dim, channels = dim / p.groups;
  const float top = top_of(p.code), bottom = p.zero ? bottom_of(p.code) : -top;
  const float magic = 12582912.f;
  for (int64_t t = 0; t < count; t++) {
    memcpy(tries[t].target, x, 4 * dim);
    tries[t].loss = 0;
  }
  for (int64_t i = dim - 1; i >= 0; i--) {
    const float* row = factor + i * dim;
    float error[TRIES];
    for (int64_t t = 0; t < count; t++) {
      Try& each = tries[t];
      const Affine by = each.groups[i / channels];
      float y = (each.target[i] - by.zero) / by.scale;
      y = y > top ? top : y < bottom ? bottom : y;
      const float code = (y + magic) - magic, seen = by.scale * code + by.zero, off = seen - each.target[i];
      each.codes[i] = code;
      each.loss += row[i] * (off * off);
      error[t] = seen - x[i];
    }
    for (int64_t t = 0; t < count; t++) {
      float* target = tries[t].target;
      for (int64_t j = 0; j < i; j++) target[j] -= error[t] * row[j];
    }
  }
}
// The range with the least loss, if any is a number: its codes and planes in place of the plain ones.
static void choose_range(const Pages& p, const float* x, const Affine* plain, const float* factor, float* codes,
                         uint8_t* scale, uint8_t* zero) {
  Try tries[TRIES];
  const bool several = p.dynamic && (p.code == INT4 || p.code == INT3);
  const double* factors = !several ? WHOLE : p.code == INT4 ? OF_INT4 : OF_INT3;
  const int64_t channels = p.head_dim / p.groups, size = p.scale_type == F32 ? 4 : 2, count = several ? TRIES : 1;
  for (int64_t t = 0; t < count; t++)
    for (int64_t g = 0; g < p.groups; g++)
      tries[t].groups[g] = p.dynamic ? measure(p, x + g * channels, channels, tries[t].scale + g * size,
                                               tries[t].zero + g * size, factors[t])
                                     : plain[g];
  round_in_turn(p, x, factor, tries, count);
  const Try* best = nullptr;
  for (int64_t t = 0; t < count; t++)
    if (tries[t].loss < (best ? best->loss : INFINITY)) best = tries + t;
  if (!best) return;
  memcpy(codes, best->codes, 4 * p.head_dim);
  if (!p.dynamic) return;
  memcpy(scale, best->scale, size * p.groups);
  if (p.zero) memcpy(zero, best->zero, size * p.groups);
}

// One row into its page; `seen`, if given, is what the page now holds. `factor`: for rounding in turn.
static void write_row(const Pages& p, int64_t head, int64_t page, int64_t offset, const float* x, float* seen,
                      const float* factor = nullptr) {
  const int64_t dim = p.head_dim;
  uint8_t* to = p.codes + page * p.page_stride + head * p.head_stride + offset * p.row_stride;
  if (!p.scale) {
    write_numbers(x, dim, to, p.code);
    if (seen) memcpy(seen, x, 4 * dim);
    return;
  }
  alignas(64) float finite[512], codes[512];
  make_finite(x, dim, F32, finite);
  uint8_t* scale = p.scale + head * p.scale_head;
  uint8_t* zero = p.zero + head * p.zero_head;
  if (p.dynamic) {
    scale += page * p.scale_page + offset * p.scale_row;
    zero += page * p.zero_page + offset * p.zero_row;
  }
  const int64_t count = dim / p.groups, size = p.scale_type == F32 ? 4 : 2;
  Affine groups[512];
  for (int64_t g = 0; g < p.groups; g++) {
    Affine& by = groups[g];
    if (p.dynamic) by = measure(p, finite + g * count, count, scale + g * size, zero + g * size);
    else by = {number(scale, p.scale_type, g), p.zero ? number(zero, p.scale_type, g) : 0.f};
    encode(p, finite + g * count, count, by, codes + g * count);
  }
  if (factor) choose_range(p, finite, groups, factor, codes, scale, zero);
  put_codes(p.code, codes, dim, to);
  if (seen) dequantize_row(p, head, to, scale, zero, seen);
}

// What a page would hold of a row that is written nowhere.
static void round_trip(Pages p, int64_t head, const float* x, float* seen, const float* factor) {
  uint8_t codes[2048], scale[2048], zero[2048];
  p.codes = codes;
  p.page_stride = p.head_stride = 0;
  if (p.dynamic && p.scale) {
    p.scale = scale;
    p.scale_page = p.scale_head = 0;
    if (p.zero) p.zero = zero;
    p.zero_page = p.zero_head = 0;
  }
  write_row(p, head, 0, 0, x, seen, factor);
}

struct Input {
  const uint8_t* from;
  int64_t heads, token_stride, head_stride, dim;
  const float* norm;
  bool turn, rotate;
  // The key map of kv_head `head / group`, null for none: taken on by keys, undone in queries.
  const float *scale, *mean;
  const float* matrix;
  int64_t group;
  bool query;
  // For rounding in turn, of kv_head 0; null: each channel by itself.
  const float* feedback;
};
static void map_row(const Input& in, int64_t head, float* x) {
  const int64_t at = head / in.group * in.dim;
  if (in.query) {
    for (int64_t c = 0; c < in.dim; c++) x[c] = x[c] / in.scale[at + c];
  } else {
    if (in.mean)
      for (int64_t c = 0; c < in.dim; c++) x[c] = x[c] - in.mean[at + c];
    for (int64_t c = 0; c < in.dim; c++) x[c] = x[c] * in.scale[at + c];
  }
  if (!in.matrix) return;
  alignas(64) float given[512];
  memcpy(given, x, 4 * in.dim);
  memset(x, 0, 4 * in.dim);
  for (int64_t i = 0; i < in.dim; i++) {
    const float* row = in.matrix + (at + i) * in.dim;
    for (int64_t c = 0; c < in.dim; c++) x[c] += given[i] * row[c];
  }
}
static void read_row(const Write& w, const Input& in, int64_t token, int64_t head, float* x) {
  const int64_t size = w.type == F32 ? 4 : 2;
  read_numbers(in.from + (token * in.token_stride + head * in.head_stride) * size, w.type, in.dim, x);
  if (in.norm && !w.norm_after) norm_row(x, in.norm, in.dim, (float)w.eps);
  if (in.turn) {
    const int64_t at = w.step.positions[token] * w.half_rotary;
    rope_row(x, w.cos + at, w.sin + at, w.half_rotary, w.interleaved);
  }
  if (in.norm && w.norm_after) norm_row(x, in.norm, in.dim, (float)w.eps);
  if (in.scale) map_row(in, head, x);
  if (in.rotate) rotate_row(x, in.dim);
}
static void write_side(const Write& w, const Pages& p, const Pages& exact, const Input& in, int64_t token, uint8_t* rows) {
  alignas(64) float x[512], seen[512];
  const int64_t slot = w.step.slots[token], near = w.step.exact_slots && exact.codes ? w.step.exact_slots[token] : -1;
  const int64_t size = w.type == F32 ? 4 : 2;
  if (slot < 0 && near < 0 && !rows) return;
  for (int64_t h = 0; h < in.heads; h++) {
    read_row(w, in, token, h, x);
    const float* factor = in.feedback ? in.feedback + h * in.dim * in.dim : nullptr;
    if (slot >= 0) write_row(p, h, slot / w.step.page_size, slot % w.step.page_size, x, rows ? seen : nullptr, factor);
    else if (rows) round_trip(p, h, x, seen, factor);
    if (near >= 0) {
      alignas(64) float finite[512];
      make_finite(x, in.dim, exact.code, finite);
      write_row(exact, h, near / w.step.page_size, near % w.step.page_size, finite, nullptr, exact.scale && exact.code != FP8 ? factor : nullptr);
    }
    if (rows) write_numbers(seen, in.dim, rows + (token * in.heads + h) * in.dim * size, w.type);
  }
}
void write_token(const Write* call, int64_t token) {
  const Write& w = *call;
  const int64_t size = w.type == F32 ? 4 : 2, dim = w.layer.key.head_dim;
  const bool turn = w.cos != nullptr;
  const bool rotate = w.layer.key.rotated != 0;
  const float *scale = w.layer.map_scale, *mean = w.layer.map_mean;
  if (w.q) {
    alignas(64) float x[512];
    const Input in = {w.q, w.q_heads, w.q_token, w.q_head, dim, w.q_norm, turn, rotate, scale, nullptr, w.layer.map_unturn, w.q_heads / w.kv_heads, true, nullptr};
    for (int64_t h = 0; h < w.q_heads; h++) {
      read_row(w, in, token, h, x);
      write_numbers(x, dim, w.q_out + (token * w.q_heads + h) * dim * size, w.type);
    }
  }
  const Input key = {w.k, w.kv_heads, w.k_token, w.k_head, dim, w.k_norm, turn, rotate, scale, mean, w.layer.map_turn, 1, false, w.layer.feedback};
  write_side(w, w.layer.key, w.layer.exact_key, key, token, w.k_rows);
  const Input value = {w.v, w.kv_heads, w.v_token, w.v_head, w.layer.value.head_dim, nullptr, false, w.layer.value.rotated != 0, nullptr, nullptr, nullptr, 1, false, nullptr};
  write_side(w, w.layer.value, w.layer.exact_value, value, token, w.v_rows);
}

}  // namespace
