"""What a model's configuration says, read once for all who ask."""

from types import SimpleNamespace

import pytest

from quantpage.integrations.hf_transformers.loading.model import load_model, most_positions

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(("said", "known"), [(2048, 2048), (None, None), (0, None), (-1, None)])
def test_positions_that_no_model_has_are_no_limit(said, known):
    text = SimpleNamespace(max_position_embeddings=said)
    config = SimpleNamespace(get_text_config=lambda decoder: text)
    assert most_positions(config) == known


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dtype": "float33"}, "dtype: expected 'auto' or a dtype of torch, got 'float33'"),
        ({"dtype": "nn"}, "dtype: expected 'auto' or a dtype of torch, got 'nn'"),
        ({"weights": "int4"}, "weights: expected one of model, int8; got 'int4'"),
    ],
)
def test_what_a_model_cannot_be_loaded_as_is_said_before_it_is_looked_for(given, said):
    with pytest.raises(ValueError, match=said):
        load_model("no/such/folder", **given)
