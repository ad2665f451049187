"""Who may see whom: causal, windows, sinks, intervals."""

from quantpage.masks.base import CausalMask, FullMask, Mask

__all__ = ["CausalMask", "FullMask", "Mask"]
