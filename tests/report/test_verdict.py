"""What figures say, in words: the rules of report/verdict."""

import pytest

from quantpage.report.costs import curve_of
from quantpage.report.verdict import judge, level_of
from tests.report.samples import report, row

pytestmark = pytest.mark.pure


def test_the_smallest_format_that_cannot_be_told_apart_is_taken():
    said = judge(report())
    assert said.take == "int8" and said.flag == "--kv-format int8"
    assert said.headline.startswith("Take int8: on this model it changes less than bfloat16")
    assert dict(said.levels) == {
        "none": "indistinguishable", "int8": "indistinguishable", "fp8": "close", "int4": "close"
    }  # fmt: skip
    words = " ".join(said.reasons)
    assert "1.0 \N{PLUS-MINUS SIGN} 0.4 of 100" in words
    assert "int4 would save another 45% and loses 4.1" in words
    assert "92.8 MiB, 52% of what Transformers' own cache holds" in words


def test_without_a_yardstick_the_limits_are_numbers():
    fine, other = row("int8", kl_mean=9e-4, top1=0.985), row("int8", kl_mean=1.1e-3, top1=0.985)
    assert level_of(fine, None) == "indistinguishable" and level_of(other, None) == "close"
    assert "cannot be told from 16 bits" in judge(report(yardstick=False)).headline


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({"kl_mean": 1.6e-3, "top1": 0.97}, "indistinguishable"),
        ({"kl_mean": 1.7e-3, "top1": 0.97}, "close"),
        # Two standard errors are given, no more.
        ({"kl_mean": 1e-3, "top1": 0.967}, "indistinguishable"),
        ({"kl_mean": 1e-3, "top1": 0.965}, "close"),
        ({"kl_mean": 5e-3, "top1": 0.93}, "visible"),
        ({"kl_mean": 0.02, "top1": 0.99}, "visible"),
        ({"kl_mean": 0.2, "top1": 0.99}, "broken"),
    ],
)
def test_levels(changes, level):
    low = row("bfloat16", kl_mean=1.6e-3, top1=0.97)
    assert level_of(row("int8", **changes), low) == level


def test_where_nothing_is_indistinguishable_the_closest_kind_is_taken():
    said = judge(report(row("none"), row("fp8"), row("int4")))
    assert said.take == "int4" and "no smaller format stays as close" in said.headline
    worse = judge(report(row("int8", kl_mean=0.05), row("int4", kl_mean=0.5)))
    assert worse.take == "int8" and "only if memory decides" in worse.headline
    assert "int4 would save another 45% and breaks this model" in " ".join(worse.reasons)


def test_a_model_that_every_format_breaks_keeps_16_bits():
    said = judge(report(row("none"), row("int8", kl_mean=1.7), row("int4", kl_mean=2.5)))
    assert said.take == "none" and said.flag == "--kv-format none"
    assert "calibrate" in said.headline


def test_layers_that_lose_most_are_named_with_their_channels():
    data = report()
    data["heads"]["errors"]["int4"]["keys"]["2"] = [0.01, 0.31]
    words = " ".join(judge(data).reasons)
    assert "Layer 2, head 1 loses 16 times as much by int4's keys as the median layer" in words
    assert "outlier in channel 3" in words
    assert "--kv-format int4,layers=2:int8" in words
    # As many times, but small.
    for grid in data["heads"]["errors"]["int4"]["keys"].values():
        grid[:] = [each / 100 for each in grid]
    assert "Layer 2" not in " ".join(judge(data).reasons)


def test_error_that_grows_is_said():
    data = report()
    assert "does not grow" in " ".join(judge(data).reasons)
    data["position"]["kl"]["int8"] = [1e-4] * 8 + [5e-4] * 4
    assert "int8 grows with the text: from 1.0e-04 to 5.0e-04" in " ".join(judge(data).reasons)
    # Where a format begins without an error, it does not grow from there.
    data["position"]["kl"]["int8"] = [0.0] * 2 + [1e-4] * 10
    assert "does not grow" in " ".join(judge(data).reasons)


def test_needles_that_only_a_format_loses_are_counted():
    data = report()
    assert "Every format finds the 1 of 2 needles" in " ".join(judge(data).reasons)
    lost = [{"right": False, "probability": 0.0}] * 2
    data["needle"]["found"]["int4"] = lost
    assert "int4 loses 1" in " ".join(judge(data).reasons)
    # What the model itself does not find says nothing of a cache.
    data["needle"]["found"]["unquantized"] = lost
    assert "needle" not in " ".join(judge(data).reasons)


def test_a_choice_a_layer_is_offered_where_it_is_expected_to_stay_as_close():
    words = " ".join(judge(report()).reasons)
    assert "33% less: --kv-format int4,layers=0:int8, expected KL 1.0e-03" in words
    data = report()
    data["advice"]["curve"][1]["loss"] = 2e-3
    assert "format a layer" not in " ".join(judge(data).reasons)


def test_choices_a_layer_go_through_the_formats_that_were_measured():
    data = report()
    data["advice"]["curve"] = [
        {"line": "int4", "bits": 4.5, "loss": 1e-3},
        {"line": "int4,layers=0:int8", "bits": 6.375, "loss": 4e-4},
        {"line": "int8", "bits": 8.25, "loss": 2e-4},
    ]
    data["advice"]["uniform"] = [data["advice"]["curve"][0], data["advice"]["curve"][2]]
    found = [each["loss"] for each in curve_of(data)]
    assert found[0] == pytest.approx(2.3e-3) and found[2] == pytest.approx(1.5e-4)
    # Half of the way in bits: the geometric mean of 2.3 and 0.75.
    assert found[1] == pytest.approx(4e-4 * (2.3 * 0.75) ** 0.5)
    data["advice"]["uniform"] = []
    assert curve_of(data) == data["advice"]["curve"]
