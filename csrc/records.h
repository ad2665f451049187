// The plain C interface: records of 64-bit fields, which Python packs in one call.
//
// Written by scripts/interface.py from cpu_core/interface.py, the one list.
#pragma once
#include <cstdint>

enum Code : int64_t { F32 = 0, BF16 = 1, F16 = 2, INT8 = 3, INT4 = 4, FP8 = 5, INT6 = 6, INT3 = 7 };

enum MaskKind : int64_t { CAUSAL = 0, FULL = 1, INTERVALS = 2 };

enum Kind : int64_t { PROJECT = 0, WRITE = 1, ATTEND = 2, FINISH = 3, NORM = 4 };

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
static_assert(sizeof(Pages) == 144, "64 bits a field");

// One layer's pages.
struct Layer {
  Pages key, value;
  // Numbers kept as they are; codes null where the format keeps none.
  Pages exact_key, exact_value;
  // [kv_heads, head_dim] of the key map, before the rotation: k' = scale (k - mean), and queries
  // q' = q / scale. Null: none.
  const float* map_scale;
  const float* map_mean;
  // [kv_heads, head_dim, head_dim] for keys that are rounded in turn (formats/feedback): U below
  // the diagonal, d on it. Null: each channel by itself.
  const float* feedback;
  // [kv_heads, head_dim, head_dim]: what rows of scaled keys, and of scaled queries, are multiplied
  // with before the rotation. Null: nothing.
  const float* map_turn;
  const float* map_unturn;
};
static_assert(sizeof(Layer) == 616, "64 bits a field");

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
static_assert(sizeof(Step) == 88, "64 bits a field");

// Attention to what the pages hold.
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
  // Keys are values as well, and value pages hold the channels that follow in a key: queries have
  // those of both, outputs those of the key pages.
  int64_t latent;
  int64_t mask, window, sink_tokens;
  // Outputs in the model's basis where values are cached rotated.
  int64_t model_basis;
  int64_t threads, isa;
  double softmax_scale, softcap;
};
static_assert(sizeof(Attend) == 896, "64 bits a field");

// Norm, rotate, quantize, scatter.
struct Write {
  Layer layer;
  Step step;
  // Inputs [tokens, heads, head_dim], channels contiguous; strides in elements of `type`.
  const uint8_t* q;
  const uint8_t* k;
  const uint8_t* v;
  int64_t type;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;
  // Null where nobody wants them.
  uint8_t* q_out;
  uint8_t* k_rows;
  uint8_t* v_rows;
  // Null: no rotation.
  const float* cos;
  const float* sin;
  int64_t half_rotary, interleaved;
  // Null: no norm.
  const float* q_norm;
  const float* k_norm;
  int64_t norm_after;
  int64_t tokens, q_heads, kv_heads;
  int64_t threads, isa;
  double eps;
};
static_assert(sizeof(Write) == 912, "64 bits a field");

// One request's rows.
struct Gather {
  Pages pages;
  const int32_t* page_table;
  uint8_t* out;
  int64_t out_type;
  int64_t context, kv_heads, page_size;
  int64_t threads, isa;
};
static_assert(sizeof(Gather) == 208, "64 bits a field");

// Rows of one type, as nn.Linear holds them.
struct Weight {
  const uint8_t* numbers;
  int64_t rows;
  // BF16, a row of INT8 each; null for the other types.
  const uint8_t* scale;
  // Of the activations' type; null: none.
  const uint8_t* bias;
};
static_assert(sizeof(Weight) == 32, "64 bits a field");

// out[t] = W norm(x[t]) for up to three weights, their rows one after the other.
struct Project {
  // [tokens, width] of `type`; weights are of `code`.
  const uint8_t* x;
  int64_t type, code, tokens, width;
  // Of an RMS norm, in `type`; null: none.
  const uint8_t* norm;
  Weight weights[3];
  // [tokens, rows of all weights] of `type`.
  uint8_t* out;
  // Rotary embedding, half-split, of the first `rotated` heads: [tokens, head_dim] of `type`.
  // Null: none.
  const uint8_t* cos;
  const uint8_t* sin;
  int64_t head_dim, rotated;
  int64_t threads, isa;
  double eps;
};
static_assert(sizeof(Project) == 208, "64 bits a field");

