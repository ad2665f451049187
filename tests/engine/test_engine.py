"""Requests that share steps, pages and a small pool answer as each of them does alone."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    LlamaConfig,
    LlamaForCausalLM,
    RecurrentGemmaConfig,
    RobertaConfig,
)

from quantpage.engine import Limits, Request, Sampling
from quantpage.errors import EngineStopped, QueueFull, UnsupportedModel
from tests.engine.asked import Asked, ask_all, engine, leaked, requests
from tests.integrations.architectures import ARCHITECTURES
from tests.integrations.tiny_models import COMMON, tiny

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("name", "kv_format"),
    [
        ("llama", "none"),
        ("llama", "int8"),
        ("llama", "int4"),
        ("llama", "k8v4"),
        ("qwen2_bias", "int8"),
        ("qwen2_bias", "int4"),
        ("gemma3_window", "int8"),
        ("gemma3_window", "int4"),
        ("gpt_oss_sinks", "none"),
    ],
)
def test_crowded_answers_equal_those_alone(name, kv_format):
    model = tiny(name, torch.float32)
    asked = requests(12, longest=90, made=56)
    alone = []
    for each in asked[:3]:
        with engine(kv_format, model=model) as one:
            alone += ask_all(one, [each])
    with engine(kv_format, model=model) as crowd:
        crowded = ask_all(crowd, asked)
    # Pages for about a third of them, nothing promised beyond the prompts: answers are preempted.
    limits = Limits(pages=30, max_running=32, step_tokens=64, promised_share=0)
    with engine(kv_format, limits, model) as small:
        tight = ask_all(small, asked, cancel=(3, 7, 11))
        preempted = small.stats().preemptions
        assert leaked(small) == 0
    assert 0 < preempted <= sum(each.answers for each in asked)
    assert [each.texts for each in alone] == [each.texts for each in crowded[:3]]
    assert all(set(each.reasons) == {"length"} for each in crowded)
    for at, (wide, narrow) in enumerate(zip(crowded, tight, strict=True)):
        if at in (3, 7, 11):
            assert set(narrow.reasons) == {"cancelled"}
            assert wide.texts[0].startswith(narrow.texts[0])
        else:
            assert wide.texts == narrow.texts, at


def test_greedy_answers_are_the_models_own():
    model = tiny("llama", torch.float32)
    ids = torch.tensor([requests(2)[1].prompt])
    expected = model.generate(
        ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, ids.shape[1] :]
    with engine("none", model=model) as one:
        (got,) = ask_all(one, [requests(2)[1]])
    assert [ord(letter) - 0x100 for letter in got.texts[0]] == expected.tolist()


def test_a_known_prompt_is_found():
    first = requests(1)[0]
    with engine() as one:
        miss, hit = Asked(one, first).wait(), Asked(one, first).wait()
    assert miss.cached == 0
    assert hit.cached == (len(first.prompt) - 1) // 16 * 16 > 0
    assert miss.texts == hit.texts
    with engine(prefix_cache=False) as one:
        assert [Asked(one, first).wait().cached for _ in range(2)] == [0, 0]


def test_answers_of_one_request_share_its_prompt():
    request = Request(tuple(range(3, 103)), 8, Sampling(seed=1), answers=6)
    with engine() as one:
        asked = Asked(one, request).wait()
        stats = one.stats()
    assert len(set(asked.texts)) > 1
    assert stats.prompt_tokens == 100
    # The prompt once (two steps of 64 tokens), then one step a token.
    assert stats.steps <= 2 + 8


def test_stop_texts_and_tokens_end_an_answer():
    request = requests(2)[1]
    with engine() as one:
        whole = Asked(one, request).wait().texts[0]
        stop = Request(request.prompt, 20, request.sampling, stop=(whole[6:9], "never"))
        asked = Asked(one, stop).wait()
        assert asked.texts == [whole[: whole.index(whole[6:9])]]
        assert asked.reasons == ["stop"]
        token = ord(whole[4]) - 0x100
        ended = Request(request.prompt, 20, request.sampling, stop_tokens=frozenset({token}))
        assert Asked(one, ended).wait().texts == [whole[: whole.index(whole[4])]]


def test_log_probabilities_are_the_models():
    model = tiny("llama", torch.float32)
    request = Request(tuple(range(3, 60)), 5, Sampling(seed=3), logprobs=3)
    with engine("none", model=model) as one:
        choices = Asked(one, request).wait().choices[0]
    ids = torch.tensor([[*request.prompt, *(each.token for each in choices)]])
    with torch.no_grad():
        expected = model(ids).logits[0].log_softmax(-1)
    for at, each in enumerate(choices):
        row = expected[len(request.prompt) - 1 + at]
        assert each.logprob == pytest.approx(float(row[each.token]), abs=1e-4)
        assert [token for token, _ in each.top] == row.topk(3).indices.tolist()


def test_what_never_fits_is_refused_and_a_full_queue_says_so():
    limits = Limits(pages=12, max_running=2, max_waiting=3, step_tokens=16)
    with engine(limits=limits) as one:
        with pytest.raises(ValueError, match=r"max_tokens: expected .* at most 12 pages"):
            Asked(one, Request((5,) * 20, 400))
        with pytest.raises(ValueError, match="n: expected at most 2 answers"):
            Asked(one, Request((5,), 1, answers=3))
        some = []
        with pytest.raises(QueueFull, match="at most 3 waiting"):
            for _ in range(200):
                some.append(Asked(one, Request((5,) * 30, 60)))
        for each in some:
            one.cancel(each.ticket)
        assert all(set(each.wait().reasons) <= {"cancelled", "length"} for each in some)
        assert Asked(one, Request((5,) * 30, 2)).wait().reasons == ["length"]


@pytest.mark.parametrize(
    ("pages", "places", "running"),
    [(400, 6, 6), (16, 6, 4)],
    ids=["as many as there are places", "as many as the pages hold"],
)
def test_a_burst_at_idle_waits_only_behind_what_can_run(pages, places, running):
    # Promised to each: 8 tokens and half of 80, which are 3 pages of 16, and one to copy into.
    limits = Limits(pages=pages, max_running=places, max_waiting=2, step_tokens=16)
    request = Request((5,) * 8, 80, Sampling(temperature=0))
    seen = threading.Event()
    with engine(limits=limits) as one:
        # Nothing is taken from the inbox meanwhile, as in a burst that comes within one step.
        with one._wake:
            one.submit(request, lambda _: seen.wait(60))
            some = [Asked(one, request) for _ in range(running + 1)]
            with pytest.raises(QueueFull, match="at most 2 waiting answers, got 3"):
                Asked(one, request)
        # The same once they have been admitted; the first answer's news hold the engine there.
        while one.stats().running < running:
            time.sleep(0.001)
        with pytest.raises(QueueFull, match="at most 2 waiting answers, got 3"):
            Asked(one, request)
        seen.set()
        assert all(each.wait().reasons == ["length"] for each in some)


def test_answers_of_one_prompt_that_all_run_at_once_do_not_wait():
    limits = Limits(pages=100, max_running=4, max_waiting=1, step_tokens=16)
    with engine(limits=limits) as one:
        assert Asked(one, Request((5,) * 30, 4, answers=4)).wait().reasons == ["length"] * 4
        with one._wake:
            runs = Asked(one, Request((5,) * 30, 4, answers=3))
            with pytest.raises(QueueFull, match="at most 1 waiting answers, got 2"):
                Asked(one, Request((5,) * 30, 4, answers=2))
        assert runs.wait().reasons == ["length"] * 3


@pytest.mark.parametrize("kind", [RuntimeError, IndexError])
def test_a_failing_step_takes_its_own_requests_and_no_other(kind, monkeypatch):
    said = []
    monkeypatch.setattr(threading, "excepthook", lambda told: said.append(told.exc_type))
    model = tiny("llama", torch.float32)
    with engine(model=model) as one:
        before = Asked(one, requests(2)[1]).wait()
        broken = model.lm_head.forward

        def fail(*_):
            raise kind("out of memory, say")

        model.lm_head.forward = fail
        lost = Asked(one, requests(3)[2]).wait()
        model.lm_head.forward = broken
        assert lost.reasons == ["error"]
        assert "out of memory" in str(lost.errors[0])
        # Of what nobody foresaw one must see where it was raised.
        assert said == ([] if kind is RuntimeError else [IndexError])
        assert Asked(one, requests(2)[1]).wait().texts == before.texts
        assert leaked(one) == 0


class _Broken:
    """A grammar that fails at an answer's third token."""

    left = 3

    def follow(self):
        return self

    def restrict(self, logits):
        self.left -= 1
        if not self.left:
            raise KeyError("no such rule")
        return logits

    def take(self, token):
        pass

    def done(self):
        return False


