"""The tokenizer of a GGUF file: Transformers' own reader's, but where that is wrong."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLAIN, _CONTROL, _OWN = 1, 3, 4
"""Kinds of tokens in a GGUF: pieces of text, those that no text becomes, and those that a tokenizer
was told to keep whole."""


def gguf_tokenizer(file: Path, model_type: str) -> "PreTrainedTokenizerBase":
    """model_type: of the configuration."""
    if model_type.startswith("gemma"):
        return _of_gemma(file)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)


def _of_gemma(file: Path) -> "PreTrainedTokenizerBase":
    """As Transformers makes it of Gemma's own files, with the file's chat template.

    Pieces are merged by their scores. Transformers (5.12 to 5.24) reads such a file as a unigram
    model, which cuts text into single letters: what the model then says of it is noise.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken
    from transformers import GemmaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    fields = GGUFReader(file).fields

    def given(name: str, otherwise: Any = None) -> Any:
        field = fields.get(f"tokenizer.{name}")
        return otherwise if field is None else field.contents()

    names, scores, kinds = (given(f"ggml.{name}") for name in ("tokens", "scores", "token_type"))
    known = {name: at for at, name in enumerate(names)}
    pieces = {
        name: score
        for name, score, kind in zip(names, scores, kinds, strict=True)
        if kind == _PLAIN
    }
    roles = {
        f"{role}_token": names[at]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (at := given(f"ggml.{key}_token_id")) is not None
    }
    tokenizer = GemmaTokenizer(
        vocab=known,
        merges=generate_merges({name: known[name] for name in pieces}, pieces),
        add_bos_token=given("ggml.add_bos_token", True),
        **roles,
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
