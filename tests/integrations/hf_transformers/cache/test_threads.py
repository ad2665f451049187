"""One attached model in several threads: right, or the second thread is told."""

import sys
import threading

import pytest
import torch

import quantpage
from quantpage.cpu_core.decoder import Decoder
from quantpage.errors import CacheError
from quantpage.integrations.hf_transformers.cache.paged_cache import QuantPageCache
from quantpage.integrations.hf_transformers.cache.paged_layer import PagedLayer
from tests.integrations.tiny_models import tiny, tokens

pytestmark = pytest.mark.cpu
PAGE = 16


@pytest.fixture
def switching():
    """Threads take turns after a few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(*acts):
    """What each act returned or raised."""
    found = [None] * len(acts)

    def work(at):
        try:
            found[at] = acts[at]()
        except Exception as error:  # noqa: BLE001 (a thread has nobody to raise to)
            found[at] = error

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(acts))]
    [each.start() for each in threads]
    [each.join() for each in threads]
    return found


def answer(model, ids, **given):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
        eos_token_id=None, pad_token_id=0, **given,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", [None, "torch"])
def test_caches_of_their_own(implementation, switching):
    model, prompts = tiny("llama", torch.float32), [tokens(1, 9 + 7 * i, i) for i in range(4)]
    with quantpage.attach(model, "int8", page_size=PAGE, implementation=implementation):
        alone = [answer(model, each) for each in prompts]
        for _ in range(3):
            found = in_threads(*[lambda each=each: answer(model, each) for each in prompts])
            for got, wanted in zip(found, alone, strict=True):
                assert torch.equal(got, wanted)


def test_caches_that_share_pages_while_they_grow(switching):
    model, system = tiny("llama", torch.float32), tokens(1, 4 * PAGE)
    prompts = [torch.cat([system, tokens(1, 5 + 9 * i, i)], 1) for i in range(4)]
    with quantpage.attach(model, "int4", page_size=PAGE) as attached:
        alone = [answer(model, each) for each in prompts]
        for _ in range(3):
            known = attached.prompts()
            known.learn(system)

            def turn(ids, known=known):
                return answer(model, ids, past_key_values=known.new_cache(ids))

            found = in_threads(*[lambda each=each: turn(each) for each in prompts])
            for got, wanted in zip(found, alone, strict=True):
                assert torch.equal(got, wanted)
            for _, each in known._known.items():
                each.check()
                each.clear()
            assert known._memory.used_bytes() == 0, "a page leaked"


@pytest.mark.parametrize("place", [Decoder, PagedLayer])
def test_another_cache_in_the_middle_of_a_step(place, monkeypatch):
    """Deterministic: the other thread's whole step runs right after a part of ours."""
    model = tiny("llama", torch.float32)
    first, second = tokens(1, 30, 1), tokens(1, 50, 2)
    implementation = None if place is Decoder else "torch"
    name = "__call__" if place is Decoder else "_attend"
    with (
        quantpage.attach(model, "int8", page_size=PAGE, implementation=implementation) as attached,
        torch.inference_mode(),
    ):
        wanted = [model(ids).logits[:, -1] for ids in (first, second)]

        def prepared(ids):
            cache = attached.new_cache()
            model(ids[:, :-1], past_key_values=cache)
            return cache

        def last(ids, cache):
            with torch.inference_mode():
                return model(ids[:, -1:], past_key_values=cache).logits[:, -1]

        ours, theirs = prepared(first), prepared(second)
        real, found = getattr(place, name), []

        def interleaved(*args, **kwargs):
            out = real(*args, **kwargs)
            if not found:
                found.append(None)
                found.extend(in_threads(lambda: last(second, theirs), lambda: last(first, ours)))
            return out

        monkeypatch.setattr(place, name, interleaved)
        got = last(first, ours)
    torch.testing.assert_close(got, wanted[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1], wanted[1], rtol=0, atol=1e-4)
    assert isinstance(found[2], CacheError)
    assert "expected one thread at a time to use it, got a second one" in str(found[2])


def test_detaching_waits_for_the_forwards_of_others():
    model, ids = tiny("llama", torch.float32), tokens(1, 20)
    attached = quantpage.attach(model, "int8", page_size=PAGE)
    with torch.inference_mode():
        inside, go = threading.Event(), threading.Event()

        def wait(*_):
            inside.set()
            go.wait(10)

        hook = model.model.layers[1].register_forward_hook(wait)
        go.set()
        wanted = model(ids).logits
        inside.clear()
        go.clear()

        def forward():
            with torch.inference_mode():
                return model(ids).logits

        def detach():
            inside.wait(10)
            timer = threading.Timer(0.1, go.set)
            timer.start()
            attached.detach()
            timer.join()
            return go.is_set()

        got, waited = in_threads(forward, detach)
        hook.remove()
        torch.testing.assert_close(got, wanted)
        assert waited is True
        assert "forward" not in vars(model) and "forward" not in vars(model.model)
        assert not isinstance(model(ids).past_key_values, QuantPageCache)


def test_detaching_inside_of_a_forward_is_refused():
    model, ids = tiny("llama", torch.float32), tokens(1, 20)
    with quantpage.attach(model, "int8", page_size=PAGE) as attached:
        hook = model.model.layers[1].register_forward_hook(lambda *_: attached.detach())
        with pytest.raises(CacheError, match="detach: expected to be called when no forward"):
            model(ids)
        hook.remove()
        model(ids)


def test_attached_once_by_two_threads(switching):
    for _ in range(5):
        model = tiny("llama", torch.float32)
        found = in_threads(*[lambda model=model: quantpage.attach(model)] * 2)
        errors = [each for each in found if isinstance(each, ValueError)]
        assert len(errors) == 1 and "not attached yet" in str(errors[0]), found
        next(each for each in found if each not in errors).detach()
        assert model.config._attn_implementation == "eager"
