#include "library.h"

#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "products.h"
#include "team.h"

static bool supported(int64_t isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == 0) return __builtin_cpu_supports("sse4.2");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  if (isa == 1) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  return isa == 2 ? avx512 : avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return isa == 0;
#endif
}

const Kernels* find_kernels(int64_t isa) {
  if (!supported(isa)) return nullptr;
#ifdef HAVE_AVX512_BF16
  // Its products alone are others.
  if (isa == 3) return quantpage_kernels_avx512();
#endif
#ifdef HAVE_AVX512
  if (isa == 2) return quantpage_kernels_avx512();
#endif
#ifdef HAVE_AVX2
  if (isa == 1) return quantpage_kernels_avx2();
#endif
  return isa == 0 ? quantpage_kernels_base() : nullptr;
}

const Products* find_products(int64_t isa) {
  if (!supported(isa)) return nullptr;
#ifdef HAVE_AVX512_BF16
  if (isa == 3) return quantpage_products_avx512bf16();
#endif
#ifdef HAVE_AVX512
  if (isa == 2) return quantpage_products_avx512();
#endif
#ifdef HAVE_AVX2
  if (isa == 1) return quantpage_products_avx2();
#endif
  return isa == 0 ? quantpage_products_base() : nullptr;
}

// The widest instruction set of this machine that is in this build; -1: none.
EXPORT int64_t quantpage_isa() {
  for (int64_t isa = 3; isa >= 0; isa--)
    if (find_kernels(isa)) return isa;
  return -1;
}

// Whether this machine multiplies tiles of bf16 (AMX): torch does so there, and nothing here.
EXPORT int64_t quantpage_tiles() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) return d >> 22 & 1;
#endif
  return 0;
}

// The records that this was compiled with, so that Python can refuse a library of another version.
EXPORT const char* quantpage_interface() { return RECORDS; }

// Asks for lines that are looked at soon, all at once; an address may be anything.
EXPORT int64_t quantpage_fetch(const uint8_t* const* lines, int64_t count) {
  for (int64_t i = 0; i < count; i++) __builtin_prefetch(lines[i], 0, 2);
  return 0;
}

// Reads bytes in order, for the read limit that the bench compares with; 64-byte aligned.
EXPORT int64_t quantpage_read(const uint8_t* bytes, int64_t size, int64_t threads) {
  typedef long long line __attribute__((vector_size(64), aligned(16)));
  const int64_t share = size / threads / 256 * 256;
  int64_t sums[256] = {};
  const auto body = [&](int64_t t) {
    const line* p = (const line*)(bytes + t * share);
    line a = {}, b = {}, c = {}, d = {};
    for (int64_t i = 0; i < share / 64; i += 4) {
      a += p[i];
      b += p[i + 1];
      c += p[i + 2];
      d += p[i + 3];
    }
    a += b + c + d;
    for (int i = 0; i < 8; i++) sums[t] += a[i];
  };
  in_team(threads, nullptr, [&](const Team& team) {
    team.in_turn(threads < 256 ? threads : 256, body);
    return 0;
  });
  int64_t total = 0;
  for (int64_t each : sums) total += each;
  return total;
}
