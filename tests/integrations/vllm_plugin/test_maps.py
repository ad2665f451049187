"""Key maps for vLLM's workers, out of a calibration's file; no vLLM is asked for anything."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from quantpage.errors import CorruptCalibration, FormatError
from quantpage.formats import FORMATS
from quantpage.integrations.hf_transformers.keys.calibration import Calibration, calibrate
from quantpage.integrations.vllm_plugin import maps
from quantpage.integrations.vllm_plugin.maps import find_calibration, key_map, worker_heads

pytestmark = pytest.mark.cpu

INT4, HEADS, WIDTH = FORMATS["int4"], 4, 16


def save_model(folder, seed: int):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": HEADS, "vocab_size": 100}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model's folder, and its file."""
    folder = tmp_path_factory.mktemp("model")
    model = save_model(folder, 0)
    text = torch.randint(100, (1, 200), generator=torch.Generator().manual_seed(0))
    path = folder / "keys.calibration"
    calibrate(model, [text], [INT4] * 2, {"text": "random"}).save(path)
    return folder, str(path)


def test_a_worker_takes_the_maps_of_its_heads(made):
    folder, path = made
    found = find_calibration(path, str(folder))
    whole = found.maps([INT4] * 2, path)[1]
    parts = [
        key_map(found, path, 1, INT4, (HEADS, WIDTH), worker_heads(HEADS, rank, 2))
        for rank in range(2)
    ]
    for name in ("scale", "mean", "feedback"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    assert key_map(found, path, 1, FORMATS["none"], (HEADS, WIDTH), (0, HEADS)) is None
    # Codes of floating point are not rounded in turn.
    fp8 = key_map(found, path, 0, FORMATS["fp8"], (HEADS, WIDTH), (0, HEADS))
    assert fp8.feedback is None and torch.equal(fp8.scale, found.layers[0].key_map.scale)


@pytest.mark.parametrize(
    ("kv_heads", "workers", "held"),
    [
        (8, 1, [(0, 8)]),
        (8, 4, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (1, 2, [(0, 1), (0, 1)]),
    ],
)
def test_heads_of_workers(kv_heads, workers, held):
    """As vLLM's QKVParallelLinear loads them."""
    assert [worker_heads(kv_heads, rank, workers) for rank in range(workers)] == held


def test_a_file_of_another_model_is_refused(made, tmp_path):
    _, path = made
    save_model(tmp_path, 1)
    with pytest.raises(CorruptCalibration, match="got one of another model"):
        find_calibration(path, str(tmp_path))
    # A name of the hub has no folder to compare with.
    found = find_calibration(path, "somebody/model")
    for shape in ((HEADS, 2 * WIDTH), (2 * HEADS, WIDTH)):
        with pytest.raises(
            CorruptCalibration, match=r"expected a map of kv_heads, head_dim .* got"
        ):
            key_map(found, path, 0, INT4, shape, (0, 1))
    with pytest.raises(
        ValueError, match="--additional-config quantpage_calibration: expected a file"
    ):
        find_calibration(str(tmp_path / "missing"), "somebody/model")


def test_a_layer_that_was_measured_for_a_format_without_maps(made, tmp_path):
    folder, path = made
    found = Calibration.load(path)
    Calibration(found.model, {0: found.layers[0]}, found.note).save(tmp_path / "first")
    half = find_calibration(str(tmp_path / "first"), str(folder))
    with pytest.raises(FormatError, match="expected key maps for int4 in layers 1"):
        key_map(half, "first", 1, INT4, (HEADS, WIDTH), (0, HEADS))
    assert key_map(half, "first", 0, INT4, (HEADS, WIDTH), (0, HEADS)) is not None


def test_keys_in_few_bits_without_maps_are_said_once(made, capsys):
    folder, _ = made
    maps.warn_without_maps.cache_clear()
    for form in (FORMATS["int8"], FORMATS["none"], FORMATS["fp8"], FORMATS["k8v4"]):
        maps.warn_without_maps(str(folder), form)
    maps.warn_without_maps("somebody/model", INT4)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        maps.warn_without_maps(str(folder), INT4)
    said = capsys.readouterr().err
    assert said.count("keys have biases, with which int4 loses") == 1
    assert "quantpage_calibration" in said
