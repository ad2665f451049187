// The plain C interface: records of 64-bit fields, so that Python can pack them in one call.
//
// src/quantpage/cpu_core/records.py holds the same lists in the same order; quantpage_abi() lets
// it check that the sizes agree.
#pragma once
#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

enum Code : int64_t { F32 = 0, BF16 = 1, F16 = 2, INT8 = 3, INT4 = 4, FP8 = 5, INT6 = 6, INT3 = 7 };
enum MaskKind : int64_t { CAUSAL = 0, FULL = 1, INTERVALS = 2 };

// K pages or V pages of one layer. Strides are in bytes, of page, head and token.
struct Pages {
  uint8_t* codes;
  int64_t page_stride, head_stride, row_stride;
  int64_t code;
  int64_t head_dim;
  // Null for numbers kept as they are.
  uint8_t* scale;
  int64_t scale_page, scale_head, scale_row;
  // Null for symmetric codes.
  uint8_t* zero;
  int64_t zero_page, zero_head, zero_row;
  // F32 or F16.
  int64_t scale_type;
  // Channels that share a scale are head_dim / groups.
  int64_t groups;
  int64_t dynamic;
  int64_t rotated;
};

// One layer's pages.
struct Layer {
  Pages key, value;
  // Numbers kept as they are; codes null where the format keeps none.
  Pages exact_key, exact_value;
  // [kv_heads, head_dim] of the key map, before the rotation: k' = scale (k - mean), q' = q / scale.
  // Null: none.
  const float *map_scale, *map_mean;
  // [kv_heads, head_dim, head_dim] for keys that are rounded in turn (formats/feedback): U below the
  // diagonal, d on it. Null: each channel by itself.
  const float* feedback;
};

// One step's requests, the same for every layer.
struct Step {
  const int32_t* page_table;
  int64_t table_stride;
  // Null for formats without exact pages.
  const int32_t* exact_table;
  int64_t exact_stride;
  const int32_t* query_starts;
  const int32_t* context_lens;
  const int64_t* slots;
  const int64_t* exact_slots;
  const int64_t* positions;
  int64_t requests, page_size;
};

struct Attend {
  Layer layer;
  Step step;
  const uint8_t* q;
  int64_t q_type, q_token, q_head;
  // [tokens, q_heads, value_dim] contiguous, and [tokens, q_heads] or null.
  uint8_t* out;
  int64_t out_type;
  float* lse;
  const float* sinks;
  // INTERVALS: row r = (head *) tokens + token sees keys [low[i], high[i]) for i in
  // starts[r] .. starts[r + 1]; sorted and disjoint.
  const int64_t* starts;
  const int32_t* low;
  const int32_t* high;
  int64_t per_head;
  int64_t tokens, q_heads, kv_heads;
  int64_t mask, window, sink_tokens;
  // Outputs in the model's basis where values are cached rotated.
  int64_t model_basis;
  int64_t threads, isa;
  double softmax_scale, softcap;
};

struct Write {
  Layer layer;
  Step step;
  // Inputs [tokens, heads, head_dim], channels contiguous; strides in elements of `type`.
  const uint8_t *q, *k, *v;
  int64_t type;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;
  uint8_t *q_out, *k_rows, *v_rows;
  const float *cos, *sin;
  int64_t half_rotary, interleaved;
  // Null: no norm.
  const float *q_norm, *k_norm;
  int64_t norm_after;
  int64_t tokens, q_heads, kv_heads;
  int64_t threads, isa;
  double eps;
};

struct Gather {
  Pages pages;
  const int32_t* page_table;
  uint8_t* out;
  int64_t out_type;
  int64_t context, kv_heads, page_size;
  int64_t threads, isa;
};
