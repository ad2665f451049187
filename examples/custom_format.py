"""A format that nobody has named, on a model, before it becomes a line in the table of formats.

    python examples/custom_format.py models/smollm2

Keys in int8 with a scale and a zero point for each 32 channels, values in int4. It runs wherever
torch does; docs/adding-a-format.md says what would make it fast.
"""

import argparse
from pathlib import Path

import torch

import quantpage
from quantpage.formats import CODES, Granularity, KVFormat, QuantSpec

TEXT = Path(__file__).parents[1] / "docs/memory.md"


def made(group: int = 32) -> KVFormat:
    """Keys with a scale a group, values with one a token and kv_head."""
    key = QuantSpec(CODES["int8"], Granularity(group=group), zero_point=True, rotation="hadamard")
    value = QuantSpec(CODES["int4"], zero_point=True, rotation="hadamard")
    return KVFormat("int8_g32_v4", key, value, summary="finer scales for keys, 4 bits for values")


@torch.inference_mode()
def loss(model, ids, kv_format: KVFormat | str) -> float:
    """Mean KL divergence to the unquantized cache, in nats a token."""
    found = []
    for each in ("none", kv_format):
        with quantpage.attach(model, each):
            found.append(model(ids, use_cache=True).logits[0].float().log_softmax(-1))
    exact, got = found
    return (exact.exp() * (exact - got)).sum(-1).mean().item()


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("model")
    flags.add_argument("--text", type=Path, default=TEXT)
    flags.add_argument("--tokens", type=int, default=512)
    given = flags.parse_args()
    model, tokenizer = quantpage.load_model(given.model, torch.float32)
    ids = tokenizer(given.text.read_text(), return_tensors="pt").input_ids[:, : given.tokens]
    own = made()
    for name, each in (("int8", "int8"), (own.name, own), ("int4", "int4")):
        print(f"{name:12} KL {loss(model, ids, each):.1e}")


if __name__ == "__main__":
    main()
