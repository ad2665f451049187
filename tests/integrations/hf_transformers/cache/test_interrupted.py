"""Whatever is raised wherever: a cache is as it was before, or says that it is spent."""

import random
import warnings

import pytest
import torch
import transformers as tf

import quantpage
from quantpage.errors import CacheError, PartlyPaged
from tests.integrations.tiny_models import COMMON, tiny, tokens
from tests.interrupted import run

pytestmark = pytest.mark.cpu
PAGE, PROMPT = 16, 40
# The compiled core in one call, block by block, a long step, and torch.
CASES = {
    "core": ("int8", torch.float32, None, 12),
    "core, exact pages": ("int4", torch.float32, None, 1),
    "long step": ("int4", torch.float32, None, 60),
    "torch": ("int8", torch.float64, "torch", 12),
}


@pytest.fixture(params=CASES)
def case(request):
    kv_format, dtype, implementation, new = CASES[request.param]
    model = tiny("llama", dtype)
    with (
        quantpage.attach(
            model, kv_format, page_size=PAGE, implementation=implementation
        ) as attached,
        torch.inference_mode(),
    ):
        yield attached, tokens(2, PROMPT + new + 1)


def padding(ids, length):
    mask = torch.ones(ids.shape[0], length, dtype=torch.long)
    mask[1, :7] = 0
    return mask


def advance(attached, cache, ids, end):
    """Logits of the tokens from where the cache ends to ``end``; row 1 is padded."""
    given = ids[:, cache.get_seq_length() : end]
    return attached.model(given, attention_mask=padding(ids, end), past_key_values=cache).logits


def begun(attached, ids):
    cache = attached.new_cache()
    advance(attached, cache, ids, PROMPT)
    return cache


def places(count, act, prepare):
    """``count`` places among the instructions of ``act``, the first and the last among them."""
    state = prepare()
    total = run(lambda: act(state))[0]
    draw = random.Random(total)
    return [1, 2, total, total - 1, *(draw.randrange(1, total + 1) for _ in range(count))]


def test_a_step(case):
    attached, ids = case
    end = ids.shape[1] - 1
    cache = begun(attached, ids)
    wanted = advance(attached, cache, ids, end), advance(attached, cache, ids, end + 1)
    cache.flush()
    held = cache.used_bytes()
    found = {"before": 0, "after": 0}
    for at in places(
        14, lambda cache: advance(attached, cache, ids, end), lambda: begun(attached, ids)
    ):
        cache = begun(attached, ids)
        assert run(lambda cache=cache: advance(attached, cache, ids, end), at)[1]
        if cache.get_seq_length() == PROMPT:
            found["before"] += 1
            torch.testing.assert_close(
                advance(attached, cache, ids, end), wanted[0], rtol=0, atol=0
            )
        else:
            assert cache.get_seq_length() == end
            found["after"] += 1
        torch.testing.assert_close(
            advance(attached, cache, ids, end + 1), wanted[1], rtol=0, atol=0
        )
        cache.flush()
        assert cache.used_bytes() == held == cache.rows.memory.used_bytes(), "a page leaked"
    assert found["before"] > 8 and found["after"] >= 1


def test_what_is_done_between_steps(case):
    attached, ids = case
    cache = begun(attached, ids)
    end = ids.shape[1]
    for name, act in {
        "crop": lambda cache: cache.crop(PROMPT - 3),
        "reorder": lambda cache: cache.reorder_cache(torch.tensor([0, 0])),
        "select": lambda cache: cache.batch_select_indices(torch.tensor([0])),
        "repeat": lambda cache: cache.batch_repeat_interleave(2),
        "fork": lambda cache: cache.fork(),
        "reset": lambda cache: cache.reset(),
        "flush": lambda cache: cache.flush(),
    }.items():
        for at in places(3, act, lambda: begun(attached, ids)):
            cache = begun(attached, ids)
            run(lambda cache=cache, act=act: act(cache), at)
            rows, length = cache.rows.count, cache.get_seq_length()
            states = {
                "crop": {(2, PROMPT), (2, PROMPT - 3)},
                "select": {(2, PROMPT), (1, PROMPT)},
                "repeat": {(2, PROMPT), (4, PROMPT)},
                "reset": {(2, PROMPT), (0, 0)},
            }.get(name, {(2, PROMPT)})
            assert (rows, length) in states, name
            if rows == 2 and name != "reorder":
                fresh = attached.new_cache()
                advance(attached, fresh, ids, length)
                got, wanted = (advance(attached, each, ids, end) for each in (cache, fresh))
                torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
            for pool in (shelf.pool for shelf in cache.rows.memory.shelves.values()):
                pool.check()
            cache.reset()
            assert cache.rows.memory.used_bytes() == 0, f"{name}: a page leaked"


