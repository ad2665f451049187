// What the driver hands to an instruction set's kernels. Plain data, no templates.
#pragma once
#include "abi.h"

constexpr int RUN = 16;
constexpr int RUNS = 8;
// Keys of one softmax step.
constexpr int TILE = RUN * RUNS;
// Heads of one item.
constexpr int HEADS = 4;

// At most RUN consecutive keys within one page that some row of the item sees.
struct Run {
  const uint8_t *k, *v;
  const uint8_t *k_scale, *k_zero, *v_scale, *v_zero;
  // Of latent rows.
  const uint8_t *rotary, *rotary_scale, *rotary_zero;
  int32_t count;
  // 0: some query does not see some key of it, ask `seen`.
  int32_t all;
};

struct Item {
  const Attend* call;
  // Of the codes, or exact ones. rotary: channels of latent rows' keys after those of `key`, or null.
  const Pages *key, *value, *rotary;
  int64_t kv_head;
  // First query row and the number of tokens; rows are (token, head of the group), token major.
  int64_t first, tokens;
  const Run* runs;
  int64_t num_runs;
  // [run][token], a bit a key.
  const uint16_t* seen;
  // What the thread most likely reads after this item and those beside it, its first tile; or null.
  const Item* then;
  // Whether the scratch still has the queries of these rows, from an item before.
  bool prepared;
};

// What is summed up.
static inline const Pages& values_of(const Attend& a) { return a.latent ? a.layer.key : a.layer.value; }

// Results of an item: [rows], [rows], [rows, value_dim], numerator not divided.
struct Partial {
  float *peak, *total, *acc;
};

struct Kernels {
  // Heads that see the same keys, HEADS at most. 0; or the bytes of scratch they need, where `size` is less.
  int64_t (*attend)(const Item*, const Partial*, int64_t heads, uint8_t* scratch, int64_t size);
  // The first part becomes both: the same rows over disjoint keys.
  void (*join)(int64_t rows, int64_t dim, const Partial* into, const Partial* from);
  // Output and log-sum-exp of tokens from `first` on and the heads of one kv_head, from their parts.
  void (*finish)(const Attend*, int64_t kv_head, int64_t first, int64_t tokens, const Partial* parts, int64_t count);
  // Rows of one run of tokens to [count, head_dim] of out_type, out_row elements apart.
  void (*dequantize)(const Pages*, int64_t kv_head, const uint8_t* codes, const uint8_t* scale,
                     const uint8_t* zero, int64_t count, uint8_t* out, int64_t out_type,
                     int64_t out_row);
  void (*write)(const Write*, int64_t token);
};

extern "C" {
const Kernels* quantpage_kernels_base();
const Kernels* quantpage_kernels_avx2();
const Kernels* quantpage_kernels_avx512();
}