def test_what_one_asks_for_fails_nobody_else(monkeypatch):
    said = []
    monkeypatch.setattr(threading, "excepthook", lambda told: said.append(told.exc_value))

    def deaf(piece):
        heard.append(piece)
        raise OSError("hung up")

    with engine() as one:
        ask, heard = requests(2, made=40)[1], []
        alone = Asked(one, ask).wait().texts
        beside = Asked(one, ask)
        one.submit(replace(ask, answers=2), deaf)
        lost = Asked(one, replace(ask, grammar=_Broken())).wait()
        assert beside.wait().texts == alone
        assert lost.reasons == ["error"] and "no such rule" in str(lost.errors[0])
        for wrong in ({"prompt": (5, 128)}, {"sampling": Sampling(logit_bias=((-1, 1.0),))}):
            with pytest.raises(ValueError, match=r"(prompt|logit_bias): expected tokens below 128"):
                Asked(one, replace(ask, **wrong))
        # The model has 1,024 positions, the engine 6,400 places.
        with pytest.raises(ValueError, match="max_tokens: expected at most 1024 tokens together"):
            Asked(one, replace(ask, prompt=(5,) * 1000, max_tokens=25))
        assert Asked(one, ask).wait().texts == alone
        # Who raises is told that its answers are cancelled, and no more.
        assert [each.finish_reason for each in heard] == [None, None, "cancelled", "cancelled"]
        assert [*map(str, said)] == ["hung up"] * 4
        assert leaked(one) == 0


