"""A layer over cells as vLLM would hold them, and the parts of its steps."""

import pytest
import torch
from torch import Tensor

from quantpage.attention import LayerAttention, build_attention, find_backend
from quantpage.batch import BatchPlan, ExactPlan, derive
from quantpage.cache import CacheLayout, LayerKV
from quantpage.cache.cells import cell_bytes, exact_cell_bytes, layer_of_cells
from quantpage.formats import find_format
from quantpage.hardware import device_info
from quantpage.integrations.vllm_plugin.parts import Part
from quantpage.masks import CausalMask
from quantpage.ops.attend import AttendParams
from quantpage.ops.dispatch import Call
from quantpage.ops.rope_write import WriteParams

PAGE, HEADS, WIDTH = 16, 2, 64
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = [pytest.param("cpu", marks=pytest.mark.cpu), pytest.param("cuda", marks=ON_GPU)]
PARAMS = AttendParams(WIDTH**-0.5)


class Layer:
    """A layer over cells as vLLM would hold them: page 0 is nobody's."""

    def __init__(self, pages: int, device: str, name: str = "k8v4") -> None:
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        form = find_format(name)
        self.layout = CacheLayout(HEADS, WIDTH, form, PAGE, self.dtype)
        codes = torch.zeros(pages, HEADS, cell_bytes(self.layout), dtype=torch.uint8, device=device)
        # Bytes that are NaN as numbers of any kind.
        width = exact_cell_bytes(self.layout)
        self.pool = None
        if form.exact_pages is not None:
            self.pool = torch.full((pages, HEADS, width), 255, dtype=torch.uint8, device=device)
        self.view = layer_of_cells(codes, self.layout, None, self.pool)
        call = Call(
            device_info(device), form, self.dtype, 4, HEADS, WIDTH, WIDTH, PAGE
        )  # fmt: skip
        self.attention: LayerAttention = build_attention(find_backend("flash"), CausalMask(), call)

    def numbers(self, tokens: int) -> list[Tensor]:
        device = self.view.device
        return [
            torch.randn(tokens, heads, WIDTH, dtype=self.dtype, device=device)
            for heads in (4, HEADS, HEADS)
        ]

    def write(self, plan: BatchPlan, given, view: LayerKV) -> Tensor:
        written = self.attention.write_step(*given, view, plan, WriteParams()).q
        assert written is not None
        return written

    def run(self, parts: list[Part], given) -> Tensor:
        """As QuantPageImpl does."""
        opened = [
            (None, self.view)
            if part.working is None
            else part.working.open(self.pool, self.view, self.layout)
            for part in parts
        ]
        queries = [
            self.write(part.plan, [each[part.rows] for each in given], view)
            for part, (_, view) in zip(parts, opened, strict=True)
        ]
        for part, (cells, _) in zip(parts, opened, strict=True):
            if part.working is not None:
                part.working.keep(cells, self.pool)
        for part, (cells, _) in zip(parts, opened, strict=True):
            if part.working is not None:
                part.working.bring(self.pool, cells)
        return torch.cat(
            [
                self.attention.attend_step(q, view, part.plan, PARAMS).out
                for q, part, (_, view) in zip(queries, parts, opened, strict=True)
            ]
        )

    def whole(self, plan: BatchPlan, given, params: AttendParams = PARAMS) -> Tensor:
        over = plan
        if self.pool is not None:
            over = derive(plan, exact=ExactPlan(plan.page_table, plan.slots))
        return self.attention.attend_step(
            self.write(over, given, self.view), self.view, over, params
        ).out
