"""Who owns memory: layouts, pages, pools, sequences."""

from quantpage.cache.known import KnownPages
from quantpage.cache.layout import PAGE_SIZES, CacheLayout
from quantpage.cache.paged import HostPages, PagedKVCache
from quantpage.cache.pool import PagePool
from quantpage.cache.prefix import PrefixCache, RememberedPage, prefix_seed
from quantpage.cache.reach import EVERYTHING, Reach
from quantpage.cache.sequence import PageCopy, Prefix, Sequence
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.cache.working import Working, find_working

__all__ = [
    "EVERYTHING",
    "PAGE_SIZES",
    "CacheLayout",
    "HostPages",
    "KnownPages",
    "LayerKV",
    "PageCopy",
    "PagePool",
    "PagedKVCache",
    "Prefix",
    "PrefixCache",
    "QuantizedPages",
    "Reach",
    "RememberedPage",
    "Sequence",
    "Working",
    "find_working",
    "prefix_seed",
]
