"""Finding the compiled core, and what is said where there is none."""

import ctypes.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantpage import cpu_core
from quantpage.cpu_core import interface
from quantpage.explain import example_call, explain
from quantpage.formats import CODES, FORMATS, KVFormat, QuantSpec
from quantpage.hardware import device_info
from quantpage.ops import refusals

pytestmark = pytest.mark.cpu


@pytest.fixture
def call():
    return example_call(device_info("cpu"), FORMATS["int8"])


def test_where_a_compiler_is_there_is_a_core():
    """An installation without one says why; a compiler is not such a reason."""
    if shutil.which("c++") or shutil.which("g++"):
        assert cpu_core.absence() == ""
        found = cpu_core.core()
        assert cpu_core.ISAS[found.isa] in ("baseline", "avx2", "avx512", "avx512_bf16")
        numbers = torch.ones(1 << 12, dtype=torch.int64)
        assert found.read(numbers.data_ptr(), 1 << 15, 1) == 1 << 12
    else:
        assert cpu_core.find_core() is None
        assert "no compiled core" in cpu_core.absence()


@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_file_that_is_no_library_is_a_reason(tmp_path, monkeypatch, content):
    path = tmp_path / "libquantpage_cpu.so"
    path.write_bytes(content)
    monkeypatch.setattr(cpu_core, "_chosen", path)
    cpu_core._open.cache_clear()
    try:
        found, reason = cpu_core._open()
        assert found is None and str(path) in reason
    finally:
        cpu_core._open.cache_clear()


def test_without_a_core_torch_answers(call, monkeypatch):
    sentence = "no compiled core in this installation: it was made without a C++ compiler."
    monkeypatch.setattr(refusals, "absence", lambda: sentence)
    assert refusals.CPU(call) == [sentence]
    for choice in explain(call):
        assert choice.chosen == "torch"
        assert ("cpu", sentence) in choice.refusals


def test_the_header_is_written_from_the_list():
    """What the core is compiled from and what Python packs by."""
    path = Path(__file__).parents[2] / "csrc" / "records.h"
    assert path.read_text() == interface.header(), "run scripts/interface.py"


def changed(record, old, new):
    assert old in record.body
    return replace(record, body=record.body.replace(old, new))


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("Attend", "q_type, q_token, q_head", "q_type, q_head, q_token",
         "expected q_head int64_t as number 3 of Attend, got q_token int64_t"),
        ("Step", "int64_t requests, page_size;", "int64_t page_size;",
         "expected 80 bytes as number 0 of Step, got 88 bytes"),
        ("Gather", "uint8_t* out;", "float* out;",
         "expected out float* as number 3 of Gather, got out uint8_t*"),
    ],
)  # fmt: skip
def test_a_library_of_another_list_is_refused(name, old, new, said, monkeypatch):
    """Another order, another size, another type: the sentence names the first that differs."""
    if cpu_core.find_core() is None:
        pytest.skip("no compiled core in this installation")
    records = {**interface.RECORDS, name: changed(interface.RECORDS[name], old, new)}
    monkeypatch.setattr(interface, "RECORDS", records)
    cpu_core._open.cache_clear()
    try:
        found, reason = cpu_core._open()
        assert found is None
        assert reason == (
            f"no compiled core in this installation: {said}; it was compiled from another "
            "version, install the package again."
        )
    finally:
        cpu_core._open.cache_clear()


def test_a_library_that_says_nothing_of_itself_is_refused(monkeypatch):
    monkeypatch.setattr(cpu_core, "_chosen", Path(ctypes.util.find_library("c") or "libc.so.6"))
    cpu_core._open.cache_clear()
    try:
        assert "one without quantpage_interface" in cpu_core._open()[1]
    finally:
        cpu_core._open.cache_clear()


def test_a_field_that_is_forgotten_or_unknown_is_an_error():
    values = {name: 0 for name, _ in interface.STEP.fields}
    assert len(interface.STEP.pack(**values)) == interface.STEP.size
    with pytest.raises(TypeError, match="requests"):
        interface.STEP.pack(**{name: 0 for name in values if name != "requests"})
    with pytest.raises(TypeError, match="responses"):
        interface.STEP.pack(**values, responses=0)


def test_refusals_name_what_came(call, monkeypatch):
    monkeypatch.setattr(refusals, "absence", lambda: "")
    wide = QuantSpec(CODES["int8"], scale_dtype=torch.float64)
    odd = replace(
        call,
        head_dim=40,
        value_head_dim=1024,
        dtype=torch.float64,
        format=KVFormat("wide", wide, wide),
    )
    assert refusals.CPU(odd) == [
        "needs a head_dim that is a multiple of 16 up to 512, got 40.",
        "needs a value_head_dim that is a multiple of 16 up to 512, got 1024.",
        "needs queries in float32, bfloat16 or float16, got float64.",
        "needs scales of 16 or 32 bits for keys, got float64.",
        "needs scales of 16 or 32 bits for values, got float64.",
    ]
    cuda = replace(call, device=replace(call.device, kind="cuda"))
    assert refusals.CPU(cuda) == ["needs a CPU, got cuda."]
