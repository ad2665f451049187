"""An affine map of keys before they are quantized, undone in the query.

    k' = scale (k - mean)        q' = q / scale        q' . k' = q . k - q . mean

A key that is the same in all tokens (the bias of a projection, turned by position: up to 145 in
Qwen2.5, where other channels are near 1) takes most of a code's range and says nothing. Taken out
of *every* key of a head, those of exact pages too, it moves all scores of a query by the same
number, which a softmax does not see. ``scale`` evens out the channels, so that an error costs the
same in each. Both are numbers a kv_head and channel, applied after RoPE: a scale that is one for
both channels of a rotated pair commutes with it.

What channels of a key have in common no scale takes away. ``turn`` is any matrix, of rows:

    k' = (scale (k - mean)) turn        q' = (q / scale) turn^-T

The map belongs to the pages, as their rotation does: whoever writes keys or hands queries over
finds it there (``LayerKV.key_map``).
"""

from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from jaxtyping import Float
from torch import Tensor

from quantpage.autocast import in_own_dtypes
from quantpage.formats.rotate import rotate


@dataclass(frozen=True, slots=True)
class KeyMap:
    """One layer's map; ValueError for shapes and numbers that cannot be."""

    scale: Float[Tensor, "kv_heads head_dim"]
    """Of either sign and not 0, float32."""
    mean: Float[Tensor, "kv_heads head_dim"] | None = None
    """What is taken out of every key, in the model's basis, float32; None: nothing."""
    feedback: Float[Tensor, "kv_heads head_dim head_dim"] | None = None
    """By which codes are rounded in turn (formats/feedback), in the basis of the cache, float32: U
    below the diagonal, d on it; None: each channel by itself."""
    turn: Float[Tensor, "kv_heads head_dim head_dim"] | None = None
    """What rows of scaled keys are multiplied with, float32, before the rotation; None: nothing."""
    unturn: Float[Tensor, "kv_heads head_dim head_dim"] | None = field(init=False, default=None)
    """What rows of scaled queries are multiplied with: the inverse of ``turn``, transposed."""

    def __post_init__(self) -> None:
        shape = tuple(self.scale.shape)
        _check("scale", self.scale, shape if len(shape) == 2 else ("kv_heads", "head_dim"))
        if bool((self.scale == 0).any()):
            raise ValueError("scale: expected numbers other than 0, got 0.0")
        for name, plane, wanted in (
            ("mean", self.mean, shape),
            ("feedback", self.feedback, (*shape, shape[1])),
            ("turn", self.turn, (*shape, shape[1])),
        ):
            if plane is not None:
                _check(name, plane, wanted)
                if plane.device != self.scale.device:
                    raise ValueError(
                        f"{name}: expected it on {self.scale.device} as scale, got {plane.device}"
                    )
        if self.turn is not None:
            object.__setattr__(self, "unturn", _undone(self.turn))

    @property
    def kv_heads(self) -> int:
        """Heads of keys."""
        return self.scale.shape[0]

    @property
    def head_dim(self) -> int:
        """Channels of a key."""
        return self.scale.shape[1]

    def keys(
        self, k: Float[Tensor, "tokens kv_heads head_dim"]
    ) -> Float[Tensor, "tokens kv_heads head_dim"]:
        """Keys after RoPE, mapped; at least float32, unrounded."""
        work = _wide(k)
        if self.mean is not None:
            work = work - self.mean.to(work.dtype)
        return _times(work * self.scale.to(work.dtype), self.turn)

    def queries(
        self, q: Float[Tensor, "tokens q_heads head_dim"]
    ) -> Float[Tensor, "tokens q_heads head_dim"]:
        """Queries after RoPE, mapped; at least float32, unrounded."""
        work = _wide(q)
        group = q.shape[1] // self.kv_heads
        work = work / self.scale.to(work.dtype).repeat_interleave(group, 0)
        return _times(work, self.unturn)

    def restored(
        self, k: Float[Tensor, "tokens kv_heads head_dim"]
    ) -> Float[Tensor, "tokens kv_heads head_dim"]:
        """Mapped keys as the model had them; at least float32."""
        back = None if self.unturn is None else self.unturn.mT
        work = _times(_wide(k), back) / self.scale.to(_wide(k).dtype)
        return work if self.mean is None else work + self.mean.to(work.dtype)

    @in_own_dtypes
    def left_out(
        self, q: Float[Tensor, "tokens q_heads head_dim"], rotated: bool
    ) -> Float[Tensor, "tokens q_heads"] | None:
        """``q . mean``, which every score lacks, of queries in the basis of the cache.

        rotated: whether keys are cached rotated. At least float32; None without a mean.
        """
        if self.mean is None:
            return None
        mean = _times((self.scale * self.mean)[None], self.turn)[0]
        mean = rotate(mean) if rotated else mean
        work = _wide(q).unflatten(1, (self.kv_heads, -1))
        return torch.einsum("thgd,hd->thg", work, mean.to(work.dtype)).flatten(1)

    def to(self, device: torch.device | str) -> "KeyMap":
        """The same map on ``device``."""
        return KeyMap(*(None if x is None else x.to(device) for x in self._planes))  # type: ignore[arg-type]

    def heads(self, first: int, last: int) -> "KeyMap":
        """The map of kv_heads first .. last - 1: what one of several shards needs.

        Raises ValueError for heads that are not there.
        """
        if not 0 <= first < last <= self.kv_heads:
            raise ValueError(
                f"first, last: expected a range within 0..{self.kv_heads}, got {first}..{last}"
            )
        return KeyMap(*(None if x is None else x[first:last] for x in self._planes))  # type: ignore[arg-type]

    def digest(self) -> bytes:
        """A short hash of every number: seeds the prefix cache of an engine."""
        made = blake2b(repr(tuple(self.scale.shape)).encode(), digest_size=16)
        # Nothing is said of a turn where there is none: seeds of such maps stay what they were.
        for plane in self._planes[: 3 if self.turn is None else 4]:
            made.update(b"none" if plane is None else plane.detach().cpu().numpy().tobytes())
        return made.digest()

    @property
    def _planes(self) -> tuple[Tensor | None, ...]:
        return self.scale, self.mean, self.feedback, self.turn


