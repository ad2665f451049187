// Products of int8 weights as integers, four bytes a lane and instruction (VNNI).
//
// A token's channels are cut into stretches, which have a scale each and are rounded to 16 bits: two signed bytes,
// upper and lower. The instruction takes an unsigned byte and a signed one: weights get 128 added, and sums begin
// without what that adds. A stretch is as short, and its scale as large, that its sum is exact in 32 bits. So it is the
// same number in whatever order it is formed, and results are the same bits for one token and for many, which are
// multiplied in other ways. They have float32's rounding and that of the 16 bits, 4e-5 of the result.
#pragma once
#include "product_tiles.h"

namespace CONCAT(isa_, SUFFIX) {

// Bytes of weights to fetch ahead.
constexpr int64_t AHEAD = 8192;

#if VW == 16
// Channels with one scale: of as many rows the bytes stay in the first cache.
constexpr int64_t LONGEST = 1024;
// Sums of sizes that a code of -128 leaves within 32 bits.
constexpr int64_t SIZES = ((int64_t)1 << 31) / 128 - 1;

// How a row is cut; a token has room for whole lines: upper bytes, lower bytes, each stretch's scale and each one's
// sum without what the weights' 128 adds.
struct Stretches {
  int64_t width, count, padded;
  explicit Stretches(int64_t width)
      : width(width), count((width + LONGEST - 1) / LONGEST), padded((width + LINE - 1) / LINE * LINE) {}
  int64_t begin(int64_t i) const { return i == count ? width : width * i / count / LINE * LINE; }
  int64_t bytes() const { return 2 * padded + (8 * count + LINE - 1) / LINE * LINE; }
  float* scales(uint8_t* token) const { return (float*)(token + 2 * padded); }
  int32_t* starts(uint8_t* token) const { return (int32_t*)scales(token) + count; }
  float scale(const uint8_t* token, int64_t i) const { return load<float>(token + 2 * padded + 4 * i); }
  int32_t start(const uint8_t* token, int64_t i) const { return load<int32_t>(token + 2 * padded + 4 * (count + i)); }
};
static inline int64_t arranged_bytes(int64_t width) { return Stretches(width).bytes(); }

// The instruction by name: GCC 12 copies every accumulator of a loop of its intrinsics, which doubles the time.
static inline void add_products(vi& sum, vi bytes, vi signed_bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(signed_bytes));
}

static void arrange_stretch(const float* x, int64_t width, uint8_t* upper, uint8_t* lower, float* scale, int32_t* start) {
  constexpr float MOST = 127 * 256, LEAST = 1e-30f;
  vf most = {};
  vi odd = {};
  for (int64_t c = 0; c < width; c += VW) {
    const vf size = (vf)((vi)loadf(x + c) & splati(0x7fffffff));
    odd |= ~(size <= splat(__FLT_MAX__));
    most = vmax(most, size);
  }
  const bool finite = !any(odd);
  const float largest = hmax(most);
  float times = finite && largest > LEAST ? MOST / largest : 0.f;
  __m512i sum, sizes;
  const auto round = [&] {
    sum = sizes = _mm512_setzero_si512();
    for (int64_t c = 0; c < width; c += VW) {
      const __m512i code = _mm512_cvtps_epi32((__m512)(loadf(x + c) * splat(times)));
      const __m512i top = _mm512_srai_epi32(_mm512_add_epi32(code, _mm512_set1_epi32(128)), 8);
      _mm_storeu_si128((__m128i*)(upper + c), _mm512_cvtepi32_epi8(top));
      _mm_storeu_si128((__m128i*)(lower + c), _mm512_cvtepi32_epi8(code));
      sum = _mm512_add_epi32(sum, code);
      sizes = _mm512_add_epi32(sizes, _mm512_abs_epi32(code));
    }
    return _mm512_reduce_add_epi32(sizes);
  };
  // Only where most channels are about as large as the largest: fifteen bits are as fine there.
  const int32_t all = round();
  if (all > SIZES) {
    times *= (float)(SIZES - width) / (float)all;
    round();
  }
  *scale = !finite ? __builtin_nanf("") : times > 0 ? 1 / times : 0.f;
  *start = (int32_t)(-128u * (uint32_t)_mm512_reduce_add_epi32(sum));
}
static void arrange_bytes(const float* x, int64_t tokens, int64_t width, uint8_t* to) {
  const Stretches cut(width);
  for (int64_t t = 0; t < tokens; t++, x += width, to += cut.bytes()) {
    memset(to + cut.padded - LINE, 0, LINE);
    memset(to + 2 * cut.padded - LINE, 0, LINE);
    for (int64_t i = 0; i < cut.count; i++) {
      const int64_t begin = cut.begin(i);
      arrange_stretch(x + begin, cut.begin(i + 1) - begin, to + begin, to + cut.padded + begin, cut.scales(to) + i,
                      cut.starts(to) + i);
    }
  }
}

