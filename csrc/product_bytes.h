// Products of int8 weights as integers, four bytes a lane and instruction (VNNI).
//
// A token's channels are rounded to 16 bits, with a scale for each lane: of every 64 channels a lane has the
// same four, so that a scale is that of width / 16 channels and multiplies once, at the end. The 16 bits are two
// signed bytes, upper and lower. The instruction takes an unsigned byte and a signed one: weights get 128 added,
// and sums begin at what that adds. They are exact, so that results have float32's rounding and that of the 16
// bits, 2e-5 of the result.
#pragma once
#include "product_tiles.h"

namespace CONCAT(isa_, SUFFIX) {

// Bytes of weights to fetch ahead.
constexpr int64_t AHEAD = 8192;

#if VW == 16
// A token: upper bytes, lower bytes, the lanes' scales, and where the sums of both begin.
static inline int64_t padded(int64_t width) { return (width + LINE - 1) / LINE * LINE; }
static inline int64_t arranged_bytes(int64_t width) { return 2 * padded(width) + 3 * LINE; }

// The instruction by name: GCC 12 copies every accumulator of a loop of its intrinsics, which doubles the time.
static inline void add_products(__m512i& sum, __m512i bytes, __m512i signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(signed_bytes));
}

static inline __m512i sum_of(const uint8_t* bytes, int64_t width) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t c = 0; c < width; c += LINE)
    add_products(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(bytes + c));
  return sum;
}
static void arrange_token(const float* x, int64_t width, uint8_t* to) {
  constexpr float MOST = 127 * 256, LEAST = 1e-30f;
  const int64_t all = padded(width);
  // By channel of 64.
  vf most[4] = {};
  vi odd = {};
  for (int64_t c = 0; c < width; c += VW) {
    const vf size = (vf)((vi)loadf(x + c) & splati(0x7fffffff));
    odd |= ~(size <= splat(__FLT_MAX__));
    most[c / VW % 4] = vmax(most[c / VW % 4], size);
  }
  float sizes[LINE], times[LINE], scales[VW];
  memcpy(sizes, most, sizeof sizes);
  const float nan = any(odd) ? __builtin_nanf("") : 0.f;
  for (int l = 0; l < VW; l++) {
    float size = 0;
    for (int j = 0; j < 4; j++) size = sizes[4 * l + j] > size ? sizes[4 * l + j] : size;
    for (int j = 0; j < 4; j++) times[4 * l + j] = size > LEAST ? MOST / size : 0.f;
    scales[l] = size / MOST + nan;
  }
  memset(to + all - LINE, 0, LINE);
  memset(to + 2 * all - LINE, 0, LINE);
  for (int64_t c = 0; c < width; c += VW) {
    const __m512i code = _mm512_cvtps_epi32((__m512)(loadf(x + c) * loadf(times + c % LINE)));
    const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(code, _mm512_set1_epi32(128)), 8);
    _mm_storeu_si128((__m128i*)(to + c), _mm512_cvtepi32_epi8(upper));
    _mm_storeu_si128((__m128i*)(to + all + c), _mm512_cvtepi32_epi8(_mm512_sub_epi32(code, _mm512_slli_epi32(upper, 8))));
  }
  uint8_t* rest = to + 2 * all;
  memcpy(rest, scales, sizeof scales);
  for (int half = 0; half < 2; half++) {
    const __m512i sum = sum_of(to + half * all, all);
    _mm512_storeu_si512(rest + (1 + half) * LINE, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, 7)));
  }
}
static void arrange_bytes(const float* x, int64_t tokens, int64_t width, uint8_t* to) {
  for (int64_t t = 0; t < tokens; t++) arrange_token(x + t * width, width, to + t * arranged_bytes(width));
}

