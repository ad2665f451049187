"""Tokens to text as they come: whole characters, and nothing of a stop text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"
"""What tokenizers write for bytes that are no character yet."""
_CONTEXT = 6
"""Tokens before a new one that are decoded with it, at least: some tokenizers write a space or not
by what stands before."""
_MOST = 18
"""Shown tokens that are decoded with a new one, at most; then all but _CONTEXT are left behind."""


class TextStream:
    """The text of one answer; ``push`` a token, get the characters that are certain."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        stop: Sequence[str] = (),
        *,
        keep_stop: bool = False,
        keep_special: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """As ``Request`` has them."""
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._keep_stop, self._keep_special = keep_stop, keep_special
        self._min_tokens = min_tokens
        self._tokens: list[int] = []
        self._from, self._before = 0, ""
        """The first token that is decoded, and the text from there on that was shown."""
        self._held = ""
        """Characters that may turn out to be the beginning of a stop text."""
        self.stopped = False
        """Whether a stop text came; nothing follows."""

    def push(self, token: int) -> str:
        """The characters that this token makes certain, perhaps none."""
        self._tokens.append(token)
        now, shown = self._decode(), len(self._before)
        if now.endswith(_UNFINISHED) or len(now) <= shown:
            return ""
        self._before = now
        if len(self._tokens) - self._from >= _MOST:
            self._from = len(self._tokens) - _CONTEXT
            self._before = self._decode()
        return self._release(now[shown:])

    def finish(self) -> str:
        """What was held back, at the end of an answer that no stop text ended."""
        if self.stopped:
            return ""
        return self._release(self._decode()[len(self._before) :]) + self._take_held()

    def _release(self, text: str) -> str:
        """``text`` and what was held, up to a stop text or what may become one."""
        text, self._held = self._held + text, ""
        # (where it begins, where the answer ends), of those that are there.
        found = [(text.find(each), len(each) if self._keep_stop else 0) for each in self._stop]
        found = [(at, at + kept) for at, kept in found if at >= 0]
        if found and len(self._tokens) > self._min_tokens:
            self.stopped = True
            return text[: min(found)[1]]
        keep = max((_overlap(text, each) for each in self._stop), default=0)
        if keep:
            text, self._held = text[:-keep], text[-keep:]
        return text

    def _take_held(self) -> str:
        held, self._held = self._held, ""
        return held

    def _decode(self) -> str:
        # One text for one row of tokens, whatever its type says.
        return cast(
            str,
            self._tokenizer.decode(
                self._tokens[self._from :], skip_special_tokens=not self._keep_special
            ),
        )


def _overlap(text: str, stop: str) -> int:
    """The longest beginning of ``stop`` that ``text`` ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
