"""Answers that follow a JSON schema: llguidance says which tokens may come next."""

import json
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANY_OBJECT = {"type": "object"}
_WHITESPACE: Any = {"whitespace_pattern": "[ ]?"}
"""Between the parts of an answer; without a limit small models write spaces until the end."""


class JsonGrammar:
    """A JSON schema over one tokenizer; ``follow()`` an answer."""

    def __init__(self, schema: dict[str, Any], tokenizer: "GrammarTokenizer") -> None:
        """Raises ValueError where llguidance cannot follow the schema."""
        from llguidance import LLMatcher

        self._tokenizer = tokenizer
        try:
            self._grammar = LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides=_WHITESPACE
            )
            problem = LLMatcher.validate_grammar(self._grammar, tokenizer.table)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise ValueError(f"schema: expected a JSON schema that can be followed, got {problem}")

    def follow(self) -> "_Follower":
        """A follower at the beginning of the answer."""
        return _Follower(self._grammar, self._tokenizer)


class GrammarTokenizer:
    """llguidance's table of a Transformers tokenizer; made once, it takes a second."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", vocabulary: int) -> None:
        """vocabulary: width of the model's logits."""
        from llguidance.hf import from_tokenizer

        # It takes fewer kinds by its types than it does.
        self.table = from_tokenizer(cast(Any, tokenizer), n_vocab=vocabulary)
        self.vocabulary = vocabulary


class _Follower:
    def __init__(self, grammar: str, tokenizer: GrammarTokenizer) -> None:
        from llguidance import LLMatcher
        from llguidance.torch import allocate_token_bitmask

        self._matcher = LLMatcher(tokenizer.table, grammar)
        self._mask = allocate_token_bitmask(1, tokenizer.vocabulary)

    def restrict(self, logits: Tensor) -> Tensor:
        from llguidance.torch import apply_token_bitmask_inplace, fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._mask)
        logits = logits.clone()
        apply_token_bitmask_inplace(logits, self._mask)
        return logits

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)

    def done(self) -> bool:
        return self._matcher.is_stopped()
