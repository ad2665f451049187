"""The self-test finds what is broken, and the doctor says it; the installation at hand is well."""

import pytest
import torch

from quantpage import cpu_core, doctor
from quantpage.hardware import available_bytes, device_info
from quantpage.ops.attend import torch_blockwise
from quantpage.ops.dispatch import _load
from quantpage.ops.rope_write import reference as write_reference
from quantpage.self_test import self_test

pytestmark = pytest.mark.cpu
CPU = device_info("cpu")


def test_what_runs_here_is_right_and_everything_is_tried():
    tried = list(self_test(CPU))
    assert [each for each in tried if not each.right] == []
    ops = {"rope_write", "attend prefill", "attend decode", "gather"}
    assert {each.op for each in tried if each.implementation == "torch"} == ops
    if cpu_core.find_core() is not None:
        assert {each.op for each in tried if each.implementation == "cpu"} == ops
    assert {"none", "int8", "fp8", "int4", "k8v4"} <= {each.format for each in tried}


@pytest.fixture
def fresh():
    """Implementations are looked up anew, before and after."""
    _load.cache_clear()
    yield
    _load.cache_clear()


def wrong_of(op):
    return [each for each in self_test(CPU) if not each.right and each.op == op]


def test_a_scale_that_is_off_is_found(monkeypatch, fresh):
    right = torch_blockwise.attend

    def attend(q, layer, batch, params, **more):
        return right(q * 1.3, layer, batch, params, **more)

    monkeypatch.setattr(torch_blockwise, "attend", attend)
    found = wrong_of("attend decode")
    assert {each.implementation for each in found} == {"torch"}
    assert {"none", "int8", "int4"} <= {each.format for each in found}


def test_a_write_to_another_slot_is_found(monkeypatch, fresh):
    right = write_reference._write

    def write(rows, *others):
        return right(rows.roll(1, 0), *others)

    cases = [each for each in self_test(CPU) if each.op == "rope_write"]
    assert all(each.right for each in cases)
    monkeypatch.setattr(write_reference, "_write", write)
    if cpu_core.find_core() is None:
        pytest.skip("the core writes what the broken reference is compared with")
    assert {each.implementation for each in wrong_of("rope_write")} == {"cpu"}


def test_nan_and_an_exception_are_wrong(monkeypatch, fresh):
    def nan(q, layer, batch, params, **more):
        return torch.full_like(q, torch.nan), torch.zeros(q.shape[:2])

    monkeypatch.setattr(torch_blockwise, "attend", nan)
    assert wrong_of("attend prefill")

    def broken(*_, **__):
        raise RuntimeError("no such instruction")

    _load.cache_clear()
    monkeypatch.setattr(torch_blockwise, "attend", broken)
    assert "RuntimeError: no such instruction" in wrong_of("attend prefill")[0].said
    said = [each for each in doctor._self_test("cpu") if each.state == "bad"]
    assert said and "are wrong: attend" in said[0].found and said[0].advice


def test_every_finding_that_is_not_good_says_what_to_do(monkeypatch):
    def bad(finding):
        assert finding.state != "good" and finding.advice, finding
        return finding

    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert (
        "quantpage[transformers]" in bad(doctor._package("transformers", "transformers", "")).advice
    )
    monkeypatch.setattr(doctor, "_version", lambda name: "4.9.0")
    assert "not tested" in bad(doctor._package("transformers", "transformers", "")).found
    monkeypatch.setattr(cpu_core, "find_core", lambda: None)
    monkeypatch.setattr(cpu_core, "absence", lambda: "no compiled core.")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "C++ compiler" in bad(doctor._core()).advice
    monkeypatch.setattr(doctor, "available_bytes", lambda: 1 << 30)
    assert "1.0 GiB" in bad(doctor._memory()).found


def test_memory_is_read_on_linux():
    found = available_bytes()
    assert found is None or found > 1 << 20
