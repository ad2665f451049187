"""Prompts in, answers out: what `quantpage generate` runs for one model and one cache format."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from quantpage import console, cpu_core
from quantpage.cache.layout import PAGE_SIZES
from quantpage.engine.text import TextStream
from quantpage.hardware import find_device
from quantpage.integrations.hf_transformers import attach
from quantpage.integrations.hf_transformers.keys.key_maps import check_calibration
from quantpage.integrations.hf_transformers.loading.model import (
    WEIGHTS,
    check_format,
    load_model,
    most_positions,
)
from quantpage.integrations.hf_transformers.modules.arguments import caches_in

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen from the model's distribution."""

    temperature: float = 0.0
    """0: the most likely one (greedy), so that runs compare."""
    top_p: float = 1.0
    """Only the most likely tokens that are this probable together."""
    top_k: int = 0
    """Only this many of the most likely tokens; 0: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected 0 or more, got {self.top_k}")
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise ValueError(f"seed: expected a number of 64 bits, got {self.seed}")
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            name = "top_p" if self.top_p < 1 else "top_k"
            raise ValueError(
                f"{name}: expected a temperature above 0 beside it, as greedy decoding takes the "
                "most likely token"
            )

    def arguments(self) -> dict[str, Any]:
        """Of ``model.generate``; what the model's own generation_config says is overruled."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What the flags of `quantpage generate` say."""

    model: str
    prompts: Sequence[str]
    system: str | None = None
    kv_format: str = "int8"
    max_new_tokens: int = 128
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""
    page_size: int = 64
    calibration: str = "auto"
    """'auto', 'none' or a file."""
    dtype: str = "auto"
    device: str = "auto"
    weights: str = "model"
    raw: bool = False
    """Without the chat template."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("page_size", self.page_size, PAGE_SIZES),
            ("dtype", self.dtype, DTYPES),
            ("weights", self.weights, WEIGHTS),
        ):
            if value not in allowed:
                words = ", ".join(map(str, allowed))
                raise ValueError(f"{name}: expected one of {words}; got {value!r}")
        if not self.prompts or not all(each.strip() for each in self.prompts):
            raise ValueError("prompt: expected some text, got an empty prompt")
        if not all(self.stop):
            raise ValueError("stop: expected some text, got an empty one")
        given = {"prompt": self.prompts, "system": (self.system or "",), "stop": self.stop}
        for name, texts in given.items():
            for each in texts:
                check_text(name, each)


def check_text(name: str, text: str) -> None:
    """ValueError for bytes that are no UTF-8: flags and pipes bring them as halves of surrogate
    pairs, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected text in UTF-8, got {text[:60]!r}") from error


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer and what it took."""

    prompt: str
    text: str
    finish: str
    """'end' (the model's own end), 'stop' (a stop text) or 'length'."""
    prompt_ids: torch.Tensor
    """[1, tokens]"""
    answer_ids: torch.Tensor
    """[tokens]"""
    prompt_seconds: float
    """To the first token."""
    decode_seconds: float
    held_bytes: int
    """Of the cache's tensors, as allocated."""
    sixteen_bit_bytes: int
    """The same tokens in the model's dtype."""


class Session:
    """A model that is loaded once and answers prompts."""

    def __init__(self, request: GenerateRequest) -> None:
        """Load, and encode every prompt; ValueError for one that does not fit the model."""
        self.request = request
        self.model, self.tokenizer = load(request)
        device = self.model.device
        self.encoded = [self._encode(prompt).to(device) for prompt in request.prompts]
        for ids in self.encoded:
            check_positions(self.model.config, ids.shape[1], request.max_new_tokens)

    def answer(self, index: int, write: Callable[[str], None]) -> Answer:
        """Answer a prompt of the request; ``write`` is given the text piece by piece."""
        request, ids, model = self.request, self.encoded[index], self.model
        torch.manual_seed(request.sampling.seed)
        with (
            console.status(f"reading {ids.shape[1]:,} tokens") as waiting,
            attach(
                model,
                kv_format=request.kv_format,
                page_size=request.page_size,
                calibration=request.calibration,
            ),
        ):
            printer = Printer(self.tokenizer, request.stop, write, waiting.stop)
            start = time.perf_counter()
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request.max_new_tokens,
                streamer=printer,
                stopping_criteria=StoppingCriteriaList([Stopped(printer)]),
                return_dict_in_generate=True,
                pad_token_id=model.generation_config.pad_token_id or 0,
                **request.sampling.arguments(),
            )
            end = time.perf_counter()
            cache = caches_in(out)[0]
            first = printer.first_token or end
            answer = out.sequences[0, ids.shape[1] :].cpu()
            return Answer(
                prompt=request.prompts[index],
                text=printer.text,
                finish=self._finish(answer, printer.stopped),
                prompt_ids=ids,
                answer_ids=answer,
                prompt_seconds=first - start,
                decode_seconds=end - first,
                held_bytes=held_bytes(cache),
                sixteen_bit_bytes=cache.unquantized_bytes(),
            )

    def _finish(self, answer: torch.Tensor, stopped: bool) -> str:
        if stopped:
            return "stop"
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return "end" if len(answer) and int(answer[-1]) in ends else "length"

    def _encode(self, prompt: str) -> torch.Tensor:
        """[1, tokens]: through the model's chat template where it has one."""
        system, tokenizer = self.request.system, self.tokenizer
        if self.request.raw or tokenizer.chat_template is None:
            text = prompt if system is None else f"{system}\n\n{prompt}"
            return tokenizer(text, return_tensors="pt").input_ids
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        try:
            made = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise ValueError(
                f"system: expected what the model's chat template takes ({error}); "
                "leave --system out, or use --raw"
            ) from error
        return made["input_ids"]


