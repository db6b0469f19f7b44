"""Which steps run dense, which refresh and which run sparse."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..options import Recipe

# Step-distilled models do 4 to 8 steps, where a refresh every 5 steps, meant for 20 to 50, is next to none.
DEFAULT_INTERVAL = 5
FEW_STEPS, FEW_STEPS_INTERVAL = 8, 2


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Dense warm-up, then a refresh every `interval` steps and sparse steps between (paper: interval 5).

    Attributes:
        interval: steps from one refresh to the next; 1 refreshes at every step. The default of 5 counts as 2 in runs of
            at most 8 steps; any other is taken as it is.
        warmup: fraction of the steps, from the first, that run dense.
        refresh_steps: instead of both, the steps that refresh, ascending; those before the first run dense.
    """

    interval: int
    warmup: float
    refresh_steps: tuple[int, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe) -> Schedule:
        """The schedule of a recipe."""
        return cls(recipe.interval, recipe.warmup, recipe.refresh_steps)

    def first_refresh(self, num_steps: int) -> int:
        """Number of dense steps at the start."""
        return self.refresh_steps[0] if self.refresh_steps else math.ceil(self.warmup * num_steps - 1e-9)

    def refresh_step(self, step: int, num_steps: int) -> int | None:
        """The refresh whose caches `step` uses (or makes), or None in the warm-up.

        Args:
            num_steps: of the run; 0 where it is not known.
        """
        first = self.first_refresh(num_steps)
        if step < first:
            return None
        if self.refresh_steps:
            return max(s for s in self.refresh_steps if s <= step)
        return step - (step - first) % self._interval(num_steps)

    def tau(self, refresh: int, num_steps: int) -> int:
        """Steps from the refresh before `refresh` to it; `interval` where it is the first."""
        earlier = [s for s in self.refresh_steps if s < refresh]
        if self.refresh_steps:
            return refresh - max(earlier) if earlier else self.interval
        return self._interval(num_steps)

    def counts(self, num_steps: int) -> dict[str, int]:
        """How many steps of a run are dense, refresh and sparse."""
        uses = [self.refresh_step(step, num_steps) for step in range(num_steps)]
        dense, refresh = uses.count(None), sum(use == step for step, use in enumerate(uses))
        return {"dense": dense, "refresh": refresh, "sparse": num_steps - dense - refresh}

    def average_density(self, density: float, num_steps: int) -> float:
        """Kept fraction over the whole run, dense and refresh steps counted as 1."""
        counts = self.counts(num_steps)
        return (counts["dense"] + counts["refresh"] + counts["sparse"] * density) / num_steps

    def _interval(self, num_steps: int) -> int:
        few = self.interval == DEFAULT_INTERVAL and 0 < num_steps <= FEW_STEPS
        return FEW_STEPS_INTERVAL if few else self.interval
