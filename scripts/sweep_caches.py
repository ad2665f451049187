#!/usr/bin/env python
"""Operations on kept caches in any order: what is said next is what a new cache says of those
tokens.

    python scripts/sweep_caches.py --seeds 100                          three models in turns
    python scripts/sweep_caches.py --first 17 --only gemma3_window      one again, as its line says

Forks, copies, crops, rows chosen and repeated, files, forwards that are interrupted, resets. A
failure prints its line; exit code 1 then. Three seeds are tests (test_any_order).
"""

import argparse
import copy
import random
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import quantpage
from quantpage.errors import CacheError
from quantpage.integrations.hf_transformers import QuantPageCache
from tests.integrations.tiny_models import tiny

FORMATS = {"llama": "int8,last1=int4", "gemma3_window": "int4", "mistral_window": "fp8"}
"""Models, and the format of their caches."""
WORK = ["read"] * 6 + ["fork", "crop", "select", "repeat", "save", "stop", "drop", "reset", "trim"]
LENGTHS = (1, 1, 1, 2, 3, 7, 16, 17, 40, 70)


class Interrupted(Exception):
    pass


class Kept:
    """A cache, the tokens of its rows, and what of them was padding."""

    def __init__(self, cache, rows, padding):
        self.cache, self.rows, self.padding = cache, rows, padding

    def select(self, chosen):
        self.rows = [[*self.rows[at]] for at in chosen]
        self.padding = [[*self.padding[at]] for at in chosen]


def read(model, draw, kept):
    """Read new tokens, some rows padded; (row, logits) of those that are no padding."""
    if not kept.rows:
        count = draw.choice((1, 1, 2, 3))
        kept.rows, kept.padding = [[] for _ in range(count)], [[] for _ in range(count)]
    new, count = draw.choice(LENGTHS), len(kept.rows)
    pads = [draw.randrange(new) if draw.random() < 0.3 else 0 for _ in range(count)]
    ids = [[draw.randrange(3, 128) for _ in range(new)] for _ in range(count)]
    shown = [each + [0] * n + [1] * (new - n) for each, n in zip(kept.padding, pads, strict=True)]
    mask = torch.tensor(shown)
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -new:]
    said = model(
        torch.tensor(ids), attention_mask=mask, position_ids=positions, past_key_values=kept.cache
    ).logits
    kept.padding = shown
    for row, (each, pad) in enumerate(zip(ids, pads, strict=True)):
        kept.rows[row] += each[pad:]
        yield row, said[row, pad:]


def change(work, attached, draw, kept, path):
    """Any operation but reading."""
    rows, length = len(kept.rows), len(kept.padding[0])
    if work == "crop":
        end = max(1, length - draw.choice((0, 1, 2, 5, 16, length // 2)))
        try:
            kept.cache.crop(end)
        except CacheError:
            # Pages of a window are gone; nothing has changed.
            return
        kept.padding = [each[:end] for each in kept.padding]
        kept.rows = [
            each[: sum(shown)] for each, shown in zip(kept.rows, kept.padding, strict=True)
        ]
    elif work == "select":
        chosen = [draw.randrange(rows) for _ in range(draw.choice((1, 2, rows)))]
        draw.choice((kept.cache.reorder_cache, kept.cache.batch_select_indices))(
            torch.tensor(chosen)
        )
        kept.select(chosen)
    elif work == "repeat" and rows < 4:
        kept.cache.batch_repeat_interleave(2)
        kept.select([row for row in range(rows) for _ in range(2)])
    elif work == "save":
        attached.save_cache(kept.cache, path)
        kept.cache = attached.load_cache(path)
    elif work == "stop":
        hook = draw.choice(attached.model.model.layers).register_forward_hook(interrupt)
        try:
            list(read(attached.model, draw, copy.copy(kept)))
            raise AssertionError("a forward that is interrupted ended as any other")
        except Interrupted:
            pass
        finally:
            hook.remove()
    elif work == "reset":
        kept.cache.reset()
        kept.rows, kept.padding = [], []
    elif work == "trim":
        kept.cache.trim()


def interrupt(*_):
    raise Interrupted


@torch.no_grad()
def try_seed(name: str, seed: int, folder: Path) -> int:
    """45 operations, drawn; how many rows were compared. AssertionError where one is another."""
    draw, model = random.Random(seed), tiny(name)
    with quantpage.attach(model, FORMATS[name], page_size=16) as attached:
        every, compared = [Kept(attached.new_cache(), [], [])], 0
        for _ in range(45):
            kept, work = draw.choice(every), draw.choice(WORK)
            if kept.rows and len(kept.padding[0]) > 250:
                work = "reset"
            if work == "read" or not kept.rows:
                for row, said in read(model, draw, kept):
                    alone = model(torch.tensor([kept.rows[row]])).logits[0, -len(said) :]
                    torch.testing.assert_close(said, alone, atol=1e-6, rtol=0)
                    compared += 1
            elif work == "fork" and len(every) < 4:
                # Not of this cache: a bound one would hold its pages to the end, dropped or not.
                fork = draw.choice((QuantPageCache.fork, copy.deepcopy))
                every.append(Kept(fork(kept.cache), kept.rows, kept.padding))
                every[-1].select(range(len(kept.rows)))
            elif work == "drop" and len(every) > 1:
                every.remove(kept)
            else:
                change(work, attached, draw, kept, folder / "file")
        del kept
        for each in every:
            each.cache.reset()
        left = [each.cache.rows.memory.used_bytes() for each in every]
        assert not any(left), f"expected no page in use after a reset, got {left} bytes"
        return compared


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", choices=sorted(FORMATS))
    asked = parser.parse_args()
    failed = 0
    for seed in range(asked.first, asked.first + asked.seeds):
        for name in [asked.only] if asked.only else FORMATS:
            line = f"--first {seed} --only {name}"
            with tempfile.TemporaryDirectory() as folder:
                try:
                    print(f"{line}: {try_seed(name, seed, Path(folder))} rows", flush=True)
                # Whatever one seed finds, the next is tried.
                except Exception:  # noqa: BLE001
                    failed += 1
                    print(f"{line}: failed\n{traceback.format_exc()}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
