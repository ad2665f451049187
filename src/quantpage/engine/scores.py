"""Log-probabilities of given tokens by the logits before them.

Logits of a step stay as the model wrote them; a few rows at a time become float32, and of each row
no more is kept than a token's number, its rank and the likeliest ones.
"""

from collections.abc import Sequence as Listed

import torch
from torch import Tensor

from quantpage.engine.request import TokenChoice

_ON_CPU, _ELSEWHERE = 1 << 20, 1 << 25
"""Logits that are float32 at once: on a CPU no more than its caches hold, which is several times
faster; elsewhere few slices, as each is read back."""


def score(logits: Tensor, tokens: Listed[int], top: int) -> list[TokenChoice]:
    """What the model gives each token; logits: [tokens, vocabulary], top: how many of the likeliest
    are told with each.

    Raises RuntimeError where logits are not finite.
    """
    rows = max(1, (_ON_CPU if logits.is_cpu else _ELSEWHERE) // logits.shape[-1])
    made: list[TokenChoice] = []
    for at in range(0, len(tokens), rows):
        made += _score(logits[at : at + rows].float(), tokens[at : at + rows], top)
    return made


def _score(logits: Tensor, tokens: Listed[int], top: int) -> list[TokenChoice]:
    known = logits.log_softmax(-1)
    own = known.gather(-1, torch.tensor(tokens, device=known.device)[:, None])
    if bool(own.isnan().any()):
        raise RuntimeError("logits: expected finite numbers, got NaN or infinity")
    ranks = (known > own).sum(-1, dtype=torch.int32) + 1
    best = known.topk(min(top, known.shape[-1]))
    told = zip(
        tokens,
        own[:, 0].tolist(),
        ranks.tolist(),
        best.indices.tolist(),
        best.values.tolist(),
        strict=True,
    )
    return [
        TokenChoice(token, number, tuple(zip(which, numbers, strict=True)), rank)
        for token, number, rank, which, numbers in told
    ]
