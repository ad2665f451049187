// One instruction set's products (products.h). Bound by reading the weights: four rows at a time,
// fetched far ahead, every number converted once for all tokens.
#include "products.h"

#include "convert.h"
#include "simd.h"

namespace CONCAT(isa_, SUFFIX) {

static void read(const uint8_t* x, int64_t type, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i++) to[i] = number(x, type, i);
}

static void norm(float* x, const uint8_t* weight, int64_t type, int64_t tokens, int64_t width, float eps) {
  for (int64_t t = 0; t < tokens; t++, x += width) {
    vf sum = splat(0.f);
    for (int64_t c = 0; c < width; c += VW) sum += loadf(x + c) * loadf(x + c);
    const float times = 1.f / __builtin_sqrtf(hsum(sum) / (float)width + eps);
    for (int64_t c = 0; c < width; c++) x[c] = x[c] * times * number(weight, type, c);
  }
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

// 16-bit floats are converted two at a time, a vector of even and one of odd channels: so x has them.
static void arrange(float* x, int64_t code, int64_t tokens, int64_t width) {
  if (code != BF16) return;
  for (int64_t i = 0; i < tokens * width; i += 2 * VW) {
    float both[2 * VW];
    memcpy(both, x + i, sizeof both);
    for (int64_t j = 0; j < VW; j++) {
      x[i + j] = both[2 * j];
      x[i + VW + j] = both[2 * j + 1];
    }
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

constexpr int64_t AHEAD = 8192;
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

static void multiply(const Weight* weight, int64_t code, int64_t type, int64_t width, const float* x, int64_t tokens,
                     int64_t first, int64_t count, float* out, int64_t out_stride) {
  const int64_t size = code == F32 ? 4 : code == INT8 ? 1 : 2, stride = width * size;
  const uint8_t* from = weight->numbers + first * stride;
  switch (code) {
    case F32: multiply_code<F32>(from, stride, x, width, tokens, count, out, out_stride); break;
    case BF16: multiply_code<BF16>(from, stride, x, width, tokens, count, out, out_stride); break;
    case F16: multiply_code<F16>(from, stride, x, width, tokens, count, out, out_stride); break;
    default: multiply_code<INT8>(from, stride, x, width, tokens, count, out, out_stride);
  }
  for (int64_t t = 0; t < tokens; t++, out += out_stride) {
    if (weight->scale)
      for (int64_t r = 0; r < count; r++) out[r] *= number(weight->scale, BF16, first + r);
    if (weight->bias)
      for (int64_t r = 0; r < count; r++) out[r] += number(weight->bias, type, first + r);
  }
}

static void rotate(float* head, const uint8_t* cos, const uint8_t* sin, int64_t type, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = head[i], b = head[i + half];
    head[i] = a * number(cos, type, i) - b * number(sin, type, i);
    head[i + half] = b * number(cos, type, i + half) + a * number(sin, type, i + half);
  }
}

static void write(const float* x, int64_t type, int64_t count, uint8_t* out) {
  if (type == F32) memcpy(out, x, 4 * count);
  else if (type == BF16)
    for (int64_t i = 0; i < count; i++) store(out + 2 * i, float_to_bf16(x[i]));
  else
    for (int64_t i = 0; i < count; i++) store(out + 2 * i, float_to_half(x[i]));
}

static const Products products = {read, norm, gate, arrange, multiply, rotate, write};

}  // namespace

extern "C" const Products* CONCAT(quantpage_products_, SUFFIX)() { return &CONCAT(isa_, SUFFIX)::products; }
