"""The vLLM of this environment, as far as whoever starts its server has to know."""

from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True, slots=True)
class VllmHere:
    """What it is and serves."""

    version: str
    cpu: bool
    """It serves from a CPU."""
    own_names: bool
    """--kv-cache-dtype takes names of plugins' own (from 0.33 on)."""
    architectures: frozenset[str]
    """Classes of models that it serves."""


def find_vllm() -> VllmHere | None:
    """None where vLLM is not installed. Imports it, which takes seconds.

    Raises Unavailable for one that the plugin cannot serve.
    """
    if find_spec("vllm") is None:
        return None
    import vllm

    from quantpage.integrations.vllm_plugin import compat

    compat.check_supported()
    return VllmHere(
        vllm.__version__,
        compat.on_cpu(),
        compat.takes_own_names(),
        frozenset(vllm.ModelRegistry.get_supported_archs()),
    )
