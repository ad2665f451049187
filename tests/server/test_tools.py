"""Calls of tools, found in text that comes in pieces of any size."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pydantic")

from quantpage.server.protocol import ToolBody
from quantpage.server.tools import ToolReader

pytestmark = pytest.mark.pure

TOOLS = [ToolBody.model_validate({"type": "function", "function": {"name": "add"}})]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@given(st.lists(st.integers(1, 20), max_size=30))
def test_calls_are_found_however_the_text_is_cut(cuts):
    text = f"I add. {CALL}\n{CALL} 1 < 2 <tool"
    reader, shown, at = ToolReader(TOOLS, whole=False), "", 0
    for cut in cuts:
        shown += reader.push(text[at : at + cut], last=False)
        at += cut
    shown += reader.push(text[at:], last=True)
    assert shown == "I add.  1 < 2 <tool"
    assert [json.loads(each["function"]["arguments"]) for each in reader.calls] == [{"a": 1}] * 2


@pytest.mark.parametrize("inner", ["not json", '{"name": "other"}', '["add"]'])
def test_what_is_no_call_of_a_tool_stays_text(inner):
    text = f"<tool_call>{inner}</tool_call> so"
    reader = ToolReader(TOOLS, whole=False)
    assert reader.push(text, last=True) == text
    assert not reader.calls


def test_without_tools_marks_are_text():
    assert ToolReader([], whole=False).push(CALL, last=False) == CALL


def test_calls_behind_the_first_are_left_out_where_one_is_asked_for():
    reader = ToolReader(TOOLS, whole=False, one=True)
    assert reader.push(f"So: {CALL}\n{CALL} done", last=True) == "So:  done"
    assert len(reader.calls) == 1
