"""A file of answers is continued after any end, and a file of something else is left alone."""

import json
import resource
import signal

import pytest

from quantpage.server.answer_file import AnswerFile

pytestmark = pytest.mark.pure

RECORDS = [
    {"id": "a", "request": "1", "choices": ["first\n\u2028"]},
    {"id": 2, "request": "2", "error": "max_tokens: expected less"},
    {"id": "2", "request": "3", "choices": []},
]


def written(path, records):
    with AnswerFile(path) as file:
        file.resume({})
        for each in records:
            file.append(each)
    return path.read_bytes()


def test_a_file_cut_anywhere_goes_on_with_its_whole_answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    whole = written(path, RECORDS)
    ends = [at for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with AnswerFile(path) as file:
            # A line without its end is whole if nothing else is missing.
            there = [each for each, end in zip(RECORDS, ends, strict=True) if cut >= end]
            good = [each for each in there if "error" not in each]
            assert file.answered == {each["id"]: each["request"] for each in good}
            asked = {each["id"]: each["request"] for each in RECORDS}
            assert file.resume(asked) == {each["id"] for each in good}
            file.append(RECORDS[1])
        lines = [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]
        assert lines == [*good, RECORDS[1]]
    assert [each.name for each in tmp_path.iterdir()] == ["answers.jsonl"]


@pytest.mark.parametrize(
    "content",
    [
        b"a text of mine",
        b"a text of mine\n",
        b"\n",
        b'{"prompt": "mine", "id": 3}\n',
        b'{"id": true, "request": "1"}\n',
        b'{"id": "a", "request": "1"}\n{"id": "b"}\n{"id": "c", "request": "1"}\n',
        b"\xff\xfe",
    ],
)
def test_a_file_of_something_else_is_left_alone(tmp_path, content):
    path = tmp_path / "mine"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="out: expected a new file or answers of this command"):
        AnswerFile(path)
    assert path.read_bytes() == content


def test_a_file_of_other_answers_is_left_alone(tmp_path):
    path = tmp_path / "answers.jsonl"
    # An error, which would be tried again, and a torn line, which would go.
    whole = written(path, RECORDS) + b'{"id": "c", "requ'
    path.write_bytes(whole)
    with (
        AnswerFile(path) as file,
        pytest.raises(ValueError, match="got one to another request with id '2'"),
    ):
        file.resume({"a": "1", "2": "another"})
    assert path.read_bytes() == whole


def test_modes_and_links_stay(tmp_path):
    path, link = tmp_path / "answers.jsonl", tmp_path / "link"
    whole = written(path, RECORDS)
    path.chmod(0o640)
    link.symlink_to(path)
    path.write_bytes(whole[:-3])
    written(link, [])
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert len(path.read_bytes().splitlines()) == 1


def test_one_process_at_a_time(tmp_path):
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path) as file:
        with pytest.raises(ValueError, match="which another one is writing"):
            AnswerFile(path)
        file.append(RECORDS[0])
    assert AnswerFile(path).answered == {"a": "1"}


def test_places_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="out: expected a file, got"):
        AnswerFile(tmp_path)
    with pytest.raises(ValueError, match="out: expected a file that can be written"):
        AnswerFile(tmp_path / "nowhere" / "answers.jsonl")


def test_a_full_disk_is_told_with_the_path(tmp_path):
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with AnswerFile(tmp_path / "answers.jsonl") as file:
            file.resume({})
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
            with pytest.raises(OSError, match=r"answers\.jsonl"):
                file.append(RECORDS[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
