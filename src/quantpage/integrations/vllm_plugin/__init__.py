"""QuantPage's pages and kernels as vLLM's attention backend (docs/vllm.md).

vLLM schedules, shares prefixes, preempts, shards and serves; QuantPage says how many bytes a token
takes and attends to them. No name of vLLM's is replaced: all goes through what it offers to
plugins. Importing this package imports no vLLM; ``register`` does.
"""


def register() -> None:
    """What vLLM calls in each of its processes (entry point ``vllm.general_plugins``).

    Safe to call again. Raises Unavailable for a vLLM that this plugin cannot serve.
    """
    from quantpage.integrations.vllm_plugin import compat

    compat.check_supported()
    from quantpage.integrations.vllm_plugin import exact
    from quantpage.integrations.vllm_plugin.formats import OWN_NAMES

    compat.register_attention("quantpage.integrations.vllm_plugin.backend.QuantPageBackend")
    exact.register()
    compat.register_names(OWN_NAMES)
