"""Which steps run dense, which refresh and which run sparse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..options import Recipe

# Step-distilled models do 4 to 8 steps, where a refresh every 5 steps, meant for 20 to 50, is next to none.
DEFAULT_INTERVAL = 5
FEW_STEPS, FEW_STEPS_INTERVAL = 8, 2


@dataclasses.dataclass(frozen=True)
class Decision:
    """What an adaptive schedule decided at `step`: the refresh whose caches it uses or makes, tau after the last."""

    step: int
    refresh: int
    tau: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Dense warm-up, then a refresh every `interval` steps and sparse steps between (paper: interval 5).

    Attributes:
        interval: steps from one refresh to the next; 1 refreshes at every step. The default of 5 counts as 2 in runs of
            at most 8 steps; any other is taken as it is.
        warmup: fraction of the steps, from the first, that run dense.
        refresh_steps: instead of both, the steps that refresh, ascending; those before the first run dense.
        staggered: after a first refresh of all, each layer has steps of its own, so that every step refreshes a share
            of 1 / interval: see `late`.
        max_drift, min_interval: of an adaptive schedule: it refreshes where the step before had drifted further, at
            least so many steps after the last refresh, and at most `interval`. None: not adaptive.
    """

    interval: int
    warmup: float
    refresh_steps: tuple[int, ...] = ()
    staggered: bool = False
    max_drift: float | None = None
    min_interval: int = 1

    @classmethod
    def of(cls, recipe: Recipe) -> Schedule:
        """The schedule of a recipe."""
        drift = recipe.max_drift if recipe.refresh == "adaptive" else None
        staggered = recipe.refresh == "staggered"
        return cls(recipe.interval, recipe.warmup, recipe.refresh_steps, staggered, drift, recipe.min_interval)

    def decide(self, step: int, num_steps: int, last: Decision | None, drift: Callable[[], float]) -> Decision:
        """What a step of an adaptive schedule uses or makes, for all layers of a branch.

        Args:
            step: not before `first_refresh`.
            last: the decision of the step before, or of this very one.
            drift: asked where it matters: that of the step before, which the device may still be computing.
        """
        if last is None:
            return Decision(step, step, self._interval(num_steps))
        if last.step == step:
            return last
        age = step - last.refresh
        due = age >= self._interval(num_steps)
        if not due and age >= self.min_interval:
            due = drift() > self.max_drift
        return Decision(step, step, age) if due else dataclasses.replace(last, step=step)

    def first_refresh(self, num_steps: int) -> int:
        """Number of dense steps at the start."""
        return self.refresh_steps[0] if self.refresh_steps else math.ceil(self.warmup * num_steps - 1e-9)

    def late(self, position: int, layers: int, num_steps: int) -> int:
        """Steps by which a layer refreshes after the first one: runs of neighbours share a step.

        No residual grows older than without: a layer that is late by n refreshes n steps after the first refresh too.
        """
        return position * self._interval(num_steps) // layers if self.staggered else 0

    def refresh_step(self, step: int, num_steps: int, late: int = 0) -> int | None:
        """The refresh whose caches a layer uses (or makes) at `step`, or None in the warm-up.

        Args:
            num_steps: of the run; 0 where it is not known.
            late: of the layer.
        """
        first = self.first_refresh(num_steps)
        if step < first:
            return None
        if self.refresh_steps:
            return max(s for s in self.refresh_steps if s <= step)
        return max(first, step - (step - first - late) % self._interval(num_steps))

    def tau(self, refresh: int, num_steps: int, late: int = 0) -> int:
        """Steps from the refresh before `refresh` to it; `interval` where it is the first."""
        earlier = self.refresh_step(refresh - 1, num_steps, late)
        return self._interval(num_steps) if earlier is None else refresh - earlier

    def counts(self, num_steps: int) -> dict[str, int]:
        """How many steps of a run are dense, refresh and sparse; staggered, all after the first refresh are "mixed".

        An adaptive schedule is counted with the fewest refreshes that it can have.
        """
        dense, refresh, sparse = self._counts(num_steps, late=0)
        if self.staggered and sparse:
            return {"dense": dense, "refresh": 1, "mixed": refresh - 1 + sparse}
        return {"dense": dense, "refresh": refresh, "sparse": sparse}

    def average_density(self, density: float, num_steps: int) -> float:
        """Kept fraction over the whole run and all layers, dense and refresh steps counted as 1."""
        groups = self._interval(num_steps) if self.staggered else 1
        sparse = sum(self._counts(num_steps, late)[2] for late in range(groups)) / groups
        return (num_steps - sparse * (1 - density)) / num_steps

    def _counts(self, num_steps: int, late: int) -> tuple[int, int, int]:
        """Dense, refresh and sparse steps of a layer."""
        uses = [self.refresh_step(step, num_steps, late) for step in range(num_steps)]
        dense, refresh = uses.count(None), sum(use == step for step, use in enumerate(uses))
        return dense, refresh, num_steps - dense - refresh

    def _interval(self, num_steps: int) -> int:
        few = self.interval == DEFAULT_INTERVAL and 0 < num_steps <= FEW_STEPS
        return FEW_STEPS_INTERVAL if few else self.interval
