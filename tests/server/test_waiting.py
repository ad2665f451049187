"""What one client sends makes no other wait: the loop that carries all streams goes on."""

import asyncio
import threading

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from quantpage.engine import Request  # noqa: E402
from quantpage.server.app import create_app  # noqa: E402
from quantpage.server.completions import Completion  # noqa: E402
from quantpage.server.options import ServeOptions  # noqa: E402
from quantpage.server.protocol import CompletionBody  # noqa: E402
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


def test_a_call_may_have_more_prompts_than_there_are_places(tmp_path):
    options = {"memory": 1 << 20, "page_size": 16, "max_requests": 2, "max_waiting": 6}
    attached, made = load(ServeOptions(str(save_small(tmp_path)), **options))
    prompts = [[5 + at] * 9 for at in range(12)]

    def call(prompts, **more):
        asked = {"prompt": prompts, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        return Completion(made, CompletionBody.model_validate(asked | more))

    async def whole(*calls):
        answers = await asyncio.gather(*[call(each).whole() for each in calls])
        return [each["choices"] for each in answers]

    async def stopped():
        events = call(prompts, stream=True).stream()
        first = await anext(events)
        await asyncio.to_thread(made.engine.stop, drain=True)
        return [first, *[each async for each in events]]

    with attached:
        # None takes all places: the other call's first prompt finds one.
        together, other = asyncio.run(whole(prompts, prompts))
        assert together == other and [each["index"] for each in together] == list(range(12))
        assert together[7]["text"] == asyncio.run(whole([prompts[7]]))[0][0]["text"]
        # What cannot be asked is found before anything is.
        with pytest.raises(ValueError, match="prompt: expected tokens below"):
            call([*prompts, [999]])
        counted = made.engine.stats().made_tokens
        with pytest.raises(ValueError, match="n: expected at most 2 answers"):
            asyncio.run(whole_of_pages(made, prompts[0]))
        assert made.engine.stats().made_tokens == counted
        # An engine that ends finishes what is under way, and says so of what is not.
        events = asyncio.run(stopped())
        assert sum('"finish_reason": "length"' in each for each in events) in range(3, 12)
        assert "as the server is stopping" in events[-1]


async def whole_of_pages(served, prompt):
    """A request that fits, and behind it one that never does."""
    requests = [Request(tuple(prompt), 2), Request((5,), 4, answers=2 * served.engine.limits.pages)]
    async for _ in served.answers(requests):
        pass
