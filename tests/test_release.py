"""scripts/release: every file says the same version, and a release changes all of them or none."""

import datetime
import shutil
from pathlib import Path

import pytest

import quantpage
from scripts import release

pytestmark = pytest.mark.pure

ROOT = Path(__file__).parent.parent
DAY = datetime.date(2026, 12, 1)


@pytest.fixture
def checkout(tmp_path):
    for name in (*release.PLACES, "CHANGELOG.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def contents(root):
    return {name: (root / name).read_text() for name in (*release.PLACES, "CHANGELOG.md")}


def test_every_file_says_the_same_version():
    assert set(release.versions(ROOT).values()) == {quantpage.__version__}


def test_a_release_is_everywhere(checkout):
    (checkout / "CHANGELOG.md").write_text(
        "# Changelog\n\n## 0.9.0 (not released)\n\n- **New**: this.\n\n"
        "## 0.8.0 (2026-01-01)\n\n- Old.\n"
    )
    release.release(checkout, "0.9.0", DAY)
    assert set(release.versions(checkout).values()) == {"0.9.0"}
    log = (checkout / "CHANGELOG.md").read_text()
    assert "## 0.9.0 (2026-12-01)\n\n- **New**" in log and "## 0.8.0 (2026-01-01)" in log
    # Nothing else in these files is a version of ours.
    for name in release.PLACES:
        before, after = (ROOT / name).read_text(), (checkout / name).read_text()
        assert len(set(after.splitlines()) - set(before.splitlines())) == 1


@pytest.mark.parametrize(
    ("version", "log", "said"),
    [
        ("1.0", "## 1.0 (not released)\n\n- x\n", "version: expected a number"),
        ("0.9.0", "## 0.8.0 (not released)\n\n- x\n", "got 0.8.0"),
        ("0.9.0", "## 0.9.0 (2026-01-01)\n\n- x\n", "got none"),
        ("0.9.0", "## 0.9.0 (not released)\n\n## 0.8.0 (2026-01-01)\n\n- x\n", "expected entries"),
        ("0.9.0", "## 0.9.0 (not released)\n- x\n## 0.8.0 (not released)\n- x\n", "no other"),
    ],
)
def test_what_cannot_be_released_changes_nothing(checkout, version, log, said):
    (checkout / "CHANGELOG.md").write_text(log)
    before = contents(checkout)
    with pytest.raises(ValueError, match=said):
        release.release(checkout, version, DAY)
    assert contents(checkout) == before


def test_a_file_without_its_line_is_named(checkout):
    (checkout / "CITATION.cff").write_text("title: x\n")
    before = contents(checkout)
    with pytest.raises(ValueError, match=r"CITATION\.cff: expected one line"):
        release.release(checkout, "0.1.0", DAY)
    assert contents(checkout) == before
