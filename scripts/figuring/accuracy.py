"""What formats cost in accuracy, by model, text and calibration."""

from collections.abc import Iterable

from figuring.rows import MISSING, read, table


def accuracy() -> str:
    """What each cache format costs on real text."""
    names = {
        "hf-quanto4": "Transformers, quanto 4 bit",
        "hf-hqq4": "Transformers, HQQ 4 bit",
        "hf-hqq8": "Transformers, HQQ 8 bit",
    }

    def line(row: dict[str, str]) -> list[str]:
        kl = [float(row[k]) for k in ("kl_mean", "kl_p99")]
        return [
            names.get(row["cache"], f"`{row['cache']}`"),
            f"{float(row['bits_per_value']):g}",
            f"{int(row['bytes_per_token']):,}",
            row["sixteen_bit_tokens"],
            f"{float(row['perplexity']):.3f}",
            *("0" if each < 1e-9 else f"{each:.1e}" for each in kl),
            f"{float(row['top1']):.1%}",
        ]

    head = ("cache", "bits a value", "bytes a token", "tokens in 16 bit", "perplexity")
    return table([*head, "KL, mean", "KL, 99 %", "top-1"], map(line, read("accuracy-smollm2.csv")))


_KEYS = {
    "none": "as they are",
    "auto": "mapped, from the weights",
    "maps": "calibrated, without feedback",
    "file": "calibrated on the other text",
}
_JUDGES = {
    ("smollm2", "austen.txt"): "SmolLM2, Austen",
    ("smollm2", "handbook.txt"): "SmolLM2, handbook",
    ("qwen2.5-coder-0.5b", "austen.txt"): "Qwen2.5-Coder, Austen",
    ("qwen2.5-coder-0.5b", "handbook.txt"): "Qwen2.5-Coder, handbook",
    ("gemma-3-270m", "austen.txt"): "Gemma 3, Austen",
    ("gemma-3-270m", "handbook.txt"): "Gemma 3, handbook",
}


def _calibrated_cells() -> dict[tuple[str, str, str, str], dict[str, str]]:
    """By format, where key maps come from, model and text; of several rows the first."""
    cells: dict[tuple[str, str, str, str], dict[str, str]] = {}
    for row in read("accuracy-calibrated.csv"):
        kind = row["calibration"] if row["calibration"] in _KEYS else "file"
        if row["calibration"].endswith("-no-feedback.safetensors"):
            kind = "maps"
        cells.setdefault((row["cache"], kind, row["model"], row["text"]), row)
    return cells


def calibrated() -> str:
    """KL and top-1 of three models on two texts: keys as they are, from the weights, calibrated."""
    cells = _calibrated_cells()

    def said(row: dict[str, str] | None) -> str:
        return f"{float(row['kl_mean']):.1e}, {float(row['top1']):.1%}" if row else MISSING

    lines = [
        [f"`{cache}`", words, *(said(cells.get((cache, kind, *judge))) for judge in _JUDGES)]
        for cache in ("int8", "int6", "int4", "int4_near8", "int3")
        for kind, words in _KEYS.items()
    ]
    lines = [each for each in lines if set(each[2:]) != {MISSING}]
    return table(["cache", "keys", *_JUDGES.values()], lines)


def models() -> str:
    """The worse of two texts, of models easy and hard: keys as they are, as ``attach`` has them,
    calibrated."""
    cells = _calibrated_cells()
    names = {model: said.split(",")[0] for (model, _), said in _JUDGES.items()}

    def said(cache: str, model: str, kinds: Iterable[str]) -> str:
        texts = [text for each, text in _JUDGES if each == model]
        rows = [
            next((cells[at] for kind in kinds if (at := (cache, kind, model, text)) in cells), None)
            for text in texts
        ]
        if None in rows:
            return MISSING
        least = min(float(row["top1"]) for row in rows if row)
        return f"{max(float(row['kl_mean']) for row in rows if row):.1e}, {least:.1%}"

    ways = {
        "as they are": ("none",),
        "as `attach` has them": ("auto", "none"),
        "by `quantpage calibrate`": ("file",),
    }
    lines = [
        [f"`{cache}`", words, *(said(cache, model, kinds) for model in names)]
        for cache in ("int8", "int6", "int4", "int3")
        for words, kinds in ways.items()
    ]
    return table(
        ["cache", "keys", *names.values()], (each for each in lines if MISSING not in each)
    )


