"""Rows of tokens as ops take them and hand them back: each shape said once.

Over keys and values every width is head_dim or the values' own. Of a layer of latent rows queries
are as wide as both halves of its pages, and outputs as the row.
"""

from jaxtyping import Float, Int
from torch import Tensor

Queries = Float[Tensor, "tokens q_heads query_dim"]
Keys = Float[Tensor, "tokens kv_heads head_dim"]
Values = Float[Tensor, "tokens kv_heads value_dim"]
Outputs = Float[Tensor, "tokens q_heads out_dim"]
LogSumExps = Float[Tensor, "tokens q_heads"]
"""Natural ones."""

PageTable = Int[Tensor, " max_pages"]
"""Of one request."""
Cached = Float[Tensor, "context kv_heads head_dim"]
"""Keys or values of one request."""
