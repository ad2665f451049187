"""Transformers' models: hooks, caches, padding, what waits for a compiler."""

from .mutation import HF, Mutation

MUTATIONS = (
    Mutation(
        "a rebuilt mask's window lost",
        HF + "hooks/functions.py",
        "MaskFacts(Rule(window=sliding_window), attention_mask)",
        "MaskFacts(Rule(), attention_mask)",
        ("tests/integrations/hf_transformers/hooks/test_functions.py",),
    ),
    Mutation(
        "a dense reading not turned back",
        HF + "cache/paged_layer.py",
        'if pages.spec.rotation == "hadamard"',
        'if pages.spec.rotation == "none"',
        ("tests/integrations/hf_transformers/test_attach.py",),
    ),
    Mutation(
        "crop counts padding",
        HF + "pages/rows.py",
        "tokens = self._kept[:, :length].sum(1).tolist()",
        "tokens = [length] * self.count",
        (
            "tests/integrations/hf_transformers/test_attach.py",
            "tests/integrations/hf_transformers/hooks/test_supply.py",
        ),
    ),
    Mutation(
        "a cache of another model is taken",
        HF + "hooks/supply.py",
        "if not made.ledger.is_of(mine.ledger):",
        "if False:",
        ("tests/integrations/hf_transformers/hooks/test_supply.py",),
    ),
    Mutation(
        "as many keys of pictures go as tokens of text",
        HF + "cache/paged_cache.py",
        "layer.forget(length - drop)",
        "layer.crop(-drop)",
        ("tests/integrations/hf_transformers/cache/test_encoder_layer.py",),
    ),
    Mutation(
        "a cache that is emptied keeps pictures as zeros",
        HF + "cache/encoder_layer.py",
        "self.__init__()  # type: ignore[misc]",
        "super().reset()",
        ("tests/integrations/hf_transformers/cache/test_encoder_layer.py",),
    ),
    Mutation(
        "on a CPU another forward of an inner module is not called",
        HF + "steps/cpu.py",
        "and _OURS.issuperset(",
        "or _OURS.issuperset(",
        (
            "tests/integrations/hf_transformers/steps/test_cpu.py::test_changes_after_attaching_are_noticed",
        ),
    ),
    Mutation(
        "another attention may be named while a model is attached",
        HF + "hooks/own.py",
        "if config._attn_implementation_internal != name:",
        "if False:",
        ("tests/integrations/hf_transformers/hooks/test_own.py",),
    ),
    Mutation(
        "a configuration that asks for attention weights gets none",
        HF + "hooks/supply.py",
        "    if wanted is None:",
        "    if False:",
        ("tests/integrations/hf_transformers/hooks/test_supply.py",),
    ),
    Mutation(
        "drafts begin with what a kept cache holds",
        HF + "hooks/supply.py",
        'return {"next_sequence_length": given - held}',
        "return {}",
        ("tests/integrations/hf_transformers/hooks/test_supply.py",),
    ),
    Mutation(
        "a cache goes on under another mask than it was made for",
        HF + "hooks/supply.py",
        "if (made.formats, made.mask) != (mine.formats, mine.mask):",
        "if False:",
        ("tests/integrations/hf_transformers/hooks/test_supply.py",),
    ),
    Mutation(
        "an attachment that was left is entered again and does nothing",
        HF + "attach.py",
        "if not self._undo:",
        "if False:",
        ("tests/integrations/hf_transformers/test_attach.py",),
    ),
    Mutation(
        "a conversion to what a stand-in is already makes its pages dense in inference mode",
        HF + "pages/lazy.py",
        "if func.overloadpacket in _CONVERSIONS and",
        "if False and",
        ("tests/integrations/hf_transformers/pages/test_lazy.py", "tests/engine/test_engine.py"),
    ),
    Mutation(
        "a state beside keys and values is forgotten where pages are kept for later",
        HF + "cache/paged_cache.py",
        "return not isinstance(layer, PagedLayer) or isinstance(layer, LinearAttentionLayer)",
        "return not isinstance(layer, PagedLayer)",
        ("tests/integrations/hf_transformers/cache/test_prompts.py",),
    ),
    Mutation(
        "a state in modules is forgotten where pages are kept for later",
        HF + "cache/paged_cache.py",
        "ledger.own_state - ledger.paged if self.rows.memory.layouts else ()",
        "()",
        ("tests/integrations/hf_transformers/cache/test_prompts.py", "tests/engine/test_engine.py"),
    ),
    Mutation(
        "an assistant is handed stand-ins that the next tokens change",
        HF + "hooks/supply.py",
        "        _keep_shared(output)",
        "",
        ("tests/integrations/hf_transformers/hooks/test_supply.py",),
    ),
)
