"""Work items as kernels read them: which column of a table's row is what, the first four alike.

Gluon kernels use these too.
"""

from quantpage.ops.triton.common import Constant

TOKEN = Constant(0)
"""Row of the request's first new token."""
NEW = Constant(1)
"""New tokens of the request."""
POSITION = Constant(2)
"""Of the first of them."""
ROW = Constant(3)
"""First packed row (a token and a query head of the group)."""
