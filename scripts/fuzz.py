#!/usr/bin/env python
"""Drawn cases of the library against an oracle of its own (scripts/fuzzing).

    python scripts/fuzz.py --cases 1000 --seed 1           torch, the core, Triton's interpreter
    python scripts/fuzz.py --cases 1000 --device cuda      what dispatch chooses on this GPU
    python scripts/fuzz.py --seed 1 --case 17 --only cpu   one again, as its line says

A failure prints its line, what differed, by how much, and what had been done. Exit code 1 then.
"""

import argparse
import os
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seconds", type=float, help="draw no case after so many")
    parser.add_argument("--only", choices=["torch", "cpu", "triton", "cuda"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    asked = parser.parse_args()
    if asked.device == "cpu":
        # Triton reads this when it is first imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")

    from fuzzing.run import draw_case, kinds_here, try_case

    kinds = ("cuda",) if asked.device == "cuda" else kinds_here(interpreter=True)
    kinds = (asked.only,) if asked.only else kinds
    if asked.case is not None:
        numbers = range(asked.case, asked.case + 1)
    else:
        numbers = range(asked.first, asked.first + asked.cases)
    counts: dict[str, int] = {}
    began = time.perf_counter()
    for number in numbers:
        if asked.seconds is not None and time.perf_counter() - began > asked.seconds:
            print(f"stopped before case {number}")
            break
        case = draw_case(asked.seed, number, kinds)
        if asked.case is not None:
            print(case, flush=True)
        became, said = try_case(case)
        key = f"{case.kind} {became}"
        counts[key] = counts.get(key, 0) + 1
        if became == "failed" or (said and asked.case is not None):
            print(f"{became}: {said}", flush=True)
    told = ", ".join(f"{key} {count}" for key, count in sorted(counts.items()))
    print(f"{told}; {time.perf_counter() - began:.0f} s")
    return int(any(key.endswith("failed") for key in counts))


if __name__ == "__main__":
    sys.exit(main())
