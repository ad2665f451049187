"""One evaluation from a model folder to its table."""

import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

import quantpage
from quantpage import console
from quantpage.evaluate.advise import CANDIDATES, Advice, advise, check_budget, forwards
from quantpage.evaluate.caches import (
    Candidate,
    default_names,
    find_candidates,
    ours,
    unquantized,
)
from quantpage.evaluate.score import Scores, Window, cut_windows, log_probabilities
from quantpage.evaluate.table import Row
from quantpage.evaluate.text import default_path, obtain, read
from quantpage.formats import KVFormat
from quantpage.formats.per_layer import LayerFormats
from quantpage.hardware import find_device
from quantpage.integrations.hf_transformers.loading.model import (
    load_config,
    load_model,
    most_positions,
)

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class EvaluateRequest:
    """What the flags of `quantpage evaluate` say."""

    model: str
    text: Path | None = None
    """A text file in UTF-8; None: Jane Austen's novels, kept in the user's cache folder."""
    formats: tuple[str | KVFormat | LayerFormats, ...] = ()
    """Whatever ``attach`` takes, and names of PEERS; empty: every dynamic format and every peer
    that is installed."""
    windows: int = 2
    prompt: int = 1024
    """Tokens read before the first scored one, in each window."""
    scored: int = 1024
    """Tokens scored in each window."""
    chunk: int = 32
    """Scored tokens a forward. Our formats do not depend on it; the caches of Transformers keep up
    to this many more tokens unquantized."""
    page_size: int = 64
    dtype: str = "float32"
    device: str = "auto"
    calibration: str = "auto"
    """Of keys in our formats, as ``attach`` takes it; 'none' for None."""

    def __post_init__(self) -> None:
        for name in ("windows", "prompt", "scored", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}; got {self.dtype!r}")


def evaluate(request: EvaluateRequest) -> list[Row]:
    """Score every candidate on the same windows; rows in the order of the request.

    Arguments and names are checked before the model is loaded. Progress goes to stderr.
    """
    config = load_config(request.model)
    names = list(request.formats) or default_names()
    candidates = find_candidates(config, names, request.page_size, request.calibration)
    model, windows, text = _prepare(request, config)
    _tell_unmeasured(request, candidates)
    scores = _score_all(model, windows, candidates, request.chunk)
    return [
        _row(request, candidate, found, text, model.device.type)
        for candidate, found in zip(candidates, scores, strict=True)
    ]


def _tell_unmeasured(request: EvaluateRequest, candidates: list[Candidate]) -> None:
    """A table of short windows would praise a format of which nothing was read."""
    last = request.prompt + request.scored - 1
    for each in candidates:
        told = min(request.scored, max(0, last - each.codes_from))
        if told < request.scored:
            console.note(
                f"{each.name}: {request.scored - told:,} of {request.scored:,} predictions a "
                f"window see only pages that are kept exact (tokens before {each.codes_from:,} "
                "read no code); use a longer --prompt"
            )


def advise_model(request: EvaluateRequest, budget: float, context: int) -> tuple[Advice, str]:
    """(``advise`` for a model folder, the text's name); ``formats`` are what is chosen from.

    budget: bits a number, of what a request of ``context`` tokens holds. Progress goes to stderr.
    """
    config = load_config(request.model)
    chosen = request.formats or CANDIDATES
    check_budget(config, budget, chosen, request.page_size, context)
    model, windows, text = _prepare(request, config)
    _tell_unmeasured(request, [ours(config, each, request.page_size) for each in chosen])
    with console.progress() as progress:
        total = forwards(config, len(windows), chosen)
        task = progress.add_task("a layer and half at a time", total=total)
        if not progress.console.is_terminal:
            console.note(f"{total:,} forwards of {request.prompt + request.scored:,} tokens")
        advice = advise(
            model,
            windows,
            budget,
            candidates=chosen,
            page_size=request.page_size,
            calibration=request.calibration,
            context=context,
            each=lambda: progress.advance(task),
        )
    return advice, text


def _prepare(request: EvaluateRequest, config: Any) -> tuple[Any, list[Window], str]:
    """(model, windows, the text's name), after what can be checked without weights."""
    limit = most_positions(config)
    if limit is not None and request.prompt + request.scored > limit:
        raise ValueError(
            f"prompt, scored: expected at most {limit:,} tokens together, as the model has so many "
            f"positions; got {request.prompt:,} + {request.scored:,}"
        )
    device = find_device(request.device)
    text = obtain(default_path()) if request.text is None else request.text
    content = read(text)
    with console.status(f"loading {request.model}"):
        model, tokenizer = load_model(request.model, request.dtype, device)
    windows = cut_windows(tokenizer, content, request.windows, request.prompt, request.scored)
    return model, windows, text.name


def _score_all(
    model: Any, windows: list[Window], candidates: list[Candidate], chunk: int
) -> list[Scores]:
    """Window by window, so that only one window's unquantized predictions are held."""
    for candidate in candidates:
        # What only the model can refuse, such as another's calibration, before anything is scored.
        with candidate.attaching(model):
            pass
    scores = [Scores() for _ in candidates]
    with console.progress() as progress:
        task = progress.add_task("", total=len(windows) * (len(candidates) + 1))
        for number, window in enumerate(windows, 1):
            where = f"window {number} of {len(windows)}"
            progress.update(task, description=f"{where}: unquantized")
            if not progress.console.is_terminal:
                # A bar is drawn on terminals only; a log gets a line a window.
                console.note(where)
            with unquantized(model) as new_cache:
                exact = log_probabilities(model, window, new_cache, chunk)
            progress.advance(task)
            for candidate, found in zip(candidates, scores, strict=True):
                progress.update(task, description=f"{where}: {candidate.name}")
                with candidate.attaching(model) as new_cache:
                    found.add(window, exact, log_probabilities(model, window, new_cache, chunk))
                progress.advance(task)
    return scores


def _row(
    request: EvaluateRequest, candidate: Candidate, scores: Scores, text: str, device: str
) -> Row:
    low, high = scores.sure_divergence()
    return Row(
        cache=candidate.name,
        bits_per_value=candidate.bits_per_value,
        bytes_per_token=candidate.bytes_per_token,
        sixteen_bit_tokens=candidate.sixteen_bit_tokens,
        perplexity=scores.perplexity,
        kl_mean=scores.mean_divergence,
        kl_p99=scores.p99_divergence,
        kl_max=scores.most_divergence,
        kl_median=scores.median_divergence,
        kl_low=low,
        kl_high=high,
        top1=scores.top1,
        overlap=scores.mean_overlap,
        tokens=scores.tokens,
        windows=request.windows,
        prompt=request.prompt,
        chunk=request.chunk,
        page_size=request.page_size,
        calibration=candidate.calibration,
        model=Path(request.model).name,
        text=text,
        dtype=request.dtype,
        **made_with(device),
    )


def made_with(device: str) -> dict[str, str]:
    """The last columns of a row: on what, and with which versions."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "quantpage": f"{quantpage.__version__} {_commit()}".strip(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _commit() -> str:
    """The commit of the checkout this runs from; empty for an installed package."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return ""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()
