"""Decode steps as CUDA graphs: what a replay says beside the same step kernel by kernel."""

import pytest
import torch

import quantpage
from quantpage.engine import Engine, Limits
from quantpage.engine.step import StepRunner
from tests.engine.asked import Letters, ask_all, requests
from tests.integrations.tiny_models import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("name", "kv_format"),
    [
        ("llama", "none"),
        ("llama", "int8"),
        ("llama", "int4"),
        ("llama", "int6"),
        ("qwen2_bias", "int8"),
        ("gemma3_window", "int8"),
        ("gemma3_window", "int4"),
    ],
)
def test_a_replay_says_what_a_step_does(name, kv_format, monkeypatch):
    replayed, apart = StepRunner._replayed, []

    def both(self, chunks):
        found = replayed(self, chunks)
        if found is not None:
            # Writes the same keys and values once more.
            eager = self._eager(chunks)
            scale = eager.float().abs().amax()
            apart.append(float((found.float() - eager.float()).abs().amax() / scale))
        return found

    monkeypatch.setattr(StepRunner, "_replayed", both)
    model = tiny(name, torch.float16).cuda()
    limits = Limits(pages=400, max_running=12, step_tokens=64)
    asked = requests(9, longest=90, made=40)
    with quantpage.attach(model, kv_format, page_size=16) as attached:
        # Answers end at different times: graphs of 12, 8, 4, 2 and 1 rows, most with some empty.
        for each, made in zip(asked, range(4, 40, 4), strict=True):
            object.__setattr__(each, "max_tokens", made)
        with Engine(attached, Letters(), limits) as engine:
            ask_all(engine, asked)
            graphs = engine._runner.graphs
            assert len(graphs._made) >= 4
            assert graphs.replays == len(apart) > 20
    assert max(apart) < 0.02


def test_a_step_that_cannot_be_captured_runs_without():
    model = tiny("llama", torch.float16).cuda()
    forward = model.model.layers[0].mlp.forward

    def reads_back(x):
        return forward(x) * float(x.isfinite().all())

    model.model.layers[0].mlp.forward = reads_back
    with (
        quantpage.attach(model, "int8", page_size=16) as attached,
        Engine(attached, Letters(), Limits(pages=100, max_running=4)) as engine,
        pytest.warns(RuntimeWarning, match="decode steps are no CUDA graphs, as one could not"),
    ):
        (one,) = ask_all(engine, requests(1, made=6)[:1])
        assert set(one.reasons) == {"length"}
        assert engine._runner.graphs.replays == 0
