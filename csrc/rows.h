// Rows of codes as numbers, and rows of numbers stored and rotated.
#pragma once
#include "convert.h"
#include "simd.h"

namespace CONCAT(isa_, SUFFIX) {

static inline float static_number(const Pages& p, const uint8_t* plane, int64_t head_stride, int64_t head,
                                  int64_t channel) {
  return number(plane + head * head_stride, p.scale_type, channel / (p.head_dim / p.groups));
}

template <int64_t CODE> static void row_numbers(const uint8_t* row, int64_t dim, float* out) {
  if constexpr (CODE == INT4) {
    for (int64_t i = 0; i < dim / 2; i++) {
      out[2 * i] = (float)((row[i] & 15) - 8);
      out[2 * i + 1] = (float)((row[i] >> 4) - 8);
    }
  } else {
    for (int64_t c = 0; c < dim; c += VW) storef(out + c, numbers<CODE>(row, c) * splat(unit<CODE>()));
  }
}
// A row as numbers, scale and zero applied; static planes are asked by kv_head.
static void dequantize_row(const Pages& p, int64_t head, const uint8_t* row, const uint8_t* scale,
                           const uint8_t* zero, float* out) {
  const int64_t dim = p.head_dim;
  switch (p.code) {
    case F32: row_numbers<F32>(row, dim, out); break;
    case BF16: row_numbers<BF16>(row, dim, out); break;
    case F16: row_numbers<F16>(row, dim, out); break;
    case INT8: row_numbers<INT8>(row, dim, out); break;
    case INT4: row_numbers<INT4>(row, dim, out); break;
    case INT6:
    case INT3: {
      alignas(64) uint8_t bytes[512];
      spread_row(p.code, row, dim, bytes);
      row_numbers<INT8>(bytes, dim, out);
      break;
    }
    default: row_numbers<FP8>(row, dim, out);
  }
  if (!p.scale) return;
  const uint8_t* scales = p.dynamic ? scale : p.scale + head * p.scale_head;
  const uint8_t* zeros = !p.zero ? nullptr : p.dynamic ? zero : p.zero + head * p.zero_head;
  const int64_t channels = dim / p.groups;
  for (int64_t g = 0; g < p.groups; g++) {
    const float x = number(scales, p.scale_type, g), z = zeros ? number(zeros, p.scale_type, g) : 0.f;
    float* to = out + g * channels;
    for (int64_t c = 0; c < channels; c++) to[c] = to[c] * x + z;
  }
}

static void write_numbers(const float* row, int64_t dim, uint8_t* out, int64_t type) {
  if (type == F32) memcpy(out, row, 4 * dim);
  else if (type == BF16)
    for (int64_t c = 0; c < dim; c++) store(out + 2 * c, float_to_bf16(row[c]));
  else
    for (int64_t c = 0; c < dim; c++) store(out + 2 * c, float_to_half(row[c]));
}

// Lane i becomes lane i ^ h.
static inline vf partners(vf v, int h) {
#ifdef __clang__
  vf other;
  for (int i = 0; i < VW; i++) other[i] = v[i ^ h];
  return other;
#else
  return __builtin_shuffle(v, iota() ^ splati(h));
#endif
}
// Hadamard of each largest power-of-two piece, orthonormal (formats/rotate).
static void rotate_row(float* x, int64_t dim) {
  const int64_t block = dim & -dim;
  const float norm = 1.f / __builtin_sqrtf((float)block);
  for (int h = 1; h < VW && h < block; h *= 2) {
    const vf sign = select((iota() & splati(h)) != splati(0), splat(-1.f), splat(1.f));
    for (int64_t c = 0; c < dim; c += VW) {
      const vf v = loadf(x + c);
      storef(x + c, partners(v, h) + v * sign);
    }
  }
  for (int64_t h = VW; h < block; h *= 2)
    for (int64_t i = 0; i < dim; i += 2 * h)
      for (int64_t j = i; j < i + h; j += VW) {
        const vf a = loadf(x + j), b = loadf(x + j + h);
        storef(x + j, a + b);
        storef(x + j + h, a - b);
      }
  for (int64_t c = 0; c < dim; c += VW) storef(x + c, loadf(x + c) * splat(norm));
}

}  // namespace
