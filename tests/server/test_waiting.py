"""What one client sends makes no other wait: the loop that carries all streams goes on."""

import asyncio
import threading

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from quantpage.server.app import create_app  # noqa: E402
from quantpage.server.options import ServeOptions  # noqa: E402
from quantpage.server.run import load  # noqa: E402
from quantpage.server.serving import Served  # noqa: E402
from tests.server.small import save_small  # noqa: E402

pytestmark = pytest.mark.cpu

BODIES = {
    "/v1/completions": {"prompt": "Once", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    "/tokenize": {"prompt": "Once"},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = save_small(tmp_path_factory.mktemp("small"))
    attached, made = load(ServeOptions(str(folder), memory=1 << 20, page_size=16))
    yield made
    made.engine.stop()
    attached.detach()


@pytest.mark.parametrize("path", BODIES)
def test_others_are_answered_while_a_text_becomes_tokens(served, path, monkeypatch):
    begun, answered, encode = threading.Event(), threading.Event(), Served.encode

    def long(self, text, special=True):
        begun.set()
        assert answered.wait(20), "nobody was answered before the text was tokens"
        return encode(self, text, special)

    async def both():
        transport = httpx.ASGITransport(create_app(served, None))
        async with httpx.AsyncClient(transport=transport, base_url="http://small") as client:
            first = asyncio.ensure_future(client.post(path, json=BODIES[path]))
            while not begun.is_set():
                await asyncio.sleep(1e-3)
            other = await client.get("/health")
            answered.set()
            return other, await first

    monkeypatch.setattr(Served, "encode", long)
    other, first = asyncio.run(both())
    assert other.status_code == first.status_code == 200, first.text
