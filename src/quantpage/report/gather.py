"""All measurements of a report, each a kept part, and the figures that a page is made of."""

import json
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from quantpage import console
from quantpage.bench.contexts import time_decode
from quantpage.errors import QuantPageError
from quantpage.evaluate.caches import Candidate, find_candidates
from quantpage.evaluate.heads import head_errors, look_at_keys
from quantpage.evaluate.needle import Needle, make_needles
from quantpage.evaluate.run import made_with
from quantpage.evaluate.score import Scores, Window, cut_windows
from quantpage.evaluate.text import default_path, obtain, read
from quantpage.formats.per_layer import LayerFormats
from quantpage.hardware import device_info, find_device
from quantpage.integrations.hf_transformers.loading.model import (
    load_config,
    load_model,
    model_shape,
    most_positions,
)
from quantpage.integrations.hf_transformers.modules.digest import model_digest
from quantpage.report import choices, costs, heads, predictions
from quantpage.report.parts import Parts
from quantpage.report.predictions import BFLOAT16, EXACT, Subjects
from quantpage.report.request import ReportRequest
from quantpage.report.schema import KIND, VERSION
from quantpage.report.steps import counted
from quantpage.report.verdict import judge

_BINS = 12
"""Stretches of positions that errors are averaged over."""
_PEER = "hf-"
"""How names of Transformers' own quantized caches begin; they have predictions only."""


@dataclass(frozen=True, slots=True)
class Texts:
    """What goes through the model."""

    windows: list[Window]
    prompts: list[Window]
    """That the model's own answers follow."""
    needles: list[Needle]
    looked_at: torch.Tensor
    """[1, tokens], on which layers and heads are looked at."""
    alone: list[Window]
    """On which every layer is measured alone; empty: it is not."""


def gather(request: ReportRequest) -> dict[str, Any]:
    """Every figure of a report. What was measured before is read from its parts.

    Arguments, formats and the text are checked before the model is loaded.
    """
    config = load_config(request.model)
    names, size = list(request.names), request.page_size
    candidates = find_candidates(config, names, size, request.calibration)
    ours = [each.name for each in candidates if not each.name.startswith(_PEER)]
    for name in ours:
        if not all(each.dynamic for each in LayerFormats.parse(name).formats):
            raise ValueError(
                f"formats: expected dynamic formats, as a report measures keys and values apart, "
                f"got {name}; quantpage evaluate scores it"
            )
    costs.check_fit(config, ours, size)
    device = find_device(request.device)
    content = read(obtain(default_path()) if request.text is None else request.text)
    with console.status(f"loading {request.model}"):
        model, tokenizer = load_model(request.model, request.dtype, device)
    texts = _texts(request, tokenizer, content, config)
    made = _made(request, model, content, device)
    with counted() as steps:
        subjects = Subjects(
            model=model,
            candidates=candidates,
            parts=Parts(request.parts, {name: made[name] for name in _DEPENDED_ON}),
            steps=steps,
            chunk=request.chunk,
            settings=_settings(request),
            in_bfloat16=_lowered(model) if request.dtype == "float32" else None,
        )
        _expect(subjects, texts, ours, config)
        report: dict[str, Any] = {
            "kind": KIND,
            "version": VERSION,
            "made": made,
            "model": _model_facts(request, config),
            **_predictions(subjects, texts, request),
            "heads": _heads(subjects, texts, ours, request),
            "advice": _advice(subjects, texts, config, request),
            "speed": _speed(subjects, ours, config, device, request),
        }
    report["memory"] = costs.memory(config, ours, size, device)
    report["served"] = costs.refusals(config, ours, device_info(device))
    # As it will be read: tuples are lists.
    return json.loads(json.dumps(report | {"verdict": asdict(judge(report))}))


_DEPENDED_ON = ("model_digest", "dtype", "device", "quantpage", "torch", "transformers")
"""Of ``made``: what every part depends on."""


def _made(request: ReportRequest, model: Any, content: str, device: torch.device) -> dict[str, Any]:
    """Enough to make the report again, and to know whether it was."""
    text = default_path() if request.text is None else request.text
    return {
        **made_with(device.type),
        "model_digest": model_digest(model),
        "text": text.name,
        "text_digest": blake2b(content.encode(), digest_size=16).hexdigest(),
        "dtype": request.dtype,
        "device": device_info(device).name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "calibration": Path(request.calibration).name,
        "page_size": request.page_size,
        "command": _command(request),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
    }


