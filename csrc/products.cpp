// One instruction set's products (products.h). Bound by reading the weights: a few rows at a time,
// fetched far ahead, every number converted once for all tokens.
#include "products.h"

#include "convert.h"
#include "product_bytes.h"
#include "product_pairs.h"

namespace CONCAT(isa_, SUFFIX) {

template <int64_t TYPE> static void read_as(const uint8_t* x, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + VW <= count; i += VW) storef(to + i, numbers<TYPE>(x, i));
  for (; i < count; i++) to[i] = number(x, TYPE, i);
}
static void read(const uint8_t* x, int64_t type, int64_t count, float* to) {
  if (type == F32) memcpy(to, x, 4 * count);
  else if (type == BF16) read_as<BF16>(x, count, to);
  else read_as<F16>(x, count, to);
}

template <int64_t TYPE> static void norm_as(float* x, const uint8_t* weight, int64_t tokens, int64_t width, float eps) {
  for (int64_t t = 0; t < tokens; t++, x += width) {
    vf sum = splat(0.f);
    for (int64_t c = 0; c < width; c += VW) sum += loadf(x + c) * loadf(x + c);
    const vf times = splat(1.f / __builtin_sqrtf(hsum(sum) / (float)width + eps));
    for (int64_t c = 0; c < width; c += VW) storef(x + c, loadf(x + c) * times * numbers<TYPE>(weight, c));
  }
}
static void norm(float* x, const uint8_t* weight, int64_t type, int64_t tokens, int64_t width, float eps) {
  if (type == F32) norm_as<F32>(x, weight, tokens, width, eps);
  else if (type == BF16) norm_as<BF16>(x, weight, tokens, width, eps);
  else norm_as<F16>(x, weight, tokens, width, eps);
}

static void gate(const float* both, int64_t tokens, int64_t width, float* to) {
  for (int64_t t = 0; t < tokens; t++, both += 2 * width, to += width)
    for (int64_t c = 0; c < width; c += VW) {
      const vf g = loadf(both + c);
      // exp of a negative number: nothing overflows.
      const vi negative = g < splat(0.f);
      const vf e = vexp(select(negative, g, -g));
      const vf sigmoid = select(negative, e, splat(1.f)) / (splat(1.f) + e);
      storef(to + c, g * sigmoid * loadf(both + width + c));
    }
}

// ---- floats ------------------------------------------------------------------------------------
// 16-bit floats are converted two at a time, a vector of even and one of odd channels: so x has them.
static void arrange_floats(const float* x, int64_t code, int64_t tokens, int64_t width, float* to) {
  if (code != BF16) {
    memcpy(to, x, 4 * tokens * width);
    return;
  }
  for (int64_t i = 0; i < tokens * width; i += 2 * VW)
    for (int64_t j = 0; j < VW; j++) {
      to[i + j] = x[i + 2 * j];
      to[i + VW + j] = x[i + 2 * j + 1];
    }
}

template <int64_t CODE> INLINE void two_vectors(const uint8_t* row, int64_t c, vf& a, vf& b) {
  if constexpr (CODE == BF16) {
    const vi words = load<vi>(row + 2 * c);
    a = (vf)(words << 16);
    b = (vf)(words & splati((int32_t)0xffff0000));
  } else {
    a = numbers<CODE>(row, c);
    b = numbers<CODE>(row, c + VW);
  }
}

template <int64_t CODE> constexpr int64_t bytes() { return CODE == F32 ? 4 : CODE == INT8 ? 1 : 2; }

// ROWS x TOKENS products; sums are formed in the same order for every such shape.
template <int64_t CODE, int ROWS, int TOKENS>
static void tile(const uint8_t* w, int64_t stride, const float* x, int64_t width, float* out, int64_t out_stride) {
  vf sums[ROWS][TOKENS] = {};
  for (int64_t c = 0; c < width; c += 2 * VW) {
    UNROLL for (int r = 0; r < ROWS; r++) {
      const uint8_t* row = w + r * stride;
      vf a, b;
      two_vectors<CODE>(row, c, a, b);
      __builtin_prefetch(row + c * bytes<CODE>() + AHEAD);
      UNROLL for (int t = 0; t < TOKENS; t++) {
        sums[r][t] += a * loadf(x + t * width + c);
        sums[r][t] += b * loadf(x + t * width + c + VW);
      }
    }
  }
  UNROLL for (int r = 0; r < ROWS; r++)
    UNROLL for (int t = 0; t < TOKENS; t++) out[t * out_stride + r] = hsum(sums[r][t]);
}

template <int64_t CODE, int ROWS, int TOKENS>
static void rows_of(const uint8_t* w, int64_t stride, const float* x, int64_t width, int64_t count, float* out,
                    int64_t out_stride) {
  int64_t r = 0;
  for (; r + ROWS <= count; r += ROWS) tile<CODE, ROWS, TOKENS>(w + r * stride, stride, x, width, out + r, out_stride);
  for (; r < count; r++) tile<CODE, 1, TOKENS>(w + r * stride, stride, x, width, out + r, out_stride);
}

// As many accumulators as there are registers for.
constexpr int MANY = 4, FEW = VW == 16 ? 4 : 2;

template <int64_t CODE>
static void multiply_code(const uint8_t* w, int64_t stride, const float* x, int64_t width, int64_t tokens,
                          int64_t count, float* out, int64_t out_stride) {
  // A few rows are multiplied with all tokens while they are in the first cache.
  constexpr int64_t BLOCK = 8;
  for (int64_t first = 0; first < count; first += BLOCK) {
    const int64_t some = count - first < BLOCK ? count - first : BLOCK;
    const uint8_t* from = w + first * stride;
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4)
      rows_of<CODE, FEW, 4>(from, stride, x + t * width, width, some, out + t * out_stride + first, out_stride);
    for (; t + 2 <= tokens; t += 2)
      rows_of<CODE, MANY, 2>(from, stride, x + t * width, width, some, out + t * out_stride + first, out_stride);
    for (; t < tokens; t++)
      rows_of<CODE, 4, 1>(from, stride, x + t * width, width, some, out + t * out_stride + first, out_stride);
  }
}

