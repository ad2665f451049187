"""The defects that scripts/mutants.py makes, by what they would break: each is one that somebody
could make by hand.
"""

from . import attend, cache, formats, kernels, masks, models, serving
from .mutation import Mutation

__all__ = ["MUTATIONS", "Mutation"]
AREAS = (masks, formats, cache, attend, kernels, models, serving)
MUTATIONS = tuple(mutation for area in AREAS for mutation in area.MUTATIONS)
