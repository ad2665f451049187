"""Answers that follow a JSON schema, a pattern or a grammar: llguidance says which tokens may come
next."""

import json
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANY_OBJECT = {"type": "object"}
_WHITESPACE: Any = {"whitespace_pattern": "[ ]?"}
"""Between the parts of an answer; without a limit small models write spaces until the end."""


class AnswerGrammar:
    """What an answer has to be, over one tokenizer; ``follow()`` an answer."""

    def __init__(self, kind: str, form: Any, tokenizer: "GrammarTokenizer") -> None:
        """kind, form: 'json' and a schema, 'regex' and a pattern, 'choice' and a list of texts, or
        'grammar' and a text in llguidance's dialect of Lark.

        Raises ValueError where llguidance cannot follow it.
        """
        from llguidance import LLMatcher

        self._tokenizer = tokenizer
        try:
            self._grammar = _written(kind, form)
            problem = LLMatcher.validate_grammar(self._grammar, tokenizer.table)
        except ValueError as error:
            problem = str(error)
        if problem:
            what = _EXPECTED[kind]
            raise ValueError(f"expected {what} that can be followed, got {problem}")

    def follow(self) -> "_Follower":
        """A follower at the beginning of the answer."""
        return _Follower(self._grammar, self._tokenizer)


_EXPECTED = {
    "json": "a JSON schema",
    "regex": "a regular expression",
    "choice": "texts",
    "grammar": "a grammar",
}


def _written(kind: str, form: Any) -> str:
    """A grammar as llguidance writes it."""
    from llguidance import LLMatcher

    if kind == "json":
        return LLMatcher.grammar_from_json_schema(json.dumps(form), overrides=_WHITESPACE)
    if kind == "regex":
        return LLMatcher.grammar_from_regex(form)
    if kind == "choice":
        # Lark writes texts as JSON does.
        form = "start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in form)
    return LLMatcher.grammar_from_lark(form)


class GrammarTokenizer:
    """llguidance's table of a Transformers tokenizer; made once, it takes a second."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", vocabulary: int) -> None:
        """vocabulary: width of the model's logits."""
        from llguidance.hf import from_tokenizer

        # It takes fewer kinds by its types than it does.
        self.table = from_tokenizer(cast(Any, tokenizer), n_vocab=vocabulary)
        self.vocabulary = vocabulary


class _Follower:
    """Where in a grammar an answer stands."""

    def __init__(self, grammar: str, tokenizer: GrammarTokenizer) -> None:
        from llguidance import LLMatcher

        self._matcher, self._vocabulary = LLMatcher(tokenizer.table, grammar), tokenizer.vocabulary

    def restrict(self, logits: Tensor) -> Tensor:
        """[1, vocabulary] logits with -inf where a token cannot come next."""
        # llguidance.torch does this too, by a kernel that torch.compile makes: seconds at the first
        # answer of a server, in which all wait, and a C++ compiler that need not be there.
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=self._vocabulary, bitorder="little")
        return logits.masked_fill(torch.from_numpy(allowed == 0), -torch.inf)

    def take(self, token: int) -> None:
        """Move past a token."""
        self._matcher.consume_token(token)

    def done(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._matcher.is_stopped()
