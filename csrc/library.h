// Which kernels this machine can run.
#pragma once
#include "item.h"

// isa: 0 baseline, 1 AVX2, 2 AVX-512 with VNNI; null where the machine or the build has none.
const Kernels* find_kernels(int64_t isa);
