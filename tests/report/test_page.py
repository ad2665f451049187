"""The page: one file that loads nothing, below its limit, with everything in it."""

import json
import re
from dataclasses import asdict

import pytest
import torch

from quantpage.evaluate.heads import LayerKeys
from quantpage.report import beside, heads
from quantpage.report.charts import Axis, Plot, Series, step_of
from quantpage.report.page import LIMIT, STEPS, render, running_mean
from quantpage.report.verdict import judge
from tests.report.reader import Reader
from tests.report.samples import report, row

pytestmark = pytest.mark.pure


def judged(data):
    return data | {"verdict": json.loads(json.dumps(asdict(judge(data))))}


@pytest.mark.parametrize("compared", [False, True])
def test_nothing_is_loaded_from_elsewhere(compared):
    data = judged(report())
    page = beside.render(beside.compare(data, data), data, data) if compared else render(data)
    found = Reader(page)
    assert found.refers == []
    assert not set(found.names) & {"link", "img", "iframe", "object", "embed", "video", "base"}
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttp|WebSocket|import\(", page)


def test_the_data_is_in_the_page_and_cannot_end_its_element():
    data = judged(report())
    data["made"]["text"] = "</script><b>.txt"
    page = render(data)
    assert json.loads(Reader(page).texts["data"]) == data
    assert "</script><b>" not in page
    assert "Triton needs a &lt;GPU&gt;." in page


def test_every_format_and_figure_stands_in_it():
    page = render(judged(report()))
    for words in ("int8", "fp8", "int4", "1.5e-04", "99.0%", "95.9%", "34.300", "--kv-format int8"):
        assert words in page
    assert page.index("top token") < page.index("1 &minus; TVD") < page.index("perplexity")
    assert page.count('class="cell ') == 2 * 4 * 2


def test_flags_in_the_verdict_are_code_and_nothing_in_it_is_markup():
    data = judged(report())
    data["verdict"]["reasons"] = [
        "Less: --kv-format int4,layers=1,3-4:k8v4, expected <b>; measure it with --formats."
    ]
    flag = "<code>--kv-format int4,layers=1,3-4:k8v4</code>"
    expected = f"<li>Less: {flag}, expected &lt;b&gt;; measure it with <code>--formats</code>.</li>"
    assert expected in render(data)


def test_times_stand_beside_what_reading_alone_allows():
    data = judged(report())
    data["speed"]["rows"] = [
        {"format": "int8", "context": 2048, "microseconds": 30.4, "bytes": 300_000},
        {"format": "int8", "context": 512, "microseconds": 10.6, "bytes": 75_000},
    ]
    # 300 kB in 30.4 microseconds are 9.9 GB/s of the 20 that were measured.
    assert "</th><td>11</td><td>30</td><td>49%</td></tr>" in render(data)


def test_parts_that_could_not_be_measured_say_why():
    data = report()
    data["speed"] = {"rows": [], "why": "no compiled core <here>."}
    data["needle"] = {"cells": [], "found": {}}
    data["heads"]["errors"] = {}
    data["advice"] |= {"curve": [], "why": "too few positions"}
    page = render(judged(data))
    assert "Decode was not timed: no compiled core &lt;here&gt;." in page
    assert "No choice a layer: too few positions." in page
    assert "A needle in the text" not in page and "Where it is lost" not in page


def test_a_large_model_stays_below_the_limit():
    """80 layers of 8 heads of 128 channels, seven formats, keys that no compression makes small."""
    formats = [row("none"), *(row(f"int8,first{n}=none") for n in range(1, 7))]
    data = report(*formats, layers=80, heads=8, channels=128)
    drawn = torch.Generator().manual_seed(1)
    layers = [
        LayerKeys(at, *torch.randn(3, 8, 32, 128, generator=drawn), False, torch.ones(8, 128))
        for at in range(80)
    ]
    for at in (3, 70):
        layers[at].rms[5, 9] = 7.0 + at
    data["heads"]["pictures"] = heads.as_pictures(layers)
    page = render(judged(data))
    assert len(page.encode()) <= LIMIT
    shown = json.loads(Reader(page).texts["data"])["heads"]["pictures"]["heads"]
    assert 0 < len(shown) < 640 == len(data["heads"]["pictures"]["heads"])
    # Outliers are what the pictures are for.
    assert {(3, 5), (70, 5)} <= {(each["layer"], each["head"]) for each in shown}


def test_a_page_that_is_too_large_all_the_same_is_refused():
    data = report()
    data["model"]["name"] = "m" * LIMIT
    with pytest.raises(
        ValueError, match="formats: expected few enough for a page of 500,000 bytes"
    ):
        render(judged(data))


def test_pictures_hold_what_keys_are():
    plain = torch.zeros(1, 5, 16)
    plain[0, :, 3] = 8.0
    plain[0, :, 4] = -2.0
    rotated = plain.roll(1, 2)
    layer = LayerKeys(2, plain, rotated, plain * 2, True, plain.square().mean(1).sqrt() + 1e-3)
    made = heads.as_pictures([layer])
    assert (made["tokens"], made["channels"]) == (5, 16)
    (head,) = made["heads"]
    assert head["largest"] == [8.0, 8.0, 16.0] and head["map_in_use"]
    assert [channel for channel, _ in head["outliers"]] == [3, 4]
    levels = unpacked(head["data"]).view(3, 5, 16)
    assert (levels[0, :, 3] == 15).all() and (levels[0, :, 4] == 8).all()
    assert (levels[1, :, 4] == 15).all() and (levels[2] == levels[0]).all()
    assert (levels[0, :, 5:] == 0).all()


def unpacked(text):
    """As the page's script does it."""
    import base64
    import zlib

    numbers = []
    for each in zlib.decompress(base64.b64decode(text)):
        numbers += [each & 15, each >> 4]
    return torch.tensor(numbers)


def test_axes_place_numbers_and_name_them():
    log = Axis("KL", 1e-6, 1.0, log=True)
    assert log.share(1e-3) == pytest.approx(0.5)
    assert log.share(0.0) == 0.0 and log.share(9.0) == 1.0
    assert next(value for value, _ in log.marks()) == pytest.approx(1e-6)
    even = Axis("tokens", 0, 1536)
    assert [words for _, words in even.marks()] == ["0", "500", "1,000", "1,500"]
    assert len(Axis("of 100", 0, 0.37).marks()) >= 3


def test_a_plot_says_what_it_shows():
    svg = Plot(
        "A & B", Axis("x", 0, 1), Axis("y", 0, 1), [Series("<n>", [(0.5, 0.25)], 3, named=True)]
    ).svg()
    assert 'role="img"' in svg and 'aria-label="A &amp; B"' in svg and "&lt;n&gt;" in svg
    assert "0.25" in svg


def test_a_name_makes_room_for_the_mark_beside_it():
    axes = Axis("x", 0, 16), Axis("y", 0, 1)
    places = {"k8v4": (6.7, 0.5), "int8": (8.2, 0.5), "none": (15.9, 0.0)}
    series = [
        Series(name, [at], number, named=True) for number, (name, at) in enumerate(places.items())
    ]
    svg = Plot("t", *axes, series).svg()
    found = {name: anchor for anchor, name in re.findall(r'text-anchor="(\w+)">(\w+)</text>', svg)}
    assert [found[name] for name in places] == ["end", "start", "end"]
    # What is drawn last lies on top.
    assert svg.rindex("<text") < svg.index('class="mark')


def test_cells_have_a_colour_for_every_step():
    assert step_of(None, STEPS) == 0 and step_of(1e-5, STEPS) == 1
    assert step_of(1e-3, STEPS) == 2 and step_of(5.0, STEPS) == 8


def test_running_means_begin_with_what_there_is():
    assert running_mean([4.0, 2.0, 0.0], 2) == [4.0, 3.0, 1.0]
