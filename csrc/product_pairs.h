// Products of bf16 weights with activations rounded to bf16, two channels a lane and instruction (AVX512_BF16).
//
// The instruction multiplies as they lie what a product of floats would have to convert first, and twice as
// many of them. Rounding activations is what a model in bf16 does between any two of its layers; sums are
// float32.
#pragma once
#include "product_tiles.h"

#ifdef __AVX512BF16__
namespace CONCAT(isa_, SUFFIX) {

// Channels of one instruction.
constexpr int64_t PAIRS = 2 * VW;
// Rows of weights that stay in the first cache while all tokens are multiplied with them.
constexpr int64_t TALL = 8;
// Channels that are multiplied with all tokens before the next ones are.
constexpr int64_t STRETCH = 1536;

static void arrange_pairs(const float* x, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; i += VW)
    _mm256_storeu_si256((__m256i*)(to + 2 * i), (__m256i)_mm512_cvtneps_pbh((__m512)loadf(x + i)));
}

// By name as in product_bytes.h.
static inline void add_pairs(vf& sum, vi a, vi b) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b)); }

// Lane i of the lower half: the sum of a[i], in the order of transposed_sums.
static inline __m256 eight_sums(vf* a) {
  UNROLL for (int i = 0; i < 4; i++) a[i] = pair_sums<8>(a[i], a[i + 4]);
  UNROLL for (int i = 0; i < 2; i++) a[i] = pair_sums<4>(a[i], a[i + 2]);
  const vf both = pair_sums<2>(a[0], a[1]), twice = pair_sums<1>(both, both);
  return _mm512_castps512_ps256((__m512)SHUFFLE(twice, twice, vi, 0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14));
}

// TALL rows with TOKENS tokens over `width` channels of rows of `row` bytes: the result, or MORE to add to it.
// Meanwhile as much as lies in FETCHED of the rows is asked for at `ahead`.
template <int TOKENS, int FETCHED>
static void pair_tile(const uint8_t* const* rows, int64_t row, int64_t width, const uint8_t* x, const uint8_t* ahead,
                      bool more, int64_t count, float* out, int64_t out_stride) {
  vf sums[TOKENS][TALL] = {};
  NO_UNROLL for (int64_t c = 0; c < width; c += PAIRS) {
    vi some[TOKENS];
    UNROLL for (int t = 0; t < TOKENS; t++) some[t] = load<vi>(x + t * row + 2 * c);
    UNROLL for (int i = 0; i < FETCHED; i++) fetch_line(ahead + i * row + 2 * c);
    UNROLL for (int r = 0; r < TALL; r++) {
      const vi weights = load<vi>(rows[r] + 2 * c);
      UNROLL for (int t = 0; t < TOKENS; t++) add_pairs(sums[t][r], weights, some[t]);
    }
  }
  const __mmask8 there = (__mmask8)((1 << count) - 1);
  UNROLL for (int t = 0; t < TOKENS; t++) {
    __m256 done = eight_sums(sums[t]);
    if (more) done = _mm256_add_ps(done, _mm256_maskz_loadu_ps(there, out + t * out_stride));
    _mm256_mask_storeu_ps(out + t * out_stride, there, done);
  }
}
template <int TOKENS> static auto pair_tile_of(int64_t fetched) {
  switch (fetched) {
    case 0: return pair_tile<TOKENS, 0>;
    case 1: return pair_tile<TOKENS, 1>;
    case 2: return pair_tile<TOKENS, 2>;
    case 3: return pair_tile<TOKENS, 3>;
    case 4: return pair_tile<TOKENS, 4>;
    default: return pair_tile<TOKENS, TALL>;
  }
}

// Channels from `begin` on of rows of `row` bytes.
static void multiply_stretch(const uint8_t* w, int64_t row, int64_t begin, int64_t width, const uint8_t* x,
                             int64_t tokens, int64_t count, float* out, int64_t out_stride) {
  w += 2 * begin;
  x += 2 * begin;
  for (int64_t first = 0; first < count; first += TALL, w += TALL * row, out += TALL) {
    const int64_t some = count - first < TALL ? count - first : TALL;
    const uint8_t* rows[TALL];
    // Of fewer than eight the last is multiplied again.
    for (int64_t i = 0; i < TALL; i++) rows[i] = w + (i < some ? i : some - 1) * row;
    // The next rows are asked for evenly while these are multiplied with all tokens.
    each_tile(tokens, TALL, [&](auto tile, int64_t t, int64_t low, int64_t high) {
      pair_tile_of<tile.value>(high - low)(rows, row, width, x + t * row, w + (TALL + early(TALL) + low) * row, begin > 0,
                                           some, out + t * out_stride, out_stride);
    });
  }
}
static void multiply_pairs(const uint8_t* w, int64_t width, const uint8_t* x, int64_t tokens, int64_t count, float* out,
                           int64_t out_stride) {
  // Stretches that leave TALL rows in the first cache and many tokens in the second, whatever the number of
  // tokens: sums are formed in the same order.
  const int64_t stretches = (width + STRETCH - 1) / STRETCH;
  // A few tokens read the rows in memory's order.
  const int64_t step = tokens > 3 || stretches == 1 ? count : TALL;
  for (int64_t first = 0; first < count; first += step)
    for (int64_t i = 0; i < stretches; i++) {
      const int64_t begin = width * i / stretches / PAIRS * PAIRS, end = width * (i + 1) / stretches / PAIRS * PAIRS;
      multiply_stretch(w + first * 2 * width, 2 * width, begin, end - begin, x, tokens,
                       count - first < step ? count - first : step, out + first, out_stride);
    }
}

}  // namespace
#endif
