"""`quantpage chat`: a turn computes what is new in it, and says what a fresh start would say."""

import io
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch

import quantpage as qp
from quantpage.cli import conversation as conversation_module
from quantpage.cli.conversation import Conversation
from quantpage.cli.generation import GenerateRequest
from quantpage.integrations.hf_transformers.loading.model import load_model
from tests.interrupted import run
from tests.server.small import TEMPLATE, save_small

pytestmark = pytest.mark.cpu

QUESTIONS = ["Say something.", "And more?", "What else is there to say?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("small"), context=4096)


@pytest.fixture
def chat(quantpage, folder, monkeypatch):
    def run(*lines, flags=(), code=0):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        given = ["--max-new-tokens", 30, "--page-size", 16, *flags]
        return quantpage("chat", "--model", folder, *given, code=code)

    return run


@pytest.fixture
def conversation(folder):
    """Makes conversations with one attached model."""

    def make(template=TEMPLATE, kv_format="int8", **options):
        torch.set_num_threads(1)
        model, tokenizer = load_model(str(folder), "auto", "cpu")
        tokenizer.chat_template = template
        attached = qp.attach(model, kv_format, page_size=16)
        attachments.append(attached)
        given = {"model": "small", "prompts": ("x",), "max_new_tokens": 30} | options
        return Conversation(attached, tokenizer, GenerateRequest(**given))

    attachments = []
    yield make
    for each in attachments:
        each.detach()


def say(conversation, text):
    said = []
    return conversation.say(text, said.append), "".join(said)


LAST_ONLY = (
    "{% for message in messages %}{{ message.role }}: {% if message.role == 'assistant' and not "
    "loop.last %}{{ message.content[:4] }}{% else %}{{ message.content }}{% endif %}\n{% endfor %}"
    "assistant: "
)
"""Leaves the most of old answers out, as templates of models that reason do."""


@pytest.mark.parametrize("kv_format", ["int8", "int4", "none"])
@pytest.mark.parametrize("template", [TEMPLATE, LAST_ONLY])
def test_a_kept_cache_says_what_a_fresh_one_says(conversation, kv_format, template):
    kept, before = conversation(template, kv_format), 0
    for text in QUESTIONS:
        messages = list(kept.messages)
        turn, said = say(kept, text)
        fresh = conversation(template, kv_format)
        fresh.messages = messages
        alone, expected = say(fresh, text)
        assert said == expected and len(said) > 20
        assert turn.prompt_tokens == alone.prompt_tokens and alone.kept_tokens == 0
        if messages and template == TEMPLATE:
            # Of the last turn all is kept but what its answer's text reads otherwise.
            assert turn.kept_tokens >= before
        before = turn.prompt_tokens
    assert template != TEMPLATE or turn.kept_tokens > 100


def test_a_pipe_of_questions(chat):
    done = chat(*QUESTIONS[:2], "", "/reset", QUESTIONS[0])
    first, second, _ = re.findall(r"read (\d+) new of (\d+) tokens", done.err)
    assert int(second[0]) < int(second[1]) - int(first[1])
    alone = chat(QUESTIONS[0])
    # The answers and nothing else; after /reset the first one again.
    assert done.out.startswith(alone.out) and done.out.endswith(alone.out)
    assert len(done.out) > 2 * len(alone.out)


def test_a_saved_conversation_goes_on_where_it_was(chat, tmp_path):
    file = tmp_path / "talk.pages"
    whole = chat(*QUESTIONS).out
    begun = chat(*QUESTIONS[:2], f"/save {file}")
    loaded = chat(QUESTIONS[2], flags=("--load", file))
    assert begun.out + loaded.out == whole
    new, all_ = map(int, re.search(r"read (\d+) new of (\d+) tokens", loaded.err).groups())
    assert new < all_ / 2
    file.write_bytes(file.read_bytes()[:-9])
    assert "talk.pages: expected" in chat(f"/load {file}", code=2).err


def test_a_cache_without_messages_is_refused(conversation, tmp_path):
    talk = conversation()
    say(talk, QUESTIONS[0])
    before = list(talk.messages)
    talk._attached.save_cache(talk._held[0], tmp_path / "cache.pages")
    with pytest.raises(qp.errors.CorruptCache, match="got a cache without its messages"):
        talk.load(tmp_path / "cache.pages")
    assert talk.messages == before and say(talk, QUESTIONS[1])[0].kept_tokens > 0


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["/save"], "/save: expected a file, got none"),
        (["\udcff hello"], r"question: expected text in UTF-8, got '\udcff hello'"),
        (["/load nowhere"], "nowhere"),
        (["/save x"], "cache: expected one that holds tokens, got an empty one"),
        (["/rest"], "/rest: expected /reset, /save, /load, /help or /exit"),
        (["x" * 5000], "conversation: expected fewer than 4,096 tokens"),
    ],
)
def test_lines_that_cannot_be(chat, lines, said):
    assert said in chat(*lines, code=2).err