def test_pages_shared_by_prompts(case):
    attached, ids = case
    ids = ids[:1]
    wanted = attached.model(ids).logits[:, -1]
    prompts = attached.prompts()

    def turn(_=None):
        prompts.learn(ids[:, :PROMPT])
        cache = prompts.new_cache(ids)
        logits = attached.model(ids[:, cache.get_seq_length() :], past_key_values=cache).logits
        prompts.remember(ids, cache)
        return logits[:, -1]

    for at in places(8, turn, lambda: None):
        prompts = attached.prompts()
        run(turn, at)
        torch.testing.assert_close(turn(), wanted, rtol=0, atol=1e-4)
        next(iter(dict(prompts._known.items()).values())).check()
        for _, known in prompts._known.items():
            known.clear()
        assert prompts._memory.used_bytes() == 0, "a page leaked"


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, RuntimeError])
def test_an_error_of_the_model_itself(error):
    model = tiny("llama")
    ids = tokens(1, 60)

    def fails(*_):
        raise error

    with quantpage.attach(model, "int8", page_size=PAGE) as attached:
        cache = attached.new_cache()
        model(ids[:, :PROMPT], past_key_values=cache)
        wanted = model(ids).logits[:, PROMPT:]
        for module in (model.model.layers[1].mlp, model.model.layers[0], model.lm_head):
            hook = module.register_forward_hook(fails)
            with pytest.raises(error):
                model(ids[:, PROMPT:], past_key_values=cache)
            hook.remove()
            assert cache.get_seq_length() == PROMPT
        got = model(ids[:, PROMPT:], past_key_values=cache).logits
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
        assert model(ids).past_key_values is not None, "the next forward is given a cache"


def test_state_that_is_not_in_pages_is_spent_until_it_is_reset():
    config = tf.Qwen3NextConfig(
        **COMMON, head_dim=32, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    ids = tokens(1, 30)

    def fails(*_):
        raise MemoryError

    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", PartlyPaged)
        with quantpage.attach(model, page_size=PAGE) as attached:
            cache = attached.new_cache()
            wanted = model(ids, past_key_values=cache).logits
            hook = model.lm_head.register_forward_hook(fails)
            with pytest.raises(MemoryError):
                model(ids[:, :1], past_key_values=cache)
            hook.remove()
            for act in (
                lambda: model(ids[:, :1], past_key_values=cache),
                lambda: cache.crop(3),
                cache.fork,
            ):
                with pytest.raises(CacheError, match="cache: spent, as a step was interrupted"):
                    act()
            cache.reset()
            torch.testing.assert_close(model(ids, past_key_values=cache).logits, wanted)


def test_after_a_reset_there_may_be_other_rows():
    model = tiny("llama", torch.float32)
    with quantpage.attach(model, "int8", page_size=PAGE) as attached, torch.inference_mode():
        cache = attached.new_cache()
        for rows, length in ((2, 30), (1, 5), (3, 30), (2, 1)):
            ids = tokens(rows, length)
            got = model(ids, past_key_values=cache).logits
            torch.testing.assert_close(got, model(ids).logits)
            with pytest.raises(ValueError, match=f"expected {rows} rows, as the cache holds"):
                model(tokens(rows + 1, 2), past_key_values=cache)
            assert cache.get_seq_length() == length
            cache.reset()
