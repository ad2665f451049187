"""What a number means: codes, scales, ranges, maps of keys and their calibration."""

from .mutation import SRC, TORCH, Mutation

MUTATIONS = (
    Mutation(
        "ties of fp8 away from zero",
        SRC + "formats/quantize.py",
        "return scaled.clamp(-spec",
        "return (scaled * (1 + 2.0**-20)).clamp(-spec",
        ("tests/formats/test_quantize.py",),
        TORCH,
    ),
    Mutation(
        "nibbles the other way round",
        SRC + "formats/quantize.py",
        "stored[..., 0::2] | (stored[..., 1::2] << 4)",
        "stored[..., 1::2] | (stored[..., 0::2] << 4)",
        ("tests/formats/test_quantize.py",),
        TORCH,
    ),
    Mutation(
        "codes from a zero that is not rounded",
        SRC + "formats/quantize.py",
        "zero = low + half * (1.0 - factor) - spec.code.qmin * scale.to(work.dtype)",
        "zero = low + half * (1.0 - factor) - (spec.code.qmin + 0.25) * scale.to(work.dtype)",
        ("tests/formats/test_quantize.py",),
        TORCH,
    ),
    Mutation(
        "a shard takes the first heads",
        SRC + "formats/scales.py",
        "plane[first:last]",
        "plane[: last - first]",
        ("tests/formats/test_scales.py",),
    ),
    Mutation(
        "a digest that mixes layers up",
        SRC + "formats/scales.py",
        'f"{index} {half} {plane is not None}"',
        'f"{half} {plane is not None}"',
        ("tests/formats/test_scales.py",),
    ),
    Mutation(
        "a first token's key does not count where it is not exact",
        SRC + "formats/key_statistics.py",
        "texts = [statistics] + ([replace(statistics, keys=first)] if len(first) else [])",
        "texts = [statistics]",
        ("tests/formats/test_key_scales.py",),
    ),
    Mutation(
        "a calibration knows the first positions alone",
        "src/quantpage/cli/calibrate.py",
        "texts = placed([each.tokens for each in windows], context)",
        "texts = placed([each.tokens for each in windows], 0)",
        ("tests/cli/test_calibrate.py",),
    ),
    Mutation(
        "queries mapped as keys are",
        SRC + "formats/key_map.py",
        "work = work / self.scale.to(work.dtype).repeat_interleave(group, 0)",
        "work = work * self.scale.to(work.dtype).repeat_interleave(group, 0)",
        ("tests/formats/test_key_map.py", "tests/ops/attend/test_attend.py"),
        TORCH,
    ),
    Mutation(
        "queries take the matrix of their keys, not its inverse",
        SRC + "formats/key_map.py",
        "return _times(work, self.unturn)",
        "return _times(work, self.turn)",
        ("tests/formats/test_key_map.py",),
    ),
)
