"""`quantpage doctor`: what this installation has, whether it computes right, and what to do."""

from dataclasses import asdict

import typer

from quantpage import console
from quantpage.cli.exit_codes import CHECK_FAILED
from quantpage.cli.options import AsJson

_MARKS = {"good": "ok", "note": "note", "bad": "WRONG"}


def command(as_json: AsJson = False) -> None:
    """Check this installation, try every implementation that runs here, and say what to do.

    It takes a few seconds on a CPU; on a GPU kernels are compiled first. It changes and downloads
    nothing. The exit code is 4 if something is wrong.
    """
    from quantpage.doctor import examine

    findings = []
    with console.status("examining this installation") as waiting:
        for each in examine():
            findings.append(each)
            waiting.update(f"examined {each.about}")
    if as_json:
        console.print_json([asdict(each) for each in findings])
    else:
        width = max(len(each.about) for each in findings)
        for each in findings:
            console.print_line(f"{_MARKS[each.state]:5}  {each.about:{width}}  {each.found}")
            if each.advice:
                console.print_line(f"{'':5}  {'':{width}}  -> {each.advice}")
        bad = sum(each.state == "bad" for each in findings)
        notes = sum(each.state == "note" for each in findings)
        verdict = "everything here works" if not bad else f"{bad} of these do not work"
        extra = f"; {notes} could be better" if notes else ""
        console.print_line(f"\n{verdict}{extra}")
    if any(each.state == "bad" for each in findings):
        raise typer.Exit(CHECK_FAILED)