static int64_t arranged(int64_t code, int64_t width) {
#if VW == 16
  if (code == INT8) return arranged_bytes(width);
#endif
#ifdef __AVX512BF16__
  if (code == BF16) return 2 * width;
#endif
  return 4 * width;
}
static void arrange(const float* x, int64_t code, int64_t tokens, int64_t width, uint8_t* to) {
#if VW == 16
  if (code == INT8) return arrange_bytes(x, tokens, width, to);
#endif
#ifdef __AVX512BF16__
  if (code == BF16) return arrange_pairs(x, tokens * width, to);
#endif
  arrange_floats(x, code, tokens, width, (float*)to);
}
static void multiply_rows(int64_t code, const uint8_t* w, int64_t width, const uint8_t* x, int64_t tokens,
                          int64_t count, float* out, int64_t out_stride) {
#if VW == 16
  if (code == INT8) return multiply_bytes(w, width, x, tokens, count, out, out_stride);
#endif
#ifdef __AVX512BF16__
  if (code == BF16) return multiply_pairs(w, width, x, tokens, count, out, out_stride);
#endif
  const float* floats = (const float*)x;
  switch (code) {
    case F32: return multiply_code<F32>(w, 4 * width, floats, width, tokens, count, out, out_stride);
    case BF16: return multiply_code<BF16>(w, 2 * width, floats, width, tokens, count, out, out_stride);
    case F16: return multiply_code<F16>(w, 2 * width, floats, width, tokens, count, out, out_stride);
    default: return multiply_code<INT8>(w, width, floats, width, tokens, count, out, out_stride);
  }
}

// out[r] = with(out[r], plane[first + r]).
template <int64_t TYPE, class With>
static inline void each_row(const uint8_t* plane, int64_t first, int64_t count, float* out, const With& with) {
  int64_t r = 0;
  for (; r + VW <= count; r += VW) storef(out + r, with(loadf(out + r), numbers<TYPE>(plane, first + r)));
  for (; r < count; r++) out[r] = with(out[r], number(plane, TYPE, first + r));
}
static void multiply(const Weight* weight, int64_t code, int64_t type, int64_t width, const uint8_t* x, int64_t tokens,
                     int64_t first, int64_t count, float* out, int64_t out_stride) {
  const int64_t size = code == F32 ? 4 : code == INT8 ? 1 : 2;
  multiply_rows(code, weight->numbers + first * width * size, width, x, tokens, count, out, out_stride);
  for (int64_t t = 0; t < tokens; t++, out += out_stride) {
    if (weight->scale) each_row<BF16>(weight->scale, first, count, out, [](auto a, auto b) { return a * b; });
    const auto add = [](auto a, auto b) { return a + b; };
    if (!weight->bias) continue;
    if (type == F32) each_row<F32>(weight->bias, first, count, out, add);
    else if (type == BF16) each_row<BF16>(weight->bias, first, count, out, add);
    else each_row<F16>(weight->bias, first, count, out, add);
  }
}

template <int64_t TYPE> static void rotate_as(float* head, const uint8_t* cos, const uint8_t* sin, int64_t half) {
  int64_t i = 0;
  for (; i + VW <= half; i += VW) {
    const vf a = loadf(head + i), b = loadf(head + i + half);
    storef(head + i, a * numbers<TYPE>(cos, i) - b * numbers<TYPE>(sin, i));
    storef(head + i + half, b * numbers<TYPE>(cos, i + half) + a * numbers<TYPE>(sin, i + half));
  }
  for (; i < half; i++) {
    const float a = head[i], b = head[i + half];
    head[i] = a * number(cos, TYPE, i) - b * number(sin, TYPE, i);
    head[i + half] = b * number(cos, TYPE, i + half) + a * number(sin, TYPE, i + half);
  }
}
static void rotate(float* head, const uint8_t* cos, const uint8_t* sin, int64_t type, int64_t head_dim) {
  if (type == F32) rotate_as<F32>(head, cos, sin, head_dim / 2);
  else if (type == BF16) rotate_as<BF16>(head, cos, sin, head_dim / 2);
  else rotate_as<F16>(head, cos, sin, head_dim / 2);
}

static void write(const float* x, int64_t type, int64_t count, uint8_t* out) {
  if (type == F32) {
    memcpy(out, x, 4 * count);
    return;
  }
  int64_t i = 0;
  if (type == BF16) {
    for (; i + VW <= count; i += VW) {
      const vi bits = load<vi>(x + i);
      const vi rounded = bits + splati(0x7fff) + ((bits >> 16) & splati(1));
      const vf v = (vf)bits;
      // A NaN's bits would be rounded into an infinity.
      store_words((int16_t*)(out + 2 * i), (vi)select(v != v, (vf)splati(0x7fc00000), (vf)rounded) >> 16);
    }
    for (; i < count; i++) store(out + 2 * i, float_to_bf16(x[i]));
    return;
  }
  for (; i < count; i++) store(out + 2 * i, float_to_half(x[i]));
}

static const Products products = {read, norm, gate, arranged, arrange, multiply, rotate, write};

}  // namespace

extern "C" const Products* CONCAT(quantpage_products_, SUFFIX)() { return &CONCAT(isa_, SUFFIX)::products; }
