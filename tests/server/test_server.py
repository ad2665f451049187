"""The server as OpenAI's own client sees it, over real sockets on the loopback."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import transformers as tf
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from quantpage.server.protocol import CompletionBody, Message  # noqa: E402
from quantpage.server.run import _defaults  # noqa: E402
from quantpage.server.serving import _BYTES, Served, _plain  # noqa: E402
from tests.server.small import answering  # noqa: E402

pytestmark = pytest.mark.cpu

KEY = "a key"


@pytest.fixture(scope="module")
def url(folder):
    with answering(folder, KEY, max_body=100_000, max_requests=16, max_waiting=32) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as made:
        yield made


def chat(client, text="Say something.", **options):
    options = {"max_tokens": 8, "temperature": 0} | options
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="small", messages=messages, **options)


def complete(client, prompt="Once", **options):
    options = {"max_tokens": 8, "temperature": 0} | options
    return client.completions.create(model="small", prompt=prompt, **options)


def test_a_stream_says_what_the_whole_answer_says(client):
    whole = chat(client, max_tokens=24)
    pieces = list(chat(client, max_tokens=24, stream=True, stream_options={"include_usage": True}))
    text = "".join(each.choices[0].delta.content or "" for each in pieces if each.choices)
    assert text == whole.choices[0].message.content
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    usage = pieces[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    assert usage.completion_tokens == 24


def test_every_event_says_what_was_counted_so_far_where_that_is_asked(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    for pieces in (
        list(chat(client, max_tokens=40, stream=True, stream_options=options)),
        list(complete(client, max_tokens=40, stream=True, stream_options=options)),
    ):
        made = [each.usage.completion_tokens for each in pieces]
        # An event may bring several tokens, as letters may consist of them.
        assert made == sorted(made) and made[0] < 20 and made[-2:] == [40, 40]
        assert len({each.usage.prompt_tokens for each in pieces}) == 1


def test_several_prompts_and_answers_have_their_places(client):
    got = complete(client, ["Once", "Twice"], n=2, logprobs=2)
    assert [each.index for each in got.choices] == [0, 1, 2, 3]
    alone = [complete(client, each).choices[0].text for each in ("Once", "Twice")]
    assert [each.text for each in got.choices] == [alone[0], alone[0], alone[1], alone[1]]
    assert len(got.choices[0].logprobs.tokens) == 8
    assert all(len(each) == 2 for each in got.choices[0].logprobs.top_logprobs)


def test_tokens_are_a_prompt_too(client, http):
    tokens = http.post("/tokenize", json={"prompt": "Once"}).json()["tokens"]
    assert complete(client, tokens).choices[0].text == complete(client).choices[0].text
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "Once"}


def test_a_seed_repeats_an_answer(client):
    some = [complete(client, temperature=1, seed=7, n=3, max_tokens=16) for _ in range(2)]
    texts = [[each.text for each in got.choices] for got in some]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_log_probabilities(client):
    got = chat(client, logprobs=True, top_logprobs=3)
    content = got.choices[0].logprobs.content
    assert len(content) == 8
    for each in content:
        assert each.logprob == each.top_logprobs[0].logprob <= 0
        assert len(each.top_logprobs) == 3


def test_a_part_of_a_character_has_its_byte(client, http):
    first, second = http.post("/tokenize", json={"prompt": "é"}).json()["tokens"]
    for token, byte in ((first, 0xC3), (second, 0xA9)):
        made = chat(client, max_tokens=2, logprobs=True, logit_bias={str(token): 100})
        assert [each.bytes for each in made.choices[0].logprobs.content] == [[byte]] * 2


def test_tokens_of_a_completion_are_its_text(client, http):
    got = complete(client, logprobs=2, max_tokens=12, logit_bias={"0": -100}).choices[0]
    names = got.logprobs.tokens
    assert "".join(each for each in names if not each.startswith("bytes:")) == (
        got.text.replace("\ufffd", "")
    )
    assert all(name in top for name, top in zip(names, got.logprobs.top_logprobs, strict=True))
    space, half = http.post("/tokenize", json={"prompt": " é"}).json()["tokens"][:2]
    for token, name in ((space, " "), (half, "bytes:\\xc3")):
        made = complete(client, logprobs=0, max_tokens=1, logit_bias={str(token): 100})
        assert made.choices[0].logprobs.tokens == [name]


def test_the_space_that_a_token_begins_with_is_its_own():
    model = models.BPE({"\u2581a": 0, "b": 1}, [])
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Metaspace()
    served = SimpleNamespace(tokenizer=tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert [Served.text_of(served, token) for token in (0, 1, 2)] == [" a", "b", "token_id:2"]


def test_arguments_of_an_earlier_call_are_no_text_of_a_text():
    for sent, told in (('{"a": 1}', {"a": 1}), ("", {}), ("{", "{"), ("[1]", "[1]"), ({}, {})):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": sent}}
        made = _plain(Message(role="assistant", tool_calls=[call]))
        assert made["tool_calls"] == [call | {"function": {"name": "f", "arguments": told}}]


def test_bytes_are_all_of_byte_level_bpe():
    assert _BYTES.keys() == set(ByteLevel.alphabet())
    assert sorted(_BYTES.values()) == list(range(256))


def test_stop(client):
    whole = chat(client, max_tokens=24).choices[0].message.content
    mark = whole[4:6]
    got = chat(client, max_tokens=24, stop=[mark])
    assert got.choices[0].message.content == whole[: whole.index(mark)]
    assert got.choices[0].finish_reason == "stop"


def test_biases_penalties_and_cuts_reach_the_choice(client, http):
    (token,) = http.post("/tokenize", json={"prompt": "z"}).json()["tokens"]
    assert complete(client, logit_bias={str(token): 100}).choices[0].text == "z" * 8
    plain = complete(client, max_tokens=40).choices[0].text
    assert complete(client, max_tokens=40, frequency_penalty=2).choices[0].text != plain
    cut = {"top_k": 1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert complete(client, max_tokens=40, temperature=1, extra_body=cut).choices[0].text == plain


def test_json_follows_its_schema(client):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "good": {"type": "boolean"}},
        "required": ["name", "good"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "one", "schema": schema}}
    got = chat(client, max_tokens=200, temperature=1, seed=1, response_format=wanted)
    found = json.loads(got.choices[0].message.content)
    assert set(found) == {"name", "good"}
    assert isinstance(found["good"], bool)
    assert got.choices[0].finish_reason == "stop"


def test_any_json_object(client):
    pytest.importorskip("llguidance")
    for seed in range(3):
        wanted = {"type": "json_object"}
        got = chat(client, max_tokens=300, temperature=1, seed=seed, response_format=wanted)
        choice = got.choices[0]
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
    pieces = chat(
        client, max_tokens=300, temperature=1, seed=2, response_format=wanted, stream=True
    )
    streamed = "".join(each.choices[0].delta.content or "" for each in pieces)
    assert streamed == choice.message.content


def test_of_two_tools_the_one_that_is_named_is_called(client):
    pytest.importorskip("llguidance")
    numbers = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    numbers["additionalProperties"] = False
    tools = [
        {"type": "function", "function": {"name": name, "parameters": numbers}}
        for name in ("add", "take")
    ]
    named = {"type": "function", "function": {"name": "take"}}
    got = chat(client, max_tokens=100, tools=tools, tool_choice=named).choices[0]
    assert [call.function.name for call in got.message.tool_calls] == ["take"]
    # The answer and the tool's result are messages of the next call.
    messages = [
        {"role": "user", "content": "Hi"},
        got.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": got.message.tool_calls[0].id, "content": "3"},
    ]
    again = client.chat.completions.create(
        model="small", messages=messages, tools=tools, max_tokens=4, temperature=0
    )
    assert again.choices[0].finish_reason in ("length", "stop")
    with pytest.raises(openai.BadRequestError, match="tool_choice: expected one of tools"):
        missing = {"type": "function", "function": {"name": "other"}}
        chat(client, tools=tools, tool_choice=missing)


def test_errors_are_those_of_the_client(url, client):
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        other.models.list()
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, temperature=9)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    # A refused stream is a status, not a stream that breaks.
    with pytest.raises(openai.BadRequestError):
        chat(client, max_tokens=100_000, stream=True)


def test_a_tool_that_is_required_is_called(client):
    pytest.importorskip("llguidance")
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    got = chat(client, max_tokens=100, tools=[tool], tool_choice="required").choices[0]
    assert got.finish_reason == "tool_calls"
    (call,) = got.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    pieces = chat(client, max_tokens=100, tools=[tool], tool_choice="required", stream=True)
    calls = [c for each in pieces for c in each.choices[0].delta.tool_calls or []]
    assert [c.function.arguments for c in calls] == [call.function.arguments]
    # Cut midway it is no call, and what was made of it is not lost.
    cut = chat(client, max_tokens=10, tools=[tool], tool_choice="required").choices[0]
    assert cut.finish_reason == "length" and not cut.message.tool_calls
    assert cut.message.content.startswith("{")


def test_a_known_prompt_is_counted(client):
    text = "The same beginning, again and again. " * 3
    first, again = (chat(client, text) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens >= 96
    assert first.choices[0].message.content == again.choices[0].message.content


def schema_of_levels(levels):
    schema = {}
    for _ in range(levels):
        schema = {"not": schema}
    return {"type": "json_schema", "json_schema": {"name": "deep", "schema": schema}}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": 100_000}, "max_tokens: expected at most"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": 1e-40}, "temperature: expected 0, or 1e-10 to 100"),
        ({"top_p": 0}, "top_p"),
        ({"extra_body": {"best_of": 3}}, "best_of: unknown or not supported"),
        ({"extra_body": {"temperatur": 0}}, "temperatur: unknown"),
        ({"logit_bias": {"9999": 1}}, "logit_bias: expected token ids below"),
        ({"n": 100}, "n: expected at most 16"),
        ({"stop": ""}, "stop: expected a text of 1 or more characters"),
        ({"stop": ["a"] * 17}, "stop: expected a list of at most 16, got one of 17"),
        ({"stop": 5}, "stop: expected a text or a list, got 5"),
        ({"top_logprobs": 2}, "top_logprobs: expected logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options: expected none where"),
        ({"tool_choice": "required"}, "tool_choice: expected tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format: expected a json_schema"),
        ({"response_format": schema_of_levels(60)}, "response_format: expected a JSON schema"),
        ({"response_format": schema_of_levels(900)}, "response_format: expected at most 64 levels"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(client, options, said):
    options = {"model": "small", "messages": [{"role": "user", "content": "Hi"}]} | options
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**options)
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("said", "temperature"),
    [({}, 1.0), ({"temperature": 0.6}, 0.6), ({"temperature": 0.6, "do_sample": False}, 0.0)],
)
def test_a_model_that_says_it_does_not_sample_is_greedy(said, temperature):
    assert _defaults(tf.GenerationConfig(**said))["temperature"] == temperature


def test_what_is_null_is_left_out(http):
    asked = {"model": "small", "prompt": "Hi", "max_tokens": 4, "temperature": 0}
    given = CompletionBody.model_fields.keys() - asked.keys()
    plain, null = (
        http.post("/v1/completions", json=asked | more).json()["choices"]
        for more in ({}, dict.fromkeys(given))
    )
    assert plain == null


def test_other_paths_models_and_parts_are_refused(client, http):
    with pytest.raises(openai.NotFoundError, match="expected 'small', got 'large'") as caught:
        client.completions.create(model="large", prompt="Hi")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError, match="this server generates text"):
        client.embeddings.create(model="small", input="Hi")
    picture = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    with pytest.raises(openai.BadRequestError, match="a part 'image_url'"):
        chat(client, picture)
    assert "no such path" in http.get("/v2").json()["error"]["message"]
    got = http.get("/v1/completions").json()["error"]["message"]
    assert got == "/v1/completions: expected POST, got GET"
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, max_tokens=100_000)
    assert caught.value.code == "context_length_exceeded"


def test_a_body_that_says_it_is_no_json_is_told_so(http):
    body = {"content": b'{"prompt": "Hi"}'}
    for kind in ("application/x-www-form-urlencoded", "text/plain"):
        got = http.post("/v1/completions", **body, headers={"Content-Type": kind})
        assert got.status_code == 415
        said = got.json()["error"]["message"]
        assert said == f"Content-Type: expected application/json, got {kind}"


def test_the_key_and_the_size_of_a_body_come_first(url, http):
    for sent in ({}, {"Authorization": "Bearer another"}, {"Authorization": KEY}):
        assert httpx.get(f"{url}/v1/models", headers=sent).status_code == 401
    assert httpx.get(f"{url}/health").status_code == 200
    assert "QuantPage" in httpx.get(url).text
    large = {"model": "small", "prompt": "x" * 200_000}
    assert http.post("/v1/completions", json=large).status_code == 413

    def chunks():
        yield from [b"x" * 50_000] * 4

    assert http.post("/v1/completions", content=chunks()).status_code == 413
    assert http.get("/health", headers={"X-Request-Id": "mine"}).headers["x-request-id"] == "mine"


def test_the_metrics_count_under_vllms_names(client, http):
    def counted(name, by="vllm"):
        text = http.get("/metrics").text
        (line,) = [each for each in text.splitlines() if each.startswith(f"{by}:{name}{{")]
        return float(line.rsplit(" ", 1)[1])

    sums = ("generation_tokens_total", "request_generation_tokens_sum", "request_prompt_tokens_sum")
    complete(client)
    before = [counted(each) for each in sums]
    complete(client, prompt="A page of 16 tokens is remembered.", max_tokens=7)
    assert [counted(each) for each in sums] == [
        a + b for a, b in zip(before, (7, 7, 34), strict=True)
    ]
    assert counted("num_requests_running") == 0
    assert counted("time_to_first_token_seconds_count") >= 1
    # As in vLLM, what no answer holds is free.
    assert counted("kv_cache_usage_perc") == 0
    assert counted("pages_remembered", "quantpage") >= 2


def test_clients_that_leave_free_their_place(url, client, http):
    def leave(at):
        body = {"prompt": f"Number {at}", "max_tokens": 400, "stream": at % 2 == 0}
        headers = {"Authorization": f"Bearer {KEY}"}
        try:
            with (
                httpx.Client(timeout=0.5) as one,
                one.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as got,
            ):
                next(got.iter_lines())
        except httpx.TimeoutException:
            pass

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(leave, range(6)))
    for _ in range(600):
        text = http.get("/metrics").text
        if 'num_requests_running{model_name="small"} 0.0' in text:
            break
        time.sleep(0.1)
    assert 'num_requests_running{model_name="small"} 0.0' in text
    assert 'num_requests_waiting{model_name="small"} 0.0' in text
    # Some may have been told all before they left.
    (ended,) = re.findall(r'request_success_total\{finished_reason="abort".*\} (\d+)\.0', text)
    assert 3 <= int(ended) <= 6


def test_more_than_the_queue_holds_is_told_to_come_again(client):
    def ask(at):
        try:
            # Eight answers a call: 48 have a place, and calls come faster than they end.
            got = complete(client, f"{at}", n=8, max_tokens=40, extra_body={"ignore_eos": True})
            return got.choices[0].finish_reason
        except openai.RateLimitError as error:
            return error.response.headers["retry-after"]

    with ThreadPoolExecutor(24) as threads:
        got = list(threads.map(ask, range(24)))
    assert set(got) == {"length", "1"}


ODD = [
    b"",
    b"{",
    b"\x00",
    b"[]",
    b"null",
    b"3",
    b'"x"',
    b'{"prompt": NaN}',
    b"\xff\xfe{}",
    b'{"\\ud800": 1}',
]
ODD_VALUES = [
    None, True, 0, -1, 1e308, 1 << 70, "", "\ud800", "\x00", [], {}, [None], [[]], [[1, -1]],
    [1 << 70], {"type": "text"}, [{"role": "user"}], [{"role": "user", "content": [{}]}],
    [{"role": "user", "content": [{"type": "text"}]}], [{"role": "tool", "tool_calls": 3}],
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "good"),
    [
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 1}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
        ),
        ("/tokenize", {"prompt": "Hi"}),
        ("/detokenize", {"tokens": [5]}),
    ],
)
def test_no_body_breaks_it_and_every_refusal_names_what_is_wrong(http, path, good):
    """What schemathesis asks too (scripts/try_openapi.sh), as far as one can think of it."""
    json_header = {"Content-Type": "application/json"}
    document = http.get("/openapi.json").json()
    known = document["paths"][path]["post"]["responses"]
    assert "422" not in known
    body = document["paths"][path]["post"]["requestBody"]
    name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    parameters = document["components"]["schemas"][name]["properties"]

    def asked(content):
        got = http.post(path, content=content, headers=json_header)
        assert str(got.status_code) in known, (content, got.text)
        assert got.status_code < 500, (content, got.text)
        return got

    for content in ODD:
        error = asked(content).json()["error"]
        assert re.split("[:.]", error["message"])[0] in {"body", *parameters}, error
    for parameter in parameters:
        for value in ODD_VALUES:
            if parameter == "n" and value is True:
                continue
            got = asked(json.dumps(good | {parameter: value}).encode())
            if got.status_code != 200:
                message = got.json()["error"]["message"]
                assert re.split("[:.]", message)[0] in parameters, (parameter, value, message)
