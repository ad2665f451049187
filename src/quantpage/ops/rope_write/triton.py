"""The write of a step in one launch: arguments, and the launch's shape."""

from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from quantpage.batch import BatchPlan
from quantpage.cache.views import LayerKV
from quantpage.formats import QuantSpec, rotation_block
from quantpage.hardware import E4M3, HOPPER, device_info
from quantpage.ops import refusals
from quantpage.ops.checks import Needs, writes
from quantpage.ops.operand import A_TOKEN, Operand, operand
from quantpage.ops.rope_write.params import WriteParams, Written
from quantpage.ops.rope_write.reference import refuse_non_finite
from quantpage.ops.rope_write.triton_in_turn import launch as launch_in_turn
from quantpage.ops.rope_write.triton_kernel import Pages, write_kernel
from quantpage.ops.rope_write.triton_products import as_written
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
    """As ops/rope_write/reference.rope_write, in one launch, and one more for keys that are rounded
    in turn; strides of tokens and heads are free.

    shape: None for ``launch_shape``.
    """
    if params.checked:
        refuse_non_finite(k, "key", params.layer)
        refuse_non_finite(v, "value", params.layer)
    turned = None
    if layer.latent and q is not None:
        # Absorbed queries are as wide as both halves, each in the basis of its own rows.
        turned = layer.turned(q).to(q.dtype)
        q = None
    tokens, kv_heads, width = k.shape
    value_width = v.shape[-1]
    q_heads = 0 if q is None else q.shape[1]
    q_out = turned
    if q is not None:
        q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    seen = [torch.empty(t.shape, dtype=k.dtype, device=k.device) for t in (k, v)]
    k_seen, v_seen = seen if params.return_rows else (None, None)
    if tokens == 0:
        return Written(q_out, k_seen, v_seen)
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
    q = q if q is None or q.stride(-1) == 1 else q.contiguous()
    exact = layer.exact() if batch.exact is not None and layer.exact_key is not None else None
    rope, norm, mapped = params.rope, params.norm, layer.key_map
    in_turn = mapped is not None and mapped.feedback is not None
    mean = None if mapped is None else mapped.mean
    bias = [b.contiguous() for b in params.bias or (k[:0], k[:0], k[:0])]
    shape = shape or launch_shape(tokens, max(width, value_width), q_heads, kv_heads)
    piece = shape.piece
    key, value = operand(layer.key), operand(layer.value)
    near_key, near_value = key, value
    k_specs, v_specs = [layer.key.spec], [layer.value.spec]
    if exact is not None:
        near_key, near_value = operand(exact.key), operand(exact.value)
        k_specs.append(exact.key.spec)
        v_specs.append(exact.value.spec)
    coded = exact is not None and exact.key.spec.quantized
    products = can_multiply(k_specs, k, shape)
    if q is not None:
        products = products and can_multiply(k_specs, q, shape)
    v_products = can_multiply(v_specs, v, shape)
    overlap = device_info(k.device).since(HOPPER)
    tiles = triton.cdiv(tokens, shape.rows // shape.heads)
    halves = 1 if in_turn else 2
    parts = triton.cdiv(q_heads, shape.heads * shape.tiles) + halves * (kv_heads // shape.heads)
    exact_slots = batch.slots if exact is None or batch.exact is None else batch.exact.slots
    positions = batch.positions
    angle_row = 0 if rope is None else rope.cos.stride(0)
    cos, sin = (k, k) if rope is None else (rope.cos, rope.sin)
    map_scale, map_mean = (k if each is None else each for each in (mapped and mapped.scale, mean))
    key_pages, near_key_pages = _pages(key, near_key), _pages(near_key, near_key)
    k_piece = _piece(k_specs, width, piece)
    eps = 0.0 if norm is None else norm.eps
    # What both kernels are compiled for.
    both = {
        "HEAD_DIM": width, "PIECE": k_piece, "ROTARY": 0 if rope is None else rope.rotary_dim,
        "INTERLEAVED": rope is not None and rope.interleaved,
        "NORM": 0 if norm is None else (2 if norm.after_rope else 1),
        "BIAS": params.bias is not None,
        "MAPPED": 0 if mapped is None else (1 if mean is None else 2), "PAGE": batch.page_size,
        "EXACT": exact is not None, "RETURN": params.return_rows,
        "HARDWARE": device_info(k.device).since(E4M3), "OVERLAP": overlap, "launch_pdl": overlap,
    }  # fmt: skip
    launch = partial(
        write_kernel[(parts, tiles) if shape.heads_first else (tiles, parts)],
        k if q is None else q,
        k,
        v,
        k if q_out is None else q_out,
        k if k_seen is None else k_seen,
        v if v_seen is None else v_seen,
        key_pages,
        _pages(value, near_value),
        batch.slots,
        exact_slots,
        positions,
        cos,
        sin,
        k if norm is None else norm.q_weight,
        k if norm is None else norm.k_weight,
        *bias,
        map_scale,
        map_mean,
        eps,
        tokens,
        q_heads,
        kv_heads,
        *((k.stride(0), k.stride(1)) if q is None else (q.stride(0), q.stride(1))),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        angle_row,
        near_key_pages if coded else None,
        _pages(near_value, near_value) if coded else None,
        **{f"K_{name}": fixed for name, fixed in _fixed(key, layer.key.spec).items()},
        **{f"V_{name}": fixed for name, fixed in _fixed(value, layer.value.spec).items()},
        **_fixed_near("K_", near_key if coded else None, k_specs[-1]),
        **_fixed_near("V_", near_value if coded else None, v_specs[-1]),
        **both,
        VALUE_DIM=value_width,
        V_PIECE=_piece(v_specs, value_width, piece),
        ROWS=shape.rows,
        HEADS=shape.heads,
        TILES=shape.tiles,
        HEADS_FIRST=shape.heads_first,
        KEYS=not in_turn,
        num_warps=shape.warps,
    )
    if in_turn:
        eight = Shape(8, 1, 1, 32, 1)
        fixed = _fixed(key, layer.key.spec)
        near_fixed = _fixed_near("", near_key if coded else None, k_specs[-1])
        launch_in_turn(
            layer,
            tokens,
            {
                "k": k, "k_seen": k if k_seen is None else k_seen, "pages": key_pages,
                "near_pages": near_key_pages if coded else None, "slots": batch.slots,
                "exact_slots": exact_slots, "positions": positions, "cos": cos, "sin": sin,
                "weight": k if norm is None else norm.k_weight, "bias": bias[1],
                "map_scale": map_scale, "map_mean": map_mean, "eps": eps, "tokens": tokens,
                "kv_heads": kv_heads, "k_token": k.stride(0), "k_head": k.stride(1),
                "angle_row": angle_row,
            },
            {
                **{name: fixed[name] for name in ("CODE", "SCALES", "ZERO", "SHARED", "LIMIT")},
                **near_fixed, "HADAMARD": fixed["BLOCK"], **both,
                "PIECE": _piece(k_specs, width, eight.piece),
            },
            can_multiply(k_specs, k, eight),
        )  # fmt: skip
    compiled = launch(PRODUCTS=products, V_PRODUCTS=v_products)
    if (products or v_products) and not as_written(compiled):
        launch(PRODUCTS=False, V_PRODUCTS=False, OVERLAP=False, launch_pdl=False)
    return Written(q_out, k_seen, v_seen)


def _pages(half: Operand, near: Operand) -> Pages:
    return Pages(*half.planes, near.codes, *half.strides, *half.scale_strides, *near.strides)


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


def _fixed_near(name: str, near: Operand | None, spec: QuantSpec) -> dict[str, object]:
    """The same of near pages in codes, where those may differ from the body; None: there are none.

    name: 'K_' or 'V_'.
    """
    fixed = {} if near is None else _fixed(near, spec)
    return {f"{name}NEAR_{each}": fixed.get(each) for each in ("CODE", "ZERO", "SHARED", "LIMIT")}
