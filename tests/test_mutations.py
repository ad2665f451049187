"""The mutations of scripts/mutants.py still stand in their files; running them is by hand."""

from pathlib import Path

import pytest

from scripts.mutations import MUTATIONS

pytestmark = pytest.mark.pure
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.name)
def test_a_mutation_stands_in_its_file_once(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.new != mutation.old
    assert all((ROOT / each.partition("::")[0]).exists() for each in mutation.tests)
    assert mutation.tests
