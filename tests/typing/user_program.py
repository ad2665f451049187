"""A program of a user, for the type checker alone: mypy reads it strictly and lets no expression be
Any (pyproject.toml). tests/typing/test_user_program.py breaks it and asks whether mypy notices.
"""

from typing import assert_type

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedTokenizerBase

import quantpage
from quantpage import cache, masks
from quantpage.engine import Engine, Limits, Piece, Request, Sampling, Stats, Ticket
from quantpage.errors import QuantPageError
from quantpage.formats import CODES, Granularity, KVFormat, Quantized, QuantSpec, quantize
from quantpage.hardware import device_info
from quantpage.integrations.hf_transformers.sizes import cache_shape
from quantpage.ops.dispatch import Call


def whole_model(model: nn.Module, ids: Tensor) -> int:
    own = KVFormat("own", QuantSpec(CODES["int8"], Granularity(group=32)), QuantSpec(CODES["int4"]))
    assert_type(quantpage.FORMATS["int8"], KVFormat)
    assert_type(quantpage.find_format("int8"), KVFormat)
    quantpage.attach(model, own, page_size=16, max_tokens=1000).detach()
    quantpage.attach(model, quantpage.LayerFormats.parse("int4,first2=int8")).detach()
    mask = masks.causal_document([3, 4])
    with quantpage.attach(model, "int8", backend="flash_mask", mask=mask) as attached:
        assert_type(attached, quantpage.Attached)
        assert_type(attached.coverage, quantpage.Coverage)
        kept = attached.new_cache()
        assert_type(kept, quantpage.QuantPageCache)
        assert_type(kept.fork(), quantpage.QuantPageCache)
        assert_type(kept.get_seq_length(), int)
        prompts = attached.prompts()
        assert_type(prompts, quantpage.Prompts)
        assert_type(prompts.learn(ids), int)
        assert_type(prompts.new_cache(ids), quantpage.QuantPageCache)
        attached.save_cache(kept, "conversation.pages")
        attached.load_cache("conversation.pages").crop(-1)
        return kept.used_bytes() + kept.allocated_bytes() + kept.unquantized_bytes()


def one_layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    layout = quantpage.CacheLayout(2, 64, quantpage.find_format("int8"), page_size=16)
    owner = quantpage.PagedKVCache(pages=8)
    owner.add_layer(0, layout)
    view = owner.layer(0)
    assert_type(view, quantpage.LayerKV)
    assert_type(view.key, quantpage.QuantizedPages)
    assert_type(view.key.codes, Tensor)
    request = cache.Sequence(cache.PagePool(8), page_size=16)
    owner.copy_pages(request.reserve(5))
    batch = quantpage.plan_batch([5], [5], [request.pages], page_size=16)
    assert_type(batch, quantpage.BatchPlan)
    assert_type(batch.query_lens, tuple[int, ...])
    table = quantpage.rope_table(4096, 64)
    write = quantpage.WriteParams(rope=table, checked=True)
    attend = quantpage.AttendParams(0.125, mask=quantpage.CausalMask(window=128))
    assert_type(quantize(k, layout.format.key), Quantized)
    call = Call(
        device_info("cpu"),
        layout.format,
        q.dtype,
        4,
        2,
        head_dim=64,
        value_head_dim=64,
        page_size=16,
    )
    backend = quantpage.find_backend("flash")
    layer = quantpage.build_attention(backend, quantpage.CausalMask(128), call)
    attended = layer(q, k, v, view, batch, write, attend)
    assert_type(attended, quantpage.Attended)
    request.commit()
    return attended.out


def batches(attached: quantpage.Attached, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    said: list[str] = []

    def take(piece: Piece) -> None:
        said.append(piece.text)

    with Engine(attached, tokenizer, Limits(pages=64)) as engine:
        wanted = Request((1, 2, 3), max_tokens=8, sampling=Sampling(temperature=0))
        assert_type(engine.submit(wanted, take), Ticket)
        assert_type(engine.stats(), Stats)
    return said


def beforehand() -> int:
    shape = cache_shape(LlamaConfig(), tp=2)
    try:
        plans = shape.layers(quantpage.LayerFormats.parse("int8"), page_size=64)
    except QuantPageError:
        return 0
    assert_type(shape.dtype, torch.dtype)
    return len(plans)
