"""The pictures of docs/masks.md: docs/images/masks-<kind>.png, one a kind.

python scripts/draw_masks.py [folder]
"""

import sys
from pathlib import Path

import torch

from quantpage import masks

N = 64


def kinds() -> dict[str, masks.Mask]:
    """One mask a kind over 64 tokens."""
    keys = torch.arange(N)
    noise = torch.Generator().manual_seed(3)
    gone = keys + 1 + (torch.rand(N, generator=noise) * (N - keys)).long()
    return {
        "causal": masks.causal(N),
        "full": masks.full(N),
        "sliding-window": masks.sliding_window(N, 16),
        "causal-document": masks.causal_document([20, 12, 32]),
        "document": masks.document([20, 12, 32]),
        "shared-question": masks.shared_question(20, [14, 18, 12]),
        "global-sliding-window": masks.global_sliding_window(N, 4, 8),
        "causal-blockwise": masks.causal_blockwise([16, 20, 12, 16]),
        "prefix-lm": masks.prefix_lm(N, 24),
        "prefix-lm-document": masks.prefix_lm_document([(8, 20), (6, 14), (10, 30)]),
        "qk-sparse": masks.qk_sparse(N, [(16, 8), (40, 6)]),
        "random-eviction": masks.random_eviction(gone),
        "image-spans": masks.image_spans(N, [(6, 22), (34, 50)]),
        "block-diffusion": masks.block_diffusion(N, 12, prompt=16),
        "tree-verification": masks.tree_verification(N - 12, [-1, 0, 0, 1, 1, 2, 2, 3, 4, 5, 7, 8]),
    }


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")
    folder.mkdir(parents=True, exist_ok=True)
    for name, mask in kinds().items():
        print(mask.draw(N).save(folder / f"masks-{name}.png", cell=3))


if __name__ == "__main__":
    main()
