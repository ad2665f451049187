"""scripts/judges: parts of packages."""

import zipfile

import pytest

from scripts.judges import part_of

pytestmark = pytest.mark.cpu


def test_the_one_file_of_data_is_the_part(tmp_path):
    with zipfile.ZipFile(tmp_path / "part.whl", "w") as archive:
        archive.writestr("package_part1/__init__.py", "")
        archive.writestr("package_part1/data/model.gguf.part00", b"bytes")
        archive.writestr("package_part1-1.0.dist-info/RECORD", "")
    assert part_of(tmp_path / "part.whl") == b"bytes"
