"""What the server's tests share."""

import pytest

from tests.server.small import save_small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model on disk."""
    return save_small(tmp_path_factory.mktemp("small"))
