"""Fill the tables of measured figures in the pages from benchmarks/results, so that none is typed.

python scripts/figures.py           rewrite the tables
python scripts/figures.py --check   exit 1 where one is out of date

A table stands between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``.
"""

import csv
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "measured.md",
    ROOT / "docs" / "decode.md",
    ROOT / "docs" / "write.md",
    ROOT / "docs" / "prefill.md",
    ROOT / "docs" / "masks.md",
    ROOT / "docs" / "memory.md",
    ROOT / "docs" / "vllm.md",
)
MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
SHAPES = ("16 x 32k", "64 x 4k", "128 x 1k", "8 x 8k", "1 x 32k", "1 x 4k")
MISSING = "-"

Rows = list[dict[str, str]]


def read(name: str) -> Rows:
    with (ROOT / "benchmarks" / "results" / name).open(newline="") as file:
        return list(csv.DictReader(file))


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


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
        lines.append(
            [f"`{cache}`", _KEYS[kind], aim, worst, f"{float(off['top1']):.1%}, {where[1]}"]
        )
    return table(["cache", "keys", "aim", "largest KL, nine times of ten", "least top-1"], lines)


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


def _decode_rows() -> Rows:
    """One query a request at the main shape."""
    main = {"new": "1", "q_heads": "32", "head_dim": "128", "page_size": "64"}
    rows = read("h200-decode.csv")
    return [row for row in rows if all(row[key] == value for key, value in main.items())]


def _best_dense(rows: Rows, case: str) -> dict[str, str] | None:
    """The fastest of torch's kernels over contiguous bfloat16."""
    dense = [row for row in rows if row["case"] == case and row["format"] == "bf16 dense"]
    return min(dense, key=lambda row: float(row["microseconds"]), default=None)


def decode() -> str:
    """Microseconds and TB/s of the main shape, a column a format; dense peers in one column."""
    rows = _decode_rows()
    formats = ("none", "fp8", "int8", "k8v4", "int4")

    def cell(case: str, name: str) -> str:
        for row in rows:
            if (row["case"], row["format"]) == (case, name):
                return f"{float(row['microseconds']):.1f} us, {float(row['tb_per_s']):.2f} TB/s"
        return MISSING

    def peer(case: str) -> str:
        best = _best_dense(rows, case)
        if best is None:
            return MISSING
        return f"{float(best['microseconds']):.1f} us ({best['implementation'].split()[-1]})"

    head = ["batch x context", "best of torch, dense bf16", *(f"`{name}`" for name in formats)]
    return table(head, ([s, peer(s), *(cell(s, name) for name in formats)] for s in SHAPES))


def decode_shares() -> str:
    """TB/s and its share of the copy bandwidth, a row a format; the smallest step in us."""
    rows = _decode_rows()
    lines = (
        ("int8", "int8"),
        ("fp8", "fp8"),
        ("int8_static", "int8_static"),
        ("int4 with its exact pages", "int4"),
        ("k8v4 with its exact pages", "k8v4"),
        ("none (bf16)", "none"),
        ("best of torch, dense bf16", None),
    )

    def cell(case: str, name: str | None) -> str:
        found = _best_dense(rows, case) if name is None else None
        for row in rows:
            if name is not None and (row["case"], row["format"]) == (case, name):
                found = row
        if found is None:
            return MISSING
        if case == "1 x 4k":
            return f"{float(found['microseconds']):.1f} us"
        return f"{float(found['tb_per_s']):.2f} ({float(found['of_copy']):.0%})"

    head = ["TB/s of codes and scales (share of copy)", *SHAPES]
    return table(head, ([label, *(cell(s, name) for s in SHAPES)] for label, name in lines))


