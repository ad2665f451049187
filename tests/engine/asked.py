"""What the engine's tests share: a tiny model, a tokenizer of bytes, answers collected."""

import queue
import random
import threading
from contextlib import contextmanager

import torch

import quantpage
from quantpage.engine import Engine, Limits, Request, Sampling
from tests.integrations.tiny_models import tiny


class Letters:
    """A tokenizer whose tokens are single characters."""

    def decode(self, tokens, skip_special_tokens=True):
        return "".join(chr(0x100 + token) for token in tokens)


@contextmanager
def engine(kv_format="int8", limits=None, model=None, **options):
    torch.set_num_threads(1)
    model = tiny("llama", torch.float32) if model is None else model
    limits = limits or Limits(pages=400, max_running=32, step_tokens=64)
    with (
        quantpage.attach(model, kv_format, page_size=16) as attached,
        Engine(attached, Letters(), limits, **options) as made,
    ):
        yield made


class Asked:
    """A submitted request, and all that its answers say."""

    def __init__(self, engine, request, cancel_after=None):
        self.news = queue.SimpleQueue()
        submitted = threading.Event()

        def hear(piece):
            self.news.put(piece)
            if piece.made == cancel_after:
                submitted.wait()
                engine.cancel(self.ticket)

        self.ticket = engine.submit(request, hear)
        submitted.set()
        count = request.answers
        self.texts, self.reasons = [""] * count, [None] * count
        self.errors, self.cached, self.choices = [None] * count, 0, [[] for _ in range(count)]
        self.prompt = []

    def wait(self):
        while None in self.reasons:
            piece = self.news.get(timeout=60)
            at = piece.answer
            assert self.reasons[at] is None, "news after the end"
            self.texts[at] += piece.text
            self.choices[at] += piece.choices
            self.prompt += piece.prompt
            self.errors[at], self.cached = piece.error, piece.cached
            self.reasons[at] = piece.finish_reason
        return self


def ask_all(engine, requests, cancel=()):
    asked = [Asked(engine, each, 3 if at in cancel else None) for at, each in enumerate(requests)]
    return [each.wait() for each in asked]


def requests(count, longest=150, made=20):
    """Prompts that share beginnings, greedy and sampled, some with several answers."""
    draw = random.Random(5)
    texts = [tuple(draw.choices(range(3, 128), k=draw.randrange(20, longest))) for _ in range(4)]
    return [
        Request(
            prompt=texts[at % 4][: len(texts[at % 4]) - at // 4],
            max_tokens=made,
            sampling=Sampling(temperature=0 if at % 2 else 1, top_p=0.9, seed=at),
            answers=2 if at % 5 == 0 else 1,
        )
        for at in range(count)
    ]


def leaked(engine):
    """Bytes of pages that nobody should hold any more."""
    engine._scheduler.known.clear()
    return engine._runner.memory.used_bytes()
