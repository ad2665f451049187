"""`quantpage chat`: a conversation in the terminal, over a quantized cache that is kept."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantpage import console
from quantpage.cli.options import (
    AnswerFlags,
    MaxNewTokens,
    ModelOrWord,
    model_and_rest,
    with_answers,
)
from quantpage.errors import QuantPageError

if TYPE_CHECKING:
    from quantpage.cli.conversation import Conversation

_HELP = """\
/reset       begin anew
/save FILE   write the conversation and its cache to a file
/load FILE   go on with a saved one, of the same model and format
/help        this
/exit        leave (or Ctrl-D); Ctrl-C ends an answer, a /save or a /load, and nothing else"""


@with_answers
def command(
    model: ModelOrWord = None,
    word: Annotated[str | None, typer.Argument(hidden=True, metavar="MODEL")] = None,
    load: Annotated[
        Path | None, typer.Option(help="Continue a conversation that /save wrote.")
    ] = None,
    max_new_tokens: MaxNewTokens = 512,
    *,
    flags: AnswerFlags,
) -> None:
    """Talk with a model over a cache that is kept: a turn computes only what is new.

    A line is a question; /help lists the commands. In a pipe every line of stdin is a question.
    Answers go to stdout, what they took to stderr.
    """
    from quantpage.cli.conversation import Conversation
    from quantpage.cli.generation import load as load_model
    from quantpage.integrations.hf_transformers import attach

    named, _ = model_and_rest(model, [word] if word else [])
    request = flags.request(named, ("a conversation",), max_new_tokens)
    found, tokenizer = load_model(request)
    with attach(
        found, request.kv_format, page_size=request.page_size, calibration=request.calibration
    ) as attached:
        conversation = Conversation(attached, tokenizer, request)
        if load is not None:
            _act(conversation, f"/load {load}")
        elif sys.stdin.isatty():
            console.note("Ask something; /help says what else a line may be.")
        _talk(conversation)


def _talk(conversation: "Conversation") -> None:
    """Line by line, to the end."""
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):
            # Lines can be edited and found again.
            import readline  # noqa: F401
    while True:
        try:
            line = _line(terminal)
            if line is None or not _act(conversation, line):
                return
        except (ValueError, OSError, QuantPageError) as error:
            # Whoever sits there can try again, a program cannot.
            if not terminal:
                raise
            console.note(f"quantpage: {error}")
        except KeyboardInterrupt:
            # At the prompt, in /save or /load, or once more than an answer took.
            if not terminal:
                raise
            print()
            console.note("/exit or Ctrl-D leaves")


def _line(terminal: bool) -> str | None:
    """The next; None: there are no more."""
    try:
        return input("> ") if terminal else sys.stdin.readline() or None
    except UnicodeDecodeError as error:
        raise ValueError(f"question: expected text in UTF-8, got {error.object!r}") from error
    except EOFError:
        print()
        return None


def _act(conversation: "Conversation", line: str) -> bool:
    """Do what a line says; False: leave."""
    text = line.strip()
    if not text.startswith("/"):
        if text:
            _ask(conversation, text)
        return True
    word, _, file = text.partition(" ")
    file = file.strip()
    if word in ("/save", "/load") and not file:
        raise ValueError(f"{word}: expected a file, got none")
    if word == "/exit":
        return False
    if word == "/reset":
        conversation.reset()
    elif word == "/save":
        conversation.save(file)
        console.note(f"saved to {file}")
    elif word == "/load":
        conversation.load(file)
        turns = sum(each["role"] == "user" for each in conversation.messages)
        console.note(f"{console.counted(turns, 'question')} answered before, from {file}")
    elif word == "/help":
        console.note(_HELP)
    else:
        raise ValueError(f"{word}: expected /reset, /save, /load, /help or /exit")
    return True


def _ask(conversation: "Conversation", text: str) -> None:
    turn = conversation.say(text, _write)
    print(flush=True)
    new = turn.prompt_tokens - turn.kept_tokens
    speed = turn.made_tokens / turn.seconds if turn.seconds else 0.0
    console.note(
        f"read {new:,} new of {turn.prompt_tokens:,} tokens, said {turn.made_tokens:,} in "
        f"{turn.seconds:.2f} s ({speed:.1f} a second), cache "
        f"{console.in_units(conversation.held_bytes())}" + (", stopped" if turn.interrupted else "")
    )


def _write(text: str) -> None:
    print(text, end="", flush=True)
