"""Characters that are certain, and nothing of a stop text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantpage.engine.text import TextStream

pytestmark = pytest.mark.pure


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens, skip_special_tokens=True):
        return bytes(tokens).decode("utf-8", "replace")


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_the_pieces_are_the_text(text):
    stream = TextStream(Bytes())
    pieces = [stream.push(byte) for byte in text.encode()]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == text


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_stop_text_ends_it_where_it_first_stands(text, stops):
    stream = TextStream(Bytes(), stops)
    made = ""
    for byte in text.encode():
        made += stream.push(byte)
        if stream.stopped:
            break
    made += stream.finish()
    ends = [(at + len(each), at) for each in stops for at in [text.find(each)] if at >= 0]
    if not ends:
        assert (made, stream.stopped) == (text, False)
    else:
        # Characters come one by one: the stop text that is complete first ends the answer.
        end = min(ends)[0]
        assert stream.stopped
        assert made == text[: min(at for e, at in ends if e == end)]


def test_an_unfinished_character_is_shown_at_the_end():
    stream = TextStream(Bytes())
    assert stream.push(0xC3) == ""
    assert stream.finish() == "\ufffd"


def test_a_stop_text_is_kept_where_that_is_asked_and_overlooked_before_the_least_tokens():
    for keep, least, wanted in (
        (False, 0, "one "),
        (True, 0, "one two"),
        (False, 6, "one "),
        (False, 7, "one two three "),
    ):
        stream = TextStream(Bytes(), ("two",), keep_stop=keep, min_tokens=least)
        made = ""
        for byte in b"one two three two":
            if not stream.stopped:
                made += stream.push(byte)
        assert (made, stream.stopped) == (wanted, True)