def _command(request: ReportRequest) -> str:
    """As it was typed, or the line that would do the same for ``make``."""
    name = Path(sys.argv[0]).name
    if name == "quantpage" or sys.argv[0].endswith("quantpage/__main__.py"):
        return shlex.join(["quantpage", *sys.argv[1:]])
    return shlex.join(["quantpage", "report", "--model", request.model, "--out", str(request.out)])


def _settings(request: ReportRequest) -> dict[str, Any]:
    """What a candidate's figures depend on beside the window and its name."""
    path = Path(request.calibration)
    known = path.is_file()
    calibration = blake2b(path.read_bytes()).hexdigest()[:32] if known else request.calibration
    return {"page_size": request.page_size, "calibration": calibration}


def _lowered(model: Any) -> Callable[[], Any]:
    return lambda: deepcopy(model).to(torch.bfloat16)


def _texts(request: ReportRequest, tokenizer: Any, content: str, config: Any) -> Texts:
    limit = most_positions(config) or 1 << 30
    scored = min(request.scored, limit - request.prompt)
    answer = request.answer_prompt + request.steps
    if scored < 1 or answer > limit:
        raise ValueError(
            f"prompt, steps: expected less than the model's {limit:,} positions, got "
            f"{request.prompt:,} and {request.answer_prompt:,} + {request.steps:,}"
        )
    lengths = [each for each in request.needle_lengths if each <= limit]
    return Texts(
        cut_windows(tokenizer, content, request.windows, request.prompt, scored),
        cut_windows(tokenizer, content, request.answers, request.answer_prompt, 1),
        list(make_needles(tokenizer, content, lengths, request.needle_depths)) if lengths else [],
        cut_windows(tokenizer, content, 1, min(request.map_tokens, limit) - 1, 1)[0].tokens,
        _alone(request, tokenizer, content, limit),
    )


def _alone(request: ReportRequest, tokenizer: Any, content: str, limit: int) -> list[Window]:
    prompt, scored = request.advice_prompt, request.advice_scored
    if not request.advice or prompt + scored > limit:
        return []
    return cut_windows(tokenizer, content, 1, prompt, scored)


def _expect(subjects: Subjects, texts: Texts, ours: Sequence[str], config: Any) -> None:
    """Tell the bar of everything, in tokens that go through the model."""
    names, steps = subjects.names(), subjects.steps
    steps.expect(predictions.expected_tokens(texts.windows, subjects.names(yardstick=True)))
    steps.expect(
        sum(each.tokens.shape[1] for each in texts.prompts)
        + predictions.expected_tokens(texts.prompts, names)
    )
    needles = [each.window for each in texts.needles]
    steps.expect(predictions.expected_tokens(needles, [EXACT, *names]))
    steps.expect((2 * len(ours) + 1) * texts.looked_at.shape[1])
    steps.expect(choices.expected_tokens(config, texts.alone))


def _predictions(subjects: Subjects, texts: Texts, request: ReportRequest) -> dict[str, Any]:
    names = subjects.names()
    low = subjects.names(yardstick=True)
    found = predictions.ask(subjects, "text", texts.windows, low, predictions.compared)
    drawn = predictions.draw_answers(subjects, texts.prompts, request.steps)
    subjects.steps.expect(request.steps * len(drawn) * (len(names) + 1))
    said = predictions.ask(subjects, "answer", drawn, names, predictions.answered)
    needles = [each.window for each in texts.needles]
    hidden = predictions.ask(subjects, "needle", needles, [EXACT, *names], predictions.needle_found)
    scores = {name: predictions.scores_of(each) for name, each in found.items()}
    yardstick = None
    if BFLOAT16 in scores:
        yardstick = {"format": BFLOAT16, **figures_of(scores.pop(BFLOAT16))}
    rows = [{**_about(each), **figures_of(scores[each.name])} for each in subjects.candidates]
    answers = {name: predictions.scores_of(each) for name, each in said.items()}
    return {
        "fidelity": {"rows": rows, "yardstick": yardstick},
        "position": by_position(scores, texts.windows[0]),
        "answers": {
            "steps": request.steps,
            "count": len(drawn),
            "prompt": request.answer_prompt,
            "kl": {name: _mean_of(each.divergences) for name, each in answers.items()},
            "until": {
                name: [
                    int(torch.tensor(each["same"], device="cpu").cumprod(0).sum()) for each in rows
                ]
                for name, rows in said.items()
            },
        },
        "needle": predictions.needle_cells(texts.needles, hidden),
    }


