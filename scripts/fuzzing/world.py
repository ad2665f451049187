"""Requests of a case, what is done to them, and what has to hold after each operation."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from quantpage import PagedKVCache, plan_batch
from quantpage.cache import PagePool, PrefixCache, Sequence, prefix_seed
from quantpage.cache.reach import EVERYTHING, Reach
from quantpage.errors import CacheError, OutOfPages

from . import shown
from .attention import Seen
from .case import Case
from .keys import Rows
from .layer import Layer, device_of, tensor
from .numbers import Mismatch, form_of
from .pages import Half, held, poison

MOST_REQUESTS = 4


@dataclass(slots=True)
class Request:
    """Its pages as the package keeps them, its tokens and rows as the oracle does."""

    sequence: Sequence
    mask: shown.Shown
    tokens: list[int] = field(default_factory=list)
    keys: list[Rows] = field(default_factory=list)
    """Of each layer: every row that was written, in the basis of the cache."""
    values: list[Rows] = field(default_factory=list)

    def cut(self, length: int) -> None:
        """Forget what is after."""
        del self.tokens[length:]
        for rows in (self.keys, self.values):
            rows[:] = [each[:length] for each in rows]

    def add(self, layer: int, keys: Rows, values: Rows) -> None:
        """A step's rows."""
        for rows, new in ((self.keys, keys), (self.values, values)):
            rows[layer] = Rows(
                np.concatenate([rows[layer].x, new.x]),
                np.concatenate([rows[layer].slack, new.slack]),
            )


