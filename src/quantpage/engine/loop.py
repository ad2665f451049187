"""The engine: one thread that owns the model and its pages, and calls that reach it safely."""

import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantpage.cache import KnownPages
from quantpage.cache.saved import read_pages, write_pages
from quantpage.cache.tensor_file import Damaged
from quantpage.engine.prefix_file import collect, restore
from quantpage.engine.request import Piece, Request, TokenChoice
from quantpage.engine.sampling import Sampler, likeliest
from quantpage.engine.scheduler import Answer, Chunk, Limits, Scheduler
from quantpage.engine.scores import score
from quantpage.engine.step import StepRunner, compile_steps
from quantpage.engine.text import TextStream
from quantpage.errors import CorruptCache, EngineStopped, QuantPageError, QueueFull
from quantpage.integrations.hf_transformers.attach import Attached

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STEP_FAILURES = (RuntimeError, ValueError, MemoryError, QuantPageError)
"""What a model or a kernel raises where it cannot do a step; anything else is a mistake somewhere,
and is also said on stderr."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters since the start, and what stands now."""

    running: int
    waiting: int
    pages: int
    used_pages: int
    """Held by answers or remembered prompts."""
    answer_pages: int
    """Of them, held by answers, which keep others waiting."""
    remembered_pages: int
    """Held by the prefix cache, which lets them go when answers need them."""
    steps: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    """Of the prompts' tokens, found in the prefix cache."""
    made_tokens: int


@dataclass(frozen=True, slots=True)
class Ticket:
    """A submitted request."""

    answers: tuple[Answer, ...]


