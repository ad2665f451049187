"""Log-probabilities as clients read them: OpenAI's of a completion's text, vLLM's of a prompt."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from quantpage.engine import TokenChoice
from quantpage.server.serving import Served

_LEAST = -9999.0
"""Said of a token that cannot be, as in vLLM: JSON has no infinite numbers."""


def said(logprob: float) -> float:
    """A log-probability that JSON can say."""
    return max(logprob, _LEAST)


def of_prompt(served: Served, told: Sequence[TokenChoice], top: int) -> list[Any]:
    """vLLM's ``prompt_logprobs``: nothing of the first token; of each other one an object of token
    ids, its own first, then of the likeliest."""
    made: list[Any] = [None]
    for each in told:
        ranked = [(each.token, each.logprob, each.rank)]
        ranked += [(token, number, at) for at, (token, number) in enumerate(each.top[:top], 1)]
        known: dict[str, Any] = {}
        for token, number, rank in ranked:
            text = served.text_of(token)
            facts = {"logprob": said(number), "rank": rank, "decoded_token": text}
            known.setdefault(str(token), facts)
        made.append(known)
    return made


class TextLogprobs:
    """OpenAI's ``logprobs`` of one completion, whose text may come in pieces."""

    def __init__(self, served: Served, top: int, keep_special: bool) -> None:
        """top: how many of the likeliest are told with each token. keep_special: whether the text
        has the names of special tokens."""
        self._served, self._top, self._keep_special = served, top, keep_special
        self._text, self._at = "", 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def piece(
        self, text: str, choices: Iterable[TokenChoice], first: int | None = None
    ) -> dict[str, list[Any]]:
        """Of the next tokens, which come with this text; first: a token before them of which
        nothing can be said."""
        self._text += text
        made: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        told = [(each.token, each) for each in choices]
        for token, each in told if first is None else [(first, None), *told]:
            made["tokens"].append(self._served.named(token))
            made["token_logprobs"].append(None if each is None else said(each.logprob))
            made["top_logprobs"].append(None if each is None else self._likeliest(each))
            made["text_offset"].append(self._place(token))
        return made

    def _likeliest(self, choice: TokenChoice) -> dict[str, float]:
        """With the token itself. Where two are written alike, the likelier: it comes first."""
        made: dict[str, float] = {}
        for token, number in (*choice.top[: self._top], (choice.token, choice.logprob)):
            made.setdefault(self._served.named(token), said(number))
        return made

    def _place(self, token: int) -> int:
        """Where a token begins: behind the characters that are whole before it."""
        place, own = self._at, self._served.text_of(token)
        text = self._decoder.decode(self._served.bytes_of(token, own))
        if self._text.startswith(text, place):
            self._at += len(text)
        elif self._text.startswith(text.removeprefix(" "), place):
            # SentencePiece's first token, whose space is no part of the text.
            self._at += len(text.removeprefix(" "))
        elif self._keep_special or not self._served.is_special(token):
            # Not there yet, as what may begin a stop text, or written otherwise.
            self._at += len(text)
        return place
