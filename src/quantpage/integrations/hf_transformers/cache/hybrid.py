"""Layers that keep a recurrent state beside their keys and values (Falcon-H1, Zamba 2).

Keys and values go into pages as in any layer; the state stays what Transformers makes of it.
"""

from copy import deepcopy
from typing import Any

from transformers import cache_utils
from transformers.cache_utils import LinearAttentionLayer

from quantpage.cache import Reach
from quantpage.formats import KVFormat
from quantpage.integrations.hf_transformers.cache.paged_layer import CacheOptions, PagedLayer
from quantpage.integrations.hf_transformers.pages.rows import Rows

HYBRID = tuple(
    getattr(cache_utils, name)
    for name in (
        "LinearAttentionAndFullAttentionLayer",
        "LinearAttentionAndSlidingWindowAttentionLayer",
    )
    # The second came with Transformers 5.14.
    if hasattr(cache_utils, name)
)
"""Transformers' layers of this kind."""


class PagedHybridLayer(LinearAttentionLayer, PagedLayer):  # type: ignore[misc, override]
    """Pages for keys and values; what is called of a row or of the past concerns the state alone,
    as the cache does the same for the pages of all layers at once."""

    is_compileable = False

    def __init__(
        self,
        stock: Any,
        index: int,
        reach: Reach,
        kv_format: KVFormat,
        options: CacheOptions,
        rows: Rows,
    ) -> None:
        PagedLayer.__init__(self, index, reach, kv_format, options, rows)
        states = getattr(stock, "number_of_states", None)
        given = {} if states is None else {"number_of_states": states}
        LinearAttentionLayer.__init__(self, **given)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of pages where keys and values come, of the state where that does."""
        if len(args) == 2:
            PagedLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Forget everything."""
        LinearAttentionLayer.reset(self)
        PagedLayer.reset(self)

    def fork(self, rows: Rows) -> "PagedHybridLayer":
        """The same layer over other rows, with a copy of the state."""
        made: Any = super().fork(rows)
        for name in vars(LinearAttentionLayer()):
            setattr(made, name, deepcopy(getattr(made, name)))
        return made
