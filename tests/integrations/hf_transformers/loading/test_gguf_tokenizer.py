"""A GGUF's tokenizer: a Gemma's pieces are merged by their scores, and tokens have the roles that
the file gives them."""

import pytest

pytest.importorskip("gguf")

import gguf

from quantpage.integrations.hf_transformers.loading.gguf_tokenizer import gguf_tokenizer

pytestmark = pytest.mark.cpu

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"]
LETTERS = ["a", "b", "c", "\u2581"]
MERGED = ["ab", "\u2581ab", "abc"]
NAMES = [*SPECIAL, "\n\n", *LETTERS, *MERGED]
TEMPLATE = "{% for each in messages %}<start_of_turn>{{ each.content }}{% endfor %}"


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "gemma3")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(NAMES)
    writer.add_token_scores([-1000.0] * 6 + [-100.0] * len(LETTERS) + [-1.0, -2.0, -3.0])
    writer.add_token_types([3] * 5 + [4] + [1] * (len(LETTERS) + len(MERGED)))
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def test_pieces_are_merged_by_their_scores(file):
    tokenizer = gguf_tokenizer(file, "gemma3_text")
    text = "abc ab\n\ncab"
    ids = tokenizer(text).input_ids
    cut = ["<bos>", "abc", "\u2581ab", "\n\n", "c", "ab"]
    assert tokenizer.convert_ids_to_tokens(ids) == cut
    assert ids == [NAMES.index(each) for each in cut]
    assert tokenizer.decode(ids[1:]) == text


def test_tokens_of_a_chat_stay_whole(file):
    tokenizer = gguf_tokenizer(file, "gemma3_text")
    said = tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False)
    ids = tokenizer(said, add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<start_of_turn>", "abc"]
    assert tokenizer.eos_token == "<eos>" and tokenizer.eos_token_id == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "abc"


def test_what_is_kept_is_read_back(file, tmp_path):
    from transformers import AutoTokenizer

    made = gguf_tokenizer(file, "gemma3_text")
    made.save_pretrained(tmp_path / "made")
    again = AutoTokenizer.from_pretrained(tmp_path / "made")
    for text in ("ab abc\n\nb", "<start_of_turn>cab"):
        assert again(text).input_ids == made(text).input_ids


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("padding", [None, 4])
def test_tokens_have_the_roles_that_the_file_says(tmp_path, architecture, padding):
    file = tmp_path / "model.gguf"
    special = ["<|endoftext|>", "<|im_start|>", "<unk>", "<|im_end|>", "<fill>"]
    names = [*special, *"abc", "ab", "bc"]
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_types([3] * len(special) + [1] * 5)
    writer.add_token_merges(["a b", "b c"])
    writer.add_unk_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(3)
    if padding is not None:
        writer.add_pad_token_id(padding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = gguf_tokenizer(file, architecture)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 3)
    assert (tokenizer.unk_token, tokenizer.unk_token_id) == ("<unk>", 2)
    if padding is not None:
        assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<fill>", 4)
    assert len(tokenizer) == len(names)
    ids = tokenizer("abc<|im_end|>", add_special_tokens=False).input_ids
    assert ids == [names.index(each) for each in ("ab", "c", "<|im_end|>")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "abc"
