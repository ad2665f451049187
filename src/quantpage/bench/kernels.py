"""`quantpage bench decode`, `latent` and `write`: kernels of every format on this CUDA device."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quantpage.bench import decode, latent, write
from quantpage.bench.rows import Rows, environment, name_absent
from quantpage.bench.timing import copy_bandwidth

ABSENT = {
    "FlashInfer": "flashinfer",
    "FlashAttention-3": "flash_attn_interface",
    "FlashAttention-4": "flash_attn.cute",
    "vLLM": "vllm",
}


@dataclass(frozen=True, slots=True)
class KernelsRequest:
    """What the flags of `quantpage bench decode`, `latent` and `write` say."""

    op: str
    """'decode', 'latent' or 'write'."""
    out: Path | None = None
    cases: tuple[str, ...] = ()
    """Names ('1 x 4k' of decode, '4096' of write); empty: all."""
    check_only: bool = False
    """Compile and check, time nothing."""
    part: tuple[int, int] = (0, 1)
    """(2, 8): every eighth case from the third on; such processes warm the compiler's cache
    together."""
    flex: bool = True
    commit: str = ""
    """Of the rows, where git is not at hand."""


def run(given: KernelsRequest) -> None:
    """Check every case, time it, print and write the CSV. A check that fails raises: no speed on
    red.
    """
    op, check_only = given.op, given.check_only
    jobs = _jobs(op, given.cases)
    mine, parts = given.part
    copy = 1.0 if check_only else copy_bandwidth()
    rows = Rows(
        given.out, environment("cuda", given.commit), case=12, new=-5, head_dim=-8, q_heads=-7,
        kv_heads=-8, page_size=-9, implementation=28, format=12, microseconds=-9, tb_per_s=-9,
        of_copy=-7, error=-9,
    )  # fmt: skip
    print(
        f"copy {copy:.2f} TB/s" if not check_only else f"checking part {mine} of {parts}",
        flush=True,
    )
    for number, (kind, case, name) in enumerate(jobs):
        if number % parts != mine or (check_only and kind == "peers"):
            continue
        if kind == "peers":
            made = decode.peers(case, copy, given.flex)
        elif op == "decode":
            made = decode.measure(case, name, copy, not check_only)
        elif op == "latent":
            made = latent.measure(case, name, copy, not check_only)
        else:
            made = write.measure(case, name, copy, not check_only)
        for row in made:
            rows.add(row)
        torch.cuda.empty_cache()
    if not check_only:
        name_absent(ABSENT)


def _jobs(op: str, wanted: Sequence[str]) -> list:
    jobs: list = []
    names = {str(t): t for t in write.TOKENS} if op == "write" else None
    cases = latent.CASES if op == "latent" else decode.CASES
    named = list(names or dict.fromkeys(case.name for case in cases))
    for name in wanted:
        if name not in named:
            raise ValueError(f"cases: expected names of {', '.join(named)}, got {name!r}")
    if names is not None:
        chosen = [t for name, t in names.items() if not wanted or name in wanted]
        return [("ours", tokens, name) for tokens in chosen for name in write.FORMATS_TIMED]
    for case in cases:
        if wanted and case.name not in wanted:
            continue
        jobs += [("ours", case, name) for name in case.formats]
        if case.peers:
            jobs.append(("peers", case, ""))
    return jobs
