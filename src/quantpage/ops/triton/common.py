"""What kernels of every op say alike: code kinds, owners of scales, changes of a logarithm's base.

The numbers are those of ops/operand, which hosts give to kernels. Gluon kernels read them too.
"""

import math

import triton.language as tl

from quantpage.ops import operand

LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
"""exp(x) is exp2(LOG2E * x)."""
LN2: tl.constexpr = tl.constexpr(math.log(2.0))

NONE: tl.constexpr = tl.constexpr(operand.CODE_KINDS["none"])
INT8: tl.constexpr = tl.constexpr(operand.CODE_KINDS["int8"])
FP8: tl.constexpr = tl.constexpr(operand.CODE_KINDS["fp8"])
INT4: tl.constexpr = tl.constexpr(operand.CODE_KINDS["int4"])

NO_SCALES: tl.constexpr = tl.constexpr(operand.NO_SCALES)
A_TOKEN: tl.constexpr = tl.constexpr(operand.A_TOKEN)
STATIC: tl.constexpr = tl.constexpr(operand.STATIC)
SEVERAL: tl.constexpr = tl.constexpr(operand.SEVERAL)
