"""The defects that scripts/mutants.py makes: each is one that somebody could make by hand."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutation:
    """A text of a file, what stands there instead, and who has to notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """pytest arguments, of which at least one test has to fail."""
    fuzz: str = ""
    """Arguments of scripts/fuzz.py that have to find it as well; empty: not its matter."""


_TORCH, _CORE = "--only torch --cases 150 --seed 1", "--only cpu --cases 25 --seed 1"
_SRC, _OPS = "src/quantpage/", "src/quantpage/ops/"
_HF = "src/quantpage/integrations/hf_transformers/"

MUTATIONS = (
    # Who may see whom.
    Mutation(
        "a window's range one key short",
        _SRC + "masks/base.py",
        "first_query - self.window + 1)",
        "first_query - self.window + 2)",
        ("tests/masks/test_base.py",),
        _TORCH,
    ),
    Mutation(
        "a window one key long",
        _SRC + "masks/base.py",
        "(k > q - self.window)",
        "(k >= q - self.window)",
        ("tests/masks/test_base.py",),
        _TORCH,
    ),
    Mutation(
        "rows past the described ones see what came later",
        _SRC + "masks/rows.py",
        "clipped = found[:, :ranges].clamp(max=end)",
        "clipped = found[:, :ranges]",
        ("tests/masks/test_intervals.py",),
    ),
    Mutation(
        "two intervals that hide a key are gone through in one order",
        _SRC + "masks/columns.py",
        "for start, end in ((0, 1), (2, 3), (0, 1)):",
        "for start, end in ((0, 1), (2, 3)):",
        ("tests/masks/test_intervals.py",),
    ),
    Mutation(
        "a key that a mask does not describe is not seen by itself",
        _SRC + "masks/columns.py",
        'ute = torch.where(past, causal, named.get("UTE", causal))',
        'ute = torch.where(past, causal + 1, named.get("UTE", causal))',
        ("tests/masks/test_intervals.py", "tests/masks/test_kinds.py"),
        _TORCH,
    ),
    Mutation(
        "a rebuilt mask's window lost",
        _HF + "hooks/functions.py",
        "MaskFacts(Rule(window=sliding_window), attention_mask)",
        "MaskFacts(Rule(), attention_mask)",
        ("tests/integrations/hf_transformers/hooks/test_functions.py",),
    ),
    # What a number means.
    Mutation(
        "ties of fp8 away from zero",
        _SRC + "formats/quantize.py",
        "return scaled.clamp(-spec",
        "return (scaled * (1 + 2.0**-20)).clamp(-spec",
        ("tests/formats/test_quantize.py",),
        _TORCH,
    ),
    Mutation(
        "nibbles the other way round",
        _SRC + "formats/quantize.py",
        "stored[..., 0::2] | (stored[..., 1::2] << 4)",
        "stored[..., 1::2] | (stored[..., 0::2] << 4)",
        ("tests/formats/test_quantize.py",),
        _TORCH,
    ),
    Mutation(
        "codes from a zero that is not rounded",
        _SRC + "formats/quantize.py",
        "zero = low + half * (1.0 - factor) - spec.code.qmin * scale.to(work.dtype)",
        "zero = low + half * (1.0 - factor) - (spec.code.qmin + 0.25) * scale.to(work.dtype)",
        ("tests/formats/test_quantize.py",),
        _TORCH,
    ),
    Mutation(
        "a shard takes the first heads",
        _SRC + "formats/scales.py",
        "plane[first:last]",
        "plane[: last - first]",
        ("tests/formats/test_scales.py",),
    ),
    Mutation(
        "a digest that mixes layers up",
        _SRC + "formats/scales.py",
        'f"{index} {half} {plane is not None}"',
        'f"{half} {plane is not None}"',
        ("tests/formats/test_scales.py",),
    ),
    Mutation(
        "a first token's key does not count where it is not exact",
        _SRC + "formats/key_statistics.py",
        "texts = [statistics] + ([replace(statistics, keys=first)] if len(first) else [])",
        "texts = [statistics]",
        ("tests/formats/test_key_scales.py",),
    ),
    Mutation(
        "a calibration knows the first positions alone",
        "src/quantpage/cli/calibrate.py",
        "texts = placed([each.tokens for each in windows], context)",
        "texts = placed([each.tokens for each in windows], 0)",
        ("tests/cli/test_calibrate.py",),
    ),
    Mutation(
        "queries mapped as keys are",
        _SRC + "formats/key_map.py",
        "return work / self.scale.to(work.dtype).repeat_interleave(group, 0)",
        "return work * self.scale.to(work.dtype).repeat_interleave(group, 0)",
        ("tests/formats/test_key_map.py", "tests/ops/attend/test_attend.py"),
        _TORCH,
    ),
    Mutation(
        "a bias rounded before the rotation",
        _OPS + "rope_write/reference.py",
        "k, v = _wide(k) + k_bias, _wide(v) + v_bias",
        "k, v = k + k_bias, v + v_bias",
        ("tests/ops/rope_write/test_rope_write.py",),
        _TORCH,
    ),
    Mutation(
        "slot 0 not written",
        _OPS + "rope_write/reference.py",
        "keep = slots >= 0",
        "keep = slots > 0",
        ("tests/ops/rope_write/test_rope_write.py",),
        _TORCH,
    ),
    # Exact pages.
    Mutation(
        "the page before the query's own from its codes",
        _OPS + "attend/params.py",
        "(behind <= NEAR_PAGES)",
        "(behind < NEAR_PAGES)",
        ("tests/ops/attend/test_attend.py", "tests/ops/attend/cpu/test_attend.py"),
        _TORCH,
    ),
    Mutation(
        "the body's end at a context of 1 past a page",
        _OPS + "attend/decode/triton_share.py",
        "b_high = near_page(context - 1, PAGE) * PAGE",
        "b_high = near_page(context - 2, PAGE) * PAGE",
        ("tests/ops/attend/test_triton_segments.py",),
    ),
    Mutation(
        "the body begins a page late",
        _OPS + "attend/torch_blockwise.py",
        "return [(page_size, context)]",
        "return [(2 * page_size, context)]",
        ("tests/ops/attend/test_attend.py",),
        _TORCH,
    ),
    Mutation(
        "a sink counted in each segment",
        _OPS + "attend/__init__.py",
        "    bare = replace(params, sinks=None)\n    body",
        "    bare = params\n    body",
        ("tests/ops/attend/test_attend.py",),
        _TORCH,
    ),
    Mutation(
        "exact bytes one page short",
        _SRC + "cache/layout.py",
        "kept.kept_pages * self.exact_bytes_per_page()",
        "(kept.kept_pages - 1) * self.exact_bytes_per_page()",
        ("tests/cache/test_layout.py",),
    ),
    Mutation(
        "the page before a rollback's end given back",
        _SRC + "cache/reach.py",
        "near = range(max(query // page_size - 1, seen.start), seen.stop)",
        "near = range(max(query // page_size, seen.start), seen.stop)",
        ("tests/cache/test_sequence.py",),
        _TORCH,
    ),
    # Pages and who holds them.
    Mutation(
        "a window's last page given back",
        _SRC + "cache/reach.py",
        "max(0, query - self.window + 1) if self.window else 0",
        "max(0, query - self.window + 17) if self.window else 0",
        ("tests/cache/test_sequence.py",),
        _TORCH,
    ),
    Mutation(
        "a page of two written by one of them",
        _SRC + "cache/sequence.py",
        "pool.references(pages[-1]) > 1",
        "pool.references(pages[-1]) > 2",
        ("tests/cache/test_sequence.py",),
        _TORCH,
    ),
    Mutation(
        "a rejected draft counted",
        _SRC + "cache/sequence.py",
        "self._cut(self.length + accepted)",
        "self._cut(self.length + self.reserved)",
        ("tests/cache/test_sequence.py",),
        _TORCH,
    ),
    Mutation(
        "pages swapped in in order of their ids",
        _SRC + "cache/paged.py",
        "plane[ids] = host.planes[name]",
        "plane[sorted(ids)] = host.planes[name]",
        ("tests/cache/test_saved.py",),
        _TORCH,
    ),
    Mutation(
        "growing forgets the last page",
        _SRC + "cache/paged.py",
        "new[:both] = old[:both]",
        "new[: both - 1] = old[: both - 1]",
        ("tests/cache/test_paged.py",),
    ),
    Mutation(
        "zeros not counted",
        _SRC + "cache/layout.py",
        "planes = 2 if spec.zero_point else 1",
        "planes = 1",
        ("tests/cache/test_paged.py", "tests/cache/test_layout.py"),
    ),
    Mutation(
        "a softcap that does not give the size back",
        _OPS + "attend/torch_blockwise.py",
        "torch.tanh(scores / params.softcap) * params.softcap",
        "torch.tanh(scores / params.softcap)",
        ("tests/ops/attend/test_attend.py",),
        _TORCH,
    ),
    Mutation(
        "sums of latent rows in the basis of the rotary channels",
        _SRC + "cache/views.py",
        "summed = self.key if self.latent else self.value",
        "summed = self.value",
        ("tests/ops/test_latent_rows.py",),
        _TORCH,
    ),
    Mutation(
        "a latent row after the rotary channels in a key",
        _OPS + "attend/torch_blockwise.py",
        "return (torch.cat([first, second], -1), first)",
        "return (torch.cat([second, first], -1), first)",
        ("tests/ops/test_latent_rows.py",),
        _TORCH,
    ),
    # Models.
    Mutation(
        "a dense reading not turned back",
        _HF + "cache/paged_layer.py",
        'if pages.spec.rotation == "hadamard"',
        'if pages.spec.rotation == "none"',
        ("tests/integrations/hf_transformers/test_attach.py",),
    ),
    Mutation(
        "crop counts padding",
        _HF + "pages/rows.py",
        "tokens = self._kept[:, :length].sum(1).tolist()",
        "tokens = [length] * self.count",
        (
            "tests/integrations/hf_transformers/test_attach.py",
            "tests/integrations/hf_transformers/hooks/test_supply.py",
        ),
    ),
    # Codes in planes, in Triton.
    Mutation(
        "the high plane of a block beside the right one",
        _OPS + "triton/planes.py",
        "right = block * high_bits(CODE) - LOW",
        "right = block * high_bits(CODE) - LOW + (block == 3)",
        ("tests/ops/gather/test_triton.py",),
        "--only triton --cases 60 --seed 271306",
    ),
    Mutation(
        "both halves of a low plane of 3 bits are the first",
        _OPS + "attend/decode/triton_planes.py",
        "half = (place // (WIDTH // 2)).to(tl.int16)",
        "half = (place // WIDTH).to(tl.int16)",
        ("tests/ops/attend/decode/test_triton.py",),
    ),
    Mutation(
        "a sum of planes' bytes with one shift too few",
        _OPS + "rope_write/triton_planes.py",
        "byte |= parts[i] << (BITS * INNER * i)",
        "byte |= parts[i] << (BITS * i)",
        ("tests/ops/rope_write/test_triton.py",),
    ),
    Mutation(
        "keys in turn take the first range, whatever it loses",
        _OPS + "rope_write/triton_in_turn_rows.py",
        "keep = (number == chosen)",
        "keep = (number == 0)",
        ("tests/ops/rope_write/test_triton_in_turn.py::test_keys_that_are_rounded_in_turn",),
    ),
    Mutation(
        "pages of less than a tile go to the kernel that copies tiles",
        _OPS + "attend/decode/triton.py",
        "return not layer.page_size % 64 and one",
        "return one",
        ("tests/ops/attend/decode/test_launch.py",),
    ),
    Mutation(
        "of four lanes that round in turn each hears those that are rounded after it",
        _OPS + "rope_write/triton_in_turn_lanes.py",
        "later = lane % 4 > lane // 8",
        "later = lane % 4 < lane // 8",
        ("tests/ops/rope_write/test_triton_in_turn_lanes.py",),
    ),
    Mutation(
        "whole rows of one program leave their pieces in the same place",
        _OPS + "attend/decode/triton_kernel.py",
        "slot_id = tl.where(whole, 2 * tl.num_programs(0) + row_id, slot_id)",
        "slot_id = tl.where(whole, 2 * tl.num_programs(0), slot_id)",
        ("tests/ops/attend/decode/test_triton_near.py",),
    ),
    Mutation(
        "rows leave the exact pages' result out",
        _OPS + "attend/decode/triton_pieces.py",
        "acc = acc * shrink + others * weight",
        "acc = acc * shrink",
        ("tests/ops/attend/decode/test_triton_near.py",),
    ),
    # Long chunks inside vLLM.
    Mutation(
        "a long chunk's working pages have another page in the place of the one before",
        "src/quantpage/integrations/vllm_plugin/working.py",
        "(first - 1).clamp(min=0)",
        "first.clamp(min=0)",
        ("tests/integrations/vllm_plugin/test_parts.py",),
    ),
    # Offsets past 2^31.
    Mutation(
        "offsets of heads in 32 bits, prefill",
        _OPS + "attend/prefill/triton_kernel.py",
        "k_codes += head.to(tl.int64) * k_head",
        "k_codes += head * k_head",
        ("tests/ops/test_triton_far.py",),
    ),
    Mutation(
        "offsets of heads in 32 bits, masks",
        _OPS + "attend/interval/triton_kernel.py",
        "k_codes += head.to(tl.int64) * k_head",
        "k_codes += head * k_head",
        ("tests/ops/test_triton_far.py",),
    ),
    Mutation(
        "offsets of heads in 32 bits, write",
        _OPS + "rope_write/triton_kernel.py",
        "kv_head = narrow.to(tl.int64)",
        "kv_head = narrow",
        ("tests/ops/test_triton_far.py",),
    ),
    Mutation(
        "drafts begin with what a kept cache holds",
        _HF + "hooks/supply.py",
        'return {"next_sequence_length": given - held}',
        "return {}",
        ("tests/integrations/hf_transformers/hooks/test_supply.py",),
    ),
    Mutation(
        "a cache goes on under another mask than it was made for",
        _HF + "hooks/supply.py",
        "if (made.formats, made.mask) != (mine.formats, mine.mask):",
        "if False:",
        ("tests/integrations/hf_transformers/hooks/test_supply.py",),
    ),
    Mutation(
        "an attachment that was left is entered again and does nothing",
        _HF + "attach.py",
        "if not self._undo:",
        "if False:",
        ("tests/integrations/hf_transformers/test_attach.py",),
    ),
    Mutation(
        "a conversion to what a stand-in is already makes its pages dense in inference mode",
        _HF + "pages/lazy.py",
        "if func.overloadpacket in _CONVERSIONS and",
        "if False and",
        ("tests/integrations/hf_transformers/pages/test_lazy.py", "tests/engine/test_engine.py"),
    ),
    Mutation(
        "a state beside keys and values is forgotten where pages are kept for later",
        _HF + "cache/paged_cache.py",
        "return not isinstance(layer, PagedLayer) or isinstance(layer, LinearAttentionLayer)",
        "return not isinstance(layer, PagedLayer)",
        ("tests/integrations/hf_transformers/cache/test_prompts.py",),
    ),
    Mutation(
        "a state in modules is forgotten where pages are kept for later",
        _HF + "cache/paged_cache.py",
        "ledger.own_state - ledger.paged if self.rows.memory.layouts else ()",
        "()",
        ("tests/integrations/hf_transformers/cache/test_prompts.py", "tests/engine/test_engine.py"),
    ),
    Mutation(
        "an engine takes logits of any tokens for those that it asked for",
        _SRC + "engine/step.py",
        "return logits[kept]",
        "return logits",
        ("tests/engine/test_engine.py",),
    ),
    # Memory that launches keep.
    Mutation(
        "every step of another shape keeps a workspace more",
        _SRC + "ops/attend/decode/workspaces.py",
        "if not kept or kept[-1].numel() < size:",
        "if not kept or kept[-1].numel() != size:",
        ("tests/ops/attend/decode/test_workspaces.py",),
    ),
    Mutation(
        "every larger step keeps a workspace of its own size",
        _SRC + "ops/attend/decode/workspaces.py",
        "2 * kept[-1].numel() if kept else 0",
        "0",
        ("tests/ops/attend/decode/test_workspaces.py",),
    ),
    Mutation(
        "keys that are written again overlap with those that were wrong",
        _SRC + "ops/rope_write/triton_in_turn.py",
        'fixed |= {"OVERLAP": False, "launch_pdl": False}',
        "pass",
        ("tests/ops/rope_write/test_triton_in_turn_lanes.py",),
    ),
    # What waits for a compiler.
    Mutation(
        "an engine warms its first layer alone",
        _SRC + "engine/step.py",
        "for layer in cache.layers:\n        if not",
        "for layer in cache.layers[:1]:\n        if not",
        ("tests/engine/test_warm_up.py",),
    ),
    # What clients do to each other.
    Mutation(
        "what one answer asks for ends those of its step",
        _SRC + "engine/loop.py",
        'self._drop(each, "error", error)',
        "raise",
        ("tests/engine/test_engine.py",),
    ),
    Mutation(
        "who listens to one answer ends all by an error",
        _SRC + "engine/loop.py",
        "answer.cancelled = True\n            self._say",
        "raise\n            self._say",
        ("tests/engine/test_engine.py",),
    ),
    Mutation(
        "arguments of an earlier call are a text of a text",
        _SRC + "server/serving.py",
        'return call | {"function": function | {"arguments": arguments}}',
        "return call",
        ("tests/server/test_server.py",),
    ),
    Mutation(
        "the text of a call that was cut is lost",
        _SRC + "server/tools.py",
        "            return text\n        self.calls",
        '            return ""\n        self.calls',
        ("tests/server/test_server.py",),
    ),
    Mutation(
        "a client's text becomes tokens on the loop of all streams",
        _SRC + "server/app.py",
        "return await asyncio.to_thread(kind, served, body)",
        "return kind(served, body)",
        ("tests/server/test_waiting.py",),
    ),
    Mutation(
        "pages that are only remembered count as in use",
        _SRC + "engine/loop.py",
        "used[reach] - idle.get(reach, 0)",
        "used[reach]",
        ("tests/server/test_server.py",),
    ),
    Mutation(
        "a part of a character has the bytes of what is shown for it",
        _SRC + "server/serving.py",
        "if _PART in text else None",
        "if False else None",
        ("tests/server/test_server.py",),
    ),
    Mutation(
        "a second Ctrl-C cuts streams",
        _SRC + "server/stopping.py",
        "sig == signal.SIGINT and not self._hurried",
        "sig == signal.SIGINT and self._hurried",
        ("tests/server/test_stopping.py",),
    ),
)