// Sums of 4 rows with TOKENS tokens, by lane, to sums[token * VW .. + 4]; meanwhile as much as lies in FETCHED of
// the rows is asked for at `ahead`: where it is four, it is wanted soon.
template <int TOKENS, int FETCHED>
static void byte_sums(const uint8_t* const* rows, int64_t width, const uint8_t* x, const uint8_t* ahead, vf* sums) {
  const int64_t all = padded(width), stride = arranged_bytes(width);
  __m512i upper[TOKENS][4], lower[TOKENS][4];
  UNROLL for (int t = 0; t < TOKENS; t++) UNROLL for (int r = 0; r < 4; r++) {
    upper[t][r] = _mm512_loadu_si512(x + t * stride + 2 * all + LINE);
    lower[t][r] = _mm512_loadu_si512(x + t * stride + 2 * all + 2 * LINE);
  }
  const auto step = [&](int64_t c, __mmask64 there) __attribute__((always_inline)) {
    __m512i row[4];
    UNROLL for (int r = 0; r < 4; r++)
      row[r] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, rows[r] + c), _mm512_set1_epi8((char)0x80));
    UNROLL for (int i = 0; i < FETCHED; i++) {
      if (FETCHED == 4) __builtin_prefetch(ahead + i * width + c);
      else fetch_line(ahead + i * width + c);
    }
    UNROLL for (int t = 0; t < TOKENS; t++) {
      const __m512i high = _mm512_loadu_si512(x + t * stride + c), low = _mm512_loadu_si512(x + t * stride + all + c);
      UNROLL for (int r = 0; r < 4; r++) {
        add_products(upper[t][r], row[r], high);
        add_products(lower[t][r], row[r], low);
      }
    }
  };
  int64_t c = 0;
  NO_UNROLL for (; c + LINE <= width; c += LINE) step(c, ~(__mmask64)0);
  if (c < width) step(c, 0xffffffff);
  UNROLL for (int t = 0; t < TOKENS; t++) {
    const vf scale = load<vf>(x + t * stride + 2 * all);
    UNROLL for (int r = 0; r < 4; r++)
      sums[t * VW + r] =
          ((vf)_mm512_cvtepi32_ps(upper[t][r]) * splat(256.f) + (vf)_mm512_cvtepi32_ps(lower[t][r])) * scale;
  }
}
template <int TOKENS> static auto byte_sums_of(int64_t fetched) {
  switch (fetched) {
    case 0: return byte_sums<TOKENS, 0>;
    case 1: return byte_sums<TOKENS, 1>;
    case 2: return byte_sums<TOKENS, 2>;
    default: return byte_sums<TOKENS, 4>;
  }
}
// At most VW rows, whose sums fill one vector a token; meanwhile rows low to high after the next VW are asked for.
template <int TOKENS>
static void byte_rows(const uint8_t* w, int64_t width, const uint8_t* x, int64_t low, int64_t high, int64_t count,
                      float* out, int64_t out_stride) {
  vf sums[TOKENS * VW];
  if (count < VW) memset(sums, 0, sizeof sums);
  for (int64_t r = 0; r < count; r += 4) {
    const uint8_t* rows[4];
    // Of fewer than four the last is multiplied again.
    for (int64_t i = 0; i < 4; i++) rows[i] = w + (r + i < count ? r + i : count - 1) * width;
    const int64_t from = low + (high - low) * r / VW, until = low + (high - low) * (r + 4) / VW;
    // With one tile the next block is too far.
    const uint8_t* ahead = high - low == VW ? rows[0] + AHEAD : w + (VW + from) * width;
    byte_sums_of<TOKENS>(until - from)(rows, width, x, ahead, sums + r);
  }
  for (int t = 0; t < TOKENS; t++) {
    const vf done = transposed_sums(sums + t * VW);
    memcpy(out + t * out_stride, &done, 4 * count);
  }
}
static void multiply_bytes(const uint8_t* w, int64_t width, const uint8_t* x, int64_t tokens, int64_t count,
                           float* out, int64_t out_stride) {
  const int64_t token = arranged_bytes(width);
  // A few rows are multiplied with all tokens while they are in the first cache, and the next are asked for.
  for (int64_t first = 0; first < count; first += VW, w += VW * width, out += VW) {
    const int64_t some = count - first < VW ? count - first : VW;
    each_tile(tokens, VW, [&](auto tile, int64_t t, int64_t low, int64_t high) {
      byte_rows<tile.value>(w, width, x + t * token, low, high, some, out + t * out_stride, out_stride);
    });
  }
}
#endif

}  // namespace