def _about(candidate: Candidate) -> dict[str, Any]:
    return {
        "format": candidate.name,
        "bits": candidate.bits_per_value,
        "bytes_per_token": candidate.bytes_per_token,
        "sixteen_bit_tokens": candidate.sixteen_bit_tokens,
    }


def figures_of(scores: Scores) -> dict[str, Any]:
    """Of one cache, over all windows; top1_error: the standard error of top1."""
    count = scores.tokens
    # Where no token is another, one of them could have been.
    variance = scores.top1 * (1 - scores.top1) + 1 / count
    return {
        "kl_mean": scores.mean_divergence,
        "kl_p99": scores.p99_divergence,
        "kl_max": scores.most_divergence,
        "top1": scores.top1,
        "top1_error": (variance / count) ** 0.5,
        "overlap": scores.mean_overlap,
        "perplexity": scores.perplexity,
        "tokens": count,
    }


def by_position(scores: dict[str, Scores], window: Window) -> dict[str, Any]:
    """Mean KL of stretches of the text, which begin and end at ``edges``."""
    count = min(_BINS, window.scored)
    at = [window.scored * each // count for each in range(count + 1)]
    kl = {}
    for name, each in scores.items():
        mean = torch.stack(each.divergences).mean(0)
        parts = [float(mean[start:end].mean()) for start, end in pairwise(at)]
        kl[name] = [float(f"{part:.4g}") for part in parts]
    return {"edges": [window.prompt + each for each in at], "kl": kl}


def _mean_of(rows: Sequence[torch.Tensor]) -> list[float]:
    return [float(f"{each:.4g}") for each in torch.stack(list(rows)).mean(0).tolist()]


def _heads(
    subjects: Subjects, texts: Texts, ours: Sequence[str], request: ReportRequest
) -> dict[str, Any]:
    """The maps of layers and heads, and pictures of keys."""
    tokens, model = texts.looked_at, subjects.model
    about = {"window": predictions.window_digest(Window(tokens, 1)), **subjects.settings}
    errors = {}
    for name in ours:

        def measure(name: str = name) -> dict[str, Any]:
            subjects.steps.begin("layers and heads", name)
            found = head_errors(model, tokens, name, request.page_size, request.calibration)
            return heads.as_grids(found)

        errors[name] = subjects.parts.measure(measure, "heads", format=name, **about)
        subjects.steps.advance(2 * tokens.shape[1])

    def look() -> dict[str, Any]:
        subjects.steps.begin("keys of every layer")
        return heads.as_pictures(look_at_keys(model, tokens, calibration=request.calibration))

    pictures = subjects.parts.measure(look, "keys", **about)
    subjects.steps.advance(tokens.shape[1])
    errors = {name: each for name, each in errors.items() if each["keys"] or each["values"]}
    return {"tokens": tokens.shape[1], "errors": errors, "pictures": pictures}


def _advice(
    subjects: Subjects, texts: Texts, config: Any, request: ReportRequest
) -> dict[str, Any]:
    if not request.advice:
        return choices.none("it was not asked for")
    if not texts.alone:
        return choices.none("the model has too few positions")
    return choices.measure(subjects, config, texts.alone, request.page_size, request.calibration)


def _speed(
    subjects: Subjects,
    ours: Sequence[str],
    config: Any,
    device: torch.device,
    request: ReportRequest,
) -> dict[str, Any]:
    """Decode against context, or why it was not timed."""
    layer, why = costs.heads_of(config, request.page_size)
    if layer is None:
        return {"rows": [], "why": why}
    contexts = costs.timed_contexts(request.context)

    def measure() -> dict[str, Any]:
        subjects.steps.begin("decode against context")
        return {**asdict(time_decode(device, layer, ours, contexts)), "why": ""}

    about = {"contexts": contexts, "formats": list(ours), "threads": torch.get_num_threads()}
    try:
        return subjects.parts.measure(measure, "speed", heads=asdict(layer), **about)
    except (QuantPageError, ValueError) as error:
        return {"rows": [], "why": str(error)}


def _model_facts(request: ReportRequest, config: Any) -> dict[str, Any]:
    shape = model_shape(config)
    return {
        "name": Path(request.model).absolute().name,
        "type": config.model_type,
        "layers": shape.layers,
        "q_heads": shape.q_heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
    }
