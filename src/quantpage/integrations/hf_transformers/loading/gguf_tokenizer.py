"""The tokenizer of a GGUF file: Transformers' own reader's, but where that is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""What Transformers calls a token of its own -> what a GGUF calls it."""
_PLAIN, _CONTROL, _OWN = 1, 3, 4
"""Kinds of tokens in a GGUF: pieces of text, those that no text becomes, and those that a tokenizer
was told to keep whole."""


def gguf_tokenizer(file: Path, model_type: str) -> "PreTrainedTokenizerBase":
    """model_type: of the configuration."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields

    def given(name: str, otherwise: Any = None) -> Any:
        field = fields.get(f"tokenizer.{name}")
        return otherwise if field is None else field.contents()

    if model_type.startswith("gemma"):
        return _of_gemma(given)
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True
    )
    # The reader (5.12 to 5.24) takes a llama-like file's beginning for its end, and a Qwen's end of
    # all text for that of an answer: what waits for the end would go on past it.
    for role, at in _roles(given).items():
        setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(at))
    return tokenizer


def _roles(given: Callable[..., Any]) -> dict[str, int]:
    """The tokens that the file gives a role, by Transformers' names of roles."""
    found = {role: given(f"ggml.{key}_token_id") for role, key in _ROLES.items()}
    return {role: int(at) for role, at in found.items() if at is not None}


def _of_gemma(given: Callable[..., Any]) -> "PreTrainedTokenizerBase":
    """As Transformers makes it of Gemma's own files, with the file's chat template.

    Pieces are merged by their scores. Transformers (5.12 to 5.24) reads such a file as a unigram
    model, which cuts text into single letters: what the model then says of it is noise.
    """
    from tokenizers import AddedToken
    from transformers import GemmaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    names, scores, kinds = (given(f"ggml.{name}") for name in ("tokens", "scores", "token_type"))
    known = {name: at for at, name in enumerate(names)}
    pieces = {
        name: score
        for name, score, kind in zip(names, scores, kinds, strict=True)
        if kind == _PLAIN
    }
    tokenizer = GemmaTokenizer(
        vocab=known,
        merges=generate_merges({name: known[name] for name in pieces}, pieces),
        add_bos_token=given("ggml.add_bos_token", True),
        **{role: names[at] for role, at in _roles(given).items()},
    )
    for kept, special in ((_CONTROL, True), (_OWN, False)):
        tokenizer.add_tokens(
            [
                AddedToken(name, normalized=not special, special=special)
                for name, kind in zip(names, kinds, strict=True)
                if kind == kept
            ]
        )
    tokenizer.chat_template = given("chat_template")
    return tokenizer
