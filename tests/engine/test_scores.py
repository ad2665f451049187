"""Log-probabilities of prompts: what the model gives their tokens, however they are computed."""

from dataclasses import replace

import pytest
import torch

import quantpage
from quantpage.engine import Limits, Request, Sampling, scores, step
from quantpage.engine.scores import score
from tests.engine.asked import Asked, ask_all, engine
from tests.engine.test_engine import leaked, requests
from tests.integrations.tiny_models import tiny

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1 << 20, 300, 1])
def test_tokens_of_rows(dtype, at_once, monkeypatch):
    monkeypatch.setattr(scores, "_ON_CPU", at_once)
    logits = torch.randn(7, 100, generator=torch.Generator().manual_seed(1)).to(dtype)
    tokens = [int(row.topk(at + 1).indices[at]) for at, row in enumerate(logits.float())]
    told = score(logits, tokens, 3)
    expected = logits.float().log_softmax(-1)
    assert [each.token for each in told] == tokens
    assert [each.logprob for each in told] == [
        float(row[token]) for row, token in zip(expected, tokens, strict=True)
    ]
    # Equals have one rank, and in 16 bits there are some.
    assert [each.rank for each in told] == [
        1 + int((row > row[token]).sum()) for row, token in zip(expected, tokens, strict=True)
    ]
    assert told[0].top[0] == (told[0].token, told[0].logprob)
    for each, row in zip(told, expected, strict=True):
        assert [number for _, number in each.top] == row.topk(3).values.tolist()
    assert score(logits, tokens, 0)[0].top == ()


def test_logits_that_are_no_numbers_are_told():
    for wrong in (torch.nan, torch.inf):
        logits = torch.zeros(2, 4)
        logits[1, 2] = wrong
        with pytest.raises(RuntimeError, match="logits: expected finite numbers"):
            score(logits, [0, 0], 1)
    # A token that cannot be is as unlikely as that.
    assert score(torch.tensor([[0.0, -torch.inf]]), [1], 0)[0].logprob == -torch.inf


def own(model, prompts, kv_format, device="cpu"):
    """What the model gives the tokens of each prompt, whole, over pages of that format."""
    told = {}
    with quantpage.attach(model, kv_format, page_size=16), torch.no_grad():
        for each in prompts:
            out = model(torch.tensor([each], device=device), use_cache=True)
            told[each] = out.logits[0, :-1].float().log_softmax(-1).cpu()
    return told


def check(asked, told, within):
    """What was said of a prompt is what the model gives; its likeliest are the model's, or as
    likely."""
    expected = told[asked.prompt_of]
    assert [each.token for each in asked.prompt] == list(asked.prompt_of[1:])
    for each, row in zip(asked.prompt, expected, strict=True):
        assert each.logprob == pytest.approx(float(row[each.token]), abs=within)
        best = row.topk(2).values.tolist()
        assert [number for _, number in each.top] == pytest.approx(best, abs=within)
        assert [float(row[token]) for token, _ in each.top] == pytest.approx(best, abs=within)
        higher, as_high = (int((row > each.logprob + by).sum()) for by in (within, -within))
        assert higher < each.rank <= as_high


def scored(engine, wanted):
    """The requests answered, each with its prompt beside it."""
    asked = ask_all(engine, wanted)
    for each, request in zip(asked, wanted, strict=True):
        each.prompt_of = request.prompt
    return asked


CASES = [
    ("llama", "none"),
    ("llama", "int8"),
    ("llama", "int4"),
    ("qwen2_bias", "int8"),
    ("gemma3_window", "int4"),
]


def wanted_of(count):
    """Prompts that share beginnings, one in three asked without an answer."""
    return [
        replace(each, prompt_logprobs=2, max_tokens=0 if at % 3 == 1 else each.max_tokens)
        for at, each in enumerate(requests(count, longest=90, made=40))
    ] + [Request((5, 9), 4, Sampling(seed=1), prompt_logprobs=2)]


@pytest.mark.parametrize(("name", "kv_format"), CASES)
def test_prompts_have_the_models_own_numbers(name, kv_format, monkeypatch):
    """In chunks, beside others, and with known beginnings."""
    # Of seven tokens of a prompt a step may tell.
    monkeypatch.setattr(step, "_LOGITS", 7 * 128)
    model, wanted = tiny(name, torch.float32), wanted_of(12)
    told = own(model, {each.prompt for each in wanted}, kv_format)
    plain = [replace(each, prompt_logprobs=None) for each in wanted]
    with engine(kv_format, model=model) as wide:
        texts = [each.texts for each in ask_all(wide, plain)]
        # All prompts are known now, and are computed again.
        known = scored(wide, wanted)
        assert leaked(wide) == 0
    assert [each.texts for each in known] == texts
    for each in known:
        assert set(each.reasons) == {"length"} and each.cached == 0
        check(each, told, 1e-4)


