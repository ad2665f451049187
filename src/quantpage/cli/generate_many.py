"""`quantpage generate --file requests.jsonl --out answers.jsonl`: many requests in one batch."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from quantpage import console
from quantpage.cli.capacity import parse_bytes
from quantpage.cli.exit_codes import CHECK_FAILED
from quantpage.cli.options import AnswerFlags


@dataclass(frozen=True, slots=True)
class Batch:
    """What the flags say."""

    model: str
    file: Path
    out: Path
    max_new_tokens: int
    flags: AnswerFlags
    max_requests: int
    memory: str | None

    @property
    def sampling(self) -> dict[str, Any]:
        """By the API's names, of requests that do not say it themselves."""
        names = ("temperature", "top_p", "top_k", "seed", "stop")
        said = {name: getattr(self.flags, name) for name in names}
        return {"max_tokens": self.max_new_tokens, **said}


def answer_file(batch: Batch) -> None:
    """Answer what is not answered yet; leaves with CHECK_FAILED where a line ended in an error."""
    from quantpage.server.answer_file import AnswerFile
    from quantpage.server.offline import answer_lines, read_lines
    from quantpage.server.options import ServeOptions
    from quantpage.server.run import load

    flags = batch.flags
    defaults = {name: each for name, each in batch.sampling.items() if each is not None}
    name = Path(batch.model).resolve().name
    setting = {
        "model": name,
        "kv_format": flags.kv_format,
        "page_size": flags.page_size,
        "calibration": flags.calibration,
        "weights": flags.weights,
        "dtype": flags.dtype,
    }
    lines = read_lines(batch.file, defaults, setting)
    with AnswerFile(batch.out) as file:
        there = file.resume({each.id: each.mark for each in lines})
        todo = [each for each in lines if each.id not in there]
        if not todo:
            console.note(f"{len(lines):,} of {len(lines):,} were answered before")
            return
        attached, served = load(
            ServeOptions(
                model=batch.model,
                kv_format=flags.kv_format,
                page_size=flags.page_size,
                calibration=flags.calibration,
                memory=None if batch.memory is None else parse_bytes(batch.memory),
                max_requests=batch.max_requests,
                # Only so many wait as are asked at once, each of them with any number of answers.
                max_waiting=1 << 30,
                dtype=flags.dtype,
                device=flags.device,
                weights=flags.weights,
            )
        )
        try:
            start = time.perf_counter()
            with console.progress() as bar:
                task = bar.add_task("answers", total=len(lines), completed=len(there))
                counts = answer_lines(
                    served,
                    todo,
                    file,
                    lambda now: bar.update(task, completed=len(there) + now.answered + now.failed),
                )
        finally:
            served.engine.stop()
            attached.detach()
    seconds = time.perf_counter() - start
    before = f", {len(there):,} were there" if there else ""
    console.note(
        f"{counts.answered:,} answered{before}, {counts.failed:,} failed: {counts.made_tokens:,} "
        f"tokens in {seconds:.1f} s ({counts.made_tokens / seconds:.1f} a second)"
    )
    if counts.failed:
        print(
            f"quantpage: {console.counted(counts.failed, 'line')} ended in an error, which "
            f"{batch.out} says; another run tries again",
            file=sys.stderr,
        )
        raise typer.Exit(CHECK_FAILED)
