// How products of a few rows of weights with many tokens are cut: what integers and pairs of bf16 share.
#pragma once
#include "simd.h"

#if VW == 16
namespace CONCAT(isa_, SUFFIX) {

constexpr int64_t LINE = 64;

// body(Fixed, t, low, high): tokens t to t + value, threes and twos, a single one only where it is all there
// is; low and high say which part of `shares` is this tile's: so that what is done beside goes evenly.
template <class Body> INLINE void each_tile(int64_t tokens, int64_t shares, const Body& body) {
  const int64_t tiles = (tokens + 2) / 3;
  int64_t t = 0, tile = 0;
  const auto take = [&](auto count) __attribute__((always_inline)) {
    body(count, t, shares * tile / tiles, shares * (tile + 1) / tiles);
    t += count.value;
    tile++;
  };
  while (tokens - t > 4 || tokens - t == 3) take(Fixed<3>());
  while (tokens - t >= 2) take(Fixed<2>());
  if (t < tokens) take(Fixed<1>());
}

// How many rows more than the next block of so many are under way: when that is begun, what was asked for last would
// not be there yet.
constexpr int64_t early(int64_t rows) { return rows / 2; }

// A line of rows that come later. Into the first-level cache: asking for the second level alone, a line now and then,
// reads memory at half the rate on Zen 5.
INLINE void fetch_line(const uint8_t* at) { __builtin_prefetch(at, 0, 3); }

}  // namespace
#endif
