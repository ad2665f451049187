"""Ctrl-C: once lets answers end, twice ends them with a sentence (SIGTERM: test_process)."""

import queue
import signal

import pytest

uvicorn = pytest.importorskip("uvicorn")

from quantpage.engine import Request, Sampling  # noqa: E402
from quantpage.server.options import ServeOptions  # noqa: E402
from quantpage.server.run import load  # noqa: E402
from quantpage.server.stopping import DrainingServer  # noqa: E402
from tests.server.small import save_small  # noqa: E402

pytestmark = pytest.mark.cpu


def test_a_second_interrupt_ends_answers_and_cuts_none(tmp_path):
    attached, served = load(ServeOptions(str(save_small(tmp_path)), memory=1 << 22, page_size=16))
    with attached, served.engine as engine:
        server = DrainingServer(uvicorn.Config(lambda: None), engine, 60)
        pieces = queue.SimpleQueue()
        # Eight samplers, so that no machine is done before it is told to stop.
        asked = Request((1, 2, 3), max_tokens=480, sampling=Sampling(), answers=8, logprobs=5)
        engine.submit(asked, pieces.put)
        pieces.get(timeout=60)
        server.handle_exit(signal.SIGINT, None)
        assert server.should_exit and engine.alive
        server.handle_exit(signal.SIGINT, None)
        ends = []
        while len(ends) < 8:
            ends += filter(None, [pieces.get(timeout=60).finish_reason])
        assert ends == ["cancelled"] * 8 and not server.force_exit
        server.handle_exit(signal.SIGINT, None)
        assert server.force_exit
