"""What clients may send: OpenAI's names, and vLLM's for what OpenAI has no name for.

A parameter that is not here is refused by its name (400): nothing is ignored without a word.
"""

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Text = Annotated[str, Field(min_length=1)]
Token = Annotated[int, Field(ge=0)]


class Body(BaseModel):
    """Strict: unknown names and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_hostile(cls, value: Any) -> Any:
        """Lists in lists without end, and half of a surrogate pair: JSON can write it, and it is no
        text that a tokenizer takes.
        """
        level = [value]
        for _ in range(_LEVELS):
            if not level:
                return value
            level = [part for each in level for part in _parts(each)]
        raise ValueError(f"expected at most {_LEVELS} levels of lists and objects, got more")


_LEVELS = 64
"""Of what is sent: as deep as nobody writes, and as templates and schemas can be followed."""


def _parts(value: Any) -> Iterable[Any]:
    """What a list or an object holds; ValueError for half of a surrogate pair."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("expected text, got half of a surrogate pair") from None
    if isinstance(value, dict):
        return chain(value.keys(), value.values())
    return [each for each in value if type(each) is not int] if isinstance(value, list) else ()


def first_problem(errors: Sequence[Any]) -> tuple[str, str]:
    """(parameter, what is wrong with it) of the first of pydantic's errors."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return "", f"expected JSON, got {first['ctx']['error']} at character {first['loc'][-1]}"
    named = _path(first)[:1]
    same = [each for each in errors if _path(each)[:1] == named]
    # Of a parameter that may be of several types each type has an error; one that is about more
    # than being another type is about what was sent.
    other = next((each for each in same if not each["type"].endswith("_type")), None)
    alike = _furthest(same) if other is None else [other]
    first, where = alike[0], ".".join(_path(alike[0]))
    if first["type"] == "value_error":
        return where, str(first["ctx"]["error"])
    if first["type"] == "extra_forbidden":
        return where, _unknown(first["loc"][-1])
    # Each once, in the order of the types that were tried.
    kinds = dict.fromkeys(map(_expected, alike))
    return where, f"expected {' or '.join(kinds)}, got {_came(first)}"


_ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (False,),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "priority": (0,),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
}
"""Names of OpenAI's and vLLM's that are not served, and values which leave an answer as it is."""
_INSTEAD = {
    "best_of": "n asks for several answers",
    "chat_template": "the model's own is used",
    "documents": "chat_template_kwargs reaches the model's chat template",
    "echo": "/v1/completions has it",
    "functions": "tools asks for calls",
    "function_call": "tool_choice asks for calls",
    "guided_choice": "structured_outputs asks for it",
    "guided_grammar": "structured_outputs asks for it",
    "guided_json": "structured_outputs or response_format asks for it",
    "guided_regex": "structured_outputs asks for it",
    "n_predict": "max_tokens asks for it",
    "reasoning_effort": "chat_template_kwargs reaches the model's chat template",
    "use_beam_search": "an attached model searches (generate with num_beams)",
}
"""Who asks for what is not served, and where it is."""


def _unknown(name: Any) -> str:
    instead = _INSTEAD.get(str(name))
    return "unknown or not supported by this server" + (f"; {instead}" if instead else "")


_EXPECTED = {
    "missing": "a value",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of at most {max_length}",
    "string_too_short": "a text of {min_length} or more characters",
    "string_pattern_mismatch": "a text that matches {pattern}",
    "literal_error": "{expected}",
    "finite_number": "a finite number",
    "string_type": "a text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
"""What pydantic's kinds of errors say was expected, in this project's words."""


def _expected(error: Any) -> str:
    known = _EXPECTED.get(error["type"])
    if known is None:
        return str(error["msg"])
    facts = error.get("ctx", {})
    plain = {
        name: int(n) if isinstance(n, float) and n % 1 == 0 else n for name, n in facts.items()
    }
    return known.format(**plain)


def _came(error: Any) -> str:
    """What was sent, as JSON, if it is short."""
    if error["type"] == "missing":
        return "none"
    given = error["input"]
    if error["type"] in ("too_short", "too_long"):
        return f"one of {len(given)}"
    text = json.dumps(given, ensure_ascii=False, default=repr)
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}..."


_SHORT = 60
"""Characters of what came that an error repeats."""


def _path(error: Any) -> list[str]:
    """Where it is, without pydantic's names of the types that it tried."""
    return [
        str(part)
        for part in error["loc"]
        if part not in ("body", "str") and not (isinstance(part, str) and set(part) & set("-[("))
    ]


def _furthest(errors: Sequence[Any]) -> list[Any]:
    """Of what may be lists of several types the first errors of those types that fitted furthest;
    of anything else those that are where the first one is.
    """
    firsts: dict[str, tuple[list[int], Any]] = {}
    for each in errors:
        tried, *places = each["loc"][-len(_path(each)) :]
        if not isinstance(tried, str) or not all(isinstance(place, int) for place in places):
            return [each for each in errors if _path(each) == _path(errors[0])]
        firsts.setdefault(tried, (places, each))
    end = max(places for places, _ in firsts.values())
    return [each for places, each in firsts.values() if places == end]


class ErrorFacts(BaseModel):
    """What went wrong, for whom."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every answer that is not a success."""

    error: ErrorFacts


class StreamOptions(Body):
    """``stream_options``."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's: with ``include_usage``, so far in every event."""


class StructuredOutputs(Body):
    """vLLM's ``structured_outputs``: one of these."""

    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1)] | None = None
    grammar: Text | None = None
    """In llguidance's dialect of Lark."""


class JsonSchema(Body):
    """``response_format.json_schema``."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class GenerationBody(Body):
    """What chat and plain completions share."""

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_nothing(cls, given: Any) -> Any:
        """Clients send null, or what would be anyway, under names of other servers."""
        if not isinstance(given, dict):
            return given
        return {
            name: value
            for name, value in given.items()
            if name in cls.model_fields
            or not (value is None or value in _ASKS_NOTHING.get(name, ()))
        }

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 30)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    ignore_eos: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """vLLM's: how many of the likeliest are told with each token of the prompt."""
    prompt_cache_key: str | None = None
    """With ``user``, what only says who asks: no answer depends on it."""

    @property
    def answers(self) -> int:
        """How many are wanted of each prompt."""
        return self.n or 1


class CompletionBody(GenerationBody):
    """``/v1/completions``."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """0: the prompt alone is told of."""
    echo: bool | None = None
    """The answer begins with the prompt, and so do its ``logprobs``."""
    add_special_tokens: bool | None = None
    """None: of a text."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class FunctionBody(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Body):
    """An entry of ``tools``."""

    type: Literal["function"]
    function: FunctionBody


class NamedFunction(Body):
    """A function by its name."""

    name: str


class NamedTool(Body):
    """``tool_choice`` of one function."""

    type: Literal["function"]
    function: NamedFunction


class Message(BaseModel):
    """A message of a chat; what a role may carry besides is the chat template's business."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None


class TemplateFlags(Body):
    """How messages go through the chat template."""

    add_generation_prompt: bool | None = None
    """None: true, but where the last message is continued."""
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatBody(GenerationBody, TemplateFlags):
    """``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[ToolBody] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None


class TokenizeBody(TemplateFlags):
    """``/tokenize``: a text, or messages through the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[ToolBody] | None = None
    add_special_tokens: bool | None = None
    """None: of a text; a chat template writes its own."""
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """``/detokenize``."""

    model: str | None = None
    tokens: list[Token]