// The bytes of weights at p, of which `left` are there, as the instruction takes them.
INLINE vi lifted(const uint8_t* p, int64_t left) {
  return (vi)load_bytes(p, left) ^ splati((int32_t)0x80808080);
}
// Sums of lanes may pass 32 bits; those of all lanes are right again.
INLINE vu joined(vi upper, vi lower) { return ((vu)upper << 8) + (vu)lower; }

// ---- few tokens: rows as they lie ---------------------------------------------------------------------
// 4 rows with TOKENS tokens. Meanwhile what lies 4 rows wide at `ahead` is asked for.
template <int TOKENS>
static void four_rows(const uint8_t* const* rows, const Stretches& cut, const uint8_t* x, const uint8_t* ahead,
                      int64_t count, float* out, int64_t out_stride) {
  const int64_t stride = cut.bytes();
  const __mmask8 there = (__mmask8)((1 << count) - 1);
  for (int64_t i = 0; i < cut.count; i++) {
    vi upper[TOKENS][4] = {}, lower[TOKENS][4] = {};
    const auto step = [&](int64_t c, int64_t left) __attribute__((always_inline)) {
      vi row[4];
      UNROLL for (int r = 0; r < 4; r++) row[r] = lifted(rows[r] + c, left);
      UNROLL for (int r = 0; r < 4; r++) __builtin_prefetch(ahead + r * cut.width + c);
      UNROLL for (int t = 0; t < TOKENS; t++) {
        const vi high = load<vi>(x + t * stride + c), low = load<vi>(x + t * stride + cut.padded + c);
        UNROLL for (int r = 0; r < 4; r++) {
          add_products(upper[t][r], row[r], high);
          add_products(lower[t][r], row[r], low);
        }
      }
    };
    int64_t c = cut.begin(i);
    const int64_t end = cut.begin(i + 1);
    NO_UNROLL for (; c + LINE <= end; c += LINE) step(c, LINE);
    if (c < end) step(c, LINE / 2);
    UNROLL for (int t = 0; t < TOKENS; t++) {
      vu sum[4];
      UNROLL for (int r = 0; r < 4; r++) sum[r] = joined(upper[t][r], lower[t][r]);
      const __m512i lanes = (__m512i)reduce4(sum[0], sum[1], sum[2], sum[3]);
      const __m256i halves = _mm256_add_epi32(_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64(lanes, 1));
      __m128i all = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
      all = _mm_add_epi32(all, _mm_set1_epi32(cut.start(x + t * stride, i)));
      float* to = out + t * out_stride;
      const __m128 before = i ? _mm_maskz_loadu_ps(there, to) : _mm_setzero_ps();
      _mm_mask_storeu_ps(to, there, _mm_fmadd_ps(_mm_cvtepi32_ps(all), _mm_set1_ps(cut.scale(x + t * stride, i)), before));
    }
  }
}

