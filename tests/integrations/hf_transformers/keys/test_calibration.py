"""`quantpage calibrate` and its file: of one text, good for another, never for another model."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

import quantpage
from quantpage.cli.app import run
from quantpage.errors import CorruptCalibration, FormatError
from quantpage.formats import FORMATS
from quantpage.formats.feedback import with_feedback
from quantpage.formats.key_map import KeyMap
from quantpage.formats.per_layer import LayerFormats
from quantpage.integrations.hf_transformers.keys.calibration import (
    Calibration,
    LayerCalibration,
    calibrate,
)
from quantpage.integrations.hf_transformers.keys.statistics import far_shares
from quantpage.integrations.hf_transformers.keys.watch import watched
from quantpage.ops.attend.params import exact_pairs
from tests.integrations.tiny_models import save_tiny, tiny, tokens, uneven

pytestmark = pytest.mark.cpu


def texts(seeds=(1, 2, 3), length=400):
    return [tokens(1, length, seed) for seed in seeds]


def made(model, name="int4", layers=3):
    return calibrate(model, texts(), [FORMATS[name]] * layers, {"text": "random"})


@pytest.fixture(scope="module")
def model():
    return uneven()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "llama.safetensors"
    made(model).save(path)
    return path


@torch.inference_mode()
def logits(model, ids, cache=None):
    return model(ids, past_key_values=cache, use_cache=True).logits[0, 16:].double().log_softmax(-1)


@pytest.mark.parametrize("kv_format", ["k=int4,v=int8", "k=int8,v=none", "int4"])
def test_a_calibrated_cache_is_nearer_on_other_tokens(model, file, kv_format):
    ids = tokens(1, 300, seed=9)
    exact = logits(model, ids, DynamicCache())
    found = {}
    for calibration in (file, None):
        with quantpage.attach(
            model, kv_format=kv_format, page_size=16, calibration=calibration
        ) as attached:
            other = logits(model, ids)
        found[calibration] = (exact.exp() * (exact - other)).sum(-1).mean().item()
        assert attached.calibration == ("none" if calibration is None else "llama.safetensors")
    assert found[file] < 0.6 * found[None]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_results_do_not_depend_on_the_cut(file, chunk):
    model, ids = uneven(torch.float64), tokens(1, 100)
    with quantpage.attach(model, kv_format="int4", page_size=16, calibration=file):
        whole = model(ids, use_cache=True).logits
        out, cache = [], None
        for start in range(0, 100, chunk):
            step = model(ids[:, start : start + chunk], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            out.append(step.logits)
    torch.testing.assert_close(torch.cat(out, 1), whole, atol=1e-8, rtol=0)


def test_losses_fall_in_every_layer(model):
    found = made(model)
    assert sorted(found.layers) == [0, 1, 2]
    assert all(after < 0.5 * before for before, after in found.note["losses"].values())


def test_a_file_says_what_was_saved(model, file):
    found, loaded = made(model), Calibration.load(file)
    assert loaded.model == found.model and loaded.note["text"] == "random"
    for index, layer in found.layers.items():
        theirs = loaded.layers[index]
        assert theirs.key_map.digest() == layer.key_map.digest()
        assert torch.equal(theirs.metric, layer.metric)
        assert torch.equal(theirs.far_metric, layer.far_metric)
        assert torch.equal(theirs.far_scale, layer.far_scale)
        assert torch.equal(theirs.far_mean, layer.far_mean)
        assert torch.equal(theirs.far_turn, layer.far_turn)
        assert not torch.allclose(layer.metric, layer.far_metric, rtol=1e-2)


def test_formats_with_exact_pages_take_what_queries_see_beyond_them(
    model, file, tmp_path, monkeypatch
):
    """And scales that are looked for by it; files from before there were any of them serve."""
    found = Calibration.load(file)
    layer = found.layers[0]
    for name, far in (("int8", False), ("int6", False), ("int4", True), ("k8v4", True)):
        metric = layer.far_metric if far else layer.metric
        mapped = KeyMap(layer.far_scale, layer.far_mean) if far else layer.key_map
        turn = layer.far_turn if far else layer.key_map.turn
        # Rows of 8 bits would feel how they are handed on.
        turn = turn if FORMATS[name].key.code.bits < 8 else None
        mapped = KeyMap(mapped.scale, mapped.mean, turn=turn)
        wanted = with_feedback(mapped, metric, rotated=True)
        assert layer.for_codes(FORMATS[name]).digest() == wanted.digest()
    assert made(model, "int8").layers[1].key_map.digest() != found.layers[1].key_map.digest()
    old, planes = tmp_path / "old", load_file(file)
    scales = {i: KeyMap(each.key_map.scale, each.key_map.mean) for i, each in found.layers.items()}
    without = {i: LayerCalibration(scales[i], each.metric) for i, each in found.layers.items()}
    monkeypatch.setattr("quantpage.integrations.hf_transformers.keys.calibration.VERSION", "1")
    replace(found, layers=without).save(old)
    missing = set(planes) - set(load_file(old))
    later = {"far_metric", "far_scale", "far_mean", "far_turn", "turn"}
    # A layer that gains nothing by a matrix has none.
    assert missing == {each for each in planes if each.partition(".")[2] in later}
    assert {each.partition(".")[2] for each in missing} == later
    before = Calibration.load(old).layers[0].for_codes(FORMATS["int4"])
    assert before.digest() == with_feedback(scales[0], layer.metric, True).digest()


@pytest.mark.parametrize("name", ["llama", "gemma3_window"])
def test_shares_of_attention_beyond_exact_pages(name):
    """As attention's own probabilities say, windows and more pages than channels included."""
    model, seen = tiny(name, torch.float64), []
    ids = tokens(1, 64 * 5 + 7, seed=4)

    def look(index, query, key, value, attend):
        shares = far_shares(key, value[..., :3].contiguous(), attend)
        each = torch.eye(key.shape[2], dtype=key.dtype).expand(1, key.shape[1], -1, -1)
        probabilities = attend(key, each)[0]
        at = torch.arange(key.shape[2])
        hidden = ~exact_pairs(at, at, 64)
        seen.append((shares, (probabilities * hidden[:, None]).sum(-1)))

    with watched(model, look), torch.no_grad():
        model(ids, use_cache=False)
    for shares, wanted in seen:
        torch.testing.assert_close(shares.double(), wanted, atol=1e-6, rtol=0)
    assert max(float(wanted.max()) for _, wanted in seen) > 0.1


