"""Bodies that cannot be: the parameter, what was expected, what came."""

import pytest

pydantic = pytest.importorskip("pydantic")

from quantpage.server.protocol import ChatBody, CompletionBody, first_problem  # noqa: E402

pytestmark = pytest.mark.cpu

MESSAGES = [{"role": "user", "content": "Hi"}]


def problem(kind, **body):
    with pytest.raises(pydantic.ValidationError) as caught:
        kind.model_validate(body)
    return "{}: {}".format(*first_problem(caught.value.errors()))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"temperature": 3}, "temperature: expected at most 2, got 3"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
        ({"prompt_logprobs": -1}, "prompt_logprobs: expected at least 0, got -1"),
        ({"top_p": 0}, "top_p: expected more than 0, got 0"),
        ({"seed": 1 << 63}, f"seed: expected less than {1 << 63}, got {1 << 63}"),
        ({"stream": 1}, "stream: expected true or false, got 1"),
        ({"stop": 5}, "stop: expected a text or a list, got 5"),
        ({"stop": ["a", ""]}, 'stop.1: expected a text of 1 or more characters, got ""'),
        ({"stop": ["a"] * 17}, "stop: expected a list of at most 16, got one of 17"),
        ({"messages": []}, "messages: expected a list of 1 or more, got one of 0"),
        ({"messages": [{}]}, "messages.0.role: expected a value, got none"),
        ({"logit_bias": []}, "logit_bias: expected an object, got []"),
        (
            {"response_format": {"type": "xml"}},
            "response_format.type: expected 'text', 'json_object' or 'json_schema', got \"xml\"",
        ),
        ({"user": ["é" * 99]}, 'user: expected a text, got ["' + "é" * 58 + "..."),
    ],
)
def test_a_refusal_says_what_was_expected_and_what_came(body, said):
    assert problem(ChatBody, **{"messages": MESSAGES} | body) == said


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (5, "prompt: expected a text or a list, got 5"),
        (["a", [1]], "prompt.1: expected a text, got [1]"),
        ([[1], ["a"]], 'prompt.1.0: expected a whole number, got "a"'),
        ([{}], "prompt.0: expected a whole number or a text or a list, got {}"),
    ],
)
def test_a_prompt_may_be_of_several_types(prompt, said):
    """Of one all the way: the one that fitted furthest says where it ends."""
    assert problem(CompletionBody, prompt=prompt) == said


def test_names_of_other_servers_are_left_out_where_they_ask_for_nothing():
    plain = ChatBody.model_validate({"messages": MESSAGES})
    nothing = {"best_of": 1, "store": False, "suffix": None, "audio": None, "modalities": ["text"]}
    labels = {"metadata": {"a": "b"}, "safety_identifier": "x", "prompt_cache_key": "y"}
    assert ChatBody.model_validate({"messages": MESSAGES, **nothing}) == plain
    ChatBody.model_validate({"messages": MESSAGES, **labels})
    for body, said in (
        ({"best_of": 2}, "server; n asks for several answers"),
        ({"guided_json": {}}, "server; structured_outputs or response_format asks for it"),
        ({"store": True}, "server"),
    ):
        (name,) = body
        wanted = f"{name}: unknown or not supported by this {said}"
        assert problem(CompletionBody, prompt="Hi", **body) == wanted
    said = "echo: unknown or not supported by this server; /v1/completions has it"
    assert problem(ChatBody, messages=MESSAGES, echo=True) == said