def decode_drafts() -> str:
    """Several query tokens a request at 16 x 8k: us, and times one token's, a row a format."""
    # Of what landed, the kernel that the planner takes: its own for 32 and 64 query rows.
    rows = [
        row
        for row in read("h200-drafts.csv")
        if row["commit"] == "355a3d7"
        and row["implementation"].startswith("gluon_drafts") == (int(row["new"]) > 4)
    ]
    counts = sorted({row["new"] for row in rows}, key=int)
    found = {(row["format"], row["new"]): float(row["microseconds"]) for row in rows}

    def cell(name: str, new: str) -> str:
        time = found.get((name, new))
        if time is None:
            return MISSING
        return f"{time:.1f} us" + ("" if new == "1" else f" ({time / found[name, '1']:.2f})")

    head = ["16 x 8k, us (times one token)", *(f"{n} token{'s' * (n != '1')}" for n in counts)]
    formats = dict.fromkeys(row["format"] for row in rows)
    return table(head, ([f"`{name}`", *(cell(name, n) for n in counts)] for name in formats))


def write() -> str:
    """Microseconds of one write, TB/s of all it moves and the share of the copy bandwidth."""
    rows = read("h200-write.csv")
    tokens = tuple(dict.fromkeys(row["new"] for row in rows))

    def cell(name: str, count: str) -> str:
        for row in rows:
            if (row["format"], row["new"]) == (name, count):
                said = f"{float(row['microseconds']):.1f}"
                if int(count) > 256:
                    said += f", {float(row['tb_per_s']):.2f} ({float(row['of_copy']):.0%})"
                return said
        return MISSING

    names = dict.fromkeys(row["format"] for row in rows)
    labels = {"bf16 pages": "torch, a kernel a step, bf16 pages"}
    head = ("us, TB/s (share of copy)", *(f"{int(count):,} tokens" for count in tokens))
    return table(
        head, ([labels.get(n, f"`{n}`"), *(cell(n, count) for count in tokens)] for n in names)
    )


PREFILL = {
    "cuDNN, contiguous bf16": ("cuDNN", "bf16"),
    "FlashAttention-2, contiguous bf16": ("FlashAttention-2", "bf16"),
    "cuDNN after torch's gather, bf16 pages": ("cuDNN after a gather", "bf16 pages"),
    "cuDNN with a page table, bf16 pages": ("cuDNN, page table", "bf16 pages"),
    "QuantPage (Gluon), `none`": ("gluon", "none"),
    "QuantPage (Gluon), `int8`": ("gluon", "int8"),
    "QuantPage (Gluon), `fp8`": ("gluon", "fp8"),
    "QuantPage (Gluon), `int4` codes": ("gluon", "int4 codes"),
    "QuantPage (portable Triton), `int8`": ("triton", "int8"),
}


def planes() -> str:
    """Formats whose codes lie in planes beside those of whole bits, on an H100."""
    rows = read("h100-planes.csv")
    names = ("int8", "int6", "int4", "int3")

    def cell(case: str, name: str) -> str:
        found = [row for row in rows if (row["case"], row["format"]) == (case, name)]
        if not found:
            return MISSING
        return f"{float(found[0]['microseconds']):.1f} ({float(found[0]['of_copy']):.0%})"

    titles = {row["case"]: f"{row['op']}, {row['case']}" for row in rows}
    titles["16 x 8k"] += ", 4 tokens each"
    return table(
        ["us (share of copy)", *(f"`{name}`" for name in names)],
        ([title, *(cell(case, name) for name in names)] for case, title in titles.items()),
    )


def prefill() -> str:
    """TFLOP/s, and shares of peers in the same turns: a row an implementation."""
    cases = ("4 x 4k", "1 x 16k", "1 x 64k", "2k on 32k", "512 on 32k", "2k on 128k", "512 on 128k")
    speeds = prefill_speeds()
    return table(
        ["", *cases],
        (
            [label, *(speeds.get((c, *which), MISSING) for c in cases)]
            for label, which in prefill_timed(speeds).items()
        ),
    )


def prefill_cases() -> str:
    """The same and every other case: a row a case."""
    speeds = prefill_speeds()
    cases = dict.fromkeys(case for case, *_ in speeds)
    timed = prefill_timed(speeds)
    return table(
        ["causal", *timed],
        ([c, *(speeds.get((c, *which), MISSING) for which in timed.values())] for c in cases),
    )


def prefill_timed(speeds: dict[tuple[str, str, str], str]) -> dict[str, tuple[str, str]]:
    """Those of PREFILL that the CSV has any row of."""
    there = {key[1:] for key in speeds}
    return {label: which for label, which in PREFILL.items() if which in there}


