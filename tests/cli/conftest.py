"""Running a command as a shell does: its exit code, stdout and stderr."""

from dataclasses import dataclass

import pytest

from quantpage import console
from quantpage.cli.app import run
from tests.integrations.tiny_models import save_tiny


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def quantpage(capsys, monkeypatch):
    """Call it with arguments; ``code`` is what is expected."""

    def call(*arguments, code=0, columns=200):
        for each in (console.OUT, console.ERR):
            monkeypatch.setattr(each, "width", columns)
        # A hint or a result of a command before belongs to that one.
        capsys.readouterr()
        found = run([str(each) for each in arguments])
        done = Done(found, *capsys.readouterr())
        assert done.code == code, done
        assert "Traceback" not in done.err
        if code:
            lines = done.err.strip().splitlines()
            assert lines and lines[-1].startswith("quantpage: "), "one sentence, the last line"
        return done

    return call


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny llama whose tokens are words."""
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def words(tmp_path):
    """A text of many short paragraphs in the tiny model's words."""
    path = tmp_path / "words.txt"
    path.write_text(
        "\n\n".join(" ".join(f"w{3 + (i * j) % 120}" for i in range(40)) for j in range(60))
    )
    return path