def load(request: GenerateRequest) -> tuple[Any, Any]:
    """(model, tokenizer) of a request; a wrong format, calibration or device is known before they
    load."""
    check_format(request.model, request.kv_format)
    check_calibration(request.calibration, request.kv_format, request.model)
    device = find_device(request.device)
    if lost := cpu_core.loss(device.type):
        console.note(lost)
    with console.status(f"loading {request.model}"):
        return load_model(request.model, request.dtype, device, request.weights)


def check_positions(config: Any, prompt_tokens: int, new_tokens: int) -> None:
    """ValueError where prompt and answer are longer than the model has positions."""
    if prompt_tokens == 0:
        raise ValueError("prompt: expected at least one token, got none")
    limit = most_positions(config)
    if limit is None or prompt_tokens + new_tokens <= limit:
        return
    if prompt_tokens < limit:
        raise ValueError(
            f"max_new_tokens: expected at most {limit - prompt_tokens:,} after a prompt of "
            f"{prompt_tokens:,} tokens, as the model has {limit:,} positions; got {new_tokens:,}"
        )
    raise ValueError(
        f"prompt: expected fewer than {limit:,} tokens, as the model has {limit:,} positions; "
        f"got {prompt_tokens:,}"
    )


def held_bytes(cache: Any) -> int:
    """What a cache's tensors take: ours as allocated, Transformers' by its layers."""
    if hasattr(cache, "allocated_bytes"):
        return cache.allocated_bytes()
    planes = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(each.nbytes for each in planes if isinstance(each, torch.Tensor))


class Printer(BaseStreamer):
    """Hands an answer's text on as its tokens come, up to the first stop text."""

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str],
        write: Callable[[str], None],
        started: Callable[[], None] = lambda: None,
    ) -> None:
        """started: told that the first token is there."""
        self._stream = TextStream(tokenizer, stops)
        self._write, self._started = write, started
        self._prompt_came = False
        self.text = ""
        """What was written."""
        self.tokens: list[int] = []
        """Of the answer so far."""
        self.first_token: float | None = None
        """When it came, on ``perf_counter``'s clock."""

    @property
    def stopped(self) -> bool:
        """Whether a stop text came; nothing follows."""
        return self._stream.stopped

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then a token a call."""
        if not self._prompt_came:
            self._prompt_came = True
            return
        if self.first_token is None:
            self.first_token = time.perf_counter()
            self._started()
        for token in value.flatten().tolist():
            self.tokens.append(token)
            if not self.stopped:
                self._say(self._stream.push(token))

    def end(self) -> None:
        """Nothing comes after: what was held back is written."""
        self._say(self._stream.finish())

    def _say(self, text: str) -> None:
        if text:
            self.text += text
            self._write(text)


class Stopped(StoppingCriteria):
    """Ends the answer once a stop text came: asked after the streamer has had the token.

    Transformers' own stop strings need a tokenizer whose every token is a text of its own.
    """

    def __init__(self, printer: Printer) -> None:
        self._printer = printer

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """[rows] bool: asked after every token."""
        return torch.full((input_ids.shape[0],), self._printer.stopped, device=input_ids.device)
