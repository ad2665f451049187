"""Kernels that an engine compiles at its start are those that its requests ask for."""

import pytest
import torch

import quantpage
from quantpage.engine import Engine, Limits
from tests.engine.asked import Letters, ask_all, engine, requests
from tests.integrations.tiny_models import tiny
from tests.kernels.apart import compile_apart


@pytest.mark.cpu
def test_steps_of_an_engine_ask_for_nothing_else():
    found = compile_apart("tests.kernels.engine_case")
    # Reach by reach, bodies and exact pages.
    assert found["asked"] > 20
    assert not found["missing"]


@pytest.mark.cpu
def test_a_cpu_compiles_nothing_and_answers_as_ever():
    (wanted,) = [each.texts for each in _answers(warm_up=False)]
    assert [each.texts for each in _answers(warm_up=True)] == [wanted]


def _answers(**options):
    with engine(**options) as made:
        return ask_all(made, requests(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("name", "kv_format"), [("llama", "int8"), ("llama", "int4"), ("gemma3_window", "int4")]
)
def test_requests_of_a_warm_engine_compile_nothing(name, kv_format):
    import triton

    limits, seen, said = Limits(pages=400, max_running=6, step_tokens=64), [], []
    model = tiny(name, torch.float16).cuda()
    for warm_up in (True, False):
        with (
            quantpage.attach(model, kv_format, page_size=16) as attached,
            Engine(attached, Letters(), limits, warm_up=warm_up) as made,
        ):
            knobs = triton.knobs.runtime
            knobs.jit_post_compile_hook = lambda **named: seen.append(named["repr"])
            try:
                every = ask_all(made, requests(7, longest=90, made=20))
                said += [each.texts for each in ask_all(made, requests(1, made=20))]
            finally:
                knobs.jit_post_compile_hook = None
            assert {reason for each in every for reason in each.reasons} == {"length"}
            assert not seen
    assert said[0] == said[1] and all(said[0])
