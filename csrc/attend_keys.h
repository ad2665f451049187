// Scores of one tile: the dot products of rows and keys.
//
// Integer codes with one scale a token (or folded into the query) are multiplied as 16-bit words:
// the query is rounded to 15 bits of its largest channel, which is finer than a bf16 query. The
// words of a run are laid out once; then each vector holds the same 8 words of one key in every
// 128-bit lane against the 8 channels of as many rows as there are lanes. With AVX-512 few rows are
// multiplied byte by byte instead (attend_bytes.h), and many with a key a lane.
#pragma once
#include "item.h"
#include "simd.h"

namespace CONCAT(isa_, SUFFIX) {

constexpr int LANES = VW / 4;

// Codes of a key row as words. int4: every fourth nibble of a piece beside the other, see
// `order_query`, so that no shuffle is needed.
template <int B> static inline void spread_nibbles(const uint8_t* p, int16_t* out) {
  typedef uint16_t words __attribute__((vector_size(B)));
  words x;
  memcpy(&x, p, B);
  const words a = x & 15, b = (x >> 4) & 15, c = (x >> 8) & 15, d = x >> 12;
  memcpy(out, &a, B);
  memcpy(out + B / 2, &b, B);
  memcpy(out + B, &c, B);
  memcpy(out + B + B / 2, &d, B);
}
static inline int64_t piece(int64_t left) {
  for (int64_t b = VW * 4; b > 8; b /= 2)
    if (left >= b) return b;
  return 8;
}
template <int64_t CODE> INLINE void key_words(const uint8_t* row, int64_t dim, int16_t* out) {
  if constexpr (CODE == INT8) {
    int64_t c = 0;
#if VW == 16
    for (; c + 32 <= dim; c += 32)
      _mm512_storeu_si512(out + c, _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(row + c))));
#endif
#if VW >= 8
    for (; c + 16 <= dim; c += 16)
      _mm256_storeu_si256((__m256i*)(out + c),
                          _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(row + c))));
#elif defined(__SSE4_1__)
    for (; c + 8 <= dim; c += 8)
      _mm_storeu_si128((__m128i*)(out + c), _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)(row + c))));
#else
    for (; c < dim; c++) out[c] = (int8_t)row[c];
#endif
  } else {
    const int64_t bytes = dim / 2;
    for (int64_t b = 0; b < bytes;) {
      const int64_t left = bytes - b;
#if VW == 16
      if (left >= 64) { spread_nibbles<64>(row + b, out + 2 * b); b += 64; continue; }
#endif
#if VW >= 8
      if (left >= 32) { spread_nibbles<32>(row + b, out + 2 * b); b += 32; continue; }
#endif
      if (left >= 16) { spread_nibbles<16>(row + b, out + 2 * b); b += 16; continue; }
      spread_nibbles<8>(row + b, out + 2 * b);
      b += 8;
    }
  }
}
// A query's words in the order of a key's.
static void order_query(int64_t code, int64_t dim, const int16_t* words, int16_t* out) {
  if (code != INT4) {
    memcpy(out, words, 2 * dim);
    return;
  }
  for (int64_t b = 0; b < dim / 2;) {
    const int64_t size = piece(dim / 2 - b), fours = size / 2;
    for (int64_t k = 0; k < 4; k++)
      for (int64_t w = 0; w < fours; w++)
        out[2 * b + k * fours + w] = (int16_t)(load<uint64_t>(words + 2 * b + 4 * w) >> (16 * k));
    b += size;
  }
}

#if VW != 16
// Keys whose products are summed side by side.
constexpr int STEP = 4;

// words: [RUN][dim]; query: [ceil(rows / LANES)][dim / 8][LANES][8] words; scale: its unit, [rows
// padded]. scores: [rows padded][TILE], from lane `at`.
// DIM: head_dim where it is known when compiled (addresses become constants), else 0.
template <int64_t DIM>
static inline void integer_scores(const int16_t* words, int64_t any_dim, const int16_t* query,
                                  const float* scale, int64_t rows, float* scores) {
  const int64_t dim = DIM ? DIM : any_dim;
  for (int64_t first = 0; first < rows; first += LANES) {
    const int16_t* q = query + first * dim;
    vf unit;
    for (int i = 0; i < VW; i++) unit[i] = scale[first + i / 4];
    NO_UNROLL for (int t = 0; t < RUN; t += STEP) {
      vi acc[STEP];
      UNROLL for (int j = 0; j < STEP; j++) acc[j] = (vi){};
      const int16_t* w = words + t * dim;
      NO_UNROLL for (int64_t c = 0; c < dim; c += 8) {
        const vh x = load<vh>(q + c * LANES);
        UNROLL for (int j = 0; j < STEP; j++) acc[j] = madd(acc[j], lanes16(w + j * dim + c), x);
      }
      const vf s = __builtin_convertvector(reduce4(acc[0], acc[1], acc[2], acc[3]), vf) * unit;
      for (int l = 0; l < LANES; l++) memcpy(scores + (first + l) * TILE + t, (const float*)&s + 4 * l, 16);
    }
  }
}

