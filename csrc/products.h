// Products of weights with a few rows of numbers: what a decode step does between two attentions.
//
// src/quantpage/cpu_core/products.py packs the records.
#pragma once
#include "abi.h"

// Results are the same bits whatever the number of threads and of tokens. Widths are multiples of 32.
struct Products {
  // [tokens, width] as floats: read, RMS norm, or silu(gate) * up of floats side by side.
  void (*read)(const uint8_t* x, int64_t type, int64_t count, float* to);
  void (*norm)(float* x, const uint8_t* weight, int64_t type, int64_t tokens, int64_t width, float eps);
  void (*gate)(const float* both, int64_t tokens, int64_t width, float* to);
  // What `multiply` reads of weights of `code`, from [tokens, width] floats; bytes a token.
  int64_t (*arranged)(int64_t code, int64_t width);
  void (*arrange)(const float* x, int64_t code, int64_t tokens, int64_t width, uint8_t* to);
  // Rows first .. first + count of one weight, to out[t * out_stride + row].
  void (*multiply)(const Weight*, int64_t code, int64_t type, int64_t width, const uint8_t* x, int64_t tokens,
                   int64_t first, int64_t count, float* out, int64_t out_stride);
  void (*rotate)(float* head, const uint8_t* cos, const uint8_t* sin, int64_t type, int64_t head_dim);
  void (*write)(const float* x, int64_t type, int64_t count, uint8_t* out);
};

// isa as in library.h.
const Products* find_products(int64_t isa);

extern "C" {
const Products* quantpage_products_base();
const Products* quantpage_products_avx2();
const Products* quantpage_products_avx512();
const Products* quantpage_products_avx512bf16();
}
