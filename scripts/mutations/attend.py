"""Ops in plain torch: what is written, who is seen exactly, how pieces are joined."""

from .mutation import OPS, SRC, TORCH, Mutation

MUTATIONS = (
    Mutation(
        "a bias rounded before the rotation",
        OPS + "rope_write/reference.py",
        "_wide(k) + k_bias, _wide(v) + v_bias",
        "k + k_bias, v + v_bias",
        ("tests/ops/rope_write/test_rope_write.py",),
        TORCH,
    ),
    Mutation(
        "slot 0 not written",
        OPS + "rope_write/reference.py",
        "keep = slots >= 0",
        "keep = slots > 0",
        ("tests/ops/rope_write/test_rope_write.py",),
        TORCH,
    ),
    Mutation(
        "the page before the query's own from its codes",
        OPS + "attend/params.py",
        "(behind <= NEAR_PAGES)",
        "(behind < NEAR_PAGES)",
        ("tests/ops/attend/test_attend.py", "tests/ops/attend/cpu/test_attend.py"),
        TORCH,
    ),
    Mutation(
        "the body begins a page late",
        OPS + "attend/torch_blockwise.py",
        "return [(page_size, context)]",
        "return [(2 * page_size, context)]",
        ("tests/ops/attend/test_attend.py",),
        TORCH,
    ),
    Mutation(
        "a sink counted in each segment",
        OPS + "attend/__init__.py",
        "    bare = replace(params, sinks=None)\n    body",
        "    bare = params\n    body",
        ("tests/ops/attend/test_attend.py",),
        TORCH,
    ),
    Mutation(
        "a softcap that does not give the size back",
        OPS + "attend/torch_blockwise.py",
        "torch.tanh(scores / params.softcap) * params.softcap",
        "torch.tanh(scores / params.softcap)",
        ("tests/ops/attend/test_attend.py",),
        TORCH,
    ),
    Mutation(
        "a latent row after the rotary channels in a key",
        OPS + "attend/torch_blockwise.py",
        "return (torch.cat([first, second], -1), first)",
        "return (torch.cat([second, first], -1), first)",
        ("tests/ops/test_latent_rows.py",),
        TORCH,
    ),
    Mutation(
        "a caller's autocast reaches the products of the ops",
        SRC + "autocast.py",
        "        if not on:",
        "        if True:",
        ("tests/test_autocast.py",),
    ),
)