#endif
// Rows from which on words are turned over, a key a lane, so that no sum has to be added up over lanes.
constexpr int64_t MANY_ROWS = 16;
#if VW == 16
// Rows whose sums there are registers for.
constexpr int64_t BLOCK = 24;

// [RUN][dim] words to [dim / 2][RUN] pairs of them.
static inline void turn_words(const int16_t* words, int64_t dim, int32_t* turned) {
  NO_UNROLL for (int64_t c = 0; c < dim; c += 8) {
    vf v[4];
    UNROLL for (int j = 0; j < 4; j++) {
      const auto key = [&](int l) { return _mm_loadu_si128((const __m128i*)(words + (4 * l + j) * dim + c)); };
      __m512i x = _mm512_castsi128_si512(key(0));
      x = _mm512_inserti32x4(x, key(1), 1);
      x = _mm512_inserti32x4(x, key(2), 2);
      v[j] = (vf)_mm512_inserti32x4(x, key(3), 3);
    }
    transpose4(v);
    UNROLL for (int x = 0; x < 4; x++) store(turned + (c / 2 + x) * VW, v[x]);
  }
}
// The same two words of a row for all keys. By name: the instruction reads them by itself.
static inline void add_pair(vi& sum, vi keys, const int16_t* words) {
  asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(keys), "m"(*(const int32_t*)words));
}
template <int64_t DIM, int64_t R>
static void turned_scores(const int32_t* turned, int64_t any_dim, const int16_t* query, const float* scale,
                          float* scores) {
  const int64_t dim = DIM ? DIM : any_dim;
  vi sums[R] = {};
  NO_UNROLL for (int64_t c = 0; c < dim; c += 8) UNROLL for (int x = 0; x < 4; x++) {
    const vi keys = load<vi>(turned + (c / 2 + x) * VW);
    UNROLL for (int r = 0; r < R; r++)
      add_pair(sums[r], keys, query + r / LANES * LANES * dim + c * LANES + r % LANES * 8 + 2 * x);
  }
  UNROLL for (int r = 0; r < R; r++)
    storef(scores + r * TILE, __builtin_convertvector(sums[r], vf) * splat(scale[r]));
}
// Scores as integer_scores has them; turned: room for the words.
template <int64_t DIM>
static void many_scores(const int16_t* words, int64_t any_dim, int32_t* turned, const int16_t* query,
                        const float* scale, int64_t rows, float* scores) {
  const int64_t dim = DIM ? DIM : any_dim;
  turn_words(words, dim, turned);
  for (int64_t r = 0, count; r < rows; r += count) {
    count = rows - r >= BLOCK ? BLOCK : rows - r > 8 ? 16 : 8;
    const auto some = count == BLOCK ? turned_scores<DIM, BLOCK> : count == 16 ? turned_scores<DIM, 16> : turned_scores<DIM, 8>;
    some(turned, dim, query + r * dim, scale + r, scores + r * TILE);
  }
}
#endif

// ---- floats ------------------------------------------------------------------------------------
// rows32: [RUN][dim] floats; query: [rows][dim].
static inline void float_scores(const float* keys, int64_t dim, const float* query, int64_t rows,
                                float* scores) {
  for (int64_t r = 0; r < rows; r++) {
    const float* q = query + r * dim;
    NO_UNROLL for (int t = 0; t < RUN; t += VW) {
      vf a[VW];
      const float* k = keys + t * dim;
      UNROLL for (int j = 0; j < VW; j++) a[j] = splat(0.f);
      NO_UNROLL for (int64_t c = 0; c < dim; c += VW) {
        const vf x = loadf(q + c);
        UNROLL for (int j = 0; j < VW; j++) a[j] += x * loadf(k + j * dim + c);
      }
      storef(scores + r * TILE + t, transposed_sums(a));
    }
  }
}
template <int64_t CODE> static inline void key_floats(const uint8_t* row, int64_t dim, float* out) {
  for (int64_t c = 0; c < dim; c += VW) storef(out + c, numbers<CODE>(row, c));
}

}  // namespace
