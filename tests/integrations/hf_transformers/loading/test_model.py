"""What a model's configuration says, read once for all who ask."""

from types import SimpleNamespace

import pytest

from quantpage.integrations.hf_transformers.loading.model import most_positions

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(("said", "known"), [(2048, 2048), (None, None), (0, None), (-1, None)])
def test_positions_that_no_model_has_are_no_limit(said, known):
    text = SimpleNamespace(max_position_embeddings=said)
    config = SimpleNamespace(get_text_config=lambda decoder: text)
    assert most_positions(config) == known
