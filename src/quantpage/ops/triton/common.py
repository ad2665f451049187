"""What kernels of every op say alike: code kinds, owners of scales, changes of a logarithm's base.

The numbers are those of ops/operand, which hosts give to kernels. Gluon kernels read them too.
"""

import math
from typing import Any

import triton
import triton.language as tl

from quantpage.ops import operand


class Constant(tl.constexpr):
    """A constant that kernels read from their module.

    Before every launch Triton compares each with a copy of what it was when the kernel was
    compiled. Two ``constexpr`` take long enough for that to show in a launch of twenty constants;
    these are their own copies, and the same object needs no comparison.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> "Constant":
        return self

    def __ne__(self, other: Any) -> Any:
        return False if other is self else super().__ne__(other)


INTERPRETED = Constant(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, which knows no inline assembly."""

LOG2E = Constant(math.log2(math.e))
"""exp(x) is exp2(LOG2E * x)."""
LN2 = Constant(math.log(2.0))

NONE = Constant(operand.CODE_KINDS["none"])
INT8 = Constant(operand.CODE_KINDS["int8"])
FP8 = Constant(operand.CODE_KINDS["fp8"])
INT4 = Constant(operand.CODE_KINDS["int4"])
INT6 = Constant(operand.CODE_KINDS["int6"])
INT3 = Constant(operand.CODE_KINDS["int3"])

NO_SCALES = Constant(operand.NO_SCALES)
A_TOKEN = Constant(operand.A_TOKEN)
STATIC = Constant(operand.STATIC)
SEVERAL = Constant(operand.SEVERAL)
