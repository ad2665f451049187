// Weighted sums of value rows.
//
// Integer codes: weights (times the token's scale) are rounded to 15 bits of the tile's largest and
// multiplied as words, two keys a dword. Words of two rows are interleaved, which leaves channels in
// the order that `put_back` knows; results are put back once an item. Even channels of int8 carry an
// offset of 128 and every second nibble a factor of 16 (one operation less each), which are taken
// off later. Rows of half a vector are taken in twos, so that no lane is idle.
#pragma once
#include "attend_ahead.h"

namespace CONCAT(isa_, SUFFIX) {

// Vectors of dwords that a piece of VW * 4 bytes of a row makes.
template <int64_t CODE> constexpr int vectors() { return CODE == INT4 ? 8 : 4; }
static inline int64_t row_bytes(int64_t code, int64_t dim) {
  return code == F32 ? 4 * dim : code == BF16 || code == F16 ? 2 * dim : code == INT4 ? dim / 2 : code == INT6 ? dim * 6 / 8 : code == INT3 ? dim * 3 / 8 : dim;
}
static inline int64_t value_width(int64_t code, int64_t dim) {
  if (code != INT8 && code != INT4) return dim;
  const int64_t pieces = (row_bytes(code, dim) + VW * 4 - 1) / (VW * 4);
  return pieces * VW * (code == INT4 ? 8 : 4);
}
// What is added to the codes of a piece's vector k, and what their sums are multiplied by.
template <int64_t CODE> constexpr float offset_of(int k) { return CODE == INT4 ? 8.f : k % 2 == 0 ? 128.f : 0.f; }
template <int64_t CODE> constexpr float factor_of(int k) { return CODE == INT4 && k % 2 ? 1.f / 16 : 1.f; }
// Whether a row is half a vector (of several lanes: words are interleaved within one).
static inline bool in_halves(int64_t code, int64_t dim) {
  return LANES > 1 && (code == INT8 || code == INT4) && row_bytes(code, dim) == VW * 2;
}

template <int64_t CODE> INLINE void pair_words(vuh a, vuh b, vh* out) {
  vuh low, high;
  interleave(a, b, low, high);
  if constexpr (CODE == INT8) {
    out[0] = (vh)((low ^ 0x80) & 0xff);
    out[1] = (vh)low >> 8;
    out[2] = (vh)((high ^ 0x80) & 0xff);
    out[3] = (vh)high >> 8;
  } else {
    const vuh low_rest = low >> 8, high_rest = high >> 8;
    out[0] = (vh)(low & 0x0f);
    out[1] = (vh)(low & 0xf0);
    out[2] = (vh)(low_rest & 0x0f);
    out[3] = (vh)(low_rest & 0xf0);
    out[4] = (vh)(high & 0x0f);
    out[5] = (vh)(high & 0xf0);
    out[6] = (vh)(high_rest & 0x0f);
    out[7] = (vh)(high_rest & 0xf0);
  }
}
// A step's words: of two keys, or of four where rows are half a vector.
template <int64_t CODE, bool HALVES>
INLINE void row_words(const uint8_t* const* rows, int64_t byte, int64_t left, vh* out) {
  if constexpr (HALVES) pair_words<CODE>(load_halves(rows[0], rows[2]), load_halves(rows[1], rows[3]), out);
  else pair_words<CODE>(load_bytes(rows[0] + byte, left), load_bytes(rows[1] + byte, left), out);
}
template <bool HALVES> INLINE vh row_weights(const int32_t* weights) {
  return (vh)(HALVES ? halves_of(weights[0], weights[1]) : splati(weights[0]));
}

// acc[r][c..] += unit[r] * sum over keys of words; R rows, one piece of the row, codes read as
// they are.
template <int64_t CODE, int R, bool HALVES>
static inline void integer_piece(const uint8_t* const* rows, int64_t keys, int64_t byte, int64_t left,
                                 const int32_t* weights, const float* unit, float* acc, int64_t width,
                                 Ahead& ahead) {
  constexpr int N = vectors<CODE>(), KEYS = HALVES ? 4 : 2;
  // Registers: at most 16 accumulators.
  constexpr int C = VW == 16 ? 4 : (R > 2 ? 2 : 4);
  UNROLL for (int part = 0; part < N; part += C) {
    vi sum[R][C];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) sum[r][c] = (vi){};
    NO_UNROLL for (int64_t i = 0; i < keys; i += KEYS) {
      if (part == 0 && i % RUN == 0) ahead.fetch();
      vh words[N];
      row_words<CODE, HALVES>(rows + i, byte, left, words);
      UNROLL for (int r = 0; r < R; r++) {
        const vh w = row_weights<HALVES>(weights + r * (TILE / 2) + i / 2);
        UNROLL for (int c = 0; c < C; c++) sum[r][c] = madd(sum[r][c], words[part + c], w);
      }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) {
      float* to = acc + r * width + (part + c) * VW;
      storef(to, loadf(to) + __builtin_convertvector(sum[r][c], vf) * splat(unit[r] * factor_of<CODE>(part + c)));
    }
  }
}
// The same from words laid out once for many rows: [steps][width] dwords.
template <int64_t CODE, int R, bool HALVES>
static inline void integer_words(const int32_t* words, int64_t steps, int64_t width, const int32_t* weights,
                                 const float* unit, float* acc) {
  constexpr int C = VW == 16 ? 4 : 2;
  for (int64_t at = 0; at < width; at += C * VW) {
    vi sum[R][C];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) sum[r][c] = (vi){};
    NO_UNROLL for (int64_t i = 0; i < steps; i++) {
      UNROLL for (int r = 0; r < R; r++) {
        const vh w = row_weights<HALVES>(weights + r * (TILE / 2) + i * (HALVES ? 2 : 1));
        UNROLL for (int c = 0; c < C; c++)
          sum[r][c] = madd(sum[r][c], load<vh>(words + i * width + at + c * VW), w);
      }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) {
      float* to = acc + r * width + at + c * VW;
      storef(to, loadf(to) + __builtin_convertvector(sum[r][c], vf) * splat(unit[r] * factor_of<CODE>(c)));
    }
  }
}

