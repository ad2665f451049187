// What an item reads next, asked for while it computes.
//
// A core waits a hundred nanoseconds for memory and reads a kilobyte in thirty, so that enough must be under way at
// any time, whatever is computed: the lines of the next tile are listed and asked for evenly through all of this
// one. Into the first-level cache: in pages at random that brings twice what asking for the second level does on Zen 5.
#pragma once
#include "item.h"
#include "simd.h"

namespace CONCAT(isa_, SUFFIX) {

// Lines that are listed of a tile at most.
constexpr int64_t LINES = 1024;

struct Ahead {
  const uint8_t *const *next, *const *end;
  // Lines of one `fetch`.
  int64_t each = 0;

  // The next `part` of what is left goes into so many steps.
  void spread(float part, int64_t steps) { each = ((int64_t)((float)(end - next) * part) + steps - 1) / steps; }
  void fetch() {
    const uint8_t* const* until = end - next < each ? end : next + each;
    for (; next < until; next++) __builtin_prefetch(*next, 0, 3);
  }
};

typedef uint64_t vl __attribute__((vector_size(VW * 4)));

// Addresses that many times from the same pattern: `step` bytes apart, `count` of them.
struct Addresses {
  static constexpr int64_t SOME = VW / 2;
  vl first;
  int64_t step, count;

  Addresses(int64_t by, int64_t number) : step(by), count(number) {
    for (int64_t i = 0; i < SOME; i++) first[i] = (uint64_t)(i * by);
  }
  // Written up to the next eight.
  void list(const uint8_t* from, const uint8_t** to) const {
    vl at = first + (uint64_t)from;
    for (int64_t i = 0; i < count; i += SOME, at += (uint64_t)(SOME * step)) store(to + i, at);
  }
};

}  // namespace
