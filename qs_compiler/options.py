"""What a caller may choose: recipes and the options of the backend, validated before anything is compiled.

A recipe says what the compressed model computes, so it belongs to the artifact too. The other options say how one
compile goes about it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .errors import OptionError, RecipeError, nearest
from .lora import plain_name
from .runtime.schedule import DEFAULT_INTERVAL
from .runtime.seen_grid import Grid
from .runtime.token_layout import ALWAYS_KEPT, STATIC_MASKS

if TYPE_CHECKING:
    from .artifact import Artifact


class Format(NamedTuple):
    """How a linear is stored ("int8", "int6", "int4", "fp8"; None: 16 bit) and what its input is quantised to."""

    weight: str | None
    activation: str  # "int8", "fp8", "int6", "int4" or "none": computed in 16 bit


class Operands(NamedTuple):
    """What q and k, and v, of an attention are quantised to: "int8", "fp8", or None: 16 bit."""

    qk: str | None
    v: str | None


FORMATS = {
    "off": Format(None, "none"),
    "w8a8": Format("int8", "int8"),
    "w4a8": Format("int4", "int8"),
    "fp8": Format("fp8", "fp8"),
    "w4fp8": Format("int4", "fp8"),
    "w8a16": Format("int8", "none"),  # storage only
    "w4a16": Format("int4", "none"),  # storage only
    "w6a6": Format("int6", "int6"),  # simulated in int8
    "w4a4": Format("int4", "int4"),  # simulated: int4 storage, int8 arithmetic
}
ATTENTIONS = {
    "16bit": Operands(None, None),
    "int8": Operands("int8", None),
    "int8-fp8": Operands("int8", "fp8"),
    "fp8": Operands("fp8", "fp8"),
}
CORRECTIONS = ("none", "first_order", "second_order", "complement", "mixture")
GAINS = ("0", "1", "k/tau", "clipped")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
MASKS = ("pooled", "mass", *STATIC_MASKS)
BUDGETS = ("uniform", "fitted")
OVERRIDABLE = ("format", "density")
REFRESHES = ("fixed", "staggered", "adaptive")
CACHE_FORMATS = ("bf16", "fp8", "int8", "int4", "rank16", "rank32")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to compress and how far. Immutable and hashable; `Recipe.parse("w4a8-d25")` reads the short form.

    Attributes:
        format: a name in FORMATS; `off` leaves the linears in 16 bit.
        density: fraction of the key blocks that a sparse step keeps, always-kept blocks included; 1 is dense.
        attention: operands of the self-attentions that run on this backend's kernels: `16bit`; `int8` codes of q, and
            of k less its mean; those and float8 values, `int8-fp8`; or float8 codes of all three, `fp8`.
        block_size: tokens of a query block and of a key block.
        mask: what ranks the key blocks: `pooled` q and k; the `mass` of the last refresh, pooled in the first two of a
            video; or places alone: `spatial` or `temporal` bands, `radial` decay (runtime/token_layout.py).
        budgets: key blocks of each head: `uniform`, or `fitted` by calibration: as many in a layer, shared out to the
            heads that need them most (uniform until they are fitted; docs/masks.md).
        token_order: of the blocks: `rows` of the video, or `tiles`, boxes of it, where its (t, h, w) grid is known
            (docs/masks.md).
        always_keep: sets of key blocks that are kept whatever their rank, within the density: `text`, `first_frame`,
            `neighbourhood`. A query block's own key block always is.
        correction: of the sparse attention: `none`, `first_order` (the cached residual), `second_order` (SSAR of
            arXiv 2509.23681, eq. 16: plus gain times the low-rank change of the residual), `complement` (the softmax
            resumes from the cached output and log-sum-exp of the dropped blocks), or `mixture` (between first order
            and complement, by gains that calibration fits for each head; docs/corrections.md).
        gain: weight of the second-order term k steps after the refresh, tau = interval: `0`, `1` (the paper), `k/tau`
            or `clipped` (k/tau, at most 1/2).
        rank: rank of the second-order term (the paper: 16).
        cache_format: storage of the residuals, hence part of the numerics: `bf16`; `fp8`, `int8` or `int4` with a scale
            a token; or the best factors of rank 16 or 32.
        interval: a refresh every n-th step; the default of 5 counts as 2 in runs of up to 8 steps.
        warmup: fraction of the first steps that runs dense.
        refresh_steps: instead of both, the steps that refresh, ascending; those before the first run dense.
        refresh: `fixed` refreshes all layers at once; `staggered` a share of 1 / interval at every step after the first
            refresh, so that no step pays for a whole one; `adaptive` all at once where q has drifted by more than
            `max_drift`, at least `min_interval` and at most `interval` steps after the last one.
        max_drift: of the step before: relative change of q since the refresh, mean over the layers.
        min_interval: steps between refreshes that drift cannot undercut.
        keep: name patterns (fnmatch) of layers that stay in 16 bit.
        overrides: name pattern -> {"format": ..., "density": ...}; later patterns win, `keep` wins over all. A format
            is that of linears (`blocks.0.attn1.to_q`), a density that of attention modules (`blocks.0.attn1`). A format
            for storage alone (`w8a16`, `w4a16`) reaches the linears outside of the repeated blocks too.
        group_size: weights that share one int4 multiplier.

    Raises:
        RecipeError: a field is ill-typed or out of range.
    """

    format: str = "w8a8"
    density: float = 1.0
    attention: Literal["16bit", "int8", "int8-fp8", "fp8"] = "16bit"
    block_size: int = 128
    mask: Literal["pooled", "mass", "spatial", "temporal", "radial"] = "pooled"
    budgets: Literal["uniform", "fitted"] = "fitted"
    token_order: Literal["rows", "tiles"] = "tiles"
    always_keep: tuple[str, ...] = ()
    correction: Literal["none", "first_order", "second_order", "complement", "mixture"] = "mixture"
    gain: Literal["0", "1", "k/tau", "clipped"] = "k/tau"
    rank: int = 16
    cache_format: Literal["bf16", "fp8", "int8", "int4", "rank16", "rank32"] = "bf16"
    interval: int = DEFAULT_INTERVAL
    warmup: float = 0.1
    refresh_steps: tuple[int, ...] = ()
    refresh: Literal["fixed", "staggered", "adaptive"] = "fixed"
    max_drift: float = 0.2
    min_interval: int = 2
    keep: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict, hash=False)
    group_size: int = 128

    def __post_init__(self) -> None:
        _check_format_and_density(self.format, self.density)
        _one_of("attention", self.attention, tuple(ATTENTIONS))
        _one_of("block_size", self.block_size, (64, 128))
        _one_of("mask", self.mask, MASKS)
        _one_of("budgets", self.budgets, BUDGETS)
        _one_of("token_order", self.token_order, ("rows", "tiles"))
        if isinstance(self.always_keep, str) or not isinstance(self.always_keep, Iterable):
            raise RecipeError(f"always_keep must be a sequence of {', '.join(ALWAYS_KEPT)}, not {self.always_keep!r}.")
        for one in self.always_keep:
            _one_of("always_keep", one, ALWAYS_KEPT)
        _one_of("correction", self.correction, CORRECTIONS)
        _one_of("gain", self.gain, GAINS)
        _integer("rank", self.rank, 1, 128)
        _one_of("cache_format", self.cache_format, CACHE_FORMATS)
        _integer("interval", self.interval, 1)
        _number("warmup", self.warmup, "from 0 to 1, a fraction of the steps", lambda v: 0 <= v <= 1)
        _steps("refresh_steps", self.refresh_steps)
        _one_of("refresh", self.refresh, REFRESHES)
        if self.refresh != "fixed" and self.refresh_steps:
            raise RecipeError(
                f"refresh '{self.refresh}' chooses the steps that refresh, and refresh_steps names them; give one."
            )
        _number("max_drift", self.max_drift, "above 0, a relative change", lambda v: v > 0)
        _integer("min_interval", self.min_interval, 2)
        if self.refresh == "adaptive" and self.min_interval > self.interval:
            raise RecipeError(
                f"min_interval {self.min_interval} is above interval {self.interval}, the most steps between refreshes."
            )
        _one_of("group_size", self.group_size, (32, 64, 128, 256))
        if isinstance(self.keep, str) or not isinstance(self.keep, Iterable):
            raise RecipeError(f"keep must be a sequence of name patterns, not {self.keep!r}; write keep=['*.to_q'].")
        for pattern in self.keep:
            _pattern("keep", pattern)
        if not isinstance(self.overrides, Mapping):
            raise RecipeError(f"overrides must map name patterns to fields, not {self.overrides!r}.")
        for pattern, fields in self.overrides.items():
            _pattern("overrides", pattern)
            if not isinstance(fields, Mapping):
                raise RecipeError(f"overrides[{pattern!r}] must be a dict like {{'format': 'w8a8'}}, not {fields!r}.")
            _known(fields, OVERRIDABLE, f"a field of overrides[{pattern!r}]", RecipeError)
            _check_format_and_density(fields.get("format", "off"), fields.get("density", 1.0))
        set_field = object.__setattr__  # the normal forms of what is valid
        set_field(self, "density", float(self.density))
        set_field(self, "warmup", float(self.warmup))
        set_field(self, "max_drift", float(self.max_drift))
        set_field(self, "refresh_steps", tuple(self.refresh_steps))
        set_field(self, "always_keep", tuple(self.always_keep))
        set_field(self, "keep", tuple(self.keep))
        set_field(self, "overrides", {pattern: dict(fields) for pattern, fields in self.overrides.items()})

    @classmethod
    def parse(cls, value: str | Mapping[str, Any] | Recipe, base: Recipe | None = None) -> Recipe:
        """Read a recipe: a name such as `w4a8-d25`, a dict of fields, or a Recipe.

        Args:
            value: a name sets format and density; a dict sets its keys; a Recipe sets everything.
            base: gives the fields that `value` does not set; the defaults if None.

        Raises:
            RecipeError: an unknown name or field, an ill-typed value, a value out of range.
        """
        base = cls() if base is None else base
        if isinstance(value, Recipe):
            return value
        if isinstance(value, Mapping):
            _known(value, [f.name for f in dataclasses.fields(cls)], "a field of a recipe", RecipeError)
            return dataclasses.replace(base, **value)
        if not isinstance(value, str):
            raise RecipeError(f"a recipe is a name, a dict or a Recipe, not {type(value).__name__}; write 'w8a8-d25'.")
        name, dash, suffix = value.partition("-")
        if name not in FORMATS:
            raise RecipeError(
                f"recipe '{value}' is not known{nearest(name.lower(), FORMATS)} Formats: {', '.join(FORMATS)}; "
                "each takes a density in percent, such as w8a8-d25."
            )
        if not dash:
            return dataclasses.replace(base, format=name, density=1.0)
        percent = re.fullmatch(r"d([0-9]{1,3})", suffix)
        if percent is None or not 1 <= int(percent[1]) <= 100:
            raise RecipeError(
                f"recipe '{value}': '-{suffix}' is no density; write -dNN with an integer from 1 to 100, "
                f"such as {name}-d25, or give the fraction in a dict: {{'format': '{name}', 'density': 0.125}}."
            )
        return dataclasses.replace(base, format=name, density=int(percent[1]) / 100)

    def __str__(self) -> str:
        """The canonical name: format, and the density in percent unless dense."""
        return self.format if self.density == 1 else f"{self.format}-d{round(100 * self.density, 6):g}"

    @property
    def weight_format(self) -> str | None:
        """Storage of the weights: "int8", "int6", "int4", "fp8", or None for 16 bit."""
        return FORMATS[self.format].weight

    @property
    def activation_format(self) -> str:
        """What the input of a linear is quantised to: "int8", "fp8", "int6", "int4" or "none"."""
        return FORMATS[self.format].activation

    @property
    def stored_only(self) -> bool:
        """Whether weights are low-bit in storage alone and compute in 16 bit."""
        return self.weight_format is not None and self.activation_format == "none"

    @property
    def sparse(self) -> bool:
        """Whether attention runs sparse anywhere."""
        return min(self.density, *(fields.get("density", 1.0) for fields in self.overrides.values()), 1.0) < 1

    @property
    def needs_places(self) -> bool:
        """Whether the blocks cannot be chosen without knowing where tokens lie in the video."""
        return self.mask in STATIC_MASKS or bool(self.always_keep)

    @property
    def needs_grid(self) -> bool:
        """Whether sparse attention gains from knowing where tokens lie in the video."""
        return self.sparse and (self.token_order == "tiles" or self.needs_places)

    def for_layer(self, name: str) -> Recipe:
        """The recipe of the layer called `name`, with `keep` and `overrides` applied and dropped.

        A linear goes by the name that it has without LoRA adapters.
        """
        name = plain_name(name)
        fields: dict[str, Any] = {"keep": (), "overrides": {}}
        for pattern, override in self.overrides.items():
            if fnmatchcase(name, pattern):
                fields.update(override)
        if any(fnmatchcase(name, pattern) for pattern in self.keep):
            fields["format"] = "off"
        return dataclasses.replace(self, **fields)

    def weight_only(self) -> Recipe:
        """The same recipe for a layer that is stored low-bit but computed in 16 bit."""
        narrow = {None: "off", "int4": "w4a16"}
        return dataclasses.replace(self, format=narrow.get(self.weight_format, "w8a16"))

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        lists = {name: list(getattr(self, name)) for name in ("keep", "always_keep", "refresh_steps")}
        return {**dataclasses.asdict(self), **lists}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; fields that are missing take their defaults."""
        return cls.parse(fields)


def parse_grid(grid: Any) -> Grid | None:
    """(t, h, w) from a tuple or a list; None stays None.

    Raises:
        OptionError: anything else.
    """
    if grid is None:
        return None
    if isinstance(grid, (tuple, list)) and len(grid) == 3 and all(type(n) is int and n > 0 for n in grid):
        return grid[0], grid[1], grid[2]
    raise OptionError(f"grid must be three positive integers, tokens in time, height and width, not {grid!r}.")


@dataclasses.dataclass(frozen=True)
class BackendOptions:
    """The options of one compile, resolved: an option beats the artifact, the artifact beats the default.

    Attributes:
        recipe: with the interval and the warm-up of the options already in it.
        artifact: None for data-free scales and masks.
        memory_budget: device bytes for the residual caches, None for what is free; decides only where they live.
        strict: what cannot be compressed is an error.
        debug_dir: where the dumps go (or QS_DEBUG_DIR), or None.
        mode: Inductor's, or None.
        grid: (t, h, w) of the video tokens where the graph does not show it, or None.
    """

    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    artifact: Artifact | None = None
    memory_budget: int | None = None
    strict: bool = False
    debug_dir: Path | None = None
    mode: str | None = None
    grid: Grid | None = None

    @property
    def interval(self) -> int:
        """A refresh every n-th step."""
        return self.recipe.interval

    @property
    def warmup(self) -> float:
        """Dense fraction of the first steps."""
        return self.recipe.warmup

    @classmethod
    def parse(
        cls, options: Mapping[str, Any] | None = None, mode: str | None = None, artifact: Artifact | None = None
    ) -> BackendOptions:
        """Validate and resolve what `torch.compile` was given.

        Args:
            options: torch.compile's `options`; a value of None means that the option is not given.
            mode: torch.compile's `mode`.
            artifact: what the model is attached to; used where the options name none.

        Raises:
            OptionError: an unknown option, an ill-typed value, a value out of range, options in conflict.
            RecipeError: the same within the recipe.
            ArtifactError: the artifact cannot be read.
        """
        if options is not None and not isinstance(options, Mapping):
            raise OptionError(f"options must be a dict, not {type(options).__name__}.")
        _known(options or {}, OPTIONS, "an option of backend 'quantsparse'", OptionError)
        given = {name: value for name, value in (options or {}).items() if value is not None}

        artifact = _read_artifact(given["artifact"]) if "artifact" in given else artifact
        recipe = Recipe.parse(given.get("recipe", {}), artifact.recipe if artifact is not None else None)
        recipe = dataclasses.replace(recipe, **{k: given[k] for k in ("interval", "warmup") if k in given})
        if artifact is not None:
            _check_against_artifact(recipe, artifact.recipe)

        if "memory_budget" in given:
            _integer("memory_budget", given["memory_budget"], 0, error=OptionError)
        if not isinstance(given.get("strict", False), bool):
            raise OptionError(f"strict must be True or False, not {given['strict']!r}.")
        debug_dir = given.get("debug_dir", os.environ.get("QS_DEBUG_DIR") or None)
        if debug_dir is not None and not isinstance(debug_dir, str | os.PathLike):
            raise OptionError(f"debug_dir must be a path, not {debug_dir!r}.")
        if mode is not None and given.get("mode", mode) != mode:
            raise OptionError(f"mode is '{mode}' as an argument and {given['mode']!r} in options; give it once.")
        mode = given.get("mode", mode)
        if mode is not None:
            _one_of("mode", mode, MODES, OptionError)
        return cls(
            grid=parse_grid(given.get("grid")),
            recipe=recipe,
            artifact=artifact,
            memory_budget=given.get("memory_budget"),
            strict=given.get("strict", False),
            debug_dir=None if debug_dir is None else Path(debug_dir),
            mode=None if mode == "default" else mode,
        )

    def fingerprint(self) -> str:
        """Stable JSON of everything that may change the generated code; goes into compile-cache keys."""
        return json.dumps(
            {
                "recipe": self.recipe.to_dict(),
                "artifact": None if self.artifact is None else self.artifact.fingerprint(),
                "memory_budget": self.memory_budget,
                "strict": self.strict,
                "mode": self.mode,
                "grid": self.grid,
            },
            sort_keys=True,
        )


OPTIONS = ("artifact", "debug_dir", "grid", "interval", "memory_budget", "mode", "recipe", "strict", "warmup")


def _read_artifact(value: Any) -> Artifact:
    from .artifact import Artifact  # artifact.py needs Recipe

    if isinstance(value, Artifact):
        return value
    if not isinstance(value, str | os.PathLike):
        raise OptionError(f"artifact must be a path or an Artifact, not {type(value).__name__}.")
    return Artifact.load(value)


def _check_against_artifact(recipe: Recipe, fitted: Recipe) -> None:
    """An option beats the artifact only in what the artifact's tensors leave open."""
    if recipe.format not in ("off", fitted.format):
        raise OptionError(
            f"recipe '{recipe}' asks for {recipe.format}, but the artifact is packed as {fitted.format}; "
            f"use a recipe of {fitted.format}, or calibrate an artifact for {recipe.format}."
        )
    corrected = fitted.sparse and fitted.correction != "none" and recipe.sparse
    if corrected and recipe.correction == fitted.correction and recipe.interval != fitted.interval:
        raise OptionError(
            f"interval {recipe.interval} is not the {fitted.interval} that the artifact's correction was fitted for; "
            f"use interval={fitted.interval}, or calibrate with interval={recipe.interval}."
        )


