"""How many kernels a server's steps over latent rows are compiled to, by Triton's own rule.

Run as a program it makes the launches of steps of many lengths and prints, by series and kernel,
how many variants they ask for. Nothing is compiled or run: arguments on the CPU have the types and
the sizes that decide.
"""

import json
from collections import defaultdict
from dataclasses import replace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from quantpage.formats import CODES, QuantSpec
from quantpage.ops.attend import AttendParams
from quantpage.ops.attend.latent import gluon as by_gluon
from quantpage.ops.attend.latent import triton as by_triton
from quantpage.ops.attend.latent.launch import LatentTiles
from quantpage.ops.checks import unchecked
from tests.ops.triton_cases import CAUSAL, Step, make_step

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
asked: dict[str, set[str]] = defaultdict(set)


def record(kernel, *given, grid, warmup, **options) -> None:
    """In place of a launch: what it would be compiled for."""
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    _, specialized, chosen = binder(*given, debug=False, **options)
    asked[kernel.fn.__name__].add(str((specialized, chosen)))


def variants(attend, heads: int, lengths: list[int], tiles: LatentTiles) -> dict[str, int]:
    """By kernel, over steps of one request of each length, all of it new, and of two."""
    asked.clear()
    spec = QuantSpec(CODES["int8"])
    for new in lengths:
        for queries in ((new,), (new, 1)):
            step = Step(queries, queries, 64, 1, heads, head_dim=512, value_dim=64)
            _, layer, batch = make_step(spec, spec, step, CAUSAL, torch.bfloat16)
            q = torch.zeros(sum(queries), heads, 576, dtype=torch.bfloat16)
            layer = replace(layer, latent=True)
            unchecked(attend)(q, layer, batch, AttendParams(0.1), tiles=tiles)
    return {name: len(each) for name, each in asked.items()}


def main() -> None:
    jit.JITFunction.run = record
    assert not triton.knobs.runtime.interpret
    prompts = [17, 20, 33, 64, 100, 128, 256, 320, 1000]
    few = LatentTiles(16, 64, 4, 3, wgmma=True)
    many = LatentTiles(64, 64, 8, 3, wgmma=True)
    rows, keys = LatentTiles(64, 64, 8, 2), LatentTiles(16, 32, 2, 5, by_keys=True)
    found = {
        f"triton, prompts, {heads} heads, {'keys' if tiles.by_keys else 'rows'}": variants(
            by_triton.attend, heads, prompts, tiles
        )
        for heads, tiles in ((16, rows), (128, rows), (16, keys))
    }
    found["gluon, prompts"] = variants(by_gluon.attend, 128, prompts, many)
    for heads, tiles in ((16, few), (128, many)):
        found[f"gluon, drafts, {heads} heads"] = variants(
            by_gluon.attend, heads, list(range(1, 17)), tiles
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
