// Scores of a few rows as products of bytes (VNNI), straight from a page's codes.
//
// The instruction takes an unsigned byte and a signed one. A code gets its offset, which every query's sum begins
// without; a query's word of 15 bits is two signed bytes, upper and lower, one after the other into the same sums,
// which are moved by a byte in between. All of that is exact, so that scores are the same bits as those of words. Four
// keys fill a vector, a lane of 128 bits each: rows are loaded as they lie and turned over in registers, so that four
// keys' sums are added up at once and no word is laid out in memory.
#pragma once
#include "attend_keys.h"
#include "attend_values.h"

namespace CONCAT(isa_, SUFFIX) {

#if VW == 16
constexpr int64_t CHUNK = 16;
// Of a chunk int4 makes two vectors: even and odd channels.
static inline int64_t vectors_of(int64_t code, int64_t dim) {
  const int64_t chunks = (row_bytes(code, dim) + CHUNK - 1) / CHUNK;
  return code == INT4 ? 2 * chunks : chunks;
}
// Of one row of a query: vectors of upper bytes and of lower ones, each the same in all lanes; where the sums begin.
static inline int64_t query_bytes(int64_t code, int64_t dim) { return (2 * vectors_of(code, dim) + 1) * 64; }

// words: of 15 bits, zeros from dim to the next 32; sum: of them.
static void arrange_query(int64_t code, int64_t dim, const int16_t* words, int32_t sum, uint8_t* to) {
  const int64_t vectors = vectors_of(code, dim);
  uint8_t* lower = to + vectors * 64;
  for (int64_t v = 0; v < vectors; v++) {
    __m512i some;
    if (code == INT4) {
      some = _mm512_loadu_si512(words + v / 2 * 2 * CHUNK);
      some = v % 2 ? _mm512_srai_epi32(some, 16) : _mm512_srai_epi32(_mm512_slli_epi32(some, 16), 16);
    } else {
      some = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)(words + v * CHUNK)));
    }
    const auto keep = [](uint8_t* at, __m512i bytes) {
      _mm512_storeu_si512(at, _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(bytes)));
    };
    keep(to + 64 * v, _mm512_srai_epi32(_mm512_add_epi32(some, _mm512_set1_epi32(128)), 8));
    keep(lower + 64 * v, some);
  }
  // Nibbles' offset is taken off as in other instruction sets (lift_keys).
  vi start = {};
  for (int l = 0; l < LANES && code != INT4; l++) start[4 * l] = (int32_t)(-128u * (uint32_t)sum);
  store(lower + vectors * 64, start);
}

static inline void add_bytes(vi& sum, vi codes, vi query) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(query));
}

// Codes of every fourth key: vectors of four chunks of a row (int4: of two), of which `left` bytes are there.
template <int64_t CODE>
INLINE void four_keys(const uint8_t* keys, int64_t stride, int64_t left, vi* codes) {
  const auto lanes = [](__m512i a, __m512i b, auto which) __attribute__((always_inline)) {
    return _mm512_shuffle_i32x4(a, b, decltype(which)::value);
  };
  if constexpr (CODE == INT4) {
    const auto half = [&](int64_t key) __attribute__((always_inline)) {
      const uint8_t* from = keys + 4 * key * stride;
      return left >= 32 ? _mm256_loadu_si256((const __m256i*)from)
                        : _mm256_maskz_loadu_epi8((__mmask32)((1u << left) - 1), from);
    };
    const __m512i a = _mm512_inserti64x4(_mm512_castsi256_si512(half(0)), half(1), 1);
    const __m512i b = _mm512_inserti64x4(_mm512_castsi256_si512(half(2)), half(3), 1);
    const vuh first = (vuh)lanes(a, b, Fixed<0x88>()), second = (vuh)lanes(a, b, Fixed<0xdd>());
    codes[0] = (vi)(first & (uint16_t)0x0f0f);
    codes[1] = (vi)(first >> 4 & (uint16_t)0x0f0f);
    codes[2] = (vi)(second & (uint16_t)0x0f0f);
    codes[3] = (vi)(second >> 4 & (uint16_t)0x0f0f);
  } else {
    __m512i v[4];
    UNROLL for (int l = 0; l < 4; l++)
      v[l] = _mm512_xor_si512((__m512i)load_bytes(keys + 4 * l * stride, left), _mm512_set1_epi8((char)0x80));
    const __m512i a = lanes(v[0], v[1], Fixed<0x44>()), b = lanes(v[2], v[3], Fixed<0x44>());
    const __m512i c = lanes(v[0], v[1], Fixed<0xee>()), d = lanes(v[2], v[3], Fixed<0xee>());
    codes[0] = (vi)lanes(a, b, Fixed<0x88>());
    codes[1] = (vi)lanes(a, b, Fixed<0xdd>());
    codes[2] = (vi)lanes(c, d, Fixed<0x88>());
    codes[3] = (vi)lanes(c, d, Fixed<0xdd>());
  }
}

// keys: RUN rows, `apart` bytes apart; scores as integer_scores has them. At most MANY_ROWS rows; DIM as in integer_scores.
template <int64_t CODE, int64_t DIM>
static void byte_scores(const uint8_t* keys, int64_t apart, int64_t any_dim, const uint8_t* query,
                        const float* unit, int64_t rows, float* scores) {
  constexpr int64_t PIECE = CODE == INT4 ? 32 : 64;
  const int64_t dim = DIM ? DIM : any_dim, bytes = row_bytes(CODE, dim), vectors = vectors_of(CODE, dim);
  const int64_t stride = query_bytes(CODE, dim);
  vi sums[MANY_ROWS][4];
  NO_UNROLL for (int64_t at = 0, first = 0; at < bytes; at += PIECE, first += 4) {
    // Group g: keys g, g + 4, g + 8, g + 12.
    vi codes[4][4];
    UNROLL for (int g = 0; g < 4; g++) four_keys<CODE>(keys + g * apart + at, apart, bytes - at, codes[g]);
    const uint8_t* from = query + first * 64;
    const bool last = at + PIECE >= bytes;
    NO_UNROLL for (int64_t r = 0; r < rows; r++, from += stride) {
      vi sum[4] = {};
      UNROLL for (int v = 0; v < 4; v++) {
        if (first + v >= vectors) break;
        const vi upper = load<vi>(from + v * 64);
        UNROLL for (int g = 0; g < 4; g++) add_bytes(sum[g], codes[g][v], upper);
      }
      UNROLL for (int g = 0; g < 4; g++)
        sum[g] = (sum[g] << 8) + (at == 0 ? load<vi>(query + r * stride + stride - 64) : sums[r][g]);
      UNROLL for (int v = 0; v < 4; v++) {
        if (first + v >= vectors) break;
        const vi lower = load<vi>(from + (vectors + v) * 64);
        UNROLL for (int g = 0; g < 4; g++) add_bytes(sum[g], codes[g][v], lower);
      }
      if (!last) {
        UNROLL for (int g = 0; g < 4; g++) sums[r][g] = sum[g];
        continue;
      }
      const vi done = reduce4(sum[0], sum[1], sum[2], sum[3]);
      storef(scores + r * TILE, __builtin_convertvector(done, vf) * splat(unit[r]));
    }
  }
}
#endif

}  // namespace
