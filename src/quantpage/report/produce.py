"""A report from its request to its files."""

import json
from typing import Any

from quantpage import console
from quantpage.files import write
from quantpage.report.gather import gather
from quantpage.report.page import render
from quantpage.report.pictures import draw
from quantpage.report.request import ReportRequest
from quantpage.report.schema import check


def make(request: ReportRequest) -> dict[str, Any]:
    """Measure, and write the data, the pictures and last the page; returns the data.

    Nothing is written before everything is measured but the finished parts, which a report that
    was interrupted goes on from. Raises what `quantpage evaluate` raises for wrong arguments.
    """
    report = gather(request)
    check(report)
    page = render(report)
    write(request.data, json.dumps(report, indent=1) + "\n")
    for path in draw(report, request.out):
        console.note(f"written: {path}")
    write(request.out, page)
    return report
