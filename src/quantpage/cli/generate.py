"""`quantpage generate`: a model answers through a quantized cache, streaming."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantpage import console
from quantpage.cli.options import AnswerFlags, AsJson, MaxNewTokens, Model, with_answers
from quantpage.files import check_writable

if TYPE_CHECKING:
    from quantpage.cli.generate_compare import Forced
    from quantpage.cli.generation import Answer, GenerateRequest


@with_answers
def command(
    model: Model,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to ask; may be given several times.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="Read the prompt from this file (-: stdin); any --prompt comes below it. With "
            "--out: requests, one JSON object a line."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Answer the requests of --file in one batch; write one JSON object a line here."
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    compare: Annotated[
        bool, typer.Option(help="Run the same answer through other caches too, and compare.")
    ] = False,
    raw: Annotated[
        bool, typer.Option(help="Give the model the prompt as it is, without its chat template.")
    ] = False,
    as_json: AsJson = False,
    max_requests: Annotated[
        int, typer.Option(min=1, help="With --out: answers computed at once.")
    ] = 32,
    memory: Annotated[
        str | None, typer.Option(help="With --out: memory for the cache, such as 4GiB.")
    ] = None,
    *,
    flags: AnswerFlags,
) -> None:
    """Generate text through a quantized cache, and say what it took.

    The answer goes to stdout, everything else to stderr. The likeliest token is taken unless
    --temperature is above 0, so that runs can be compared. --compare runs the same answer through
    three caches: the one asked for, ours without quantization, and Transformers' own. A table says
    how large and how fast each is, and how often it predicts the same token as Transformers' own.

    With --out, each line of --file is a request as OpenAI's API takes it (prompt or messages, and
    sampling); flags are the defaults. Requests are answered in one batch, refilled as answers end.
    The same command continues a run that was interrupted.
    """
    if out is not None:
        for name, given in (
            ("prompt", prompt),
            ("system", flags.system),
            ("compare", compare),
            ("raw", raw),
            ("json", as_json),
        ):
            if given:
                raise ValueError(f"{name}: expected none beside --out, whose requests say it")
        if file is None:
            raise ValueError("file: expected the requests of --out, got none")
        check_writable(out, "out", in_place=True)
        from quantpage.cli.generate_many import Batch, answer_file

        answer_file(
            Batch(
                model=model,
                file=file,
                out=out,
                max_new_tokens=max_new_tokens,
                flags=flags,
                max_requests=max_requests,
                memory=memory,
            )
        )
        return
    if not prompt and file is None:
        raise ValueError("prompt: expected --prompt or --file, got neither")
    read = None if file is None else _read(file)
    texts = ["\n\n".join(each for each in (read, own) if each) for own in prompt or [""]]

    from quantpage.cli.generation import Session

    request = flags.request(model, texts, max_new_tokens, raw)
    session = Session(request)
    done = []
    for index in range(len(texts)):
        if index and not as_json:
            print()
        answer = session.answer(index, _drop if as_json else _write)
        if not as_json:
            print(flush=True)
        rows: list[Forced] = []
        if compare:
            from quantpage.cli.generate_compare import compare as compare_caches

            rows = compare_caches(session.model, answer, request)
        if as_json:
            done.append(_as_data(answer, rows))
        else:
            _report(answer, rows, request)
    if as_json:
        console.print_json({"model": model, "kv_format": flags.kv_format, "answers": done})


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _drop(text: str) -> None:
    pass


def _report(answer: "Answer", rows: "list[Forced]", request: "GenerateRequest") -> None:
    """What the answer took, on stderr."""
    from quantpage.cli.generate_compare import explanation, to_table

    new = len(answer.answer_ids)
    console.note("")
    console.note(f"prompt  {_speed(answer.prompt_ids.shape[1], answer.prompt_seconds)}")
    # The first token is the prompt's.
    console.note(f"answer  {_speed(new - 1, answer.decode_seconds)} after the first")
    console.note(
        f"cache   {console.in_units(answer.held_bytes)} held in {request.kv_format}; "
        f"{console.in_units(answer.sixteen_bit_bytes)} are the same tokens in the model's dtype"
    )
    if answer.finish == "length":
        console.note(f"cut off at --max-new-tokens {request.max_new_tokens}")
    if rows:
        console.ERR.print(to_table(rows))
        console.note(explanation(answer, request.page_size))


def _speed(tokens: int, seconds: float) -> str:
    """'31 tokens in 210.0 ms (6.77 ms a token, 147.6 tokens a second)'."""
    word = "token" if tokens == 1 else "tokens"
    if not tokens or not seconds:
        return f"{tokens:5,} {word}"
    return (
        f"{tokens:5,} {word} in {seconds * 1e3:,.1f} ms "
        f"({seconds * 1e3 / tokens:.2f} ms a token, {tokens / seconds:.1f} tokens a second)"
    )


def _as_data(answer: "Answer", rows: "list[Forced]") -> dict[str, Any]:
    return {
        "prompt": answer.prompt,
        "text": answer.text,
        "finish": answer.finish,
        "prompt_tokens": answer.prompt_ids.shape[1],
        "answer_tokens": len(answer.answer_ids),
        "answer_ids": answer.answer_ids.tolist(),
        "prompt_seconds": answer.prompt_seconds,
        "decode_seconds": answer.decode_seconds,
        "held_bytes": answer.held_bytes,
        "sixteen_bit_bytes": answer.sixteen_bit_bytes,
        "comparison": [asdict(row) for row in rows],
    }


def _read(file: Path) -> str:
    """The text of a file, a pipe or (-) standard input."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"file: expected a text file in UTF-8, got {file} ({error})") from error
    if "\0" in text:
        raise ValueError(f"file: expected a text file in UTF-8, got {file} with NUL bytes")
    return text
