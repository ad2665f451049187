"""Pages to dense rows in the compiled core; what it rounds, it rounds once, from float32."""

import torch

from quantpage.cache.views import QuantizedPages
from quantpage.cpu_core import core
from quantpage.cpu_core.interface import GATHER
from quantpage.cpu_core.records import CODES, float32_statics, pages_fields
from quantpage.ops.checks import gathers
from quantpage.ops.rows import Cached, PageTable


@gathers("cpu")
def gather_request(
    pages: QuantizedPages,
    page_table: PageTable,
    context_len: int,
    dtype: torch.dtype,
    isa: int | None = None,
) -> Cached:
    """One request's cached rows, dequantized, in the basis of the cache."""
    library = core()
    pages = float32_statics(pages)
    page_table = page_table.to(torch.int32).contiguous()
    work = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
    out = torch.empty(context_len, pages.kv_heads, pages.head_dim, dtype=work, device="cpu")
    record = GATHER.pack(
        pages=pages_fields(pages),
        page_table=page_table.data_ptr(),
        out=out.data_ptr(),
        out_type=CODES[work],
        context=context_len,
        kv_heads=pages.kv_heads,
        page_size=pages.page_size,
        threads=torch.get_num_threads(),
        isa=library.isa if isa is None else isa,
    )
    if library.gather(record):
        raise RuntimeError(f"isa: expected one that this machine runs, got {isa}")
    return out.to(dtype)
