"""Which layers need more bits: one layer after the other in the small format, and what it costs.

    python examples/format_by_layer.py models/smollm2 --small int4 --large int8 --keep 4

Prints each layer's cost alone, and then what it costs to keep all but the costliest in the small
format, as the ``--kv-format`` line to use.
"""

import argparse
from pathlib import Path

import torch

import quantpage

TEXT = Path(__file__).parents[1] / "docs/memory.md"


@torch.inference_mode()
def predictions(model, ids, kv_format: str):
    """Log-probabilities of every next token through such a cache, [tokens, vocabulary]."""
    with quantpage.attach(model, kv_format):
        return model(ids, use_cache=True).logits[0].float().log_softmax(-1)


def divergence(exact, got) -> float:
    """Mean KL divergence of ``got`` to ``exact``, in nats a token."""
    return (exact.exp() * (exact - got)).sum(-1).mean().item()


def costs(model, ids, small: str, large: str) -> list[float]:
    """What each layer alone costs in the small format, all others in the large one: KL in nats."""
    exact = predictions(model, ids, "none")
    layers = range(model.config.num_hidden_layers)
    return [
        divergence(exact, predictions(model, ids, f"{large},layers={layer}:{small}"))
        for layer in layers
    ]


def choose(found: list[float], small: str, large: str, keep: int) -> str:
    """The format line that keeps the ``keep`` costliest layers in the large format."""
    costliest = sorted(range(len(found)), key=lambda layer: found[layer])[len(found) - keep :]
    return f"{small},layers={','.join(map(str, sorted(costliest)))}:{large}" if keep else small


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("model")
    flags.add_argument("--small", default="int4")
    flags.add_argument("--large", default="int8")
    flags.add_argument("--keep", type=int, default=4, help="layers that stay in the large format")
    flags.add_argument("--text", type=Path, default=TEXT)
    flags.add_argument("--tokens", type=int, default=512)
    given = flags.parse_args()
    model, tokenizer = quantpage.load_model(given.model, torch.float32)
    ids = tokenizer(given.text.read_text(), return_tensors="pt").input_ids[:, : given.tokens]
    found = costs(model, ids, given.small, given.large)
    for layer, cost in enumerate(found):
        print(f"layer {layer:3d} in {given.small}: KL {cost:.1e}")
    exact = predictions(model, ids, "none")
    for line in (given.large, choose(found, given.small, given.large, given.keep), given.small):
        print(f"--kv-format {line}: KL {divergence(exact, predictions(model, ids, line)):.1e}")


if __name__ == "__main__":
    main()