def _undone(turn: Tensor) -> Tensor:
    """ValueError for a turn that cannot be undone in the query."""
    found, wrong = torch.linalg.inv_ex(turn.detach().double().cpu())
    made = found.mT.contiguous().float()
    if bool(wrong.any()) or not bool(torch.isfinite(made).all()):
        head = int((wrong != 0).nonzero()[0]) if bool(wrong.any()) else 0
        raise ValueError(f"turn: expected matrices with an inverse, got none for kv_head {head}")
    return made.to(turn.device)


@in_own_dtypes
def _times(x: Tensor, turn: Tensor | None) -> Tensor:
    """Rows, [tokens, heads, head_dim], each times its kv_head's matrix."""
    if turn is None:
        return x
    grouped = x.unflatten(1, (turn.shape[0], -1))
    return torch.einsum("thgi,hij->thgj", grouped, turn.to(x.dtype)).flatten(1, 2)


def _check(name: str, plane: Tensor, shape: tuple[int | str, ...]) -> None:
    whole = plane.dtype == torch.float32 and plane.is_contiguous() and not plane.is_neg()
    if not whole or tuple(plane.shape) != shape:
        named = f"[{', '.join(map(str, shape))}]"
        raise ValueError(
            f"{name}: expected a contiguous float32 tensor {named}, got {plane.dtype} of shape "
            f"{tuple(plane.shape)}"
        )
    bad = ~torch.isfinite(plane)
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}{at}: expected finite numbers, got {plane[tuple(at)].item()}")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
