"""One prompt, one model, one cache format: the run behind `quantpage generate`."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from transformers import TextStreamer

from quantpage import console
from quantpage.cache.layout import PAGE_SIZES
from quantpage.formats.per_layer import LayerFormats
from quantpage.hardware import find_device
from quantpage.integrations.hf_transformers import attach
from quantpage.integrations.hf_transformers.arguments import caches_in
from quantpage.integrations.hf_transformers.model import load_model, text_config

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("model", "int8")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What the flags of `quantpage generate` say."""

    model: str
    prompt: str
    kv_format: str = "int8"
    max_new_tokens: int = 128
    page_size: int = 64
    compare: bool = False
    dtype: str = "auto"
    device: str = "auto"
    weights: str = "model"
    raw: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("page_size", self.page_size, PAGE_SIZES),
            ("dtype", self.dtype, DTYPES),
            ("weights", self.weights, WEIGHTS),
        ):
            if value not in allowed:
                words = ", ".join(map(str, allowed))
                raise ValueError(f"{name}: expected one of {words}; got {value!r}")
        if not self.prompt.strip():
            raise ValueError("prompt: expected some text, got an empty prompt")


@dataclass(frozen=True, slots=True)
class Run:
    """What one generation took."""

    kv_format: str
    answer: torch.Tensor
    """Token ids of the answer."""
    logits: torch.Tensor
    """[answer tokens, vocabulary] float32, as they were when each token was chosen."""
    cache_bytes: int
    unquantized_bytes: int
    """The same tokens in the model's dtype."""
    prefill_seconds: float
    decode_seconds: float


def run(request: GenerateRequest) -> None:
    """Load, generate with streaming, and print the table."""
    LayerFormats.parse(request.kv_format).refuse_static()
    device = find_device(request.device)
    dtype = request.dtype if request.dtype == "auto" else getattr(torch, request.dtype)
    with console.status(f"loading {request.model}"):
        model, tokenizer = load_model(request.model, dtype, device)
        if request.weights == "int8":
            from quantpage.integrations.int8_weights import quantize_weights

            quantize_weights(model)
    prompt = encode(tokenizer, request.prompt, request.raw).to(device)
    check_positions(model.config, prompt.shape[1], request.max_new_tokens)
    with console.status(f"reading {prompt.shape[1]:,} tokens") as waiting:
        streamer = _Clock(tokenizer, waiting, skip_prompt=True, skip_special_tokens=True)
        quantized = generate_once(model, prompt, request, request.kv_format, streamer)
    runs = [quantized]
    if request.compare and request.kv_format != "none":
        with console.status("running the same prompt with an unquantized cache"):
            runs.append(generate_once(model, prompt, request, "none", _Clock(None)))
            exact = _teacher_forced(model, prompt, quantized.answer)
    else:
        exact = None
    console.ERR.print(_table(runs, prompt.shape[1], exact))


def check_positions(config: Any, prompt_tokens: int, new_tokens: int) -> None:
    """ValueError where prompt and answer are longer than the model has positions."""
    limit = getattr(text_config(config), "max_position_embeddings", None)
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


def encode(tokenizer: Any, prompt: str, raw: bool) -> torch.Tensor:
    """[1, tokens]: through the model's chat template where it has one."""
    if raw or tokenizer.chat_template is None:
        return tokenizer(prompt, return_tensors="pt").input_ids
    messages = [{"role": "user", "content": prompt}]
    made = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return made["input_ids"]


def generate_once(
    model: Any, prompt: torch.Tensor, request: GenerateRequest, kv_format: str, clock: "_Clock"
) -> Run:
    """Greedy generation through one cache format."""
    with attach(model, kv_format=kv_format, page_size=request.page_size) as attached:
        start = time.perf_counter()
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            streamer=clock,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=model.generation_config.pad_token_id or 0,
        )
        end = time.perf_counter()
        cache = caches_in(out)[0]
        first = clock.first_token or end
        return Run(
            kv_format=attached.formats.name,
            answer=out.sequences[0, prompt.shape[1] :].cpu(),
            logits=torch.cat(out.logits).float().cpu(),
            cache_bytes=cache.used_bytes(),
            unquantized_bytes=cache.unquantized_bytes(),
            prefill_seconds=first - start,
            decode_seconds=end - first,
        )


class _Clock(TextStreamer):
    """Prints as TextStreamer does and notes when the first token came; silent without tokenizer.

    waiting: a spinner that ends with the first token.
    """

    def __init__(self, tokenizer: Any, waiting: Any = None, **kwargs: Any) -> None:
        super().__init__(tokenizer, **kwargs)
        self._waiting = waiting
        self.first_token: float | None = None
        self._calls = 0

    def put(self, value: torch.Tensor) -> None:
        self._calls += 1
        if self._calls == 2:
            self.first_token = time.perf_counter()
            if self._waiting is not None:
                self._waiting.stop()
        if self.tokenizer is not None:
            super().put(value)

    def end(self) -> None:
        if self.tokenizer is not None:
            super().end()


@torch.inference_mode()
def _teacher_forced(model: Any, prompt: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Logits of the same answer without any cache: [answer tokens, vocabulary]."""
    tokens = torch.cat([prompt, answer[None].to(prompt.device)], dim=1)
    out = model(tokens, use_cache=False, logits_to_keep=answer.shape[0] + 1)
    return out.logits[0, :-1].float().cpu()


def _table(runs: list[Run], prompt_tokens: int, exact: torch.Tensor | None) -> Table:
    table = Table(title=f"{prompt_tokens} prompt tokens", title_justify="left")
    for column in ("cache", "bytes", "of 16 bit", "prefill tok/s", "decode tok/s", "agreement"):
        table.add_column(column, justify="left" if column == "cache" else "right", overflow="fold")
    for each in runs:
        new = each.answer.shape[0]
        decode = f"{(new - 1) / each.decode_seconds:.1f}" if new > 1 else "-"
        agreement = "-"
        if exact is not None and each is runs[0]:
            same = (each.logits.argmax(-1) == exact.argmax(-1)).float().mean().item()
            agreement = f"{same:.1%} of tokens, KL {_divergence(exact, each.logits):.1e}"
        table.add_row(
            each.kv_format,
            f"{each.cache_bytes:,}",
            f"{each.cache_bytes / each.unquantized_bytes:.1%}",
            f"{prompt_tokens / each.prefill_seconds:.1f}",
            decode,
            agreement,
        )
    return table


def _divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL(exact || other) a token, in nats."""
    p, q = exact.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
