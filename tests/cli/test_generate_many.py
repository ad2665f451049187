"""`quantpage generate --file requests.jsonl --out answers.jsonl`."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from tests.server.small import save_small

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("small"))


REQUESTS = [
    {"id": "greedy", "prompt": "Once upon a time", "max_tokens": 30},
    {"id": "chat", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9},
    {"id": "drawn", "prompt": "Once", "n": 3, "temperature": 1, "seed": 4, "logprobs": 1},
    {"id": "several", "prompt": ["One", "Two"], "stop": ["e"]},
    {"prompt": [5, 6, 7], "ignore_eos": True},
]


def save(path, requests):
    path.write_text("".join(json.dumps(each) + "\n" for each in requests))
    return path


def texts(answer):
    """Without log-probabilities, whose last digits depend on who shares a step."""
    return [
        (each.get("text") or each["message"]["content"], each["finish_reason"])
        for each in answer["choices"]
    ]


def read(path):
    return {each["id"]: each for each in map(json.loads, path.read_text().split("\n")[:-1])}


@pytest.fixture
def answer(quantpage, folder, tmp_path):
    def run(requests, *flags, name="answers.jsonl", code=0):
        file, out = save(tmp_path / "requests.jsonl", requests), tmp_path / name
        given = ["--model", folder, "--file", file, "--out", out, "--memory", "8MiB"]
        done = quantpage("generate", *given, "--max-new-tokens", 8, *flags, code=code)
        return done, read(out) if out.exists() else {}

    return run


def test_every_request_is_answered_as_alone(answer):
    done, together = answer(REQUESTS)
    assert "5 answered, 0 failed" in done.err and done.out == ""
    # No bar off a terminal, nor what is left of one.
    assert "\u2501" not in done.err
    assert list(map(str, sorted(map(str, together)))) == ["5", "chat", "drawn", "greedy", "several"]
    for at, each in enumerate(REQUESTS):
        _, alone = answer([each], name=f"alone-{at}.jsonl")
        (mine,) = alone.values()
        assert texts(together[each.get("id", 5)]) == texts(mine)
    assert len({each["text"] for each in together["drawn"]["choices"]}) == 3
    # The flag says what a line leaves out, and nothing else.
    used = {name: each["usage"]["completion_tokens"] for name, each in together.items()}
    assert (used["greedy"], used["chat"], used[5]) == (30, 9, 8)
    assert all("e" not in each["text"] for each in together["several"]["choices"])


def test_a_line_that_cannot_be_asked_is_recorded_and_tried_again(answer, tmp_path):
    wrong = [
        ({"prompt": "x", "temperatur": 1}, "temperatur: unknown or not supported"),
        ({"prompt": "x", "max_tokens": 100_000}, "max_tokens: expected at most 512"),
        ({"prompt": "x", "messages": []}, "prompt: expected a prompt or messages, got both"),
        ({"max_tokens": 3}, "prompt: expected a prompt or messages, got both or neither"),
        ({"prompt": "x", "stream": True}, "stream: expected none"),
        ({"prompt": "x", "model": "another"}, "model: expected"),
        ({"prompt": "x", "id": [1]}, "id: expected a text or a whole number"),
        ({"prompt": "x", "n": 40}, "n: expected at most 32 answers"),
        ({"prompt": "", "id": 1.5}, "id: expected a text or a whole number"),
        ([1], "line 10: expected a JSON object"),
    ]
    done, got = answer([*(each for each, _ in wrong), REQUESTS[0]], code=4)
    assert "1 answered, 10 failed" in done.err
    for number, (_, said) in enumerate(wrong, 1):
        assert said in got[number]["error"]
    # Mended lines are answered, and nothing is asked twice.
    mended = [{"prompt": "x"} for _ in wrong]
    done, again = answer([*mended, REQUESTS[0]])
    assert "10 answered, 1 were there, 0 failed" in done.err
    assert again["greedy"] == got["greedy"] and len(again) == 11
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 11
    done, _ = answer([*mended, REQUESTS[0]])
    assert "11 of 11 were answered before" in done.err


@pytest.mark.parametrize(
    "flags",
    [
        ("--temperature", 1),
        ("--kv-format", "int4"),
        ("--page-size", 32),
        ("--calibration", "none"),
        ("--dtype", "bfloat16"),
    ],
)
def test_answers_to_other_requests_are_not_taken_for_these(answer, flags, tmp_path):
    asked = [*REQUESTS[3:], {"id": "wrong", "prompt": ""}]
    answer(asked, code=4)
    before = (tmp_path / "answers.jsonl").read_bytes()
    done, _ = answer(asked, *flags, code=2)
    assert "out: expected answers to these requests, got one to another" in done.err
    assert (tmp_path / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("requests", "said"),
    [
        ([], "file: expected a JSON object a line"),
        ([{"id": 2, "prompt": "x"}, {"prompt": "y"}], "file: expected every id once, got 2 twice"),
    ],
)
def test_files_that_are_no_requests(answer, requests, said):
    done, _ = answer(requests, code=2)
    assert said in done.err


@pytest.mark.parametrize("flag", ["--compare", "--raw", "--json", "--prompt=x", "--system=x"])
def test_flags_of_a_single_prompt_are_refused(answer, flag):
    done, _ = answer(REQUESTS, flag, code=2)
    assert "expected none beside --out" in done.err


def test_a_run_that_was_ended_goes_on(folder, tmp_path, answer):
    """By kill -9, by Ctrl-C, and then to its end."""
    many = [
        {"id": at, "prompt": f"Number {at}", "max_tokens": 100, "ignore_eos": True}
        for at in range(48)
    ]
    _, whole = answer(many, "--max-requests", 4, name="whole.jsonl")
    file, out = save(tmp_path / "many.jsonl", many), tmp_path / "answers.jsonl"
    before = 0
    for sent in (signal.SIGKILL, signal.SIGINT):
        end_a_run(folder, file, out, sent)
        with open(out, "ab") as torn:
            torn.write(b'{"id": 47, "requ')
        before, known = len(out.read_bytes().split(b"\n")) - 1, before
        assert known < before < 48
    done, resumed = answer(many, "--max-requests", 4)
    assert f"{48 - before} answered, {before} were there" in done.err
    assert {at: each["choices"] for at, each in resumed.items()} == {
        at: each["choices"] for at, each in whole.items()
    }


def end_a_run(folder, file, out, sent):
    """Start it, and end it when it has written some lines."""
    size = out.stat().st_size if out.exists() else 0
    command = [sys.executable, "-m", "quantpage", "generate", "--model", str(folder)]
    command += ["--file", str(file), "--out", str(out), "--max-requests", "4", "--memory", "1MiB"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    end = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end:
        if out.exists() and out.stat().st_size > size + 1500:
            break
        time.sleep(0.02)
    process.send_signal(sent)
    said = process.communicate()[1]
    assert process.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL), said
