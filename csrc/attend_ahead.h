// What an item reads next, asked for while it computes.
//
// A core waits a hundred nanoseconds for memory and reads a kilobyte in thirty, so that enough must be under way at
// any time, whatever is computed: the lines of the next tile are listed and asked for evenly through all of this
// one. Into the first-level cache: in pages at random that brings twice what asking for the second level does on Zen 5.
#pragma once
#include "item.h"
#include "simd.h"

namespace CONCAT(isa_, SUFFIX) {

// Eight lines, `step` bytes apart.
struct Block {
  const uint8_t* at;
  int64_t step;
};
// Blocks that are listed of a tile at most.
constexpr int64_t BLOCKS = 256;

struct Ahead {
  const Block *next = nullptr, *end = nullptr;
  // In 64ths of a block: what is asked for each time, and what is due.
  int64_t each = 0, due = 0;

  // All of it in so many times.
  void spread(int64_t times) { each = ((end - next) * 64 + times - 1) / times; }
  void fetch() {
    for (due += each; due >= 64 && next < end; due -= 64, next++)
      UNROLL for (int i = 0; i < 8; i++) __builtin_prefetch(next->at + i * next->step, 0, 3);
  }
};

// Blocks of RUN rows, behind those that are listed already; how many there are then.
static inline int64_t list_blocks(const uint8_t* from, int64_t bytes, int64_t stride, Block* blocks, int64_t listed) {
  const auto list = [&](int64_t at, int64_t step) {
    if (listed < BLOCKS) blocks[listed++] = {from + at, step};
  };
  if (stride == bytes) {
    // Rows without gaps are one long row.
    for (int64_t b = 0; b < RUN * bytes; b += 512) list(b, 64);
  } else {
    for (int64_t b = 0; b < bytes; b += 64)
      for (int64_t row = 0; row < RUN; row += 8) list(row * stride + b, stride);
  }
  return listed;
}

typedef uint64_t vl __attribute__((vector_size(VW * 4)));

// Addresses of RUN rows, many times: a run's offsets are the same.
struct Rows {
  static constexpr int SOME = VW / 2;
  vl offsets[RUN / SOME];

  explicit Rows(int64_t stride) {
    for (int64_t j = 0; j < RUN; j++) offsets[j / SOME][j % SOME] = (uint64_t)(j * stride);
  }
  // Past the end of a short run stands its last row, for keys that get the weight 0.
  void list(const uint8_t* from, int64_t count, const uint8_t** to) const {
    UNROLL for (int i = 0; i < RUN / SOME; i++) store(to + i * SOME, offsets[i] + (uint64_t)from);
    for (int64_t j = count; j < RUN; j++) to[j] = to[count - 1];
  }
};

}  // namespace