def test_a_file_serves_the_model_in_any_dtype(file):
    model = uneven().bfloat16()
    quantpage.attach(model, kv_format="int8", calibration=file).detach()


def test_formats_of_other_codes_take_what_they_can(model, file):
    wanted = (("none", False, False), ("fp8", True, False), ("int8", True, True))
    for name, mapped, in_turn in wanted:
        with quantpage.attach(model, kv_format=name, calibration=file) as attached:
            maps = attached.options.key_maps
            assert bool(maps) == mapped
            assert all((each.feedback is not None) == in_turn for each in maps.values())


@pytest.mark.parametrize("kv_format", ["k=int4,v=int8", "k=int8,v=none"])
def test_without_feedback_keys_are_written_by_the_map_alone(model, file, tmp_path, kv_format):
    path, ids = tmp_path / "plain", tokens(1, 300, seed=9)
    plain = calibrate(model, texts(), [FORMATS["int4"]] * 3, {"text": "random"}, feedback=False)
    plain.save(path)
    exact = logits(model, ids, DynamicCache())
    found = {}
    for calibration in (path, file, None):
        with quantpage.attach(model, kv_format, page_size=16, calibration=calibration) as attached:
            maps, cache = attached.options.key_maps, attached.new_cache()
            other = logits(model, ids, cache)
        found[calibration] = (exact.exp() * (exact - other)).sum(-1).mean().item()
        if calibration == path:
            assert len(maps) == 3 and all(each.feedback is None for each in maps.values())
            assert maps[0].digest() == plain.layers[0].key_map.digest()
    assert found[path] < 0.8 * found[None]
    assert found[file] != found[path]


def test_another_model_is_refused_and_nothing_changes(file):
    model = tiny("mistral_window", torch.float32)
    with torch.no_grad():
        model.model.norm.weight.add_(0.5)
    before = model.config._attn_implementation
    with pytest.raises(CorruptCalibration, match="expected one of this model"):
        quantpage.attach(model, calibration=file)
    assert model.config._attn_implementation == before