def test_a_conversation_that_is_too_long_stays_as_it_was(conversation):
    talk = conversation()
    say(talk, QUESTIONS[0])
    before = list(talk.messages)
    with pytest.raises(ValueError, match="as the model has so many positions"):
        talk.say("x" * 5000, print)
    assert talk.messages == before and say(talk, QUESTIONS[1])[0].kept_tokens > 0


def test_a_model_without_a_chat_template_is_refused(conversation):
    with pytest.raises(ValueError, match="model: expected one with a chat template"):
        conversation(template=None)


def test_in_a_terminal_ctrl_c_ends_an_answer_and_a_wrong_line_nothing(tmp_path):
    # Of a model that never ends an answer: there is time to do it.
    folder = save_small(tmp_path, context=4096, ends=None)
    mine, its = pty.openpty()
    command = [sys.executable, "-m", "quantpage", "chat", str(folder), "--max-new-tokens", "4000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment)
    os.close(its)
    said = ""

    def until(mark, again=lambda: None):
        nonlocal said
        end = time.monotonic() + 120
        while not re.search(mark, said):
            assert time.monotonic() < end, said
            if select.select([mine], [], [], 1)[0]:
                said += os.read(mine, 1 << 16).decode("utf-8", "replace")
            else:
                again()
        found, said = said, ""
        return found

    try:
        until(r"> $")
        os.write(mine, b"/nothing\n")
        assert "/nothing: expected /reset" in until(r"(?s)expected.*> $")
        os.write(mine, b"Go on.\n")
        # More than the question and its echo: something of the answer.
        until(r"(?s)Go on\..{100,}")
        process.send_signal(signal.SIGINT)
        told = until(r"(?s)said [\d,]+ in .*> $")
        assert "stopped" in told
        assert int(re.search(r"said ([\d,]+) in", told).group(1).replace(",", "")) < 3900
        # Once more than it takes, as people do: whatever it meets goes on.
        os.write(mine, b"Go on.\n")
        until(r"(?s)Go on\..{100,}")
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        until(r"(?s)> $")
        # A signal that Python misses between prompt and reading of keys takes the next line.
        until(r"(?s)nothing: expected.*> $", again=lambda: os.write(mine, b"/nothing\n"))
        # At the prompt, for the same reason, a signal is sent until it is heard.
        # Last, for one that was late would end a question.
        until(r"(?s)Ctrl-D leaves.*> $", again=lambda: process.send_signal(signal.SIGINT))
        os.write(mine, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(mine)


def interrupted_at(act, prepare, count):
    """What ``prepare`` made, after ``act`` of it was ended by Ctrl-C at ``count`` places."""
    total = run_traced(act, prepare())
    draw = random.Random(total)
    for at in [1, total // 2, *range(total - 6, total + 1), *draw.sample(range(1, total), count)]:
        state = prepare()
        assert run_traced(act, state, at)
        yield state


def run_traced(act, state, at=None):
    passed, thrown = run(lambda: act(state), at, conversation_module.__file__, KeyboardInterrupt)
    return passed if at is None else thrown


@pytest.mark.parametrize("kv_format", ["int8", "int3"])
def test_ctrl_c_anywhere_leaves_a_conversation_that_says_what_a_fresh_one_says(
    conversation, tmp_path, kv_format
):
    first = conversation(LAST_ONLY, kv_format, max_new_tokens=12)
    other = "Tell me nothing"
    say(first, "Tell me a tale!")
    first.save(tmp_path / "talk.pages")

    def begun():
        made = Conversation(first._attached, first._tokenizer, first._request)
        # As many tokens as the saved one has.
        say(made, other[:15])
        return made

    acts = (lambda talk: say(talk, QUESTIONS[1]), lambda talk: talk.load(tmp_path / "talk.pages"))
    for act in acts:
        for talk in interrupted_at(act, begun, 8):
            fresh = Conversation(first._attached, first._tokenizer, first._request)
            fresh.messages = list(talk.messages)
            assert say(talk, QUESTIONS[2])[1] == say(fresh, QUESTIONS[2])[1]