class World:
    """A case under way."""

    def __init__(self, case: Case) -> None:
        self.case, self.rng = case, np.random.default_rng([case.seed, case.number, 1])
        self.log: list[str] = []
        window = case.window if not case.sink_tokens else None
        self.reach = EVERYTHING if window is None else Reach(window=window)
        exact = any(form_of(name)[2] for name in case.formats)
        pages = 3 * (case.longest // case.page_size + 2)
        self.pool = PagePool(pages)
        self.exact_pool = PagePool(pages) if exact else None
        alike = case.mask.removeprefix("interval ") in shown.SHARED
        self.shared = None if case.each_its_own and not alike else self._draw_mask()
        mask = (self.shared or self._draw_mask()).mask
        backend = "flash_mask" if mask.kind == "interval" or self.rng.random() < 0.2 else "flash"
        self.layers = [Layer.draw(case, name, self.rng, backend, mask) for name in case.formats]
        self.cache = PagedKVCache(pages, pages if exact else 0, device_of(case))
        for index, layer in enumerate(self.layers):
            self.cache.add_layer(index, layer.layout, layer.static(), layer.key_map())
            poison(self.cache.layer(index))
        seed = prefix_seed("fuzz", self.cache.layouts)
        self.prefix = PrefixCache(self.pool, case.page_size, seed, self.exact_pool, self.reach)
        self.requests: list[Request] = []
        self.next_token = 0

    def run(self) -> None:
        """Draw operations, do them, check everything after each."""
        self._start()
        acts = {
            self.step: 6.0, self._start: 1.0, self.fork: 1.0, self.hit: 1.5, self.swap: 0.7,
            self.save: 0.4, self.rollback: 1.0, self.end: 0.5, self.grow: 0.3, self.evict: 0.3,
        }  # fmt: skip
        names, weights = list(acts), np.array(list(acts.values()))
        for turn in range(self.case.operations):
            act = names[int(self.rng.choice(len(names), p=weights / weights.sum()))]
            (self.step if turn == 0 else act)()
            self.check()
        self.close()

    # What is done.

    def _start(self) -> None:
        if len(self.requests) < MOST_REQUESTS:
            self.requests.append(self._request(self._sequence()))

    def step(self) -> None:
        """New tokens of some requests, through every layer."""
        chosen = [each for each in self.requests if self.rng.random() < 0.8]
        news, taken = [], []
        for request in chosen:
            new = self._new_tokens(len(request.tokens))
            try:
                self.cache.copy_pages(request.sequence.reserve(new))
            except OutOfPages:
                continue
            taken.append(request)
            news.append(new)
        if not taken:
            return
        self.log.append(f"step {[(len(r.tokens), n) for r, n in zip(taken, news, strict=True)]}")
        contexts = [len(r.tokens) + n for r, n in zip(taken, news, strict=True)]
        gone = [_leading(r.sequence.pages) for r in taken]
        batch = plan_batch(
            news, contexts,
            [[max(page, 0) for page in r.sequence.pages] for r in taken],
            self.case.page_size,
            device_of(self.case),
            None if self.exact_pool is None else [r.sequence.exact_pages for r in taken],
            gone if any(gone) else None,
        )  # fmt: skip
        positions = np.concatenate(
            [np.arange(c - n, c) for c, n in zip(contexts, news, strict=True)]
        )
        mask = shown.together([r.mask for r in taken]).to(device_of(self.case))

        def sees(halves: tuple[Half, Half], row: int, exact: bool) -> Seen:
            return self._seen(taken[row], halves, news[row], exact)

        for index, layer in enumerate(self.layers):
            tensors = self._rows(sum(news))
            raw = [each.cpu().double().numpy() for each in tensors]
            expected = layer.expected(*raw, positions)
            first = 0
            for request, new in zip(taken, news, strict=True):
                own = slice(first, first + new)
                request.add(index, expected[1][own], expected[2][own])
                first += new
            layer.step((tensors, expected), self.cache.layer(index), batch, mask, sees)
        for request, new in zip(taken, news, strict=True):
            kept = new
            if new > 1 and self.rng.random() < 0.3:
                kept = int(self.rng.integers(0, new))
                self.log.append(f"reject {new - kept}")
            counted = len(request.tokens) + kept
            request.tokens += range(self.next_token, self.next_token + new)
            self.next_token += new
            request.sequence.commit(kept)
            if request.sequence.length != counted:
                raise Mismatch(f"commit: expected {counted} tokens, got {request.sequence.length}")
            request.cut(counted)

    def fork(self) -> None:
        """A second request with the same tokens."""
        if not self.requests or len(self.requests) >= MOST_REQUESTS:
            return
        self.log.append("fork")
        one = self._any()
        self.requests.append(self._copy(one, one.sequence.fork(), len(one.tokens), one.mask))

    def hit(self) -> None:
        """Remember a request's pages and start another from them."""
        if not self.requests:
            return
        one = self._any()
        self.prefix.insert(one.tokens, one.sequence)
        self.prefix.check()
        if len(self.requests) >= MOST_REQUESTS or not one.tokens:
            return
        asked = int(self.rng.integers(1, len(one.tokens) + 1))
        found = self.prefix.acquire(one.tokens[:asked])
        sequence = self._sequence()
        sequence.adopt(found)
        if not self.reach.limited and self.exact_pool is None:
            wanted = asked // self.case.page_size * self.case.page_size
            if sequence.length != wanted:
                raise Mismatch(f"prefix: expected a hit of {wanted}, got {sequence.length}")
        self.log.append(f"hit {sequence.length} of {asked}")
        mask = self.shared or self._draw_mask()
        self.requests.append(self._copy(one, sequence, sequence.length, mask))

    def swap(self) -> None:
        """A request's pages to the host and back to others."""
        if not self.requests:
            return
        one = self._any()
        fresh = self._sequence()
        try:
            fresh.reserve(len(one.tokens))
        except OutOfPages:
            return
        fresh.commit()
        old, new = one.sequence, fresh
        pairs, exact_pairs = (
            [(a, b) for a, b in zip(*tables, strict=True) if b >= 0]
            for tables in ((old.pages, new.pages), (old.exact_pages, new.exact_pages))
        )
        if any(a < 0 for a, _ in pairs + exact_pairs):
            # A hit brought less than a request of its own keeps.
            fresh.free()
            return
        self.log.append(f"swap {len(pairs)} pages, {len(exact_pairs)} exact")
        order = self.rng.permutation(len(pairs))
        pairs = [pairs[at] for at in order]
        out = self.cache.swap_out([a for a, _ in pairs], [a for a, _ in exact_pairs])
        self.cache.swap_in(out, [b for _, b in pairs], [b for _, b in exact_pairs])
        old.free()
        one.sequence = fresh

    def save(self) -> None:
        """To a file and back."""
        self.log.append("save")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pages"
            note = {"lengths": [len(each.tokens) for each in self.requests]}
            self.cache.save(path, note=note)
            layouts = self.cache.layouts
            self.cache, told = PagedKVCache.load(path, device_of(self.case), layouts)
        if told != note:
            raise Mismatch(f"save: expected the note {note}, got {told}")

    def rollback(self) -> None:
        """Forget a request's last tokens."""
        if not self.requests:
            return
        one = self._any()
        length = int(self.rng.integers(max(0, len(one.tokens) - 40), len(one.tokens) + 1))
        try:
            one.sequence.crop(length)
        except CacheError:
            if len(one.tokens) - length <= self.case.page_size and len(self.log) < 2:
                raise
            self.log.append(f"crop to {length} refused")
            return
        self.log.append(f"crop {len(one.tokens)} to {length}")
        one.cut(length)

    def end(self) -> None:
        """Let go of a request; its pages are used again."""
        if self.requests:
            self.log.append("end")
            self.requests.pop(int(self.rng.integers(len(self.requests)))).sequence.free()

    def grow(self) -> None:
        """More pages."""
        self.log.append("grow")
        more = int(self.rng.integers(1, 5))
        self.pool.grow(more)
        if self.exact_pool is not None:
            self.exact_pool.grow(more)
        self.cache.grow(more, 0 if self.exact_pool is None else more)

    def evict(self) -> None:
        """Prefixes go that nobody uses."""
        self.log.append("evict")
        self.prefix.evict(int(self.rng.integers(1, 6)))
        if self.exact_pool is not None:
            self.prefix.evict_exact(int(self.rng.integers(1, 3)))
        self.prefix.check()

    def close(self) -> None:
        """Everything is given back."""
        for each in self.requests:
            each.sequence.free()
        self.prefix.clear()
        for pool in filter(None, (self.pool, self.exact_pool)):
            pool.check()
            if pool.used:
                raise Mismatch(f"end: {pool.used} pages are still held")

    # What has to hold.

    def check(self) -> None:
        """Pages hold what their requests wrote, whatever was done since."""
        self.pool.check()
        for index, layer in enumerate(self.layers):
            view = self.cache.layer(index)
            for row, request in enumerate(self.requests):
                sequence = request.sequence
                if sequence.length != len(request.tokens):
                    raise Mismatch(f"request {row}: {sequence.length} tokens instead of "
                                   f"{len(request.tokens)}")  # fmt: skip
                for name, spec, pages, exact, rows in zip(
                    ("key", "value"), layer.specs, (view.key, view.value),
                    (view.exact_key, view.exact_value), (request.keys, request.values), strict=True,
                ):  # fmt: skip
                    where = f"request {row}, layer {index} of {layer.format}, {name}"
                    Half.of(spec, pages, exact).check(
                        rows[index], sequence.pages, sequence.exact_pages, self.case.page_size,
                        (self.case.dtype, where), layer.given.turn if name == "key" else None,
                    )  # fmt: skip

    # What these need.

    def _any(self) -> Request:
        return self.requests[int(self.rng.integers(len(self.requests)))]

    def _sequence(self) -> Sequence:
        return Sequence(self.pool, self.case.page_size, self.exact_pool, self.reach)

    def _request(self, sequence: Sequence) -> Request:
        case = self.case
        keys, values = (
            [Rows.exact(np.zeros((0, case.kv_heads, width))) for _ in case.formats]
            for width in (case.head_dim, case.value_dim)
        )
        return Request(sequence, self.shared or self._draw_mask(), [], keys, values)

    def _copy(self, one: Request, sequence: Sequence, length: int, mask: shown.Shown) -> Request:
        made = Request(sequence, mask, list(one.tokens), list(one.keys), list(one.values))
        made.cut(length)
        return made

    def _draw_mask(self) -> shown.Shown:
        case = self.case
        if case.mask == "causal":
            return shown.plain(case.window, case.sink_tokens)
        if case.mask == "full":
            return shown.everything()
        kind = case.mask.removeprefix("interval ")
        made = shown.draw(kind, case.described, case.kv_heads, self.rng)
        self._check_cuts(made)
        return made

    def _check_cuts(self, drawn: shown.Shown) -> None:
        """``next_cut`` against every pair."""
        length = int(self.rng.integers(1, self.case.described + 20))
        at = int(self.rng.integers(0, length + 1))
        heads = range(self.case.kv_heads)
        sees = np.any([drawn.visible(np.arange(length), length, h) for h in heads], 0)
        wanted = next(p for p in range(at, length + 1) if not sees[:p, p:].any())
        got = drawn.mask.next_cut(at, length)
        if got != wanted:
            raise Mismatch(f"next_cut({at}, {length}): expected {wanted}, got {got}")

    def _new_tokens(self, length: int) -> int:
        """One, a few, many, none, or up to about the border of a page."""
        size, most = self.case.page_size, self.case.longest - length
        drawn = self.rng.random()
        if drawn < 0.3:
            new = 1
        elif drawn < 0.5:
            new = int(self.rng.integers(2, 18))
        elif drawn < 0.55:
            new = 0
        elif drawn < 0.8:
            new = (
                size * int(self.rng.integers(1, 4)) - length % size + int(self.rng.integers(-1, 2))
            )
        else:
            new = int(self.rng.integers(1, self.case.longest))
        return max(0, min(new, most))

    def _rows(self, tokens: int):
        """q, k, v of a step: outliers, rows of zeros, equal rows, numbers halfway between codes."""
        case, rng = self.case, self.rng
        made = []
        for heads, width in (
            (case.kv_heads * case.group, case.query_dim),
            (case.kv_heads, case.head_dim),
            (case.kv_heads, case.value_dim),
        ):
            x = rng.normal(0, 1, (tokens, heads, width))
            if len(made) and tokens:
                x *= 1 + 5 * (rng.random((heads, width)) < 0.05)
                x[rng.random(tokens) < 0.03] = 0.0
                x[rng.random(tokens) < 0.03] = rng.normal()
                halfway = rng.random(tokens) < 0.1
                x[halfway] = rng.integers(-31, 32, x[halfway].shape) / 2
                x[halfway, :, 0] = rng.choice([7.0, 14.0, 127.0 / 8])
                if rng.random() < 0.1 and case.kind in ("torch", "cpu"):
                    # Of more the square is no float32, and a norm makes 0 of it, as torch's does.
                    huge = min(torch.finfo(getattr(torch, case.dtype)).max / 4, 1e17)
                    bad = rng.choice([np.nan, np.inf, -np.inf, huge])
                    # An infinite score may be one that weighs nothing.
                    if "none" in case.formats:
                        bad = np.nan
                    x[rng.integers(tokens), rng.integers(heads), rng.integers(width)] = bad
            made.append(tensor(x).to(device_of(case), getattr(torch, case.dtype)))
        return made

    def _seen(self, request: Request, halves: tuple[Half, Half], new: int, exact: bool) -> Seen:
        """What the request's new queries see, as it stands in the pages."""
        size, context = self.case.page_size, len(request.keys[-1].x)
        context = max(len(rows.x) for rows in request.keys)
        queries = np.arange(context - new, context)
        visible = np.stack(
            [request.mask.visible(queries, context, h) for h in range(self.case.kv_heads)], -1
        )
        keys = np.arange(context)
        apart = queries[:, None] // size - keys[None] // size
        near = ((keys[None] < size) | ((apart == 0) | (apart == 1))) & exact
        sequence = request.sequence
        found = []
        for table, pairs, read in (
            (sequence.pages, ~near, Half.numbers),
            (sequence.exact_pages, near, Half.exactly),
        ):
            if read is Half.exactly and not exact:
                found += [None, None]
                continue
            here = held(table, context, size)
            wanted = (visible.any(-1) & pairs).any(0)
            if (wanted & ~here).any():
                at = int(np.flatnonzero(wanted & ~here)[0])
                raise Mismatch(f"key {at} is seen, and its page is not kept")
            for half in halves:
                rows = read(half, table, np.flatnonzero(here), size)
                full = np.full((context, *rows.shape[1:]), np.nan)
                full[here] = rows
                found.append(full)
        if self.case.latent:
            found = [*_of_latent(*found[:2]), *_of_latent(*found[2:])]
        return Seen(*found, near, visible)


def _of_latent(row: np.ndarray | None, rotary: np.ndarray | None):
    """Keys and values of latent rows and their rotary channels."""
    if row is None or rotary is None:
        return None, None
    return np.concatenate([row, rotary], -1), row


def _leading(pages: list[int]) -> int:
    """Pages given back before the first that is held."""
    return next((at for at, page in enumerate(pages) if page >= 0), len(pages))
