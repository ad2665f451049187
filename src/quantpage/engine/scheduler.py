"""Who computes what in the next step: queues, pages, promises. Plain Python, no tensors.

A step holds the next token of every running answer and, with what is left of its budget, chunks of
prompts, oldest first. An answer is admitted with a *promise* of pages: its prompt and a part of its
longest answer, since most answers end early. Promises together never exceed the pool, and what the
prefix cache alone holds gives way. When answers grow beyond their promises and pages run out, the
one admitted last is preempted: its pages go to the prefix cache as far as they are full, it waits
at the head of the queue, and comes back with its longest answer promised whole. Such an answer is
never preempted again, so that no request is preempted twice.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from quantpage.cache import KnownPages, PageCopy, Reach
from quantpage.engine.holding import Holding, Shelves
from quantpage.engine.request import Request
from quantpage.errors import OutOfPages


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine may hold and compute at once.

    Raises ValueError for limits below 1, and a step with fewer tokens than answers.
    """

    pages: int
    """Pages of codes, for running answers and remembered prompts together."""
    max_running: int = 64
    """Answers that share a step."""
    max_waiting: int = 256
    """Answers that wait for a place or for pages; one more is refused (QueueFull)."""
    step_tokens: int = 256
    """Tokens a step: decode and prompt chunks together."""
    promised_share: float = 0.5
    """Part of an answer's longest length that its admission counts on."""

    def __post_init__(self) -> None:
        for name in ("pages", "max_running", "max_waiting", "step_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.step_tokens < self.max_running:
            raise ValueError(
                f"step_tokens: expected at least max_running {self.max_running}, so that every "
                f"answer gets a token, got {self.step_tokens}"
            )
        if not 0 <= self.promised_share <= 1:
            raise ValueError(f"promised_share: expected 0 to 1, got {self.promised_share}")


@dataclass(slots=True, eq=False)
class Answer:
    """One answer under way. Everything but ``cancelled`` belongs to the engine's thread."""

    request: Request
    index: int
    tokens: list[int]
    """The prompt and what was made so far."""
    emit: Any
    """Called with each Piece."""
    sampler: Any = None
    text: Any = None
    holding: Holding | None = None
    """Its pages; None while it waits."""
    promise: int = 0
    """Pages that admission counted on."""
    whole: bool = False
    """Its longest answer is promised; it is never preempted."""
    cached: int = 0
    scored: int = 0
    """Tokens of the prompt whose next one's log-probability was told."""
    cancelled: bool = False
    siblings: list["Answer"] = field(default_factory=list)
    """Answers to the same prompt that start from its pages once these are written."""

    @property
    def made(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def cached_length(self) -> int:
        """Tokens whose keys and values are in pages."""
        return 0 if self.holding is None else self.holding.length

    @property
    def to_score(self) -> int:
        """What ``scored`` is in the end."""
        return 0 if self.request.prompt_logprobs is None else len(self.request.prompt) - 1


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one answer that a step computes."""

    answer: Answer
    tokens: int
    kept: int = 1
    """Of them, the last ones whose logits are wanted."""


@dataclass(frozen=True, slots=True)
class _Taken:
    """Places and promised pages of answers that run."""

    places: int
    pages: int

    def beside(self, answers: int, promise: int) -> "_Taken":
        """With so many more answers of so many pages each."""
        return _Taken(self.places + answers, self.pages + answers * promise)

    def within(self, limits: Limits) -> bool:
        """Whether they may all run at once."""
        return self.places <= limits.max_running and self.pages <= limits.pages


class Scheduler:
    """Waiting and running answers, over pools that nobody else uses."""

    def __init__(
        self,
        limits: Limits,
        page_size: int,
        shelves: Shelves,
        known: KnownPages | None,
        most_scored: int = 1 << 30,
    ) -> None:
        """most_scored: tokens of prompts of which a step gives log-probabilities."""
        self.limits, self.page_size, self.known = limits, page_size, known
        self._shelves, self._most_scored = shelves, most_scored
        self.waiting: deque[Answer] = deque()
        self.running: list[Answer] = []
        """In the order of admission."""
        self.preemptions = 0

    def refuse(self, request: Request) -> None:
        """Raise ValueError for a request that never fits."""
        if request.answers > self.limits.max_running:
            raise ValueError(
                f"n: expected at most {self.limits.max_running} answers at once, "
                f"got {request.answers}"
            )
        need = self._whole(request) * request.answers
        if need > self.limits.pages:
            raise ValueError(
                f"max_tokens: expected a prompt and {request.answers} longest answer(s) of at most "
                f"{self.limits.pages} pages of {self.page_size} tokens, got {need} pages"
            )

    def room(self, prompt: int, answers: int) -> int:
        """The longest answer in tokens that fits beside a prompt of so many, ``answers`` times."""
        return (self.limits.pages // answers - 1) * self.page_size - prompt

    def add(self, answers: list[Answer]) -> None:
        """Queue the answers of one request."""
        first, *rest = answers
        first.siblings = rest
        self.waiting.append(first)

    def admit(self) -> None:
        """Let waiting answers run, in their order, as long as their promises fit."""
        taken = self._taken()
        while self.waiting:
            answer = self.waiting[0]
            group = [answer, *answer.siblings]
            promise = self._promised(answer)
            taken = taken.beside(len(group), promise)
            if not taken.within(self.limits):
                return
            self.waiting.popleft()
            for each in group:
                each.promise = promise
            answer.holding = Holding(self._shelves)
            # Before its prompt is looked for: whatever is raised there, it is somewhere.
            self.running.append(answer)
            if self.known is not None:
                # At least one token is computed: its logits are the answer's first. Pages have no
                # logits, so that tokens are computed as well whose log-probabilities are not told.
                last = answer.scored if answer.scored < answer.to_score else -1
                answer.holding.adopt(self.known.acquire(answer.tokens[:last])[1])
                if not answer.made:
                    answer.cached = answer.holding.length

    def left_waiting(self, arriving: list[list[Answer]]) -> int:
        """Answers of the queue, and of the requests arriving behind it, that cannot run now."""
        queue = [[each, *each.siblings] for each in list(self.waiting)] + arriving
        taken = self._taken()
        for at, group in enumerate(queue):
            taken = taken.beside(len(group), self._promised(group[0]))
            if not taken.within(self.limits):
                return sum(map(len, queue[at:]))
        return 0

    def next_step(self) -> tuple[list[Chunk], list[tuple[Reach, PageCopy]]]:
        """What to compute now, with its pages reserved, and the copies to make first."""
        left, rows = self.limits.step_tokens, self._most_scored
        chunks: list[Chunk] = []
        copies: list[tuple[Reach, PageCopy]] = []
        # Decode first: whoever reads an answer waits for its next token.
        for answer in sorted(self.running, key=lambda each: _missing(each) > 1):
            if answer not in self.running:
                continue  # preempted for one before it
            chunk = _chunk(answer, left, rows)
            while chunk.tokens > 0:
                assert answer.holding is not None
                try:
                    copies += answer.holding.reserve(chunk.tokens)
                except OutOfPages:
                    if self._make_room(answer, chunk.tokens, chunks):
                        continue
                    break
                chunks.append(chunk)
                left -= chunk.tokens
                rows -= chunk.kept if answer.scored < answer.to_score else 0
                break
        return chunks, copies

    def committed(self, chunk: Chunk) -> None:
        """A chunk is written: count it, remember its pages, start the answers beside it."""
        answer = chunk.answer
        assert answer.holding is not None
        answer.holding.commit()
        if answer.made == 0 and self.known is not None:
            self.known.insert(answer.tokens[: answer.cached_length], answer.holding.tables)

    def fork(self, answer: Answer) -> list[Answer]:
        """The answers to the same prompt, running from its pages now that they are written."""
        started, answer.siblings = answer.siblings, []
        assert answer.holding is not None
        for each in started:
            each.holding, each.cached = answer.holding.fork(), answer.cached
            each.scored = answer.scored
            self.running.append(each)
        return started

    def finish(self, answer: Answer) -> None:
        """An answer ended: its full pages are remembered, the rest is free."""
        if answer.holding is not None:
            self._let_go(answer)
            self.running.remove(answer)
            # A prompt that is cancelled before its answers have started takes nobody with it.
            for each in reversed(answer.siblings):
                self.waiting.appendleft(each)
            answer.siblings = []
        elif answer in self.waiting:
            at = self.waiting.index(answer)
            del self.waiting[at]
            if answer.siblings:
                first, *rest = answer.siblings
                first.siblings = rest
                self.waiting.insert(at, first)
                answer.siblings = []

    def abandon(self, chunks: list[Chunk]) -> None:
        """A step failed: whatever its answers hold may be half written, and is let go."""
        for answer in {id(chunk.answer): chunk.answer for chunk in chunks}.values():
            if answer.holding is not None:
                answer.holding.free()
                answer.holding = None
                self.running.remove(answer)

    def _make_room(self, answer: Answer, tokens: int, chunks: list[Chunk]) -> bool:
        """Free pages for ``reserve(tokens)``; False where the answer has to wait a step."""
        assert answer.holding is not None
        if self.known is not None and self.known.give_way(answer.holding.shortages(tokens)):
            return True
        busy = {id(chunk.answer) for chunk in chunks}
        victims = (
            each
            for each in reversed(self.running)
            if not each.whole and each is not answer and id(each) not in busy
        )
        victim = next(victims, None)
        if victim is None:
            return False
        self._preempt(victim)
        return True

    def _preempt(self, answer: Answer) -> None:
        self.preemptions += 1
        self._let_go(answer)
        answer.whole = True
        self.running.remove(answer)
        self.waiting.appendleft(answer)

    def _let_go(self, answer: Answer) -> None:
        assert answer.holding is not None
        if self.known is not None:
            self.known.insert(answer.tokens[: answer.cached_length], answer.holding.tables)
        answer.holding.free()
        answer.holding, answer.promise = None, 0

    def _taken(self) -> _Taken:
        """What running answers, and those that start beside them, hold."""
        answers = [each for runs in list(self.running) for each in (runs, *runs.siblings)]
        return _Taken(len(answers), sum(each.promise for each in answers))

    def _promised(self, answer: Answer) -> int:
        """Pages of what an answer holds and of the part that it is promised of what it may make."""
        share = 1.0 if answer.whole else self.limits.promised_share
        rest = answer.request.max_tokens - answer.made
        return -(-(len(answer.tokens) + int(share * rest)) // self.page_size) + 1

    def _whole(self, request: Request) -> int:
        # One more than the tokens take: answers that share a partly filled page copy it.
        return -(-(len(request.prompt) + request.max_tokens) // self.page_size) + 1


def _chunk(answer: Answer, left: int, rows: int) -> Chunk:
    """An answer's part of a step that has room for ``left`` tokens and the logits of ``rows``."""
    tokens = min(_missing(answer), left)
    if answer.scored >= answer.to_score:
        return Chunk(answer, tokens)
    # What is computed again, after a preemption, was told.
    again = max(0, answer.scored - answer.cached_length)
    tokens = min(tokens, again + max(rows, 0))
    return Chunk(answer, tokens, max(1, tokens - again))


def _missing(answer: Answer) -> int:
    """Tokens that have to be computed before the next one is known."""
    return len(answer.tokens) - answer.cached_length
