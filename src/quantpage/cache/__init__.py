"""Who owns memory: layouts, pages, pools, sequences."""

from quantpage.cache.layout import PAGE_SIZES, CacheLayout
from quantpage.cache.paged import HostPages, PagedKVCache
from quantpage.cache.pool import PagePool
from quantpage.cache.prefix import PrefixCache, prefix_seed
from quantpage.cache.sequence import PageCopy, Prefix, Sequence
from quantpage.cache.views import LayerKV, QuantizedPages

__all__ = [
    "PAGE_SIZES",
    "CacheLayout",
    "HostPages",
    "LayerKV",
    "PageCopy",
    "PagePool",
    "PagedKVCache",
    "Prefix",
    "PrefixCache",
    "QuantizedPages",
    "Sequence",
    "prefix_seed",
]