def other_llama(model):
    """Of the same sizes, with the same norms, trained apart."""
    torch.manual_seed(77)
    return type(model)(model.config).to(model.dtype).eval()


@pytest.mark.parametrize("name", ["int4", "fp8_static"])
def test_a_model_that_differs_in_its_matrices_alone_is_another(model, tmp_path, name):
    path = tmp_path / "made"
    made(model, name).save(path)
    with pytest.raises(CorruptCalibration, match="expected one of this model"):
        quantpage.attach(other_llama(model), name, calibration=path)
    near = uneven()
    with torch.no_grad():
        for weight in near.parameters():
            # As fine-tuning changes them, or weights of 4 bits.
            weight += 0.1 * weight.std().nan_to_num() * torch.randn_like(weight) * (weight.ndim > 1)
    with quantpage.attach(near, name, calibration=path) as attached:
        assert attached.calibration.startswith("made")


def test_damaged_files_are_refused(model, file, tmp_path):
    cut = tmp_path / "cut"
    cut.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CorruptCalibration, match="whole safetensors file"):
        quantpage.attach(model, calibration=cut)
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    planes = load_file(file)
    planes["0.scale"] = planes["0.scale"] * 2
    save_file(planes, tmp_path / "altered", metadata)
    with pytest.raises(CorruptCalibration, match="it was altered"):
        quantpage.attach(model, calibration=tmp_path / "altered")
    save_file(planes, tmp_path / "other", {"kind": "something"})
    with pytest.raises(CorruptCalibration, match="expected kind 'quantpage calibration'"):
        quantpage.attach(model, calibration=tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"calibration: expected .* a file"):
        quantpage.attach(model, calibration=tmp_path / "nothing")


def test_what_cannot_be_calibrated_says_why(model):
    with pytest.raises(ValueError, match="kv_format: expected quantized keys"):
        made(model, "none")


def test_the_command_writes_a_file_that_evaluate_reads(tmp_path, capsys):
    folder = save_tiny(tmp_path / "model")
    words = " ".join(f"w{i}" for i in tokens(1, 4000)[0].tolist())
    (tmp_path / "words.txt").write_text(words)
    out = tmp_path / "made.safetensors"
    given = ["--model", str(folder), "--text", str(tmp_path / "words.txt")]
    asked = ["calibrate", *given, "--out", str(out), "--tokens", "1024", "--window", "256"]
    assert run(asked) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("layer  error of scores, plain -> mapped")
    assert [line.split()[0] for line in table[1:]] == ["0", "1", "2"]
    asked = ["evaluate", *given, "--formats", "int4", "--windows", "1", "--prompt", "64"]
    csv = tmp_path / "rows.csv"
    assert run([*asked, "--scored", "32", "--calibration", str(out), "--csv", str(csv)]) == 0
    assert "made.safetensors" in csv.read_text()
    capsys.readouterr()
    # Another model's, or without what a static format takes: told before a window is scored.
    other = tmp_path / "other.safetensors"
    made(other_llama(uneven())).save(other)
    for wrong, name in ((other, "int4"), (out, "int8,last1=int8_static")):
        formats = ["--formats", f"none,{name}", "--calibration", str(wrong)]
        asked = ["evaluate", *given, "--windows", "1", "--prompt", "64", "--scored", "32"]
        assert run([*asked, *formats]) == 2
        said = capsys.readouterr().err
        assert str(wrong) in said and "window 1" not in said
    assert run(["calibrate", *given, "--out", str(out), "--kv-format", "int9"]) == 2
    assert run(["calibrate", *given, "--out", str(tmp_path), "--tokens", "1024"]) == 2
    assert run(["calibrate", *given, "--out", str(out), "--window", "9000"]) == 2


@pytest.mark.parametrize(
    ("name", "mapped", "given"),
    [
        ("k=int8,v=int8_static", [0, 1, 2], [0, 1, 2]),
        ("k=int8_static,v=int4", [], [0, 1, 2]),
        ("k=none,v=fp8_static,layers=1:int8", [1], [0, 2]),
    ],
)
def test_one_half_given_and_the_other_not(model, tmp_path, name, mapped, given):
    path = tmp_path / "halves.safetensors"
    found = calibrate(model, texts(), LayerFormats.parse(name).of_layers(3), {})
    assert (sorted(found.layers), sorted(found.static)) == (mapped, given)
    found.save(path)
    ids = next(iter(texts()))
    with torch.inference_mode():
        exact = model(ids).logits.double().log_softmax(-1)
        with quantpage.attach(model, name, page_size=16, calibration=path) as attached:
            near = model(ids).logits.double().log_softmax(-1)
            assert sorted(attached.options.key_maps) == mapped
    assert 1e-7 < float((exact.exp() * (exact - near)).sum(-1).mean()) < 0.2


