"""Continuous batching over quantized pages: requests in, tokens out.

``Engine`` runs one attached Transformers model: prompts in chunks beside decode, prompts that are
known found in their pages, preemption when pages run out. What an answer says does not depend on
which other requests share its steps (up to the rounding of the model's own matrix products).
"""

from quantpage.engine.loop import Engine, Stats, Ticket
from quantpage.engine.request import Piece, Request, Sampling, TokenChoice
from quantpage.engine.scheduler import Limits

__all__ = ["Engine", "Limits", "Piece", "Request", "Sampling", "Stats", "Ticket", "TokenChoice"]
