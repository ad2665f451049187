"""Static scales out of a checkpoint's own files, under every name that they go by."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import quantpage
from quantpage.errors import FormatError
from quantpage.formats import FORMATS
from quantpage.integrations.hf_transformers.keys.calibration import calibrate
from quantpage.integrations.hf_transformers.keys.checkpoint_scales import read_checkpoint_scales
from tests.integrations.tiny_models import save_tiny, tiny, tokens

pytestmark = pytest.mark.cpu

NAMES = {
    "compressed-tensors": "model.layers.{}.self_attn.{}_scale",
    "modelopt": "model.layers.{0}.self_attn.{1}_proj.{1}_scale",
    "fastdeploy": "ernie.layers.{}.self_attn.cache{}_matmul.activation_scale",
}


def write(folder, planes):
    save_file(planes, folder / "scales.safetensors")
    return folder


def scalars(style="compressed-tensors", layers=3):
    """A number a tensor: keys 0.01, 0.02, ..., values ten times that."""
    return {
        NAMES[style].format(index, half): torch.tensor([0.01 * (index + 1) * by])
        for index in range(layers)
        for half, by in (("k", 1), ("v", 10))
    }


def read(folder, name="fp8_static", layers=3):
    return read_checkpoint_scales(folder, [FORMATS[name]] * layers, 2, 16)


@pytest.mark.parametrize("style", NAMES)
@pytest.mark.parametrize("name", ["fp8_static", "int8_static"])
def test_one_number_serves_a_tensor(tmp_path, style, name):
    found = read(write(tmp_path, scalars(style)), name)
    bound = FORMATS[name].key.code.qmax if style == "fastdeploy" else 1.0
    for index in range(3):
        layer = found.find(index)
        wanted = FORMATS[name].key.granularity.scale_shape(2, 16)
        assert tuple(layer.key_scale.shape) == tuple(layer.value_scale.shape) == wanted
        torch.testing.assert_close(layer.key_scale, torch.full(wanted, 0.01 * (index + 1) / bound))
        torch.testing.assert_close(layer.value_scale, torch.full(wanted, 0.1 * (index + 1) / bound))


def test_heads_and_channels_are_taken_as_they_are(tmp_path):
    planes = scalars()
    heads, channels = torch.tensor([0.1, 0.2]), torch.rand(2, 16) + 0.1
    planes[NAMES["compressed-tensors"].format(1, "k")] = heads
    planes[NAMES["compressed-tensors"].format(2, "k")] = channels.flatten()
    found = read(write(tmp_path, planes), "int8_static")
    assert torch.equal(found.find(1).key_scale, heads[:, None].expand(2, 16))
    assert torch.equal(found.find(2).key_scale, channels)


def test_zero_points_become_the_number_of_code_0(tmp_path):
    planes = scalars("fastdeploy")
    for index in range(3):
        for half in "kv":
            name = NAMES["fastdeploy"].format(index, half).replace("_scale", "_zero_point")
            planes[name] = torch.tensor([-3.0])
    layer = read(write(tmp_path, planes), "int4_static").find(0)
    torch.testing.assert_close(layer.key_scale, torch.full((2, 16), 0.01))
    torch.testing.assert_close(layer.key_zero, torch.full((2, 16), 0.03))
    with pytest.raises(FormatError, match="layer 0, key zero: expected no zero point"):
        read(tmp_path, "int8_static")


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda p: p.pop("model.layers.1.self_attn.v_scale"), "layer 1, value scale: expected one"),
        (
            lambda p: p.update({"model.layers.3.self_attn.k_scale": torch.ones(1)}),
            "layer 3, key scale: expected layers 0 to 2, got model.layers.3",
        ),
        (
            lambda p: p.update({"model.layers.0.self_attn.k_scale": torch.ones(3)}),
            r"layer 0, key scale, model.layers.0.self_attn.k_scale: expected 1, 2 .*got \\(3,\\)",
        ),
        (
            lambda p: p.update({"model.layers.2.self_attn.v_scale": torch.tensor([torch.nan])}),
            "layer 2, value scale.*: expected positive finite numbers",
        ),
        (
            lambda p: p.update({"model.layers.0.self_attn.k_scale": torch.zeros(1)}),
            "layer 0, key scale.*: expected positive finite numbers",
        ),
        (
            lambda p: p.update({"model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)}),
            "layer 0, key scale: expected one tensor, got .* and ",
        ),
    ],
    ids=["missing", "extra", "shape", "nan", "zero", "twice"],
)
def test_what_is_wrong_names_layer_and_tensor(tmp_path, change, said):
    planes = scalars()
    change(planes)
    with pytest.raises(FormatError, match=said.replace("\\\\", "\\")):
        read(write(tmp_path, planes))


def test_int4_without_zero_points_is_refused(tmp_path):
    with pytest.raises(FormatError, match="layer 0, key zero: expected a zero point"):
        read(write(tmp_path, scalars()), "int4_static")


def test_a_checkpoint_serves_the_model_that_was_loaded_from_it(tmp_path):
    folder = save_tiny(tmp_path / "model")
    static = calibrate(tiny("llama", torch.float32), [tokens(1, 400)], [FORMATS["fp8_static"]] * 3,
                       {}, rule="absmax").static  # fmt: skip
    planes = {}
    for index, scales in static.items():
        planes[NAMES["compressed-tensors"].format(index, "k")] = scales.key_scale.float().flatten()
        planes[NAMES["compressed-tensors"].format(index, "v")] = (
            scales.value_scale.float().flatten()
        )
    write(folder, planes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokens(1, 120, seed=4)
    with torch.inference_mode():
        exact = model(ids).logits.double().log_softmax(-1)
        for calibration in ("auto", folder):
            with quantpage.attach(model, "fp8_static", calibration=calibration) as attached:
                out = model(ids, use_cache=True)
            other = out.logits.double().log_softmax(-1)
            assert (exact.exp() * (exact - other)).sum(-1).mean() < 0.2
            assert attached.calibration == "scales of model"
            held = out.past_key_values.rows.layer(2).key.scale
            assert torch.equal(held, static[2].key_scale)
    (folder / "scales.safetensors").unlink()
    with pytest.raises(FormatError, match="calibration: expected a file with static scales"):
        quantpage.attach(model, "fp8_static")
