"""What clients of vLLM's server ask for besides OpenAI's names, over real sockets."""

import asyncio
import re
import socket

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

from quantpage.server.options import ServeOptions  # noqa: E402
from quantpage.server.run import bind, listen, load  # noqa: E402
from tests.server.small import answering, save_small  # noqa: E402

pytestmark = pytest.mark.cpu


PAGE = "http://a.page:3000"


@pytest.fixture(scope="module")
def http(tmp_path_factory):
    folder = save_small(tmp_path_factory.mktemp("small"))
    with (
        answering(folder, None, max_requests=4, allow_origins=(PAGE,)) as address,
        httpx.Client(base_url=address, timeout=60) as made,
    ):
        yield made


def answered(http, path="/v1/completions", **body):
    body = {"prompt": "Once", "max_tokens": 8, "temperature": 0} | body
    if "messages" in body:
        del body["prompt"]
    got = http.post(path, json=body)
    assert got.status_code == 200, got.text
    return got.json()["choices"][0]


def refused(http, path="/v1/completions", **body):
    got = http.post(path, json={"prompt": "Once"} | body)
    assert got.status_code == 400
    return got.json()["error"]["message"]


def test_tokens_and_texts_that_end_an_answer(http):
    plain = answered(http, ignore_eos=True)["text"]
    first, letter = next((at, one) for at, one in enumerate(plain) if at and one.isascii())
    assert letter not in plain[:first]
    (end,) = http.post("/tokenize", json={"prompt": letter}).json()["tokens"]
    for asked in ({"stop_token_ids": [end]}, {"stop": letter}):
        got = answered(http, ignore_eos=True, **asked)
        assert (got["text"], got["finish_reason"]) == (plain[:first], "stop")
        got = answered(http, ignore_eos=True, include_stop_str_in_output=True, **asked)
        assert got["text"] == plain[: first + 1]
        got = answered(http, ignore_eos=True, min_tokens=8, **asked)
        assert got["finish_reason"] == "length"
    assert (
        refused(http, stop_token_ids=[999]) == "stop_token_ids: expected tokens below 264, got 999"
    )


def test_special_tokens_are_text_where_that_is_asked(http):
    body = {"logit_bias": {"0": 100}, "ignore_eos": True, "max_tokens": 2}
    assert answered(http, **body)["text"] == ""
    assert answered(http, **body, skip_special_tokens=False)["text"] == "<eos>" * 2


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"choice": ["yes", 'no "\n"']}, 'yes|no "\n"'),
        ({"regex": "[0-9]{3}-[ab]"}, "[0-9]{3}-[ab]"),
        ({"json": {"enum": [True, False]}}, "true|false"),
        ({"grammar": 'start: "a" | "b" "c"'}, "a|bc"),
    ],
)
def test_an_answer_has_the_form_that_is_asked(http, form, pattern):
    pytest.importorskip("llguidance")
    for seed in range(3):
        got = answered(
            http, structured_outputs=form, max_tokens=20, temperature=1, seed=seed, min_tokens=0
        )
        assert re.fullmatch(pattern, got["text"]) and got["finish_reason"] == "stop"


def test_forms_that_cannot_be_are_refused(http):
    pytest.importorskip("llguidance")
    for body, said in (
        ({"structured_outputs": {}}, "structured_outputs: expected json, json_object, regex"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs: expected a regular expr"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs: expected a grammar"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs: expected one form of an answer, got structured_outputs and",
        ),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "response_format: expected one form of an answer, got response_format and structured",
        ),
        (
            {"structured_outputs": {"regex": "a"}, "min_tokens": 2},
            "min_tokens: expected none beside a grammar",
        ),
    ):
        assert refused(http, **body).startswith(said)


MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]


def test_the_chat_template_is_told_what_is_asked(http):
    def written(**body):
        got = http.post("/tokenize", json={"messages": MESSAGES} | body)
        assert got.status_code == 200, got.text
        return http.post("/detokenize", json={"tokens": got.json()["tokens"]}).json()["prompt"]

    plain = "user: Hi\nassistant: Well\n"
    assert written() == plain + "assistant: "
    assert written(add_generation_prompt=False) == plain
    assert written(continue_final_message=True) == plain.rstrip("\n")
    assert written(chat_template_kwargs={"calm": True}) == "(calm)\n" + plain + "assistant: "
    tool = {"type": "function", "function": {"name": "add"}}
    assert '"name": "add"' in written(tools=[tool]).replace('":"', '": "')
    # An answer begins where the tokens end.
    prompt = plain.rstrip("\n")
    got = answered(http, "/v1/chat/completions", messages=MESSAGES, continue_final_message=True)
    assert got["message"]["content"] == answered(http, prompt=prompt)["text"]


def test_what_a_template_does_not_read_is_refused(http):
    for body, said in (
        ({"chat_template_kwargs": {"enable_thinking": False}}, "got 'enable_thinking'"),
        ({"chat_template_kwargs": {"tokenize": False}}, "got 'tokenize'"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message: expected an assistant's message at the end, got add_gen",
        ),
        (
            {"continue_final_message": True, "messages": MESSAGES[:1]},
            "continue_final_message: expected an assistant's message at the end, got a message of",
        ),
        ({"add_special_tokens": True}, "add_special_tokens: expected none beside messages"),
    ):
        got = http.post("/tokenize", json={"messages": MESSAGES} | body)
        assert got.status_code == 400 and said in got.json()["error"]["message"], got.text
    assert refused(http, "/tokenize", tools=[]) == (
        "tools: expected none beside a prompt, which has no chat template"
    )
    strings = http.post("/tokenize", json={"prompt": "ab", "return_token_strs": True}).json()
    assert strings["token_strs"] == ["a", "b"]


def test_a_page_of_an_allowed_origin_may_call(http):
    for origin, allowed in ((PAGE, PAGE), ("http://another.page", None)):
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x"}
        got = http.options("/v1/completions", headers={"Origin": origin, **asks})
        assert got.status_code == (200 if allowed else 400)
        for each in (got, http.get("/v1/models", headers={"Origin": origin})):
            assert each.headers.get("access-control-allow-origin") == allowed


def test_an_answer_of_several_parts_does_not_wait_for_the_client():
    async def first_connection():
        met = asyncio.get_running_loop().create_future()

        def meet(_, writer):
            sock = writer.get_extra_info("socket")
            met.set_result(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with bind("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(meet, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                at_once = await met
                writer.close()
                return at_once

    assert asyncio.run(first_connection())


def test_steps_that_have_no_token_for_each_answer_are_refused():
    for options in ({"step_tokens": 63}, {"step_tokens": 1, "max_requests": 2}):
        with pytest.raises(ValueError, match="step_tokens: expected at least max_requests"):
            load(ServeOptions("nowhere", **options))


def test_a_port_that_another_took_meanwhile_is_told():
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with bind("127.0.0.1", port) as second:
            listen(first, "127.0.0.1")
            with pytest.raises(ValueError, match=f"host, port: cannot listen on 127.0.0.1:{port}"):
                listen(second, "127.0.0.1")
