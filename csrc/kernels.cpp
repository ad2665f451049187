// One instruction set's attention. Compiled once a set, -DVW=<float lanes> -DSUFFIX=<name>.
#include <initializer_list>

#include "attend_finish.h"
#include "attend_item.h"

namespace CONCAT(isa_, SUFFIX) {

// In rows.cpp, which is compiled without fused multiply-adds.
void dequantize(const Pages*, int64_t, const uint8_t*, const uint8_t*, const uint8_t*, int64_t, uint8_t*,
                int64_t, int64_t);
void write_token(const Write*, int64_t);

static const Kernels kernels = {attend_items, join, finish, dequantize, write_token};

}  // namespace

extern "C" const Kernels* CONCAT(quantpage_kernels_, SUFFIX)() { return &CONCAT(isa_, SUFFIX)::kernels; }