def prefill_speeds() -> dict[tuple[str, str, str], str]:
    """(case, implementation, format) -> TFLOP/s and, in brackets, shares.

    Of cuDNN on contiguous rows and, for ours, of the fastest peer over pages.
    """

    def cell(row: dict[str, str]) -> str:
        shares = [] if row["implementation"] == "cuDNN" else [row["of_cudnn"]]
        if row["implementation"] in ("gluon", "triton"):
            shares.append(row.get("of_best_paged", ""))
        told = ", ".join(f"{float(share):.2f}" for share in shares if share)
        return f"{float(row['tflops']):.0f}" + (f" ({told})" if told else "")

    return {
        (row["case"], row["implementation"], row["format"]): cell(row)
        for row in read("h200-prefill.csv")
        if row["tflops"]
    }


COSTS = {"against_causal": "a pair", "a_tile": "a tile"}


def masks() -> str:
    """TFLOP/s of visible pairs of the whole call and how many times FlexAttention's; what costs."""
    sizes = {"8192": "8k", "32768": "32k", "65536": "64k", "131072": "128k"}
    found = {
        (row["kind"], row["tokens"], row["implementation"], row["part"]): row
        for row in read("h200-masks.csv")
        if row.get("new", row["tokens"]) == row["tokens"]
    }
    kinds = dict.fromkeys(k for k, _, who, part in found if (who, part) == ("flash_mask", "attend"))

    def speed(kind: str, size: str) -> str:
        mine = found.get((kind, size, "flash_mask", "attend"))
        peer = found.get((kind, size, "FlexAttention bf16", "attend"))
        if mine is None:
            return MISSING
        times = (
            f" ({float(peer['microseconds']) / float(mine['microseconds']):.2f}x)" if peer else ""
        )
        return f"{float(mine['tflops']):.0f}{times}"

    def line(kind: str) -> list[str]:
        parts = [found[kind, "32768", "flash_mask", p] for p in ("attend", "kernel", "planner")]
        (whole, kernel, planner), pairs = parts, int(parts[0]["visible_pairs"])
        return [
            f"`{kind}`",
            f"{pairs / 32768**2:.0%}",
            *(speed(kind, size) for size in sizes),
            f"{float(whole['microseconds']) / 1e3:.1f} ms",
            *(f"{float(kernel[key]):.2f}" if kernel.get(key) else MISSING for key in COSTS),
            f"{float(planner['microseconds']) / float(whole['microseconds']):.1%}",
        ]

    names = (f"{name}: TFLOP/s" for name in sizes.values())
    head = ["kind", "visible", *names, "32k", *COSTS.values(), "planner"]
    return table(
        head, (line(kind) for kind in kinds if (kind, "32768", "flash_mask", "attend") in found)
    )


def _peers(phase: str, unit: str, worse: Callable[[list[float]], float]) -> str:
    """Kernels of several projects on two H100, a row a kernel and cache: the worse reading."""
    rows = [row for row in read("h100-peers.csv") if row["phase"] == phase]
    cases = dict.fromkeys(row["case"] for row in rows)
    kernels = dict.fromkeys((row["implementation"], row["cache"]) for row in rows)

    def line(kernel: tuple[str, str]) -> list[str]:
        mine = [row for row in rows if (row["implementation"], row["cache"]) == kernel]
        found = {
            row["case"]: worse(
                [float(v) for v in (row["first_machine"], row["second_machine"]) if v]
            )
            for row in mine
        }
        return [
            kernel[0],
            f"`{kernel[1]}`",
            *(f"{found[c]:g}" for c in cases),
            mine[0]["error"] or MISSING,
        ]

    return table([unit, "cache", *cases, "error"], map(line, kernels))


def peers_decode() -> str:
    """Microseconds a decode step of one layer."""
    return _peers("decode", "us", max)


def peers_prefill() -> str:
    """TFLOP/s of prompts and chunks."""
    return _peers("prefill", "TFLOP/s", min)