// ---- many tokens: rows turned over ---------------------------------------------------------------------
// Channels `begin` to `end` of VW rows as vectors of 16 of them, of every fourth row: so that sums of all rows
// are added up at once. What is past the last row is that row again.
static void turn_rows(const uint8_t* w, int64_t width, int64_t count, int64_t begin, int64_t end, uint8_t* turned) {
  const uint8_t* rows[VW];
  for (int64_t i = 0; i < VW; i++) rows[i] = w + (i < count ? i : count - 1) * width;
  const auto lanes = [](vi a, vi b, auto which) __attribute__((always_inline)) {
    return _mm512_shuffle_i32x4((__m512i)a, (__m512i)b, decltype(which)::value);
  };
  NO_UNROLL for (int64_t c = begin; c < end; c += LINE, turned += VW * LINE) UNROLL for (int g = 0; g < 4; g++) {
    vi v[4];
    UNROLL for (int l = 0; l < 4; l++) v[l] = lifted(rows[4 * l + g] + c, end - c < LINE ? LINE / 2 : LINE);
    const vi a = (vi)lanes(v[0], v[1], Fixed<0x44>()), b = (vi)lanes(v[2], v[3], Fixed<0x44>());
    const vi d = (vi)lanes(v[0], v[1], Fixed<0xee>()), e = (vi)lanes(v[2], v[3], Fixed<0xee>());
    store(turned + g * LINE, lanes(a, b, Fixed<0x88>()));
    store(turned + (4 + g) * LINE, lanes(a, b, Fixed<0xdd>()));
    store(turned + (8 + g) * LINE, lanes(d, e, Fixed<0x88>()));
    store(turned + (12 + g) * LINE, lanes(d, e, Fixed<0xdd>()));
  }
}
// VW rows with TOKENS tokens over the turned channels of stretch i. Meanwhile as many channels are asked for at
// ahead[0] to ahead[fetched].
template <int TOKENS>
static void turned_tile(const uint8_t* turned, const Stretches& cut, int64_t i, const uint8_t* x,
                        const uint8_t* const* ahead, int64_t fetched, int64_t count, float* out, int64_t out_stride) {
  const int64_t stride = cut.bytes(), width = cut.begin(i + 1) - cut.begin(i);
  const uint8_t* from = x + cut.begin(i);
  vi upper[TOKENS][4] = {}, lower[TOKENS][4] = {};
  const auto step = [&](int64_t c) __attribute__((always_inline)) {
    vi row[4];
    UNROLL for (int g = 0; g < 4; g++) row[g] = load<vi>(turned + c * VW + g * LINE);
    UNROLL for (int t = 0; t < TOKENS; t++) {
      const vi high = (vi)lanes16(from + t * stride + c), low = (vi)lanes16(from + t * stride + cut.padded + c);
      UNROLL for (int g = 0; g < 4; g++) {
        add_products(upper[t][g], row[g], high);
        add_products(lower[t][g], row[g], low);
      }
    }
  };
  int64_t c = 0;
  NO_UNROLL for (; c + LINE <= width; c += LINE) {
    NO_UNROLL for (int64_t r = 0; r < fetched; r++) fetch_line(ahead[r] + c);
    UNROLL for (int k = 0; k < 4; k++) step(c + 16 * k);
  }
  NO_UNROLL for (; c < width; c += 16) step(c);
  const __mmask16 there = (__mmask16)((1 << count) - 1);
  UNROLL for (int t = 0; t < TOKENS; t++) {
    vu sum[4];
    UNROLL for (int g = 0; g < 4; g++) sum[g] = joined(upper[t][g], lower[t][g]);
    const vu all = reduce4(sum[0], sum[1], sum[2], sum[3]) + (uint32_t)cut.start(x + t * stride, i);
    float* to = out + t * out_stride;
    const __m512 before = i ? _mm512_maskz_loadu_ps(there, to) : _mm512_setzero_ps();
    const __m512 scale = _mm512_set1_ps(cut.scale(x + t * stride, i));
    _mm512_mask_storeu_ps(to, there, _mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)all), scale, before));
  }
}

// A row of stretch i of the VW rows at w, or of those that follow, stretch by stretch.
INLINE const uint8_t* find_row(const uint8_t* w, const Stretches& cut, int64_t i, int64_t row) {
  const int64_t then = i + row / VW;
  return w + (then / cut.count * VW + row % VW) * cut.width + cut.begin(then % cut.count);
}

// Tokens up to which turning rows over costs more than it saves.
constexpr int64_t FEW_TOKENS = 3;

static void multiply_bytes(const uint8_t* w, int64_t width, const uint8_t* x, int64_t tokens, int64_t count,
                           float* out, int64_t out_stride) {
  const Stretches cut(width);
  if (tokens <= FEW_TOKENS) {
    for (int64_t first = 0; first < count; first += 4, w += 4 * width, out += 4) {
      const int64_t some = count - first < 4 ? count - first : 4;
      const uint8_t* rows[4];
      // Of fewer than four the last is multiplied again.
      for (int64_t i = 0; i < 4; i++) rows[i] = w + (i < some ? i : some - 1) * width;
      each_tile(tokens, 1, [&](auto tile, int64_t t, int64_t, int64_t) {
        four_rows<tile.value>(rows, cut, x + t * cut.bytes(), w + AHEAD, some, out + t * out_stride, out_stride);
      });
    }
    return;
  }
  alignas(LINE) uint8_t turned[VW * LONGEST];
  // A few rows are multiplied with all tokens while they are in the first cache, and what comes next is asked for.
  for (int64_t first = 0; first < count; first += VW, w += VW * width, out += VW) {
    const int64_t some = count - first < VW ? count - first : VW;
    for (int64_t i = 0; i < cut.count; i++) {
      turn_rows(w, width, some, cut.begin(i), cut.begin(i + 1), turned);
      const uint8_t* ahead[VW];
      for (int64_t r = 0; r < VW; r++) ahead[r] = find_row(w, cut, i, VW + early(VW) + r);
      each_tile(tokens, VW, [&](auto tile, int64_t t, int64_t low, int64_t high) {
        turned_tile<tile.value>(turned, cut, i, x + t * cut.bytes(), ahead + low, high - low, some,
                                out + t * out_stride, out_stride);
      });
    }
  }
}
#endif

}  // namespace