@pytest.mark.parametrize("drain", [True, False])
def test_stop_drains_or_cancels(drain):
    with engine() as one:
        asked = [Asked(one, each) for each in requests(4, made=40)]
        one.stop(drain=drain)
        reasons = {reason for each in asked for reason in each.wait().reasons}
        assert reasons == ({"length"} if drain else {"cancelled"})
        with pytest.raises(EngineStopped):
            Asked(one, requests(1)[0])


def test_models_whose_requests_cannot_share_a_step_are_refused():
    model = tiny("llama", torch.float32)
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UnsupportedModel, match="dynamic"), engine(model=model):
        pass


SMALL = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
OTHERS = {
    "recurrent_gemma": lambda: RecurrentGemmaConfig(**SMALL, num_key_value_heads=1),
    "bart": lambda: BartConfig(
        vocab_size=128, d_model=64, decoder_layers=2, decoder_attention_heads=4,
        decoder_ffn_dim=64, is_decoder=True, is_encoder_decoder=False,
    ),
    "roberta": lambda: RobertaConfig(**SMALL, is_decoder=True),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::quantpage.errors.PartlyPaged")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen3_next", "only state, got layers of LinearAttention"),
        ("falcon_h1", "only state, got layers of PagedHybridLayer"),
        ("recurrent_gemma", "only state, got layers of PagedLayer"),
        ("bart", "a forward that is told positions"),
        ("roberta", "a first token at position 0"),
        ("falcon", "read pages, got 2 that attend densely because its attention is its own code"),
    ],
)
def test_models_that_an_engine_cannot_serve_are_refused(name, said):
    config = {**ARCHITECTURES, **OTHERS}[name]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(UnsupportedModel, match=said), engine(model=model):
        pass


class AllLogits(LlamaForCausalLM):
    """A class that does not know which logits are wanted, as some of Transformers'."""

    def forward(self, input_ids=None, position_ids=None, **rest):
        rest.pop("logits_to_keep", None)
        return super().forward(input_ids, position_ids=position_ids, **rest)


class HandsOn(LlamaForCausalLM):
    """Names no positions, as Evolla, and hands them on."""

    def forward(self, input_ids=None, **rest):
        return super().forward(input_ids, **rest)


class KeepsBack(HandsOn):
    """Names no positions, and counts its own."""

    def forward(self, input_ids=None, **rest):
        rest.pop("position_ids", None)
        return super().forward(input_ids, **rest)


