// Vectors of VW floats in the compiler's vector extensions; intrinsics where the portable form is
// slow. Included by translation units that are compiled once an instruction set: everything lives
// in a namespace of its own and nothing here instantiates std::, because the linker merges inline
// functions and would hand AVX code to a machine that has none.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#ifdef __x86_64__
#include <immintrin.h>
#endif
#include "abi.h"

#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define UNROLL _Pragma("GCC unroll 32")
#define INLINE static inline __attribute__((always_inline))
#define NO_UNROLL _Pragma("GCC unroll 1")

namespace CONCAT(isa_, SUFFIX) {

typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));
typedef int16_t vh __attribute__((vector_size(VW * 4)));
typedef uint16_t vuh __attribute__((vector_size(VW * 4)));

// Lanes of two vectors by constant indices; GCC has the second spelling from 12 on only.
#ifdef __clang__
#define SHUFFLE(a, b, type, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, type, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif

// A number that is known when compiled, as an argument.
template <int64_t N> struct Fixed {
  static constexpr int64_t value = N;
};

template <class T> static inline T load(const void* p) {
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T> static inline void store(void* p, T v) { memcpy(p, &v, sizeof v); }
static inline vf loadf(const float* p) { return load<vf>(p); }
static inline void storef(float* p, vf v) { store(p, v); }
static inline vf splat(float x) { return x - (vf){}; }
static inline vi splati(int32_t x) { return x - (vi){}; }
static inline vf select(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
static inline vi iota() {
  vi v;
  for (int i = 0; i < VW; i++) v[i] = i;
  return v;
}
static inline vf vmax(vf a, vf b) {
#if VW == 16
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif VW == 8
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}
static inline float hsum(vf v) {
#if VW == 16
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < VW; i++) s += v[i];
  return s;
#endif
}
static inline float hmax(vf v) {
#if VW == 16
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  for (int i = 1; i < VW; i++) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

static inline int32_t hmax(vi v) {
#if VW == 16
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t m = v[0];
  for (int i = 1; i < VW; i++) m = v[i] > m ? v[i] : m;
  return m;
#endif
}

// Whether a lane of a comparison holds.
static inline bool any(vi mask) {
#if VW == 16
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif VW == 8
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t found = 0;
  for (int i = 0; i < VW; i++) found |= mask[i];
  return found != 0;
#endif
}

// exp for x <= 88; 0 below -87 (so for -inf), NaN for NaN. 2^n times a polynomial of what is left of
// x log2(e), 2e-7 relative (of x beyond 10: 2e-8 times x).
static inline vf vexp(vf x) {
  const vi tiny = x < splat(-87.0f);
  const vf log2e = splat(1.442695041f), magic = splat(12582912.f);
#if VW == 16
  // What comes of -inf is masked.
  const vf bounded = x;
#else
  // The second of the two where one is NaN.
  const vf bounded = vmax(splat(-87.0f), x);
#endif
  const vf raised = bounded * log2e + magic, whole = raised - magic, f = bounded * log2e - whole;
  vf p = splat(1.3276471e-3f);
  p = p * f + splat(9.6755410e-3f);
  p = p * f + splat(5.5507131e-2f);
  p = p * f + splat(2.4022120e-1f);
  p = p * f + splat(6.9314694e-1f);
  p = p * f + splat(1.f);
#if VW == 16
  return (vf)_mm512_maskz_scalef_ps((__mmask16)~_mm512_movepi32_mask((__m512i)tiny), (__m512)p, (__m512)whole);
#else
  const vi n = (vi)raised - (vi)magic;
  // Bits of a NaN that are moved into its exponent would make a number of it.
  return select(tiny, splat(0.f), select(x != x, x, (vf)((vi)p + (n << 23))));
#endif
}

// tanh by exp of a negative number, so that nothing overflows.
static inline vf vtanh(vf x) {
  const vf size = (vf)((vi)x & splati(0x7fffffff));
  const vf e = vexp(size * splat(-2.f));
  const vf t = (splat(1.f) - e) / (splat(1.f) + e);
  return (vf)((vi)t | ((vi)x & splati((int32_t)0x80000000)));
}

// ---- 16-bit integer products ----------------------------------------------------------------
static inline vi madd(vi acc, vh a, vh b) {
#if VW == 16
  // By name: GCC 12 copies every accumulator of a loop of its intrinsics.
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
#elif VW == 8
  return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return acc + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  for (int i = 0; i < VW; i++)
    acc[i] += (int32_t)a[2 * i] * b[2 * i] + (int32_t)a[2 * i + 1] * b[2 * i + 1];
  return acc;
#endif
}
// 16 bytes in every 128-bit lane.
static inline vh lanes16(const void* p) {
#if VW == 16
  return (vh)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
#elif VW == 8
  return (vh)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
#else
  return load<vh>(p);
#endif
}
// Words of a and b in turn, within each 128-bit lane: the lower and the upper half of the lane.
static inline void interleave(vuh a, vuh b, vuh& low, vuh& high) {
#if VW == 16
  low = (vuh)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
  high = (vuh)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
#elif VW == 8
  low = (vuh)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b);
  high = (vuh)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b);
#else
  low = SHUFFLE(a, b, vuh, 0, 8, 1, 9, 2, 10, 3, 11);
  high = SHUFFLE(a, b, vuh, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
}
// Dwords of a and b in turn, within each 128-bit lane: the lower and the upper half of the lane.
template <class V> static inline void interleave32(V a, V b, V& low, V& high) {
#if VW == 16
  low = (V)_mm512_unpacklo_epi32((__m512i)a, (__m512i)b);
  high = (V)_mm512_unpackhi_epi32((__m512i)a, (__m512i)b);
#elif VW == 8
  low = (V)_mm256_unpacklo_epi32((__m256i)a, (__m256i)b);
  high = (V)_mm256_unpackhi_epi32((__m256i)a, (__m256i)b);
#else
  low = SHUFFLE(a, b, vi, 0, 4, 1, 5);
  high = SHUFFLE(a, b, vi, 2, 6, 3, 7);
#endif
}
template <class V> static inline void interleave64(V a, V b, V& low, V& high) {
#if VW == 16
  low = (V)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
  high = (V)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
#elif VW == 8
  low = (V)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
  high = (V)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
#else
  low = SHUFFLE(a, b, vi, 0, 1, 4, 5);
  high = SHUFFLE(a, b, vi, 2, 3, 6, 7);
#endif
}
// Sums of the four dwords of each 128-bit lane: lane L of the result holds those of a, b, c, d.
template <class V> static inline V reduce4(V a, V b, V c, V d) {
  interleave32(V(a), V(b), a, b);
  interleave32(V(c), V(d), c, d);
  V low, high;
  interleave64(a + b, c + d, low, high);
  return low + high;
}
// v[x] becomes the x-th dwords of v[0], v[1], v[2], v[3], lane by lane.
static inline void transpose4(vf* v) {
  vf low, high, low2, high2;
  interleave32(v[0], v[1], low, high);
  interleave32(v[2], v[3], low2, high2);
  interleave64(low, low2, v[0], v[1]);
  interleave64(high, high2, v[2], v[3]);
}
template <int L> static inline vf pair_sums(vf a, vf b) {
#if VW == 16
  if constexpr (L == 8)
    return SHUFFLE(a, b, vi, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLE(a, b, vi, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  else if constexpr (L == 4)
    return SHUFFLE(a, b, vi, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           SHUFFLE(a, b, vi, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  else if constexpr (L == 2)
    return SHUFFLE(a, b, vi, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           SHUFFLE(a, b, vi, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  else
    return SHUFFLE(a, b, vi, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           SHUFFLE(a, b, vi, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
#elif VW == 8
  if constexpr (L == 4)
    return SHUFFLE(a, b, vi, 0, 1, 2, 3, 8, 9, 10, 11) +
           SHUFFLE(a, b, vi, 4, 5, 6, 7, 12, 13, 14, 15);
  else if constexpr (L == 2)
    return SHUFFLE(a, b, vi, 0, 1, 8, 9, 4, 5, 12, 13) +
           SHUFFLE(a, b, vi, 2, 3, 10, 11, 6, 7, 14, 15);
  else
    return SHUFFLE(a, b, vi, 0, 8, 2, 10, 4, 12, 6, 14) +
           SHUFFLE(a, b, vi, 1, 9, 3, 11, 5, 13, 7, 15);
#else
  if constexpr (L == 2)
    return SHUFFLE(a, b, vi, 0, 1, 4, 5) + SHUFFLE(a, b, vi, 2, 3, 6, 7);
  else
    return SHUFFLE(a, b, vi, 0, 4, 2, 6) + SHUFFLE(a, b, vi, 1, 5, 3, 7);
#endif
}
// Lane i of the result: the sum of a[i].
static inline vf transposed_sums(vf* a) {
#if VW == 16
  UNROLL for (int i = 0; i < 8; i++) a[i] = pair_sums<8>(a[i], a[i + 8]);
#endif
#if VW >= 8
  UNROLL for (int i = 0; i < 4; i++) a[i] = pair_sums<4>(a[i], a[i + 4]);
#endif
  UNROLL for (int i = 0; i < 2; i++) a[i] = pair_sums<2>(a[i], a[i + 2]);
  return pair_sums<1>(a[0], a[1]);
}
// Dwords that fit in 16 bits.
static inline void store_words(int16_t* to, vi v) {
#if VW == 16
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)v));
#else
  for (int j = 0; j < VW; j++) to[j] = (int16_t)v[j];
#endif
}
// The first `left` bytes of p (a multiple of 8), zeros after them; all of a vector at most.
static inline vuh load_bytes(const uint8_t* p, int64_t left) {
  if (left >= VW * 4) return load<vuh>(p);
#if VW == 16
  return (vuh)_mm512_maskz_loadu_epi8(((uint64_t)1 << left) - 1, p);
#else
  vuh v = {};
  for (int64_t i = 0; i + 8 <= left; i += 8) memcpy((char*)&v + i, p + i, 8);
  return v;
#endif
}
// Half a vector at p, half at q.
static inline vuh load_halves(const uint8_t* p, const uint8_t* q) {
#if VW == 16
  return (vuh)_mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p)),
                                 _mm256_loadu_si256((const __m256i*)q), 1);
#else
  vuh v;
  memcpy(&v, p, VW * 2);
  memcpy((char*)&v + VW * 2, q, VW * 2);
  return v;
#endif
}
// a in the lower half of the lanes, b in the upper.
static inline vi halves_of(int32_t a, int32_t b) {
#if VW == 16
  return (vi)_mm512_mask_set1_epi32(_mm512_set1_epi32(a), 0xff00, b);
#else
  const vi upper = iota() >= splati(VW / 2);
  return (splati(a) & ~upper) | (splati(b) & upper);
#endif
}
// The upper half of the lanes added to the lower.
static inline vf fold_halves(vf v) {
#if VW == 16
  return v + (vf)_mm512_shuffle_f32x4((__m512)v, (__m512)v, 0xee);
#else
  vf other = {};
  memcpy(&other, (const char*)&v + VW * 2, VW * 2);
  return v + other;
#endif
}

// ---- codes in planes (formats/spec) ----------------------------------------------------------
static inline bool planed(int64_t code) { return code == INT6 || code == INT3; }
// What such a row is read as once it is spread.
static inline int64_t spread_code(int64_t code) { return planed(code) ? INT8 : code; }
typedef uint64_t two_words __attribute__((vector_size(16)));
template <class V> INLINE V repeated(uint8_t byte) { return (V)(V{} + 0x0101010101010101u * (uint64_t)byte); }
// Codes of a row as bytes, as many of the high plane's bytes at a time as V has. Block j of the channels
// lies in bits j * HIGH of the high plane, and in bits j / 2 * LOW of one half of the low plane.
template <int BITS, int LOW, class V> INLINE void spread_piece(const uint8_t* row, int64_t block, int64_t b, uint8_t* out) {
  constexpr int HIGH = BITS - LOW, BLOCKS = 8 / HIGH;
  constexpr uint8_t HALF = 1 << (BITS - 1), SIGN = 0x80;
  const V low[2] = {load<V>(row + b), load<V>(row + block + b)}, high = load<V>(row + 2 * block + b);
  UNROLL for (int j = 0; j < BLOCKS; j++) {
    const V bottom = (V)((V)(low[j % 2] >> (j / 2 * LOW)) & repeated<V>((1 << LOW) - 1));
    const V top = (V)((V)((V)(high >> (j * HIGH)) & repeated<V>((1 << HIGH) - 1)) << LOW);
    // Less half the range in every byte; the sign bit, which no code has, keeps borrows apart.
    const V code = (V)((V)((V)(bottom | top | repeated<V>(SIGN)) - repeated<V>(HALF)) ^ repeated<V>(SIGN));
    store(out + j * block + b, code);
  }
}
template <int BITS, int LOW> static inline void spread_planes(const uint8_t* row, int64_t dim, uint8_t* out) {
  const int64_t block = dim * (BITS - LOW) / 8;
  int64_t b = 0;
  for (; b + 16 <= block; b += 16) spread_piece<BITS, LOW, two_words>(row, block, b, out);
  for (; b + 8 <= block; b += 8) spread_piece<BITS, LOW, uint64_t>(row, block, b, out);
  for (; b + 4 <= block; b += 4) spread_piece<BITS, LOW, uint32_t>(row, block, b, out);
  for (; b + 2 <= block; b += 2) spread_piece<BITS, LOW, uint16_t>(row, block, b, out);
}
static inline void spread_row(int64_t code, const uint8_t* row, int64_t dim, uint8_t* out) {
  if (code == INT6) spread_planes<6, 4>(row, dim, out);
  else spread_planes<3, 2>(row, dim, out);
}

// ---- numbers of other types as floats ---------------------------------------------------------
static inline float half_to_float(uint16_t h) {
  // Exponents 0 and 31 come out right: subnormals by the product, infinity and NaN by the patch.
  uint32_t bits = (uint32_t)(h & 0x7fff) << 13;
  float f;
  memcpy(&f, &bits, 4);
  f *= 0x1p112f;
  memcpy(&bits, &f, 4);
  if ((h & 0x7c00) == 0x7c00) bits = 0x7f800000u | (uint32_t)(h & 0x3ff) << 13;
  bits |= (uint32_t)(h & 0x8000) << 16;
  memcpy(&f, &bits, 4);
  return f;
}
static inline vi widen_words(const uint8_t* p) {
#if VW == 16
  return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif VW == 8
  return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__SSE4_1__)
  return (vi)_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  vi v;
  for (int i = 0; i < VW; i++) v[i] = load<uint16_t>(p + 2 * i);
  return v;
#endif
}
static inline vi widen_bytes(const uint8_t* p) {
#if VW == 16
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif VW == 8
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#elif defined(__SSE4_1__)
  return (vi)_mm_cvtepi8_epi32(_mm_cvtsi32_si128(load<int32_t>(p)));
#else
  vi v;
  for (int i = 0; i < VW; i++) v[i] = (int8_t)p[i];
  return v;
#endif
}
static inline vf halves(const uint8_t* p) {
#if VW == 16
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif VW == 8
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  const vi h = widen_words(p);
  vf f = (vf)((h & splati(0x7fff)) << 13) * splat(0x1p112f);
  const vi special = (h & splati(0x7c00)) == splati(0x7c00);
  f = select(special, (vf)(splati(0x7f800000) | ((h & splati(0x3ff)) << 13)), f);
  return (vf)((vi)f | ((h & splati(0x8000)) << 16));
#endif
}
// VW numbers starting at channel c. fp8 comes out divided by 256: e4m3 bits are moved into the
// fields of a half, whose bias is 8 larger; exact, subnormals included.
template <int64_t CODE> static inline vf numbers(const uint8_t* row, int64_t c) {
  if constexpr (CODE == F32) return load<vf>(row + 4 * c);
  else if constexpr (CODE == BF16) return (vf)(widen_words(row + 2 * c) << 16);
  else if constexpr (CODE == F16) return halves(row + 2 * c);
  else if constexpr (CODE == INT8) return __builtin_convertvector(widen_bytes(row + c), vf);
  else {
#if VW == 16
    __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(row + c)));
    x = _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16((int16_t)0xbfff));
    return (vf)_mm512_cvtph_ps(x);
#elif VW == 8
    __m128i x = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)(row + c)));
    x = _mm_and_si128(_mm_slli_epi16(x, 7), _mm_set1_epi16((int16_t)0xbfff));
    return (vf)_mm256_cvtph_ps(x);
#else
    // Not through a float's subnormals, which the baseline multiplies a hundred times slower.
    const vi x = widen_bytes(row + c), size = x & splati(0x7f);
    const vf normal = (vf)((size << 20) + splati((127 - 7 - 8) << 23));
    const vf small = __builtin_convertvector(size, vf) * splat(0x1p-17f);
    const vf both = select(size < splati(8), small, normal);
    return (vf)((vi)both | (x & splati((int32_t)0x80000000)));
#endif
  }
}
template <int64_t CODE> constexpr float unit() { return CODE == FP8 ? 256.f : 1.f; }
static inline float code_unit(const Pages& p) { return p.code == FP8 ? unit<FP8>() : 1.f; }

static inline float number(const uint8_t* p, int64_t type, int64_t i) {
  if (type == F32) return load<float>(p + 4 * i);
  if (type == F16) return half_to_float(load<uint16_t>(p + 2 * i));
  const uint32_t bits = (uint32_t)load<uint16_t>(p + 2 * i) << 16;
  return load<float>(&bits);
}

}  // namespace
