"""What is asked of the engine, and what it says while it answers."""

from array import array
from collections.abc import Collection
from dataclasses import dataclass, field

from quantpage.cache.counts import whole
from quantpage.engine.grammar import AnswerGrammar

_COLDEST = 1e-10
"""Lower ones divide logits to more than float32 holds."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. The names and meanings are those of OpenAI and vLLM.

    Raises ValueError for numbers that cannot be.
    """

    temperature: float = 1.0
    """0: always the most likely token; else 1e-10 to 100."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, number added to its logit)."""
    seed: int | None = None
    """None: another answer each time. Answer i of a request draws from ``seed + i``."""

    def __post_init__(self) -> None:
        if self.temperature != 0 and not _COLDEST <= self.temperature <= 100:
            raise ValueError(
                f"temperature: expected 0, or {_COLDEST:g} to 100, got {self.temperature}"
            )
        _between("top_p", self.top_p, 1e-6, 1)
        _between("top_k", whole("top_k", self.top_k), 0, 1 << 30)
        _between("min_p", self.min_p, 0, 1)
        _between("repetition_penalty", self.repetition_penalty, 1e-6, 100)
        _between("presence_penalty", self.presence_penalty, -2, 2)
        _between("frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None and not isinstance(self.seed, int):
            raise ValueError(f"seed: expected a whole number or None, got {self.seed!r}")
        _tokens("logit_bias", [token for token, _ in self.logit_bias])
        for token, bias in self.logit_bias:
            _between(f"logit_bias[{token}]", bias, -100, 100)


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and what is wanted of its answers.

    Raises ValueError for what cannot be asked.
    """

    prompt: tuple[int, ...]
    """Token ids, at least one."""
    max_tokens: int
    """Longest answer in tokens; 0: the prompt is computed, and nothing follows."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""
    stop_tokens: frozenset[int] = frozenset()
    """Tokens that end an answer, such as the model's end of sequence."""
    min_tokens: int = 0
    """Before so many tokens nothing of ``stop`` and ``stop_tokens`` ends an answer."""
    keep_stop: bool = False
    """Whether what ended an answer, a stop text or a token's, is part of it."""
    keep_special: bool = False
    """Whether the text has the names of special tokens."""
    answers: int = 1
    """Independent answers, which share the prompt's pages."""
    logprobs: int | None = None
    """Alternatives to report with every token's log-probability; None: report nothing."""
    prompt_logprobs: int | None = None
    """Alternatives to report with the log-probability of every token of the prompt but the first;
    None: report nothing. All of the prompt is computed, whatever is known of it."""
    grammar: AnswerGrammar | None = None
    """What the answer has to follow; None: free text."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt: expected at least one token, got none")
        object.__setattr__(self, "prompt", _tokens("prompt", self.prompt))
        _between("max_tokens", whole("max_tokens", self.max_tokens), 0, 1 << 40)
        _between("n", whole("n", self.answers, 1), 1, 1 << 20)
        for name, asked in (
            ("logprobs", self.logprobs),
            ("prompt_logprobs", self.prompt_logprobs),
        ):
            if asked is not None:
                _between(name, whole(name, asked), 0, 20)
        _between("min_tokens", whole("min_tokens", self.min_tokens), 0, self.max_tokens)
        _tokens("stop_tokens", self.stop_tokens)
        if self.min_tokens and self.grammar is not None:
            raise ValueError(
                f"min_tokens: expected none beside a grammar, which ends answers, "
                f"got {self.min_tokens}"
            )
        if any(not text for text in self.stop):
            raise ValueError("stop: expected texts of at least one character, got an empty one")


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """A token that was chosen or given, and what the model gave it and the likeliest ones."""

    token: int
    logprob: float
    """Natural logarithm of its probability before temperature, penalties and cuts."""
    top: tuple[tuple[int, float], ...] = ()
    """(token, log-probability) of the likeliest, first the most likely."""
    rank: int = 0
    """1: no token is likelier; 0: nobody asked."""


@dataclass(frozen=True, slots=True)
class Piece:
    """News of one answer."""

    answer: int
    """Which of the request's answers."""
    text: str = ""
    """Follows what came before; characters whose last bytes are missing wait."""
    choices: tuple[TokenChoice, ...] = ()
    """Of the tokens since the last piece, where the request asked for log-probabilities."""
    prompt: tuple[TokenChoice, ...] = ()
    """Of the next tokens of the prompt, from its second on, where the request asked for theirs.
    They come before all else, and with the first answer for all of a request's."""
    finish_reason: str | None = None
    """'stop' (a stop text or token), 'length', 'cancelled' or 'error'; None: more will come."""
    error: BaseException | None = None
    """Why an answer ended in 'error'."""
    made: int = 0
    """Tokens of the answer so far."""
    cached: int = 0
    """Tokens of the prompt that were found in the prefix cache."""


def _tokens(name: str, tokens: Collection[int]) -> tuple[int, ...]:
    """``tokens`` as Python integers; ValueError for what is no number of a token."""
    try:
        # In C, as prompts are long.
        return tuple(array("q", tokens))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{name}: expected numbers of tokens, but {error}") from None


def _between(name: str, got: float, low: float, high: float) -> None:
    if not low <= got <= high:
        raise ValueError(f"{name}: expected {low:g} to {high:g}, got {got}")