def aims() -> str:
    """What was aimed at, and the worst of three models on two texts."""
    wanted = {
        ("int8", "file"): (1e-4, 0.993),
        ("int6", "file"): (1e-3, 0.98),
        ("int4", "file"): (2e-3, 0.98),
        ("int3", "file"): (1e-2, 0.95),
        ("int8", "auto"): (3e-4, None),
        ("int4", "auto"): (6e-3, 0.965),
    }
    cells, lines = _calibrated_cells(), []
    for (cache, kind), (most, least) in wanted.items():
        rows = [row for at, row in cells.items() if at[:2] == (cache, kind)]
        far = max(rows, key=lambda row: float(row["kl_mean"]))
        off = min(rows, key=lambda row: float(row["top1"]))
        where = [_JUDGES[row["model"], row["text"]] for row in (far, off)]
        low, high = (far[name] and f"{float(far[name]):.1e}" for name in ("kl_low", "kl_high"))
        sure = f" ({low} to {high})" if low else ""
        aim = f"{most:.0e}" + (f", {least:.1%}" if least else "")
        worst = f"{float(far['kl_mean']):.2e}{sure}, {where[0]}"
        top = float(off["top1"])
        chance = (top * (1 - top) / int(off["tokens"])) ** 0.5
        lines.append(
            [f"`{cache}`", _KEYS[kind], aim, worst, f"{top:.1%} ± {chance:.1%}, {where[1]}"]
        )
    head = ["cache", "keys", "aim", "largest KL, nine times of ten", "least top-1 ± standard error"]
    return table(head, lines)


def turns() -> str:
    """What matrices of keys lose beside scales alone, by code and model."""
    rows = read("key-turns.csv")
    judged = list(dict.fromkeys((row["model"], row["code"]) for row in rows))
    found = {(row["model"], row["code"], row["changed"]): row for row in rows}
    names = {"qwen2.5-coder-0.5b": "Qwen2.5-Coder", "gemma-3-270m": "Gemma 3"}

    def said(row: dict[str, str] | None) -> str:
        losses = ("loss_of_scales", "loss_of_scales_mean_log")
        return ", ".join(f"{float(row[each]):.2f}" for each in losses) if row else MISSING

    kinds = dict.fromkeys(row["changed"] for row in rows)
    lines = ([kind, *(said(found.get((*each, kind))) for each in judged)] for kind in kinds)
    return table(["", *(f"{names[model]}, `{code}`" for model, code in judged)], lines)


def positions() -> str:
    """Errors of scores by the positions that keys and queries were measured at."""
    shown = (
        ("qwen2.5-coder-0.5b", "1536"),
        ("qwen2.5-coder-0.5b", "4096"),
        ("qwen2.5-coder-0.5b", "8192"),
        ("gemma-3-270m", "1536"),
    )
    lines: dict[str, list[str]] = {}
    texts = (row for row in read("key-positions.csv") if row["calibrated_on"] != "random tokens")
    for row in texts:
        line = lines.setdefault(row["positions_up_to"], [MISSING] * len(shown))
        if (row["model"], row["text_tokens"]) in shown:
            # Of a context's rows the last: two texts at the start, as the product places them.
            at = shown.index((row["model"], row["text_tokens"]))
            line[at] = f"{float(row['loss_of_the_start']):.2f}"
    names = {"qwen2.5-coder-0.5b": "Qwen2.5-Coder", "gemma-3-270m": "Gemma 3"}
    head = (f"{names[model]}, text of {int(tokens):,}" for model, tokens in shown)
    return table(
        ["positions below", *head], ([f"{int(each):,}", *line] for each, line in lines.items())
    )


def judged() -> str:
    """Programs that pass, and needles that are found, a column a format."""
    formats = ("none", "int8", "int4")
    said = {"smollm2": "SmolLM2", "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B"}
    programs = {row["kv_format"]: row for row in read("accuracy-programs.csv")}
    solved = {name: set(programs[name]["solved"].split()) for name in formats}
    first = programs["none"]
    lines = [
        [f"programs that pass, of {first['problems']}, {said[first['model']]}"]
        + [programs[name]["passed"] for name in formats],
        ["of them those of `none`"] + [str(len(solved[name] & solved["none"])) for name in formats],
    ]
    needles = read("accuracy-needles.csv")
    for model in dict.fromkeys(row["model"] for row in needles):
        rows = [row for row in needles if row["model"] == model]
        found = [[int(row["found"]) for row in rows if row["kv_format"] == f] for f in formats]
        counts = {len(each) for each in found}
        assert len(counts) == 1, f"{model}: needles differ by format"
        head = f"needles that are found, of {counts.pop()}, {said[model]}"
        lines.append([head, *(str(sum(each)) for each in found)])
    return table(["", *(f"`{name}`" for name in formats)], lines)
