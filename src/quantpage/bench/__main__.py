"""`python -m quantpage.bench decode|write --out rows.csv`: kernels on this CUDA device."""

import argparse
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from quantpage.bench import decode, write
from quantpage.bench.measure import Row, copy_bandwidth, write_rows

ABSENT = {
    "FlashInfer": "flashinfer",
    "FlashAttention-3": "flash_attn_interface",
    "FlashAttention-4": "flash_attn.cute",
    "vLLM": "vllm",
}


def main(
    op: str,
    out: Path | None = None,
    check_only: bool = False,
    part: str = "0/1",
    flex: bool = True,
    commit: str | None = None,
    cases: str = "",
) -> list[Row]:
    """Check every case of ``op`` ('decode' or 'write'), time it, and write ``out``.

    check_only: compile and check, time nothing; processes that each take a ``part`` ('2/8') of the
    cases warm the compiler's cache together. commit: of the rows, where this copy has no history.
    cases: names, separated by ';' ('1 x 4k' of decode, '4096' of write); none: all. A check that
    fails raises: no speed on red.
    """
    jobs = _jobs(op, [name.strip() for name in cases.split(";") if name.strip()])
    if not torch.cuda.is_available():
        raise ValueError("bench: expected a CUDA device, found none")
    copy = 1.0 if check_only else copy_bandwidth()
    rows: list[Row] = []
    print(f"copy {copy:.2f} TB/s" if not check_only else f"checking part {part}", flush=True)
    for number, (kind, case, name) in enumerate(jobs):
        mine, parts = map(int, part.split("/"))
        if number % parts != mine or (check_only and kind == "peers"):
            continue
        if kind == "peers":
            made = decode.peers(case, copy, flex)
        elif op == "decode":
            made = decode.measure(case, name, copy, not check_only)
        else:
            made = write.measure(case, name, copy, not check_only)
        for row in made:
            rows.append(row if commit is None else replace(row, commit=commit))
            print(
                f"{row.case:12} {row.new:5} {row.head_dim:4} {row.q_heads}/{row.kv_heads} "
                f"{row.page_size:4} {row.implementation:28} {row.format:12} "
                f"{row.microseconds:9.1f} us {row.tb_per_s:6.3f} TB/s {row.of_copy:.2f} "
                f"{row.error:.0e}",
                flush=True,
            )
        torch.cuda.empty_cache()
        if out is not None and rows:
            write_rows(rows, out)
    for name, module in ABSENT.items():
        if not check_only and find_spec(module.split(".")[0]) is None:
            print(f"absent: {name}")
    return rows


def _jobs(op: str, wanted: list[str]) -> list:
    jobs: list = []
    names = {str(t): t for t in write.TOKENS} if op == "write" else None
    named = list(names or dict.fromkeys(case.name for case in decode.CASES))
    for name in wanted:
        if name not in named:
            raise ValueError(f"cases: expected names of {', '.join(named)}, got {name!r}")
    if names is not None:
        chosen = [t for name, t in names.items() if not wanted or name in wanted]
        return [("ours", tokens, name) for tokens in chosen for name in write.FORMATS_TIMED]
    for case in decode.CASES:
        if wanted and case.name not in wanted:
            continue
        jobs += [("ours", case, name) for name in case.formats]
        if case.peers:
            jobs.append(("peers", case, ""))
    return jobs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", choices=("decode", "write"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th case from the i-th on")
    parser.add_argument("--no-flex", action="store_true", help="FlexAttention compiles for long")
    parser.add_argument("--commit", help="of this copy, where it has no history")
    parser.add_argument("--cases", default="", help="names, separated by ';'; default: all")
    given = parser.parse_args()
    main(
        given.op, given.out, given.check_only, given.part, not given.no_flex, given.commit,
        given.cases,
    )  # fmt: skip
