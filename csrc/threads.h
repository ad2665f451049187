// Loops over threads. OpenMP where the compiler has it (torch's own runtime, loaded before us).
#pragma once
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

template <class Body> void parallel(int64_t count, int64_t threads, int64_t step, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && count > step && !omp_in_parallel()) {
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)threads)
    for (int64_t i = 0; i < (count + step - 1) / step; i++)
      for (int64_t j = i * step; j < (i + 1) * step && j < count; j++) body(j);
    return;
  }
#endif
  for (int64_t i = 0; i < count; i++) body(i);
}