@pytest.mark.parametrize(("kv_format", "prefix_cache"), [("none", True), ("int4", False)])
def test_a_prompt_that_gave_way_is_told_once(kv_format, prefix_cache, monkeypatch):
    monkeypatch.setattr(step, "_LOGITS", 3 * 128)
    model = tiny("llama", torch.float32)
    # While the prompt is told, three tokens a step, the answers before it outgrow the pages.
    before, prompt = [Request((5,) * 20, 60)] * 2, tuple(range(3, 128))
    limits = Limits(pages=15, max_running=4, step_tokens=64, promised_share=0)
    with engine(kv_format, limits, model, prefix_cache=prefix_cache) as small:
        scheduler, told = small._scheduler, []
        preempt = scheduler._preempt
        monkeypatch.setattr(
            scheduler, "_preempt", lambda each: (told.append(each.scored), preempt(each))
        )
        *rest, asked = ask_all(small, [*before, Request(prompt, 4, prompt_logprobs=2)])
    assert 16 < told[0] < len(prompt) - 1
    assert [each.reasons for each in (*rest, asked)] == [["length"]] * 3
    asked.prompt_of = prompt
    check(asked, own(model, [prompt], kv_format), 1e-4)


def test_a_format_moves_them_little():
    model, wanted = tiny("llama", torch.float32), wanted_of(6)
    with torch.no_grad():
        plain = {
            each.prompt: model(torch.tensor([each.prompt])).logits[0, :-1].log_softmax(-1)
            for each in wanted
        }
    apart = {}
    for kv_format in ("none", "int8", "int3"):
        with engine(kv_format, model=model) as one:
            asked = scored(one, wanted)
        gaps = [
            abs(each.logprob - float(row[each.token]))
            for one in asked
            for each, row in zip(one.prompt, plain[one.prompt_of], strict=True)
        ]
        apart[kv_format] = sum(gaps) / len(gaps)
    # Nats a token, of a random model whose logits are range over 15.
    assert apart["none"] < 1e-5 < apart["int8"] < 0.1 < apart["int3"] < 1, apart


def test_a_prompt_whose_numbers_fail_takes_its_own_answers_and_no_other(monkeypatch):
    wanted = wanted_of(3)
    with engine() as one:
        before = Asked(one, replace(wanted[2], prompt_logprobs=None)).wait()

        def fail(*_):
            raise RuntimeError("no numbers")

        monkeypatch.setattr("quantpage.engine.loop.score", fail)
        lost = Asked(one, replace(wanted[0], answers=3))
        beside = Asked(one, replace(wanted[2], prompt_logprobs=None)).wait()
        assert lost.wait().reasons == ["error"] * 3
        assert "no numbers" in str(lost.errors[0])
        assert beside.texts == before.texts
        assert leaked(one) == 0


def test_a_prompt_may_be_all_that_is_asked():
    with engine() as one:
        (asked,) = ask_all(one, [Request((5,) * 40, 0, answers=2)])
        assert (asked.texts, asked.reasons, asked.prompt) == (["", ""], ["length"] * 2, [])
        # It is known from then on, as any prompt.
        assert Asked(one, Request((5,) * 40, 1)).wait().cached == 32
        assert one.stats().made_tokens == 1
    with pytest.raises(ValueError, match="max_tokens: expected a whole number of at least 0"):
        Request((5,), -1)
    with pytest.raises(ValueError, match="prompt_logprobs: expected 0 to 20, got 21"):
        Request((5,), 1, prompt_logprobs=21)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "kv_format"), CASES[:3])
def test_prompts_on_a_gpu_have_the_models_own_numbers(name, kv_format, monkeypatch):
    """Beside answers whose steps are CUDA graphs, and of two tokens, which are a graph too."""
    monkeypatch.setattr(scores, "_ELSEWHERE", 5 * 128)
    model, wanted = tiny(name, torch.float16).cuda(), wanted_of(6)
    told = own(model, {each.prompt for each in wanted}, kv_format, "cuda")
    with engine(kv_format, model=model) as one:
        for asked in (scored(one, wanted), scored(one, wanted[-1:])):
            for each in asked:
                # Rounded to 16 bits, and codes that this moves; another row's are nats apart.
                check(each, told, 0.1)
        assert one._runner.graphs.replays > 0