def gpu_model() -> str:
    """The 8B-shaped model, a row a cache format."""
    rows = read("h200-model.csv")
    base = float(rows[0]["decode_tokens_per_s"])

    def line(row: dict[str, str]) -> list[str]:
        speed = float(row["decode_tokens_per_s"])
        return [
            f"`{row['kv_format']}`",
            f"{float(row['cache_gib']):.1f} GiB",
            f"{float(row['decode_ms']):.2f} ms",
            f"{speed:,.0f} ({speed / base:.2f}x)",
            f"{float(row['prompt_tokens_per_s']):,.0f}",
        ]

    head = ("cache", "size", "decode step", "decode tokens/s", "prompt tokens/s")
    return table(head, map(line, rows))


def cpu_model() -> str:
    """SmolLM2 on two threads, tokens a second, a row a context."""
    rows = read("cpu-model-2-threads.csv")
    kinds = list(dict.fromkeys((row["cache"], row["weights"]) for row in rows))

    def label(cache: str, weights: str) -> str:
        name = "Transformers, bf16 cache" if cache == "transformers" else f"`{cache}`"
        return name if weights == "bf16" else f"{name}, `--weights {weights}`"

    def cell(context: str, kind: tuple[str, str]) -> str:
        for row in rows:
            if (row["context"], row["cache"], row["weights"]) == (context, *kind):
                times = "" if kind[0] == "transformers" else f" ({row['times_transformers']}x)"
                return f"{float(row['decode_tokens_per_s']):.1f}{times}"
        return MISSING

    contexts = dict.fromkeys(row["context"] for row in rows)
    return table(
        ["context", *(label(*kind) for kind in kinds)],
        ([f"{int(c):,}", *(cell(c, kind) for kind in kinds)] for c in contexts),
    )


def memory() -> str:
    rows = read("cpu-memory.csv")
    head = ("model", "tokens", "cache", "held, MiB", "standing, MiB", "of Transformers'")
    columns = ("model", "context", "cache", "held_mib", "standing_mib", "of_transformers")
    return table(
        (*head, "process at most, MiB"),
        ([*(row[name] for name in columns), row["peak_mib"] or MISSING] for row in rows),
    )


def vllm() -> str:
    """A step inside vLLM, 16 requests of 16k tokens: the newest row of each cache."""
    said = {
        "bfloat16": "FlashAttention-3, bf16",
        "fp8": "FlashAttention-3, fp8",
        "quantpage_int8": "`quantpage_int8`",
        "quantpage_fp8": "`quantpage_fp8`",
        "quantpage_k8v4": "`quantpage_k8v4`",
        "quantpage_int4": "`quantpage_int4`",
    }
    shape = {"requests": "16", "context": "16384", "layers": "16"}
    rows = [row for row in read("h100-vllm.csv") if all(row[k] == v for k, v in shape.items())]
    newest = {row["kv_cache_dtype"]: row for row in rows if row["steady_ms"]}

    def line(name: str) -> list[str]:
        row = newest[name]
        return [said[name], f"{row['steady_ms']} ms", f"{int(row['prompt_tokens_per_s']):,}"]

    return table(["cache", "decode step", "prompt tokens/s"], map(line, said))


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy,
    "calibrated": calibrated,
    "models": models,
    "aims": aims,
    "positions": positions,
    "judged": judged,
    "decode": decode,
    "decode-shares": decode_shares,
    "planes": planes,
    "decode-drafts": decode_drafts,
    "write": write,
    "prefill": prefill,
    "prefill-cases": prefill_cases,
    "masks": masks,
    "peers-decode": peers_decode,
    "peers-prefill": peers_prefill,
    "gpu-model": gpu_model,
    "cpu-model": cpu_model,
    "memory": memory,
    "vllm": vllm,
}


def main() -> int:
    """Rewrite or check; the exit status."""
    stale = []
    for page in PAGES:
        text = page.read_text()
        wanted = MARKED.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)
        if text != wanted:
            stale.append(page)
            if "--check" not in sys.argv[1:]:
                page.write_text(wanted)
    if stale and "--check" in sys.argv[1:]:
        names = ", ".join(page.name for page in stale)
        print(f"{names}: figures differ from benchmarks/results; run scripts/figures.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
