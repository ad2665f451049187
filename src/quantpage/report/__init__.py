"""What a model loses by a quantized cache, as a page for a colleague: `quantpage report`.

request      what is asked for
gather       all measurements, by evaluate/ and bench/, each a kept part
predictions  texts, own answers and needles through each cache
heads        layers, heads and keys as a page can hold them
costs        memory, who serves what, what decode is timed on
parts        finished measurements in a folder, so that an interrupted report goes on
steps        the bar with the time left
verdict      what the figures say, in words
charts       SVG: axes, lines, dots, cells
page         the data as one HTML file
pictures     the main charts as PNG
schema       the form of the data
beside       two reports beside each other
produce      all of it, from a request to files

    from quantpage.report import ReportRequest, make
    make(ReportRequest("models/smollm2", Path("report.html"), formats=("int8", "int4")))
"""

from quantpage.report.beside import compare
from quantpage.report.produce import make
from quantpage.report.request import ReportRequest
from quantpage.report.schema import load

__all__ = ["ReportRequest", "compare", "load", "make"]
