"""Files that commands write: there whole or not at all, whatever ends the writing."""

import resource
import threading
from pathlib import Path

import pytest

from quantpage.files import check_writable, whole_file, write, write_bytes

pytestmark = pytest.mark.pure


@pytest.fixture
def full_disk(monkeypatch):
    """Files of this process end at 4,096 bytes, as on a full disk."""
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("old", [None, b"as it was"])
def test_a_full_disk_leaves_what_was_there_and_is_told_with_the_path(tmp_path, full_disk, old):
    path = tmp_path / "rows.csv"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(OSError, match=r"rows\.csv"):
        write_bytes(path, b"x" * 100_000)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == ([] if old is None else [old])


def test_an_interruption_leaves_what_was_there(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"as it was")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"half of")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"as it was"


def test_two_that_write_at_once_do_not_meet(tmp_path):
    path, start = tmp_path / "new" / "rows.csv", threading.Barrier(4)
    texts = [letter * 300_000 for letter in "abcd"]
    failed = []

    def work(text):
        start.wait()
        for _ in range(20):
            try:
                write(path, text)
                assert path.read_text() in texts
            except (OSError, AssertionError) as error:
                failed.append(error)

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failed and list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_not_there_yet_is_made(tmp_path):
    """Also by who writes as it goes, after hours: check_writable has said that it can be."""
    for at, path in enumerate(tmp_path / name / "deep" / "rows.csv" for name in "ab"):
        check_writable(path, "csv")
        if at == 0:
            write(path, "new")
        else:
            with whole_file(path) as file:
                file.write(b"new")
        assert path.read_text() == "new"


def test_modes_and_links_stay(tmp_path):
    path, link = tmp_path / "rows.csv", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    check_writable(link, "csv")
    write(link, "new")
    assert link.is_symlink() and path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_is_no_file_or_another_of_the_command_is_refused_beforehand(tmp_path):
    path, link = tmp_path / "text.txt", tmp_path / "link"
    path.write_text("words")
    link.symlink_to(path)
    for wrong, why in ((tmp_path, "the folder"), (Path("/dev/full"), "a device or pipe")):
        with pytest.raises(ValueError, match=f"csv: expected a file to write, got .*{why}"):
            check_writable(wrong, "csv")
    for same in (path, link, tmp_path / "." / "text.txt"):
        with pytest.raises(ValueError, match="csv: expected another file than text, got "):
            check_writable(same, "csv", {"model": None, "text": path})
    # Before it is there, too.
    with pytest.raises(ValueError, match="csv: expected another file than out"):
        check_writable(tmp_path / "new", "csv", {"out": tmp_path / "new"})
    check_writable(tmp_path / "rows.csv", "csv", {"text": path})
    assert path.read_text() == "words"


def test_a_folder_that_takes_no_file_is_refused_beforehand(tmp_path):
    """Also to root, whom no mode stops, and where a file is there but cannot be replaced."""
    with pytest.raises(ValueError, match=r"csv: expected a file that can be written, got /proc/x"):
        check_writable(Path("/proc/x"), "csv")
    # Root may write to it, nobody may replace it.
    there = Path("/proc/self/oom_score_adj")
    with pytest.raises(ValueError, match="csv: expected a file that can be written, got /proc/"):
        check_writable(there, "csv")
    check_writable(there, "csv", in_place=True)
    check_writable(tmp_path / "new", "csv")
    assert not list(tmp_path.iterdir())
