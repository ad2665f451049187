"""A model's own answers, and whether another cache would have given the same, token by token.

An answer is drawn at temperature 1 by the largest of log-probability plus noise (Gumbel's), which
draws by probability. Forced through another cache with the same noise, its tokens are those that
the same seed would have chosen there, as long as all before them are the same: how long two runs
of one seed stay word for word equal is seen without running the second.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from quantpage.evaluate.caches import unquantized
from quantpage.evaluate.score import Attaching, Window
from quantpage.integrations.hf_transformers.modules.arguments import cache_as


@torch.inference_mode()
def draw_answer(
    model: Any, prompt: Window, steps: int, seed: int, attaching: Attaching = unquantized
) -> Window:
    """``prompt``'s prompt and ``steps`` tokens that the model says after it, through one cache."""
    tokens = prompt.tokens[:, : prompt.prompt].to(model.device)
    with attaching(model) as new_cache:
        given, cache, said = tokens, new_cache(), []
        for step in range(steps):
            out = model(given, **cache_as(model, cache), use_cache=True, logits_to_keep=1)
            found = out.logits[0].float().log_softmax(-1)
            given = (found + noise(seed, step, found.shape[-1]).to(found)).argmax(-1)[None]
            said.append(given)
    return Window(torch.cat([tokens, *said], 1).cpu(), prompt.prompt)


def same_tokens(
    answer: Window, found: Float[Tensor, "steps vocabulary"], seed: int
) -> Bool[Tensor, " steps"]:
    """Where the answer's seed chooses its token by these log-probabilities as well."""
    chosen = [
        (row + noise(seed, step, len(row)).to(row)).argmax() for step, row in enumerate(found)
    ]
    return torch.stack(chosen).cpu() == answer.tokens[0, answer.prompt :].cpu()


def noise(seed: int, step: int, size: int) -> Float[Tensor, " size"]:
    """Gumbel noise of one step, the same on every device."""
    drawn = torch.Generator().manual_seed(seed * 1_000_003 + step)
    uniform = torch.rand(size, generator=drawn, dtype=torch.float64, device="cpu")
    return -(-uniform.clamp_min(1e-300).log()).log()