// Sums of one row by channel: `zero` added, `lift` times what was added to its codes taken off.
template <int64_t CODE>
static void put_back(const float* acc, int64_t dim, bool halves, float zero, float lift, float* to) {
  constexpr int N = vectors<CODE>();
  for (int64_t first = 0; first < dim; first += LANES * 4 * N, acc += N * VW) {
    vf v[N];
    UNROLL for (int k = 0; k < N; k++) {
      v[k] = loadf(acc + k * VW);
      if (halves) v[k] = fold_halves(v[k]);
      v[k] = v[k] + splat(zero - lift * offset_of<CODE>(k));
    }
    if constexpr (CODE == INT8) {
      interleave32(vf(v[0]), vf(v[1]), v[0], v[1]);
      interleave32(vf(v[2]), vf(v[3]), v[2], v[3]);
    } else {
      transpose4(v);
      transpose4(v + 4);
    }
    // Each lane of the N vectors in turn holds N * 4 channels.
    UNROLL for (int k = 0; k < N; k++) {
      float lane[VW];
      storef(lane, v[k]);
      for (int64_t l = 0; l < LANES; l++) {
        const int64_t at = first + (l * N + k) * 4;
        if (at < dim) memcpy(to + at, lane + 4 * l, 16);
      }
    }
  }
}

// Floats: weights [R][TILE], one weight a key.
template <int64_t CODE, int R, int C>
static inline void float_slice(const uint8_t* const* rows, int64_t keys, int64_t at, const float* weights,
                               float* acc, int64_t width, Ahead& ahead) {
  vf sum[R][C];
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) sum[r][c] = loadf(acc + r * width + at + c * VW);
  NO_UNROLL for (int64_t i = 0; i < keys; i++) {
    if (at == 0 && i % RUN == 0) ahead.fetch();
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
                                int64_t width, Ahead& ahead) {
  constexpr int C = VW == 16 ? 4 : 2;
  int64_t at = 0;
  for (; at + C * VW <= width; at += C * VW) float_slice<CODE, R, C>(rows, keys, at, weights, acc, width, ahead);
  for (; at < width; at += VW) float_slice<CODE, R, 1>(rows, keys, at, weights, acc, width, ahead);
}

}  // namespace
