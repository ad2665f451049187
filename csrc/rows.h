// Rows of codes as numbers.
#pragma once
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


}  // namespace
