"""One answer, teacher-forced through several caches: what each holds, how fast it is, and how often
it would have chosen the same token. The table below the answer of `quantpage generate --compare`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from quantpage import console
from quantpage.cli.generation import Answer, GenerateRequest, held_bytes
from quantpage.evaluate.score import divergence
from quantpage.integrations.hf_transformers import attach
from quantpage.integrations.hf_transformers.modules.arguments import cache_as, caches_in

REFERENCE = "Transformers"
"""Its own cache and attention, in the same dtype: what every row is compared with."""
MOST = 256
"""Tokens of an answer that are forced; the predictions of all of them are held."""


@dataclass(frozen=True, slots=True)
class Forced:
    """What one cache made of the answer."""

    cache: str
    held_bytes: int
    prompt_tokens_per_s: float
    decode_tokens_per_s: float | None
    """None: the answer is one token, which is predicted by the prompt."""
    same_token: float
    """Share of the answer's tokens whose most likely choice is the reference's."""
    mean_divergence: float
    """KL to the reference, nats a token."""


def compare(model: Any, answer: Answer, request: GenerateRequest) -> list[Forced]:
    """The request's cache, ours without quantization, and Transformers' own."""
    tokens = torch.cat([answer.prompt_ids[0], answer.answer_ids[:MOST].to(model.device)])[None]
    names = list(dict.fromkeys((request.kv_format, "none")))
    found, held, speeds = {}, {}, {}
    for name in (REFERENCE, *names):
        with (
            console.status(f"the same answer through {name}"),
            _attached(model, name, request) as cache,
        ):
            forced = _force(model, tokens, answer.prompt_ids.shape[1], cache)
        found[name], held[name], speeds[name] = forced
    exact = found[REFERENCE]
    return [
        Forced(
            cache=name,
            held_bytes=held[name],
            prompt_tokens_per_s=speeds[name][0],
            decode_tokens_per_s=speeds[name][1],
            same_token=float((found[name].argmax(-1) == exact.argmax(-1)).double().mean()),
            mean_divergence=float(divergence(exact, found[name]).mean()),
        )
        for name in (*names, REFERENCE)
    ]


@contextmanager
def _attached(model: Any, name: str, request: GenerateRequest) -> Iterator[Any]:
    """An empty cache; None: the one that the model makes for itself."""
    if name == REFERENCE:
        yield None
    else:
        own = name == request.kv_format
        with attach(
            model,
            kv_format=name,
            page_size=request.page_size,
            calibration=request.calibration if own else None,
        ) as attached:
            yield attached.new_cache()


@torch.inference_mode()
def _force(
    model: Any, tokens: torch.Tensor, prompt: int, cache: Any
) -> tuple[torch.Tensor, int, tuple[float, float | None]]:
    """(log-probabilities of each answer token, bytes held, (prompt, decode) tokens a second)."""
    marks, found = [time.perf_counter()], []
    for end in range(prompt, tokens.shape[1]):
        start = 0 if end == prompt else end - 1
        given = {} if cache is None else cache_as(model, cache)
        out = model(tokens[:, start:end], use_cache=True, logits_to_keep=1, **given)
        cache = caches_in(out)[0]
        # Moved to the host, which waits for the device.
        found.append(out.logits[0].float().log_softmax(-1).cpu())
        marks.append(time.perf_counter())
    decoded = len(marks) - 2
    decode = decoded / (marks[-1] - marks[1]) if decoded else None
    return torch.cat(found), held_bytes(cache), (prompt / (marks[1] - marks[0]), decode)


def to_table(rows: list[Forced]) -> Table:
    """For the terminal, in 80 columns."""
    columns = ("cache", "holds", "of its", "prompt/s", "decode/s", "same token", "KL")
    table = console.new_table(*columns)
    (reference,) = (row for row in rows if row.cache == REFERENCE)
    for row in rows:
        decode = row.decode_tokens_per_s
        own = row is reference
        table.add_row(
            row.cache,
            console.in_units(row.held_bytes),
            f"{row.held_bytes / reference.held_bytes:.0%}",
            f"{row.prompt_tokens_per_s:.1f}",
            "-" if decode is None else f"{decode:.1f}",
            "-" if own else f"{row.same_token:.1%}",
            "-" if own else f"{row.mean_divergence:.1e}",
        )
    return table


def explanation(answer: Answer, page_size: int) -> str:
    """What the table's columns are."""
    scored = min(len(answer.answer_ids), MOST)
    cached = answer.prompt_ids.shape[1] + scored - 1
    pages = -(-cached // page_size)
    return (
        f"The same {scored} tokens forced through each cache, {REFERENCE} without QuantPage last. "
        f"holds: the caches' tensors for {cached:,} tokens; ours are whole pages of {page_size}, "
        f"{pages * page_size:,} tokens at least. same token, KL (nats a token): against "
        f"{REFERENCE}; `none` shows what the arithmetic alone changes."
    )
