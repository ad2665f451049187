"""An engine of one layer."""

import torch

from quantpage.attention import build_attention, find_backend
from quantpage.batch import plan_batch
from quantpage.cache import CacheLayout, PagedKVCache, PagePool, Sequence
from quantpage.formats import FORMATS
from quantpage.hardware import device_info
from quantpage.masks import CausalMask
from quantpage.ops.attend import AttendParams
from quantpage.ops.dispatch import Call
from quantpage.ops.rope_write import WriteParams
from quantpage.rope import rope_table
from tests.tolerances import attention_atol

PAGE, WIDTH, TOKENS = 16, 32, 75


class Engine:
    """One layer, one pool, requests that bring prompts of the same random numbers."""

    def __init__(self, name: str):
        layout = CacheLayout(2, WIDTH, FORMATS[name], PAGE, torch.float32)
        self.cache = PagedKVCache(40, 40)
        self.cache.add_layer(0, layout)
        self.pool, self.exact_pool = PagePool(40), None
        if layout.format.exact_pages is not None:
            self.exact_pool = PagePool(40)
        call = Call(device_info("cpu"), layout.format, torch.float32, 4, 2, WIDTH, WIDTH, PAGE)
        self.layer = build_attention(find_backend("flash"), CausalMask(), call)
        noise = torch.Generator().manual_seed(1)
        self.q, self.k, self.v = (
            torch.randn(TOKENS, heads, WIDTH, generator=noise) for heads in (4, 2, 2)
        )
        self.rope = rope_table(128, WIDTH)

    def request(self) -> Sequence:
        return Sequence(self.pool, PAGE, self.exact_pool)

    def step(self, sequence: Sequence, tokens: int) -> torch.Tensor:
        """The next ``tokens`` of the prompt through the layer."""
        first = sequence.length
        rows = slice(first, first + tokens)
        self.cache.copy_pages(sequence.reserve(tokens))
        exact = [sequence.exact_pages] if self.exact_pool is not None else None
        batch = plan_batch([tokens], [first + tokens], [sequence.pages], PAGE, exact_tables=exact)
        done = self.layer(
            *(x[rows] for x in (self.q, self.k, self.v)),
            self.cache.layer(0),
            batch,
            WriteParams(rope=self.rope),
            AttendParams(WIDTH**-0.5),
        )
        sequence.commit()
        return done.out


def close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=attention_atol(WIDTH, TOKENS), rtol=0)
