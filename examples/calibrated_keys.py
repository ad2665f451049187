"""Keys measured on text, so that four bits cost less: the same bytes, another rounding.

    python examples/calibrated_keys.py models/smollm2 --out smollm2.keys

The command ``quantpage calibrate`` does this over whole files; here it is in Python, over a few
pieces of one text, and the loss is measured on another.
"""

import argparse
from pathlib import Path

import torch

import quantpage
from quantpage.formats.per_layer import LayerFormats
from quantpage.integrations.hf_transformers import calibrate

DOCS = Path(__file__).parents[1] / "docs"


def measure(model, texts, kv_format: str, out: Path) -> Path:
    """Write what ``texts``, ids [1, tokens] each, say of the model's keys; the file."""
    formats = LayerFormats.parse(kv_format).of_layers(model.config.num_hidden_layers)
    calibrate(model, texts, formats, {"text": "this example"}).save(out)
    return out


@torch.inference_mode()
def loss(model, ids, kv_format: str, calibration) -> float:
    """Mean KL divergence to the unquantized cache, in nats a token."""
    found = []
    for each, keys in (("none", None), (kv_format, calibration)):
        with quantpage.attach(model, each, calibration=keys):
            found.append(model(ids, use_cache=True).logits[0].float().log_softmax(-1))
    exact, got = found
    return (exact.exp() * (exact - got)).sum(-1).mean().item()


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("model")
    flags.add_argument("--kv-format", default="int4")
    flags.add_argument("--out", type=Path, default=Path("calibrated.keys"))
    flags.add_argument("--measured", type=Path, default=DOCS / "masks.md")
    flags.add_argument("--scored", type=Path, default=DOCS / "memory.md")
    flags.add_argument("--tokens", type=int, default=512)
    given = flags.parse_args()
    model, tokenizer = quantpage.load_model(given.model, torch.float32)
    measured, scored = (
        tokenizer(path.read_text(), return_tensors="pt").input_ids
        for path in (given.measured, given.scored)
    )
    # A thousand tokens show the calls; quantpage calibrate measures 8,192.
    texts = measured[:, : 2 * given.tokens].split(given.tokens, 1)
    ids = scored[:, : given.tokens]
    keys = measure(model, texts, given.kv_format, given.out)
    print(f"{given.kv_format}: KL {loss(model, ids, given.kv_format, None):.1e}")
    print(f"{given.kv_format}, calibrated: KL {loss(model, ids, given.kv_format, keys):.1e}")


if __name__ == "__main__":
    main()