def answers_of(kind):
    """Texts that a tiny Llama of another class answers."""
    model = tiny("llama", torch.float32)
    model.__class__ = kind
    with engine(model=model) as one:
        return [each.texts for each in ask_all(one, requests(3, longest=60, made=8))]


def test_positions_may_be_handed_on_unnamed():
    assert answers_of(HandsOn) == answers_of(LlamaForCausalLM)
    model = tiny("llama", torch.float32)
    model.__class__ = KeepsBack
    with (
        pytest.raises(UnsupportedModel, match="a forward that is told positions"),
        engine(model=model),
    ):
        pass


def test_a_class_that_gives_all_logits_answers_as_one_that_is_told():
    assert answers_of(AllLogits) == answers_of(LlamaForCausalLM)


def test_layers_that_read_others_pages_are_served():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["gemma3n"](), dtype=torch.float32)
    asked = requests(3, longest=60, made=8)
    with engine(model=model.eval()) as one:
        alone = [ask_all(one, [each])[0].texts for each in asked]
    with engine(model=model) as one:
        assert [each.texts for each in ask_all(one, asked)] == alone and all(map(all, alone))


def test_limits_and_requests_name_what_is_wrong():
    with pytest.raises(ValueError, match="step_tokens: expected at least max_running"):
        Limits(pages=4, max_running=8, step_tokens=4)
    with pytest.raises(ValueError, match="pages: expected at least 1"):
        Limits(pages=0)
    with pytest.raises(ValueError, match="temperature: expected 0, or 1e-10 to 100"):
        Sampling(temperature=-1)
    with pytest.raises(ValueError, match="prompt: expected at least one token"):
        Request((), 1)
    asked = {"prompt": (3, 4), "max_tokens": 5}
    for name, wrong in (
        ("prompt", (3.0, 4)),
        ("prompt", "words"),
        ("max_tokens", 2.5),
        ("n", 1.5),
        ("logprobs", 1.5),
        ("min_tokens", 0.5),
        ("stop_tokens", frozenset({"</s>"})),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected "):
            Request(**asked | {"answers" if name == "n" else name: wrong})
    for name, wrong in (("seed", 1.5), ("top_k", 2.5), ("logit_bias", ((1.5, 2.0),))):
        with pytest.raises(ValueError, match=f"{name}: expected "):
            Sampling(**{name: wrong})


def test_token_numbers_of_any_kind_are_pythons():
    made = Request(tuple(torch.tensor([3, 4])), 1).prompt
    assert made == (3, 4) and {*map(type, made)} == {int}


def test_logits_that_are_not_finite_end_greedy_answers_too():
    model = tiny("llama", torch.float32)
    good = requests(2)[1]
    with engine(model=model) as one:
        fine = Asked(one, good).wait()
        model.lm_head.weight.data[5] = torch.nan
        asked = [good, replace(good, logprobs=2), replace(good, sampling=Sampling(seed=1))]
        for lost in ask_all(one, asked):
            assert lost.reasons == ["error"] and "expected finite numbers" in str(lost.errors[0])
        model.lm_head.weight.data[5] = 0
        assert Asked(one, good).wait().reasons == fine.reasons == ["length"]


def test_ends_and_alternatives_beyond_the_vocabulary():
    """A tokenizer names ends that the model has not; of a small vocabulary fewer are told."""
    model = LlamaForCausalLM(LlamaConfig(**COMMON | {"vocab_size": 12})).eval()
    ends = frozenset({-1, 50256})
    asked = Request((3, 4), 5, Sampling(temperature=0), stop_tokens=ends, min_tokens=3, logprobs=20)
    with engine(model=model) as one:
        answer = Asked(one, asked).wait()
    assert answer.reasons == ["length"]
    assert [len(each.top) for each in answer.choices[0]] == [12] * 5


def test_what_fails_while_a_request_is_let_in_is_told(monkeypatch):
    said = []
    monkeypatch.setattr(threading, "excepthook", lambda told: said.append(told.exc_value))
    with engine() as one:

        def full(tokens):
            raise MemoryError("no memory for the list")

        monkeypatch.setattr(one._scheduler.known, "acquire", full)
        lost = Asked(one, requests(2)[1]).wait()
    assert lost.reasons == ["error"] and lost.errors == said