// The second half of a block: y = residual + O a, out = y + D (silu(G n) * U n), n = norm(y).
struct Finish {
  // [tokens, attended_width], [tokens, width] and [tokens, width] of `type`.
  const uint8_t* attended;
  const uint8_t* residual;
  uint8_t* out;
  int64_t type, code, tokens, attended_width, width;
  const uint8_t* norm;
  Weight output, gate, up, down;
  int64_t threads, isa;
  double eps;
};
static_assert(sizeof(Finish) == 224, "64 bits a field");

// An RMS norm alone, in place.
struct Norm {
  // [tokens, width] of `type`, as the weight.
  uint8_t* x;
  int64_t type, tokens, width;
  const uint8_t* weight;
  int64_t isa;
  double eps;
};
static_assert(sizeof(Norm) == 56, "64 bits a field");

// What quantpage_interface() says, for Python to compare.
static const char RECORDS[] =
  "Code: F32, BF16, F16, INT8, INT4, FP8, INT6, INT3\n"
  "MaskKind: CAUSAL, FULL, INTERVALS\n"
  "Kind: PROJECT, WRITE, ATTEND, FINISH, NORM\n"
  "Pages: 144 bytes, codes uint8_t*, page_stride int64_t, head_stride int64_t, row_stride int64_t, code int64_t, head_dim int64_t, scale uint8_t*, scale_page int64_t, scale_head int64_t, scale_row int64_t, zero uint8_t*, zero_page int64_t, zero_head int64_t, zero_row int64_t, scale_type int64_t, groups int64_t, dynamic int64_t, rotated int64_t\n"
  "Layer: 616 bytes, key Pages, value Pages, exact_key Pages, exact_value Pages, map_scale const float*, map_mean const float*, feedback const float*, map_turn const float*, map_unturn const float*\n"
  "Step: 88 bytes, page_table const int32_t*, table_stride int64_t, exact_table const int32_t*, exact_stride int64_t, query_starts const int32_t*, context_lens const int32_t*, slots const int64_t*, exact_slots const int64_t*, positions const int64_t*, requests int64_t, page_size int64_t\n"
  "Attend: 896 bytes, q const uint8_t*, q_type int64_t, q_token int64_t, q_head int64_t, out uint8_t*, out_type int64_t, lse float*, sinks const float*, starts const int64_t*, low const int32_t*, high const int32_t*, per_head int64_t, tokens int64_t, q_heads int64_t, kv_heads int64_t, latent int64_t, mask int64_t, window int64_t, sink_tokens int64_t, model_basis int64_t, threads int64_t, isa int64_t, softmax_scale double, softcap double\n"
  "Write: 912 bytes, q const uint8_t*, k const uint8_t*, v const uint8_t*, type int64_t, q_token int64_t, q_head int64_t, k_token int64_t, k_head int64_t, v_token int64_t, v_head int64_t, q_out uint8_t*, k_rows uint8_t*, v_rows uint8_t*, cos const float*, sin const float*, half_rotary int64_t, interleaved int64_t, q_norm const float*, k_norm const float*, norm_after int64_t, tokens int64_t, q_heads int64_t, kv_heads int64_t, threads int64_t, isa int64_t, eps double\n"
  "Gather: 208 bytes, pages Pages, page_table const int32_t*, out uint8_t*, out_type int64_t, context int64_t, kv_heads int64_t, page_size int64_t, threads int64_t, isa int64_t\n"
  "Weight: 32 bytes, numbers const uint8_t*, rows int64_t, scale const uint8_t*, bias const uint8_t*\n"
  "Project: 208 bytes, x const uint8_t*, type int64_t, code int64_t, tokens int64_t, width int64_t, norm const uint8_t*, weights0 Weight, weights1 Weight, weights2 Weight, out uint8_t*, cos const uint8_t*, sin const uint8_t*, head_dim int64_t, rotated int64_t, threads int64_t, isa int64_t, eps double\n"
  "Finish: 224 bytes, attended const uint8_t*, residual const uint8_t*, out uint8_t*, type int64_t, code int64_t, tokens int64_t, attended_width int64_t, width int64_t, norm const uint8_t*, output Weight, gate Weight, up Weight, down Weight, threads int64_t, isa int64_t, eps double\n"
  "Norm: 56 bytes, x uint8_t*, type int64_t, tokens int64_t, width int64_t, weight const uint8_t*, isa int64_t, eps double\n";
