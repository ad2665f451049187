"""What text says of a model's keys and queries, in a file for ``attach(calibration=...)``.

    tensors      <layer>.scale, <layer>.mean of the key map; where keys are rounded in turn
                 <layer>.metric: mean of q q', and <layer>.far_metric: the same of what queries
                 see beyond exact pages, <layer>.far_scale, <layer>.far_mean: the map for
                 that; <layer>.turn, <layer>.far_turn: matrices of both; for a static format
                 <layer>.key_scale, .key_zero, .value_scale, .value_zero instead
    metadata     kind, version, model (a digest), note (JSON), checksum over everything else

The maps are chosen for one format and hold for others; rounding in turn follows from the metric
and the codes of the format at hand when the file is read.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from quantpage.cache.tensor_file import Damaged, open_whole, write_whole
from quantpage.errors import CorruptCalibration, FormatError, UnsupportedModel
from quantpage.formats import KeyMap, KVFormat, LayerScales, StaticScales
from quantpage.formats.channel_ranges import ChannelRanges, Rule
from quantpage.formats.feedback import with_feedback
from quantpage.formats.key_statistics import ChosenMap, KeyStatistics, choose_map
from quantpage.integrations.hf_transformers.keys.measured import Measured
from quantpage.integrations.hf_transformers.keys.statistics import Placed, measure, measure_random
from quantpage.integrations.hf_transformers.loading.model import text_config

KIND = "quantpage calibration"
VERSION = "3"
_READ = ("1", "2", VERSION)
"""Files of version 1 have positive scales, and none of what lies beyond exact pages; those of 2 no
matrices."""
_METRICS = ("metric", "far_metric", "far_scale", "far_mean", "far_turn")
_PLANES = ("key_scale", "value_scale", "key_zero", "value_zero")
SKIPPED = 64
"""First tokens of a text that are not counted."""


@dataclass(frozen=True, slots=True)
class LayerCalibration:
    """One layer of a dynamic format."""

    key_map: KeyMap
    """Without feedback."""
    metric: Float[Tensor, "kv_heads head_dim head_dim"] | None
    """Mean of q q', float32; None: channels are rounded by themselves."""
    far_metric: Float[Tensor, "kv_heads head_dim head_dim"] | None = None
    """The same for formats that keep near pages exact (``KeyStatistics.far``); None: as others."""
    far_scale: Float[Tensor, "kv_heads head_dim"] | None = None
    """The map for those; None: as others."""
    far_mean: Float[Tensor, "kv_heads head_dim"] | None = None
    far_turn: Float[Tensor, "kv_heads head_dim head_dim"] | None = None

    def for_codes(self, kv_format: KVFormat) -> KeyMap | None:
        """The map with which ``kv_format`` writes keys; None: it keeps them as they are."""
        spec = kv_format.key
        if not spec.quantized or not spec.dynamic:
            return None
        near = KeyMap(self.key_map.scale, self.key_map.mean)
        if self.metric is None or not spec.code.integer:
            return near
        far = kv_format.exact_pages is not None and self.far_metric is not None
        metric = self.far_metric if far else self.metric
        assert metric is not None
        turn = self.key_map.turn
        if far and self.far_scale is not None:
            near, turn = KeyMap(self.far_scale, self.far_mean), self.far_turn
        # A kernel hands turned rows on in 16 bits, which is nothing beside codes of fewer than 8.
        turn = turn if spec.code.bits < 8 else None
        key_map = KeyMap(near.scale, near.mean, turn=turn)
        return with_feedback(key_map, metric, spec.rotation == "hadamard")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Every layer's, of one model."""

    model: str
    """``weights_digest`` of it."""
    layers: Mapping[int, LayerCalibration]
    note: Mapping[str, Any]
    """Where it comes from: text, tokens, format, losses."""
    static: Mapping[int, LayerScales] = field(default_factory=dict)
    """Scales of the layers with a static format."""

    def save(self, path: Path | str) -> None:
        """Write a file, whole or not at all."""
        planes: dict[str, Tensor] = {}
        for index, each in self.layers.items():
            planes[f"{index}.scale"] = each.key_map.scale.cpu()
            if each.key_map.mean is not None:
                planes[f"{index}.mean"] = each.key_map.mean.cpu()
            if each.key_map.turn is not None:
                planes[f"{index}.turn"] = each.key_map.turn.cpu()
            for name in _METRICS:
                metric = getattr(each, name)
                if metric is not None:
                    planes[f"{index}.{name}"] = metric.cpu()
        for index, scales in self.static.items():
            for name in _PLANES:
                plane = getattr(scales, name)
                if plane is not None:
                    planes[f"{index}.{name}"] = plane.cpu()
        metadata = {"kind": KIND, "version": VERSION, "model": self.model}
        metadata["note"] = json.dumps(dict(self.note))
        write_whole(Path(path), planes, metadata)

    @classmethod
    def load(cls, path: Path | str) -> "Calibration":
        """What ``save`` wrote; CorruptCalibration unless it is whole."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                "calibration: expected 'auto', 'none' or a file that `quantpage calibrate` wrote, "
                f"got {path}"
            )
        try:
            with open_whole(path) as file:
                metadata = file.metadata
                for name, wanted in (("kind", (KIND,)), ("version", _READ)):
                    if metadata.get(name) not in wanted:
                        named = " or ".join(map(repr, wanted))
                        raise Damaged(f"expected {name} {named}, got {metadata.get(name)!r}")
                planes = file.read()
        except Damaged as error:
            raise CorruptCalibration(f"{path}: {error}") from error
        indices = sorted({int(name.partition(".")[0]) for name in planes})
        layers = {
            index: LayerCalibration(
                KeyMap(
                    planes[f"{index}.scale"],
                    planes.get(f"{index}.mean"),
                    turn=planes.get(f"{index}.turn"),
                ),
                *(planes.get(f"{index}.{name}") for name in _METRICS),
            )
            for index in indices
            if f"{index}.scale" in planes
        }
        static = {
            index: LayerScales(**{name: planes.get(f"{index}.{name}") for name in _PLANES})
            for index in indices
            if any(f"{index}.{name}" in planes for name in _PLANES)
        }
        return cls(metadata["model"], layers, json.loads(metadata["note"]), static)

    def maps(self, formats: Sequence[KVFormat], path: Path | str) -> dict[int, KeyMap]:
        """The maps with which layers of ``formats`` write keys, by layer.

        FormatError where a layer takes one that was measured for a format without.
        """
        measured = set(self.note.get("measured", [*self.layers, *self.static]))
        taking = {
            index
            for index, each in enumerate(formats)
            if each.key.quantized and each.key.dynamic and index in measured
        }
        missing = sorted(taking - self.layers.keys())
        if missing:
            name = formats[missing[0]].name
            made_for = self.note.get("kv_format", "another format")
            raise FormatError(
                f"{path}: expected key maps for {name} in layers {', '.join(map(str, missing))}, "
                f"got none, as it was made for {made_for} (quantpage calibrate --kv-format {name})"
            )
        made = {index: each.for_codes(formats[index]) for index, each in self.layers.items()}
        return {index: each for index, each in made.items() if each is not None}

    def scales(self, formats: Sequence[KVFormat], path: Path | str) -> StaticScales | None:
        """The static scales of the layers whose format is static; None where none is.

        FormatError for scales that are missing, of another format, or wrong in shape or number.
        """
        wanted = {index: each for index, each in enumerate(formats) if not each.dynamic}
        if not wanted:
            return None
        first, made_for = next(iter(wanted.values())), self.note.get("static_format")
        if any(each != first for each in wanted.values()):
            names = ", ".join(sorted({each.name for each in wanted.values()}))
            raise FormatError(f"kv_format: expected one static format in all layers, got {names}")
        if made_for != first.name:
            raise FormatError(
                f"{path}: expected static scales for {first.name}, got "
                f"{'none' if made_for is None else f'them for {made_for}'} "
                f"(quantpage calibrate --kv-format {first.name})"
            )
        sizes = self.note["sizes"]
        layers = {index: each for index, each in self.static.items() if index in wanted}
        found = StaticScales(first, sizes[0], sizes[1], layers, sizes[2])
        for index in wanted:
            found.find(index)
        return found

    def check(self, model: nn.Module, path: Path | str) -> None:
        """CorruptCalibration where it is of another model."""
        alike = likeness(self.note.get("weights", {}), weights_sample(model))
        if self.model != weights_digest(model) or alike < SAME_MODEL:
            raise CorruptCalibration(f"{path}: expected one of this model, got one of another")


def calibrate(
    model: PreTrainedModel,
    texts: Iterable[Int[Tensor, "1 tokens"] | Placed],
    formats: Sequence[KVFormat],
    note: Mapping[str, Any],
    each: Callable[[int, ChosenMap], None] | None = None,
    rule: Rule = "mse",
    measured: Measured | None = None,
    feedback: bool = True,
) -> Calibration:
    """Measure a model on texts, one forward each, and choose every layer's map, or its scales.

    texts: placed (``statistics.placed``), or they say nothing of longer contexts. formats: of the
    layers; those that are static are one. note: what to remember. each: told of a layer's map when
    it is chosen. rule: how much of a range static scales cover. measured: what was measured before
    and is added to. feedback: keep what rounding in turn needs.
    """
    static_names = {form.name for form in formats if not form.dynamic}
    if len(static_names) > 1:
        names = ", ".join(sorted(static_names))
        raise FormatError(f"kv_format: expected one static format in all layers, got {names}")
    if not any(form.key.quantized or not form.dynamic for form in formats):
        raise ValueError(
            f"kv_format: expected quantized keys or given scales, as nothing else is calibrated; "
            f"got {formats[0].name}"
        )
    measured = Measured() if measured is None else measured
    ranges = measured.ranges if static_names else None
    found = measure(model, texts, SKIPPED, ranges=ranges, found=measured.keys)
    if not found:
        raise _unmeasurable(model)
    mean = takes_means(model)
    layers, losses, static, sizes = {}, {}, {}, None
    for index, statistics in sorted(found.items()):
        if index >= len(formats) or not formats[index].quantized:
            continue
        if not formats[index].dynamic:
            assert ranges is not None
            static[index] = _static(ranges[index], formats[index], rule)
            sizes = [*ranges[index][0].low.shape, ranges[index][1].low.shape[1]]
        key = formats[index].key
        if not (key.quantized and key.dynamic):
            continue
        layers[index], chosen = _layer(statistics, formats[index], mean, feedback, feedback)
        losses[str(index)] = [chosen.plain_loss, chosen.loss]
        if each is not None:
            each(index, chosen)
    made = {**note, "losses": losses, "weights": weights_sample(model), "measured": sorted(found)}
    if static:
        made |= {"static_format": next(iter(static_names)), "sizes": sizes, "rule": rule}
    return Calibration(weights_digest(model), layers, made, static)


def _layer(
    statistics: KeyStatistics, kv_format: KVFormat, mean: bool, feedback: bool, search: bool
) -> tuple[LayerCalibration, ChosenMap]:
    """search: choose maps for both metrics, and look for better ones than laws say; else one for
    ``kv_format``'s.
    """
    statistics = _on_cpu(statistics)
    far, exact = statistics.far(), kv_format.exact_pages is not None
    seen, unseen = (far, statistics) if exact else (statistics, far)
    chosen = choose_map(seen, kv_format.key, mean, feedback, search)
    if not feedback:
        return LayerCalibration(chosen.key_map, None), chosen
    metric, far_metric = (each.metric.float().contiguous() for each in (statistics, far))
    if not search:
        return LayerCalibration(chosen.key_map, metric, far_metric), chosen
    other = choose_map(unseen, kv_format.key, mean, feedback, search)
    near, beyond = (other, chosen) if exact else (chosen, other)
    maps = near.key_map, beyond.key_map
    beyond_planes = maps[1].scale, maps[1].mean, maps[1].turn
    return LayerCalibration(maps[0], metric, far_metric, *beyond_planes), chosen


def calibrate_random(model: PreTrainedModel, formats: Sequence[KVFormat]) -> Calibration:
    """The maps that ``attach`` makes by itself, out of the weights alone, for an engine that cannot
    measure a model. Raises UnsupportedModel for one that cannot be measured.
    """
    found = measure_random(model)
    if not found:
        raise _unmeasurable(model)
    layers = layers_of_weights(found, formats, takes_means(model))
    note = {"text": "random tokens", "weights": weights_sample(model), "measured": sorted(found)}
    return Calibration(weights_digest(model), layers, note)


def layers_of_weights(
    found: Mapping[int, KeyStatistics], formats: Sequence[KVFormat], mean: bool
) -> dict[int, LayerCalibration]:
    """Maps of layers with quantized keys by ``measure_random``, each for its layer's format.

    Rounding in turn is for codes of few bits: the map alone leaves 8 bits little to gain, and what
    writes them is faster. mean: take it out.
    """
    made = {}
    for index, statistics in sorted(found.items()):
        if index >= len(formats) or not formats[index].key.quantized:
            continue
        made[index] = LayerCalibration(statistics.key_map(mean), None)
        if formats[index].key.code.bits < 8:
            made[index], _ = _layer(statistics, formats[index], mean, True, False)
    return made


def _unmeasurable(model: nn.Module) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(model).__name__}: expected attention through Transformers' interface, got its "
        "own code, which cannot be measured"
    )


def _static(
    ranges: tuple[ChannelRanges, ChannelRanges], kv_format: KVFormat, rule: Rule
) -> LayerScales:
    (key, key_zero), (value, value_zero) = (
        each.scales(spec, rule) if spec.quantized and not spec.dynamic else (None, None)
        for each, spec in zip(ranges, (kv_format.key, kv_format.value), strict=True)
    )
    return LayerScales(key, value, key_zero, value_zero)


def takes_means(model: nn.Module) -> bool:
    """Whether a mean may be taken out of keys: not under a softcap, which is no sum."""
    return getattr(text_config(model.config), "attn_logit_softcapping", None) is None


def weights_digest(model: nn.Module) -> str:
    """Tells models apart whatever their dtype: shapes and a few numbers of norms and biases."""
    made = blake2b(digest_size=16)
    for name, weight in model.named_parameters():
        if weight.ndim == 1 and not weight.is_meta:
            few = weight.detach()[:: max(1, weight.numel() // 8)].bfloat16().tolist()
            made.update(f"{name} {tuple(weight.shape)} {few}\n".encode())
    return made.hexdigest()


SAME_MODEL = 0.9
"""Least likeness. Another dtype, weights of 4 bits and fine-tuning change a model's numbers by far
less; a model trained apart shares none."""


def weights_sample(model: nn.Module) -> dict[str, list[float]]:
    """A few numbers of every matrix that is kept as one, by its name."""
    found = {}
    for name, weight in model.named_parameters():
        plain = type(weight) is nn.Parameter and weight.is_floating_point()
        if weight.ndim == 2 and plain and not weight.is_meta:
            few = weight.detach().flatten()[[*sampled_places(weight.numel())]]
            found[name] = [float(f"{each:.4g}") for each in few.tolist()]
    return found


def sampled_places(numbers: int) -> range:
    """Which of a matrix's numbers ``weights_sample`` takes."""
    return range(0, numbers, max(1, numbers // 4))[:4]


def likeness(kept: Mapping[str, Sequence[float]], here: Mapping[str, Sequence[float]]) -> float:
    """Cosine of two samples, every matrix with the same weight; 1 where they share none.

    Not a digest: the same weights in another dtype are other numbers.
    """
    products, squares, others = 0.0, 0.0, 0.0
    for name in kept.keys() & here.keys():
        size = sum(each * each for each in kept[name])
        if len(kept[name]) != len(here[name]) or size == 0.0:
            continue
        products += sum(a * b for a, b in zip(kept[name], here[name], strict=True)) / size
        others += sum(each * each for each in here[name]) / size
        squares += 1.0
    if squares == 0.0:
        return 1.0
    return products / (squares * others) ** 0.5 if others else 0.0


def _on_cpu(statistics: KeyStatistics) -> KeyStatistics:
    return KeyStatistics(
        statistics.tokens,
        statistics.query_products.cpu(),
        statistics.far_products.cpu(),
        statistics.key_products.cpu(),
        statistics.key_sums.cpu(),
        statistics.keys.cpu(),
        statistics.first_keys.cpu(),
    )
