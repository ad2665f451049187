"""Kernels that random steps of an engine ask for and its warm-up does not, as on an H100."""

import json
import random

import torch

import quantpage
from quantpage.engine import Limits, step
from quantpage.engine.holding import Holding
from quantpage.engine.request import Request
from quantpage.engine.scheduler import Answer, Chunk
from quantpage.engine.step import StepRunner, ask_layers
from quantpage.integrations.hf_transformers.steps import cpu
from quantpage.ops.attend.decode import triton as decode
from quantpage.ops.attend.prefill import gluon as prefill
from quantpage.ops.rope_write import triton as write
from quantpage.ops.triton import ahead
from quantpage.warm_up import WarmUp
from tests.integrations.tiny_models import tiny
from tests.kernels.warm_up_case import pretend

LIMITS = Limits(pages=200, max_running=6, step_tokens=64)
NEWS = (*[1] * 6, 2, 3, 9, 16, 17, 30, 60)


def random_chunks(draw: random.Random, runner: StepRunner) -> list[Chunk]:
    """A step of what LIMITS allow; the last tokens of each request are new."""
    count = draw.choice((1, 2, 5, LIMITS.max_running))
    news = [draw.choice(NEWS) for _ in range(count)]
    while sum(news) > LIMITS.step_tokens:
        news.remove(max(news))
    longest, made = draw.choice((1, 60, 300)), []
    for new in news:
        end = draw.randint(new, max(new, longest))
        tokens, holding = [0] * end, Holding(runner.memory.shelves)
        answer = Answer(Request(tuple(tokens), 1), 0, tokens, None, holding=holding)
        made.append(Chunk(answer, new))
        for at in range(0, end - new, LIMITS.step_tokens):
            holding.reserve(min(LIMITS.step_tokens, end - new - at))
            holding.commit()
        holding.reserve(new)
    return made


def main() -> None:
    """As JSON."""
    # As a GPU's model, whose layers ask attention themselves.
    cpu.install = lambda *given: None
    assert decode and prefill and write
    # Nothing is launched, so that what two forwards say is alike by chance only.
    step._ALIKE = float("inf")
    pretend()
    draw, missing = random.Random(0), []
    with (
        quantpage.attach(tiny("gemma3_window", torch.float16), "int4", page_size=16) as attached,
        ahead.compile_ahead() as count,
    ):
        assert count is not None
        ask_layers(WarmUp(attached.model.device, count), attached, LIMITS)
        asked = known = count()
        runner = StepRunner(attached, LIMITS)
        for _ in range(80):
            chunks = random_chunks(draw, runner)
            runner.run(chunks, [])
            if count() > known:
                missing.append([(each.tokens, len(each.answer.tokens)) for each in chunks])
                known = count()
            for each in chunks:
                each.answer.holding.free()
    print(json.dumps({"asked": asked, "missing": missing}))


if __name__ == "__main__":
    main()
