// Weighted sums of value rows.
//
// Integer codes: weights (times the token's scale) are rounded to 15 bits of the tile's largest and
// multiplied as words, two keys a dword. Words of two rows are interleaved, which leaves channels in
// the order of `value_order`; results are put back once an item. Even channels of int8 carry an
// offset of 128 (one operation less each); `lift` takes it off.
#pragma once
#include "item.h"
#include "simd.h"

namespace CONCAT(isa_, SUFFIX) {

// Vectors of dwords that a piece of VW * 4 bytes of a row makes.
template <int64_t CODE> constexpr int vectors() { return CODE == INT4 ? 8 : 4; }
static inline int64_t row_bytes(int64_t code, int64_t dim) {
  return code == F32 ? 4 * dim : code == BF16 || code == F16 ? 2 * dim : code == INT4 ? dim / 2 : dim;
}
static inline int64_t value_width(int64_t code, int64_t dim) {
  if (code != INT8 && code != INT4) return dim;
  const int64_t pieces = (row_bytes(code, dim) + VW * 4 - 1) / (VW * 4);
  return pieces * VW * (code == INT4 ? 8 : 4);
}
// order[i]: the channel of dword i, -1 for padding.
static void value_order(int64_t code, int64_t dim, int32_t* order) {
  const int64_t width = value_width(code, dim), n = code == INT4 ? 8 : 4;
  for (int64_t i = 0; i < width; i++) {
    if (code != INT8 && code != INT4) {
      order[i] = (int32_t)i;
      continue;
    }
    const int64_t block = i / (VW * n), k = i / VW % n, lane = i % VW / 4, j = i % 4;
    int64_t c;
    if (code == INT8) c = block * VW * 4 + 16 * lane + 2 * (j + 4 * (k / 2)) + k % 2;
    else c = block * VW * 8 + 32 * lane + 4 * (j + 4 * (k / 4)) + k % 4;
    order[i] = c < dim ? (int32_t)c : -1;
  }
}
// What vector k of a piece adds to each code.
static inline float offset_of(int64_t code, int64_t k) { return code == INT4 ? 8.f : k % 2 == 0 ? 128.f : 0.f; }

template <int64_t CODE> INLINE void pair_words(const uint8_t* a, const uint8_t* b, int64_t left, vh* out) {
  vuh low, high;
  interleave(load_bytes(a, left), load_bytes(b, left), low, high);
  if constexpr (CODE == INT8) {
    out[0] = (vh)((low ^ 0x80) & 0xff);
    out[1] = (vh)low >> 8;
    out[2] = (vh)((high ^ 0x80) & 0xff);
    out[3] = (vh)high >> 8;
  } else {
    UNROLL for (int k = 0; k < 4; k++) {
      out[k] = (vh)((low >> (4 * k)) & 15);
      out[4 + k] = (vh)((high >> (4 * k)) & 15);
    }
  }
}

// Rows to fetch ahead: lines [begin, end) of 64 bytes of each.
struct AheadRows {
  const uint8_t* const* rows;
  int64_t begin, end;
};
static inline void fetch(const AheadRows& ahead, int64_t row) {
  for (int64_t line = ahead.begin; line < ahead.end; line++) __builtin_prefetch(ahead.rows[row] + 64 * line, 0, 3);
}

// acc[r][c..] += unit[r] * sum over pairs of words; R rows, one piece of the row, codes read as
// they are.
template <int64_t CODE, int R>
static inline void integer_piece(const uint8_t* const* rows, int64_t pairs, int64_t byte, int64_t left,
                                 const int32_t* weights, const float* unit, float* acc, int64_t width,
                                 const AheadRows& ahead) {
  constexpr int N = vectors<CODE>();
  // Registers: at most 16 accumulators.
  constexpr int C = VW == 16 ? 4 : (R > 2 ? 2 : 4);
  UNROLL for (int part = 0; part < N; part += C) {
    vi sum[R][C];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) sum[r][c] = (vi){};
    NO_UNROLL for (int64_t i = 0; i < pairs; i++) {
      if (part == 0) {
        fetch(ahead, 2 * i);
        fetch(ahead, 2 * i + 1);
      }
      vh words[N];
      pair_words<CODE>(rows[2 * i] + byte, rows[2 * i + 1] + byte, left, words);
      UNROLL for (int r = 0; r < R; r++) {
        const vh w = (vh)splati(weights[r * (TILE / 2) + i]);
        UNROLL for (int c = 0; c < C; c++) sum[r][c] = madd(sum[r][c], words[part + c], w);
      }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) {
      float* to = acc + r * width + (part + c) * VW;
      storef(to, loadf(to) + __builtin_convertvector(sum[r][c], vf) * splat(unit[r]));
    }
  }
}
// The same from words laid out once for many rows: [pairs][width] dwords.
template <int R>
static inline void integer_words(const int32_t* words, int64_t pairs, int64_t width, const int32_t* weights,
                                 const float* unit, float* acc) {
  constexpr int C = VW == 16 ? 4 : 2;
  for (int64_t at = 0; at < width; at += C * VW) {
    vi sum[R][C];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) sum[r][c] = (vi){};
    NO_UNROLL for (int64_t i = 0; i < pairs; i++) {
      UNROLL for (int r = 0; r < R; r++) {
        const vh w = (vh)splati(weights[r * (TILE / 2) + i]);
        UNROLL for (int c = 0; c < C; c++)
          sum[r][c] = madd(sum[r][c], load<vh>(words + i * width + at + c * VW), w);
      }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) {
      float* to = acc + r * width + at + c * VW;
      storef(to, loadf(to) + __builtin_convertvector(sum[r][c], vf) * splat(unit[r]));
    }
  }
}

// Floats: weights [R][TILE], one weight a key.
template <int64_t CODE, int R, int C>
static inline void float_slice(const uint8_t* const* rows, int64_t keys, int64_t at, const float* weights,
                               float* acc, int64_t width, const AheadRows& ahead) {
  vf sum[R][C];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) sum[r][c] = loadf(acc + r * width + at + c * VW);
  NO_UNROLL for (int64_t i = 0; i < keys; i++) {
    if (at == 0) fetch(ahead, i);
    vf v[C];
    UNROLL for (int c = 0; c < C; c++) v[c] = numbers<CODE>(rows[i], at + c * VW);
    UNROLL for (int r = 0; r < R; r++) {
      const vf w = splat(weights[r * TILE + i]);
      UNROLL for (int c = 0; c < C; c++) sum[r][c] += w * v[c];
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) storef(acc + r * width + at + c * VW, sum[r][c]);
}
template <int64_t CODE, int R>
static inline void float_values(const uint8_t* const* rows, int64_t keys, const float* weights, float* acc,
                                int64_t width, const AheadRows& ahead) {
  constexpr int C = VW == 16 ? 4 : 2;
  int64_t at = 0;
  for (; at + C * VW <= width; at += C * VW) float_slice<CODE, R, C>(rows, keys, at, weights, acc, width, ahead);
  for (; at < width; at += VW) float_slice<CODE, R, 1>(rows, keys, at, weights, acc, width, ahead);
}

}  // namespace
