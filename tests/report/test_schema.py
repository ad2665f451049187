"""The data's form, and two reports beside each other."""

import json
from dataclasses import asdict

import pytest

from quantpage.errors import CorruptReport
from quantpage.report import compare, load
from quantpage.report.beside import render
from quantpage.report.schema import check
from quantpage.report.verdict import judge
from tests.report.samples import report, row

pytestmark = pytest.mark.pure


def judged(data):
    return data | {"verdict": json.loads(json.dumps(asdict(judge(data))))}


def test_what_a_report_says_is_accepted():
    check(judged(report()))
    check(judged(report(yardstick=False)))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("kind",), "other", "expected the data of `quantpage report`"),
        (("version",), 2, "expected version 1, got 2"),
        (("fidelity", "rows", 0, "kl_mean"), "x", r"fidelity.rows\[0\].kl_mean: expected a number"),
        (("fidelity", "rows", 0, "kl_mean"), float("nan"), "expected a finite number, got nan"),
        (("fidelity", "rows"), {}, "fidelity.rows: expected a list"),
        (("fidelity", "yardstick"), 3, "yardstick: expected names and values, got 3"),
        (("needle", "found", "int8"), [{"right": 1}], "found.int8.*right: expected a bool, got 1"),
        (("model", "layers"), True, "model.layers: expected a int, got True"),
        (("verdict", "reasons"), None, "verdict.reasons: expected a list"),
    ],
)
def test_what_is_wrong_is_named(path, value, words):
    data = judged(report())
    at = data
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    with pytest.raises(CorruptReport, match=words):
        check(data)


def test_what_is_missing_is_named(tmp_path):
    data = judged(report())
    del data["made"]["model_digest"]
    with pytest.raises(CorruptReport, match=r"report\.made: expected 'model_digest', found none"):
        check(data)
    file = tmp_path / "r.json"
    file.write_text(json.dumps(data))
    with pytest.raises(CorruptReport, match=r"r\.json.made: expected 'model_digest'"):
        load(file)
    for wrong in ("{", "[" * 100_000):
        file.write_text(wrong)
        with pytest.raises(CorruptReport, match="expected JSON of `quantpage report`"):
            load(file)
    file.write_text("[]")
    with pytest.raises(CorruptReport, match="got something else"):
        load(file)


def test_two_reports_are_put_beside_each_other():
    a = judged(report())
    b = judged(report(row("int8", kl_mean=1e-5, top1=0.999), row("int4", top1=0.96), row("k8v4")))
    b["made"] |= {"calibration": "c.file", "date": "later"}
    found = compare(a, b)
    assert [(each.what, each.a, each.b) for each in found.differences] == [
        ("calibration", "auto", "c.file")
    ]
    assert found.same_predictions and found.take == ("int8", "k8v4")
    int8, int4 = found.pairs
    assert int8.format == "int8" and int8.kl_mean == (1.5e-4, 1e-5) and int8.beyond_noise
    # 95.9 and 96.0 of 100, of which either is good to 0.2.
    assert not int4.beyond_noise
    assert found.only == (("none", "fp8"), ("k8v4",)) and found.context == 2048
    assert int8.microseconds == (9.0, 9.0)
    page = render(found, a, b)
    assert "A says: take int8. B says: take k8v4." in page and "c.file" in page and "99.9%" in page


def test_reports_of_other_models_are_said_to_be():
    a, b = judged(report()), judged(report())
    b["made"]["text_digest"] = "u"
    found = compare(a, b)
    assert not found.same_predictions
    assert "Not the same model and text" in render(found, a, b)
    b["speed"]["rows"] = []
    assert compare(a, b).context is None and compare(a, b).pairs[0].microseconds is None
    assert "-" in render(compare(a, b), a, b)


def test_what_is_no_report_is_refused():
    with pytest.raises(CorruptReport, match="B: expected the data"):
        compare(judged(report()), {})