def _known(given: Iterable[Any], names: Iterable[str], what: str, error: type[OptionError]) -> None:
    for name in given:
        if name not in names:
            hint = nearest(name, names) if isinstance(name, str) else "."
            raise error(f"'{name}' is not {what}{hint} Choose from: {', '.join(sorted(names))}.")


def _steps(name: str, value: Any) -> None:
    valid = isinstance(value, (tuple, list)) and all(type(s) is int and s >= 0 for s in value)
    if not valid or any(a >= b for a, b in itertools.pairwise(value)):
        raise RecipeError(f"{name} must be ascending numbers of steps, not {value!r}; write {name}=[2, 7, 12].")


def _one_of(name: str, value: Any, choices: tuple[Any, ...], error: type[OptionError] = RecipeError) -> None:
    if type(value) is not type(choices[0]) or value not in choices:
        hint = nearest(value, choices) if isinstance(value, str) and isinstance(choices[0], str) else "."
        raise error(f"{name} {value!r} is not known{hint} Choose from: {', '.join(map(str, choices))}.")


def _integer(
    name: str, value: Any, least: int, most: int | None = None, error: type[OptionError] = RecipeError
) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise error(f"{name} must be an integer {span}, not {value!r}.")


def _number(name: str, value: Any, span: str, valid: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not valid(value):
        raise RecipeError(f"{name} must be a number {span}, not {value!r}.")


def _check_format_and_density(form: Any, density: Any) -> None:
    _one_of("format", form, tuple(FORMATS))
    _number("density", density, "above 0 and at most 1, the kept fraction (0.25 for 25 %)", lambda v: 0 < v <= 1)


def _pattern(where: str, pattern: Any) -> None:
    if not isinstance(pattern, str) or not pattern:
        raise RecipeError(f"{where} holds {pattern!r}; a name pattern is a non-empty string such as '*.to_q'.")
