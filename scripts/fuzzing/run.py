"""A case from its two integers."""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from quantpage.cpu_core import absence
from quantpage.errors import NoImplementation

from .case import Case, draw_case
from .world import World


@dataclass(slots=True)
class Tally:
    """What became of the cases."""

    passed: Counter[str] = field(default_factory=Counter)
    """By who computed."""
    refused: Counter[str] = field(default_factory=Counter)
    """By the sentence."""
    failed: list[str] = field(default_factory=list)
    """The line of each, and what differed."""


def kinds_here(interpreter: bool) -> tuple[str, ...]:
    """Who computes here, plain torch first. interpreter: kernels run in Triton's interpreter."""
    core = ("cpu", "cpu") if not absence() else ()
    return ("torch", *core, *(("triton",) if interpreter else ()))


def try_case(case: Case) -> tuple[str, str]:
    """('passed' | 'refused' | 'failed', what was said)."""
    torch.manual_seed(0)
    log: list[str] = []
    try:
        # numpy says what hardware does silently; the interpreter runs on numpy.
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            world = World(case)
            log = world.log
            world.run()
    except NoImplementation as refusal:
        return "refused", str(refusal)
    except Exception as error:  # noqa: BLE001  whatever is raised is what was looked for
        # An assertion of the oracle says what differed; anything else, where it came from.
        told = f"{type(error).__name__}: {error}"
        if not isinstance(error, AssertionError):
            frames = traceback.extract_tb(error.__traceback__)
            own = [each for each in frames if "quantpage" in each.filename] or frames
            told += "".join(f"\n    {each.filename}:{each.lineno} {each.line}" for each in own[-3:])
        return "failed", f"{case}\n    {told}\n    after: {'; '.join(log)}"
    return "passed", ""


def run_cases(seed: int, numbers: Iterable[int], kinds: tuple[str, ...]) -> Tally:
    """Try each number of a seed."""
    tally = Tally()
    for number in numbers:
        case = draw_case(seed, number, kinds)
        became, said = try_case(case)
        if became == "passed":
            tally.passed[case.kind] += 1
        elif became == "refused":
            tally.refused[said] += 1
        else:
            tally.failed.append(said)
    return tally