@pytest.mark.parametrize("rule", ["absmax", "percentile", "mse"])
@pytest.mark.parametrize("name", ["int8_static", "fp8_static", "int4_static"])
def test_static_formats_take_their_scales_from_a_file(model, tmp_path, name, rule):
    path = tmp_path / "static.safetensors"
    found = calibrate(model, texts(), [FORMATS[name]] * 3, {}, rule=rule)
    found.save(path)
    ids = tokens(1, 150, seed=9)
    exact = logits(model, ids, DynamicCache())
    with quantpage.attach(model, kv_format=name, page_size=16, calibration=path) as attached:
        out = model(ids, use_cache=True)
        held = out.past_key_values.rows.layer(1)
    for half, scale, zero in (
        (held.key, found.static[1].key_scale, found.static[1].key_zero),
        (held.value, found.static[1].value_scale, found.static[1].value_zero),
    ):
        assert torch.equal(half.scale, scale)
        assert zero is None or torch.equal(half.zero, zero)
    other = out.logits[0, 16:].double().log_softmax(-1)
    assert (exact.exp() * (exact - other)).sum(-1).mean() < (1.0 if "int4" in name else 0.1)
    assert attached.calibration.startswith("static.safetensors")


def test_static_scales_in_windows_and_mixed_with_dynamic_layers(tmp_path):
    model = tiny("mistral_window", torch.float32)
    forms = [FORMATS["int8_static"], FORMATS["int8"], FORMATS["int8_static"]]
    found = calibrate(model, texts(), forms, {})
    assert sorted(found.static) == [0, 2] and sorted(found.layers) == [1]
    path = tmp_path / "mixed.safetensors"
    found.save(path)
    ids = tokens(1, 150, seed=9)
    exact = logits(model, ids, DynamicCache())
    name = "int8_static,layers=1:int8"
    with quantpage.attach(model, kv_format=name, page_size=16, calibration=path):
        other = logits(model, ids)
    assert (exact.exp() * (exact - other)).sum(-1).mean() < 0.1


@pytest.mark.parametrize("calibration", ["auto", None])
def test_static_formats_without_scales_are_refused(model, calibration):
    with pytest.raises(FormatError, match="expected a file with static scales for fp8"):
        quantpage.attach(model, kv_format="fp8_static", calibration=calibration)


def test_scales_of_another_format_or_shape_are_refused(model, file, tmp_path):
    with pytest.raises(FormatError, match="expected static scales for int8_static, got none"):
        quantpage.attach(model, kv_format="int8_static", calibration=file)
    found = calibrate(model, texts(), [FORMATS["fp8_static"]] * 3, {})
    found.save(tmp_path / "fp8")
    with pytest.raises(FormatError, match="for int8_static, got them for fp8_static"):
        quantpage.attach(model, kv_format="int8_static", calibration=tmp_path / "fp8")
    scales = dict(found.static)
    scales[1] = replace(scales[1], key_scale=scales[1].key_scale[:, :0])
    replace(found, static=scales).save(tmp_path / "wrong")
    with pytest.raises(FormatError, match=r"layer 1, key scale: expected \(2, 1\)"):
        quantpage.attach(model, kv_format="fp8_static", calibration=tmp_path / "wrong")
    del scales[1]
    replace(found, static=scales).save(tmp_path / "missing")
    with pytest.raises(FormatError, match="layer 1: expected static scales"):
        quantpage.attach(model, kv_format="fp8_static", calibration=tmp_path / "missing")
    scales[1] = replace(found.static[1], value_scale=found.static[1].value_scale * torch.nan)
    replace(found, static=scales).save(tmp_path / "nan")
    with pytest.raises(FormatError, match=r"layer 1, value scale.*: expected positive finite"):
        quantpage.attach(model, kv_format="fp8_static", calibration=tmp_path / "nan")