class Engine:
    """Continuous batching of one attached model.

    ``submit(request, emit)`` returns at once; ``emit`` is called with a ``Piece`` for all that an
    answer says, from the engine's thread, and must not block. Use as a context manager, or call
    ``stop``.
    """

    def __init__(
        self,
        attached: Attached,
        tokenizer: "PreTrainedTokenizerBase",
        limits: Limits,
        prefix_cache: bool = True,
        cuda_graphs: bool = True,
        warm_up: bool = False,
    ) -> None:
        """tokenizer: the model's. prefix_cache: False forgets prompts with their answers.
        cuda_graphs: False runs decode steps on a GPU kernel by kernel too. warm_up: True compiles
        what steps on a GPU will ask for now, and not while the first requests wait.

        Raises UnsupportedModel for models with another state than keys and values, with rotations
        that change with the longest request of a step, or in which tokens see later ones.
        """
        if warm_up:
            compile_steps(attached, limits)
        self._runner = StepRunner(attached, limits, cuda_graphs)
        self.tokenizer, self.limits = tokenizer, limits
        shelves, page_size = self._runner.memory.shelves, self._runner.page_size
        known = KnownPages(shelves, page_size) if prefix_cache else None
        self._scheduler = Scheduler(limits, page_size, shelves, known, self._runner.most_scored)
        self._inbox: deque[list[Answer]] = deque()
        self._errands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._ended = False
        self._wake = threading.Condition()
        self._stopping, self._draining = False, False
        self._steps = self._prompt_tokens = self._cached_tokens = self._made_tokens = 0
        self._thread = threading.Thread(target=self._run, name="quantpage-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, emit: Callable[[Piece], None]) -> Ticket:
        """Queue a request.

        Raises ValueError where it never fits, in pages or in the model's positions, or names tokens
        that the model has not, QueueFull when too many wait, EngineStopped.
        """
        self.refuse(request)
        answers = [
            Answer(request, index, list(request.prompt), emit) for index in range(request.answers)
        ]
        with self._wake:
            if self._stopping or self._draining:
                raise EngineStopped("engine: expected a running engine, got one that was stopped")
            # What came since the last step waits for no one where it can run in the next.
            waiting = self._scheduler.left_waiting([*self._inbox, answers])
            if waiting > self.limits.max_waiting:
                raise QueueFull(
                    f"queue: expected at most {self.limits.max_waiting} waiting answers, got "
                    f"{waiting}"
                )
            self._inbox.append(answers)
            self._wake.notify()
        return Ticket(tuple(answers))

    def refuse(self, request: Request) -> None:
        """Raise the ValueError of ``submit``, for who has more to submit before it is this one's
        turn."""
        self._scheduler.refuse(request)
        self._runner.refuse(request)

    def room(self, prompt: int, answers: int = 1) -> int:
        """The longest answer in tokens that fits beside a prompt of so many, ``answers`` times."""
        return self._scheduler.room(prompt, answers)

    def cancel(self, ticket: Ticket) -> None:
        """End a request's answers before the next step; those that ended are left alone."""
        with self._wake:
            for answer in ticket.answers:
                answer.cancelled = True
            self._wake.notify()

    def stop(self, drain: bool = False, timeout: float | None = None) -> None:
        """End the thread: after the answers under way (``drain``), or cancelling them.

        timeout: seconds to drain; what is not done by then is cancelled.
        """
        with self._wake:
            self._draining = True
            if not drain:
                self._stopping = True
            self._wake.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._wake:
                self._stopping = True
                self._wake.notify()
            self._thread.join()

    def save_prefixes(self, path: Path | str) -> int:
        """Write the remembered prompts and their pages to a file, whole or not at all; pages.

        Answers under way wait only while the pages are copied. Also after ``stop``. Raises
        CacheError where the file cannot be written.
        """
        known, memory, model = self._remembered(), self._runner.memory, self._runner.digest()
        saved = self._between_steps(lambda: collect(memory, known, model))
        write_pages(path, saved)
        return max((pages for pages, _ in saved.counts.values()), default=0)

    def load_prefixes(self, path: Path | str) -> int:
        """Remember what ``save_prefixes`` wrote, as far as there is room; pages.

        Raises CorruptCache, with nothing changed, for a damaged file or one of another model,
        format or calibration; CacheError or FileNotFoundError where it cannot be read.
        """
        known, memory, model = self._remembered(), self._runner.memory, self._runner.digest()
        saved = read_pages(path, memory.layouts)
        try:
            return self._between_steps(lambda: restore(memory, known, saved, model))
        except Damaged as error:
            raise CorruptCache(f"{path}: {error}") from error

    def _remembered(self) -> KnownPages:
        if self._scheduler.known is None:
            raise ValueError("prefix_cache: expected an engine that remembers prompts, got none")
        return self._scheduler.known

    def _between_steps(self, work: Callable[[], Any]) -> Any:
        """The result of ``work``, done where no step is under way: by the engine's thread."""
        done: Future[Any] = Future()
        with self._wake:
            ended = self._ended
            if not ended:
                self._errands.append((work, done))
                self._wake.notify()
        return work() if ended else done.result()

    def _run_errands(self) -> None:
        while self._errands:
            work, done = self._errands.popleft()
            try:
                done.set_result(work())
            except _STEP_FAILURES as error:
                done.set_exception(error)

    def stats(self) -> Stats:
        """What the engine holds and has done, from any thread."""
        shelves, known = self._runner.memory.shelves, self._scheduler.known
        used = {reach: shelf.pool.used for reach, shelf in shelves.items()}
        idle = {} if known is None else {reach: each.idle_pages for reach, each in known.items()}
        return Stats(
            running=len(self._scheduler.running),
            waiting=self._waiting() + sum(map(len, list(self._inbox))),
            pages=self.limits.pages,
            used_pages=max(used.values()),
            # Counted one after the other, while answers come and go.
            answer_pages=max(max(0, used[reach] - idle.get(reach, 0)) for reach in used),
            remembered_pages=0 if known is None else len(known),
            steps=self._steps,
            preemptions=self._scheduler.preemptions,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            made_tokens=self._made_tokens,
        )

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._thread.is_alive() and not self._draining

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _waiting(self) -> int:
        return sum(1 + len(each.siblings) for each in list(self._scheduler.waiting))

    def _run(self) -> None:
        """The thread; where it dies of something unforeseen, nobody is left waiting."""
        try:
            if self._runner.device.type == "cuda":
                # A thread begins on the first GPU, whatever the one that made it is on.
                torch.cuda.set_device(self._runner.device)
            self._loop()
        except BaseException as error:
            with self._wake:
                self._draining = self._stopping = True
                inbox, self._inbox = list(self._inbox), deque()
            for answers in inbox:
                self._scheduler.add(answers)
            self._end_all("error", error)
            raise
        finally:
            with self._wake:
                self._ended = True
            self._run_errands()

    def _loop(self) -> None:
        """Take what came, drop what was cancelled, compute a step."""
        scheduler = self._scheduler
        while True:
            with self._wake:
                while not (
                    self._inbox
                    or self._errands
                    or scheduler.waiting
                    or scheduler.running
                    or self._draining
                ):
                    self._wake.wait()
                inbox, self._inbox = list(self._inbox), deque()
                for answers in inbox:
                    scheduler.add(answers)
                stopping = self._stopping
                idle = not (scheduler.waiting or scheduler.running)
            self._run_errands()
            if stopping:
                self._end_all("cancelled", None)
            if stopping or (idle and self._draining):
                return
            self._drop_cancelled()
            with self._wake:
                # Who leaves the queue runs: whoever submits meanwhile must see one or the other.
                scheduler.admit()
            if scheduler.running:
                self._step()

    def _step(self) -> None:
        chunks, copies = self._scheduler.next_step()
        if not chunks:
            return
        try:
            logits = self._runner.run(chunks, copies)
            self._steps += 1
            for chunk in chunks:
                self._scheduler.committed(chunk)
            self._answer(chunks, logits)
        except Exception as error:  # noqa: BLE001  whose requests fail, and nobody else's
            if not isinstance(error, _STEP_FAILURES):
                self._say_unforeseen()
            self._scheduler.abandon(chunks)
            self._runner.reset()
            for answer in {id(each.answer): each.answer for each in chunks}.values():
                for each in [answer, *answer.siblings]:
                    self._emit(each, finish_reason="error", error=error)

    def _answer(self, chunks: list[Chunk], logits: Any) -> None:
        ends = list(accumulate(chunk.kept for chunk in chunks))
        for chunk, end in zip(chunks, ends, strict=True):
            if chunk.answer.scored < chunk.answer.to_score:
                self._score(chunk, logits[end - chunk.kept : end])
        last = {end - 1: chunk.answer for chunk, end in zip(chunks, ends, strict=True)}
        ready = [at for at, answer in last.items() if _complete(answer)]
        plain = likeliest(logits[ready]) if ready else []
        for at, token in zip(ready, plain, strict=True):
            answer = last[at]
            beside = self._scheduler.fork(answer) if answer.siblings else []
            for each in [answer, *beside]:
                try:
                    self._choose(each, token, logits[at])
                except Exception as error:  # noqa: BLE001  what one asked for ends no other's answer
                    self._drop(each, "error", error)

    @torch.inference_mode()
    def _score(self, chunk: Chunk, logits: Tensor) -> None:
        """Tell what the model gives the tokens of a prompt behind those of a chunk."""
        answer, request = chunk.answer, chunk.answer.request
        at = answer.scored
        tokens = request.prompt[at + 1 : answer.cached_length + 1]
        if not tokens:
            # Computed again, after a preemption.
            return
        assert request.prompt_logprobs is not None
        try:
            prompt = score(logits[: len(tokens)], tokens, request.prompt_logprobs)
        except Exception as error:  # noqa: BLE001  what one asked for ends no other's answer
            for one in [*answer.siblings, answer]:
                self._drop(one, "error", error)
            return
        answer.scored += len(tokens)
        self._emit(answer, prompt=tuple(prompt))

    def _choose(self, answer: Answer, likeliest_token: int, logits: Any) -> None:
        if answer.sampler is None:
            self._begin(answer)
        if answer.request.max_tokens == 0:
            self._scheduler.finish(answer)
            self._emit(answer, finish_reason="length")
            return
        if answer.sampler.plain:
            choice = answer.sampler.take(likeliest_token)
        else:
            choice = answer.sampler.choose(logits)
        self._take(answer, choice)

    def _begin(self, answer: Answer) -> None:
        request = answer.request
        answer.sampler = Sampler(request, answer.index)
        answer.text = TextStream(
            self.tokenizer,
            request.stop,
            keep_stop=request.keep_stop,
            keep_special=request.keep_special,
            min_tokens=request.min_tokens,
        )
        if answer.index == 0:
            self._prompt_tokens += len(answer.request.prompt)
            self._cached_tokens += answer.cached

    def _take(self, answer: Answer, choice: TokenChoice) -> None:
        """A token was chosen: say its text, and end the answer where it ends."""
        request = answer.request
        answer.tokens.append(choice.token)
        self._made_tokens += 1
        reason = "length" if answer.made >= request.max_tokens else None
        text = ""
        ends = choice.token in request.stop_tokens
        if request.keep_stop or not ends:
            text = answer.text.push(choice.token)
        if ends or answer.text.stopped or answer.sampler.done():
            reason = "stop"
        if reason is not None:
            text += answer.text.finish()
            self._scheduler.finish(answer)
        choices = () if request.logprobs is None else (choice,)
        self._emit(answer, text=text, choices=choices, finish_reason=reason)

    def _drop_cancelled(self) -> None:
        scheduler = self._scheduler
        beside = [each for some in scheduler.waiting for each in some.siblings]
        beside += [each for some in scheduler.running for each in some.siblings]
        for answer in [*scheduler.running, *list(scheduler.waiting), *beside]:
            if answer.cancelled:
                self._drop(answer, "cancelled", None)

    def _end_all(self, reason: str, error: BaseException | None) -> None:
        scheduler = self._scheduler
        while scheduler.running or scheduler.waiting:
            self._drop((scheduler.running or list(scheduler.waiting))[0], reason, error)

    def _drop(self, answer: Answer, reason: str, error: BaseException | None) -> None:
        for each in [*self._scheduler.running, *self._scheduler.waiting]:
            if answer in each.siblings:
                each.siblings.remove(answer)
        self._scheduler.finish(answer)
        self._emit(answer, finish_reason=reason, error=error)

    def _emit(self, answer: Answer, **news: Any) -> None:
        try:
            answer.emit(Piece(answer.index, made=answer.made, cached=answer.cached, **news))
        except Exception:  # noqa: BLE001  said as a thread's own would be; the engine goes on
            answer.cancelled = True
            self._say_unforeseen()

    def _say_unforeseen(self) -> None:
        """What is handled now, with where it was raised, as if it had ended the thread."""
        threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), self._thread)))


def _complete(answer: Answer) -> bool:
    """Whether all tokens of an answer are in pages, so that the logits say its next one."""
    return answer.holding is not None and answer.cached_length == len(answer.tokens)
