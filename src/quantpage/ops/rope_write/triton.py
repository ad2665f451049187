"""The write of a step in one launch: arguments, and the launch's shape."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV, QuantizedPages
from quantpage.formats import QuantSpec, rotation_block
from quantpage.hardware import E4M3, HOPPER, device_info
from quantpage.kept import KeptWith
from quantpage.ops import refusals
from quantpage.ops.checks import Needs, writes
from quantpage.ops.operand import A_TOKEN, Operand, operand
from quantpage.ops.rope_write.params import WriteParams, Written
from quantpage.ops.rope_write.reference import refuse_non_finite
from quantpage.ops.rope_write.triton_in_turn import launch as launch_in_turn
from quantpage.ops.rope_write.triton_kernel import Pages, write_kernel
from quantpage.ops.rope_write.triton_products import as_written
from quantpage.ops.rope_write.triton_turn import turned_before
from quantpage.ops.rows import Keys, Queries, Values


@dataclass(frozen=True, slots=True)
class Shape:
    """How the work is cut."""

    rows: int
    """Of a tile: so many heads of so many tokens."""
    heads: int
    """Neighbouring heads in a tile; divides rows and the numbers of heads."""
    tiles: int
    """Of queries a program."""
    piece: int
    """Channels a piece of a row; those of a thread are neighbours in it."""
    warps: int
    heads_first: bool = False
    """Neighbouring programs: heads of a token, else tokens of a head."""


def launch_shape(tokens: int, width: int, q_heads: int, kv_heads: int) -> Shape:
    """The shape for rows of ``width`` channels.

    Few tokens are spread over many threads. Of many, a tile is eight heads of a token where their
    numbers allow: neighbouring programs read neighbouring memory. Two tiles of queries a program,
    as a device starts about one program in a nanosecond, whatever it does.
    """
    whole = triton.next_power_of_2(width)
    if tokens <= 128:
        warps = whole // 64 if tokens <= 64 else whole // 128
        return Shape(4, 1, 1, max(32, whole // 2), max(1, warps))
    heads = min(8, q_heads & -q_heads or 8, kv_heads & -kv_heads)
    if tokens * heads // 8 > 65535:
        # More tiles than the second axis of a grid has.
        heads = 1
    return Shape(8, heads, 2, max(32, whole // 4), max(1, whole // 128), heads > 1)


def _piece(specs: list[QuantSpec], width: int, wanted: int) -> int:
    """Channels a piece: at most ``wanted``, all of a row where scales are of its parts, or where
    bytes of planes hold channels of no power of two apart.

    specs: of all pages that a row is written to.
    """
    whole = triton.next_power_of_2(width)
    grouped = [s.quantized and s.dynamic and s.granularity.groups(width) > 1 for s in specs]
    scattered = width != whole and any(s.code.fields for s in specs)
    return whole if any(grouped) or scattered else min(wanted, whole)


def can_multiply(specs: list[QuantSpec], x: Tensor, shape: Shape) -> bool:
    """Whether rows of ``x`` can be rotated by products: 16-bit, aligned, eight of them a warp."""
    turned = specs[0].rotation == "hadamard"
    if not x.is_cuda or not turned or _piece(specs, x.shape[-1], shape.piece) != 32:
        return False
    return (
        device_info(x.device).since((8, 0))
        and x.shape[-1] in (64, 128, 256)
        and shape.rows == 8 * shape.warps
        and x.element_size() == 2
        and x.data_ptr() % 16 == 0
        and all(x.stride(i) % 16 == 0 for i in (0, 1))
    )


@writes(Needs(refusals.WRITE_TRITON, kind="cuda"))
def rope_write(
    q: Queries | None, k: Keys, v: Values, layer: LayerKV, batch: BatchPlan, params: WriteParams,
    shape: Shape | None = None,
) -> Written:  # fmt: skip
    """As ops/rope_write/reference.rope_write, in one launch, one more for keys that are rounded in
    turn, and one for a key map with a matrix; strides of tokens and heads are free.

    shape: None for ``launch_shape``.
    """
    if params.checked:
        refuse_non_finite(k, "key", params.layer)
        refuse_non_finite(v, "value", params.layer)
    q_out = None
    turned = layer.key_map is not None and layer.key_map.turn is not None
    if turned:
        q_out, k, v, layer, params = turned_before(q, k, v, layer, batch, params)
        q = None
    elif layer.latent and q is not None:
        # Absorbed queries are as wide as both halves, each in the basis of its own rows.
        q_out = layer.turned(q).to(q.dtype)
        q = None
    elif q is not None:
        q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    seen = [torch.empty(t.shape, dtype=k.dtype, device=k.device) for t in (k, v)]
    written = Written(q_out, *(seen if params.return_rows else (None, None)))
    if not k.shape[0]:
        return written
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
    q = q if q is None or q.stride(-1) == 1 else q.contiguous()
    step = _step(k, layer, batch, params, turned)
    if shape is None:
        widest = max(k.shape[-1], v.shape[-1])
        shape = launch_shape(k.shape[0], widest, 0 if q is None else q.shape[1], k.shape[1])
    _write((q, k, v), written, step, params, shape)
    if step.in_turn:
        _write_in_turn(k, written, step, layer, params)
    return written


class _Half(NamedTuple):
    """K or V of a layer."""

    body: Operand
    near: Operand
    """Exact pages; the body where there are none."""
    coded: bool
    """Exact pages hold codes."""
    specs: list[QuantSpec]
    """Of all pages that a row is written to."""

    @classmethod
    def of(cls, body: QuantizedPages, near: QuantizedPages | None) -> "_Half":
        if near is None:
            alone = operand(body)
            return cls(alone, alone, False, [body.spec])
        return cls(operand(body), operand(near), near.spec.quantized, [body.spec, near.spec])

    def pages(self) -> tuple[Pages, Pages | None]:
        """Of the body, and of exact pages that hold codes."""
        body = Pages(*_planes(self.body, self.near))
        return body, Pages(*_planes(self.near, self.near)) if self.coded else None

    def fixed(self, name: str) -> dict[str, object]:
        """What is compiled in; name: 'K_' or 'V_'."""
        body = {f"{name}{each}": fixed for each, fixed in _fixed(self.body, self.specs[0]).items()}
        return body | self.fixed_near(name)

    def fixed_near(self, name: str = "") -> dict[str, object]:
        """The same of exact pages in codes, where those may differ from the body."""
        fixed = _fixed(self.near, self.specs[-1]) if self.coded else {}
        return {
            f"{name}NEAR_{each}": fixed.get(each) for each in ("CODE", "ZERO", "SHARED", "LIMIT")
        }


class _Given(NamedTuple):
    """What both kernels are given, by their names of it."""

    slots: Tensor
    exact_slots: Tensor
    positions: Tensor
    cos: Tensor
    sin: Tensor
    map_scale: Tensor
    map_mean: Tensor
    eps: float
    angle_row: int


class _Step(NamedTuple):
    """What the launch of a write and the one of keys in turn have in common."""

    key: _Half
    value: _Half
    in_turn: bool
    """Keys are written by a launch of their own."""
    made: bool
    """Those are what the launch before the write made of them."""
    undone: Tensor
    """What queries are multiplied with where keys have a map."""
    given: _Given
    fixed: dict[str, object]
    """What both kernels are compiled for."""


def _undone_of(layer: LayerKV) -> Tensor:
    assert layer.key_map is not None
    return 1.0 / layer.key_map.scale


_undone = KeptWith(_undone_of)


def _step(k: Tensor, layer: LayerKV, batch: BatchPlan, params: WriteParams, turned: bool) -> _Step:
    exact = layer.exact() if batch.exact is not None and layer.exact_key is not None else None
    rope, norm, mapped = params.rope, params.norm, layer.key_map
    mean = None if mapped is None else mapped.mean
    device = device_info(k.device)
    overlap = device.since(HOPPER)
    in_turn = mapped is not None and mapped.feedback is not None
    return _Step(
        _Half.of(layer.key, None if exact is None else exact.key),
        _Half.of(layer.value, None if exact is None else exact.value),
        in_turn,
        in_turn and turned,
        k if mapped is None else _undone(layer),
        _Given(
            batch.slots,
            batch.slots if exact is None or batch.exact is None else batch.exact.slots,
            batch.positions,
            k if rope is None else rope.cos,
            k if rope is None else rope.sin,
            k if mapped is None or mapped.scale is None else mapped.scale,
            k if mean is None else mean,
            0.0 if norm is None else norm.eps,
            0 if rope is None else rope.cos.stride(0),
        ),
        {
            "HEAD_DIM": k.shape[-1], "ROTARY": 0 if rope is None else rope.rotary_dim,
            "INTERLEAVED": rope is not None and rope.interleaved,
            "NORM": 0 if norm is None else (2 if norm.after_rope else 1),
            "BIAS": params.bias is not None,
            "MAPPED": 0 if mapped is None else (1 if mean is None else 2),
            "PAGE": batch.page_size, "EXACT": exact is not None, "RETURN": params.return_rows,
            "HARDWARE": device.since(E4M3), "OVERLAP": overlap, "launch_pdl": overlap,
        },
    )  # fmt: skip


def _write(
    qkv: tuple[Tensor | None, Tensor, Tensor], written: Written, step: _Step, params: WriteParams,
    shape: Shape,
) -> None:  # fmt: skip
    """All rows, but keys that are rounded in turn."""
    q, k, v = qkv
    (tokens, kv_heads, width), value_width = k.shape, v.shape[-1]
    q_heads = 0 if q is None else q.shape[1]
    key, value, given, norm = step.key, step.value, step.given, params.norm
    products = can_multiply(key.specs, k, shape)
    if q is not None:
        products = products and can_multiply(key.specs, q, shape)
    v_products = can_multiply(value.specs, v, shape)
    tiles = triton.cdiv(tokens, shape.rows // shape.heads)
    halves = 1 if step.in_turn else 2
    parts = triton.cdiv(q_heads, shape.heads * shape.tiles) + halves * (kv_heads // shape.heads)
    (k_pages, k_near), (v_pages, v_near) = key.pages(), value.pages()
    bias = [b.contiguous() for b in params.bias or (k[:0], k[:0], k[:0])]
    first = k if q is None else q
    launch = partial(
        write_kernel[(parts, tiles) if shape.heads_first else (tiles, parts)],
        first, k, v,
        k if written.q is None else written.q,
        k if written.k_rows is None else written.k_rows,
        v if written.v_rows is None else written.v_rows,
        k_pages, v_pages, given.slots, given.exact_slots, given.positions, given.cos, given.sin,
        k if norm is None else norm.q_weight, k if norm is None else norm.k_weight, *bias,
        given.map_scale, step.undone, given.map_mean, given.eps, tokens, q_heads, kv_heads,
        first.stride(0), first.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        given.angle_row, k_near, v_near,
        **key.fixed("K_"),
        **value.fixed("V_"),
        **step.fixed,
        PIECE=_piece(key.specs, width, shape.piece),
        VALUE_DIM=value_width,
        V_PIECE=_piece(value.specs, value_width, shape.piece),
        ROWS=shape.rows,
        HEADS=shape.heads,
        TILES=shape.tiles,
        HEADS_FIRST=shape.heads_first,
        KEYS=not step.in_turn,
        num_warps=shape.warps,
    )  # fmt: skip
    compiled = launch(PRODUCTS=products, V_PRODUCTS=v_products, MADE=step.made)
    if (products or v_products) and not as_written(compiled):
        launch(PRODUCTS=False, V_PRODUCTS=False, MADE=False)


def _write_in_turn(
    k: Tensor, written: Written, step: _Step, layer: LayerKV, params: WriteParams
) -> None:
    key, fixed = step.key, _fixed(step.key.body, step.key.specs[0])
    pages, near_pages = key.pages()
    eight = Shape(8, 1, 1, 32, 1)
    launch_in_turn(
        layer,
        k.shape[0],
        {
            "k": k, "k_seen": k if written.k_rows is None else written.k_rows, "pages": pages,
            "near_pages": near_pages,
            "weight": k if params.norm is None else params.norm.k_weight,
            "bias": k[:0] if params.bias is None else params.bias[1].contiguous(),
            "tokens": k.shape[0], "kv_heads": k.shape[1], "k_token": k.stride(0),
            "k_head": k.stride(1), **step.given._asdict(),
        },
        {
            **{name: fixed[name] for name in ("CODE", "SCALES", "ZERO", "SHARED", "LIMIT")},
            **key.fixed_near(), "HADAMARD": fixed["BLOCK"], **step.fixed, "MADE": step.made,
            "PIECE": _piece(key.specs, k.shape[-1], eight.piece),
        },
        can_multiply(key.specs, k, eight),
    )  # fmt: skip


def _planes(half: Operand, near: Operand) -> tuple[Any, ...]:
    """Fields of ``Pages``."""
    return (*half.planes, near.codes, *half.strides, *half.scale_strides, *near.strides)


def _fixed(half: Operand, spec: QuantSpec) -> dict[str, object]:
    """What is compiled in of the K or the V pages."""
    # One dynamic scale is of all channels, those that a power of two adds too.
    whole = half.scales == A_TOKEN and half.groups == 1
    limit = torch.finfo(spec.scale_dtype).max if spec.scale_dtype != torch.float64 else 3.4e38
    return {
        "CODE": half.code,
        "SCALES": half.scales,
        "ZERO": half.has_zero,
        "SHARED": triton.next_power_of_2(half.head_dim) if whole else half.shared,
        "LIMIT": limit,
        "BLOCK": rotation_block(half.head_dim) if spec.rotation == "hadamard" else 1,
    }
