"""Kernels alone: decode, the write, prompts, masks, and other projects' beside them."""

from collections.abc import Callable

from figuring.rows import MISSING, Rows, read, table

SHAPES = ("16 x 32k", "64 x 4k", "128 x 1k", "8 x 8k", "1 x 32k", "1 x 4k")


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

    head = ["TB/s of what is read (share of copy)", *SHAPES]
    return table(head, ([label, *(cell(s, name) for s in SHAPES)] for label, name in lines))


def decode_drafts() -> str:
    """Several query tokens a request at 16 x 8k: us, and times one token's, a row a format."""
    # Of what landed, the kernel that the planner takes: its own for 32 and 64 query rows.
    rows = [
        row
        for row in read("h200-drafts.csv")
        if (row["commit"], row["case"]) == ("6719b93", "16 x 8k")
        and row["implementation"].startswith("gluon_drafts") == (int(row["new"]) > 4)
        and "without" not in row["implementation"]
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
