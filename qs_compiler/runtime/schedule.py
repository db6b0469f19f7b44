"""Which steps run dense, which refresh and which run sparse."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Dense warm-up, then a refresh every `interval` steps and sparse steps between (paper: interval 5).

    Attributes:
        interval: steps from one refresh to the next; 1 refreshes at every step.
        warmup: fraction of the steps, from the first, that run dense.
    """

    interval: int
    warmup: float

    def first_refresh(self, num_steps: int) -> int:
        """Number of dense steps at the start."""
        return math.ceil(self.warmup * num_steps - 1e-9)

    def refresh_step(self, step: int, num_steps: int) -> int | None:
        """The refresh whose caches `step` uses (or makes), or None in the warm-up."""
        first = self.first_refresh(num_steps)
        if step < first:
            return None
        return step - (step - first) % self.interval

    def counts(self, num_steps: int) -> dict[str, int]:
        """How many steps of a run are dense, refresh and sparse."""
        first = min(self.first_refresh(num_steps), num_steps)
        refresh = math.ceil((num_steps - first) / self.interval)
        return {"dense": first, "refresh": refresh, "sparse": num_steps - first - refresh}

    def average_density(self, density: float, num_steps: int) -> float:
        """Kept fraction over the whole run, dense and refresh steps counted as 1."""
        counts = self.counts(num_steps)
        return (counts["dense"] + counts["refresh"] + counts["sparse"] * density) / num_steps
