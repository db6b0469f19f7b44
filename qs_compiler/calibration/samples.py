"""The forwards that a model is calibrated on: given, or caught in denoising runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import OptionError


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """The inputs of one forward, tensors on the CPU, and the autocast dtype that it ran under (None: off)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: torch.dtype | None = None

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device) -> Sample:
        """Copy the inputs of a forward that runs on `device` now."""
        with torch.inference_mode(False):  # distillation differentiates through copies made here
            args, kwargs = pytree.tree_map_only(
                torch.Tensor, lambda t: t.detach().clone().cpu(), (tuple(args), dict(kwargs))
            )
        on = torch.is_autocast_enabled(device.type)
        return cls(args, kwargs, torch.get_autocast_dtype(device.type) if on else None)

    def to(self, device: torch.device) -> Sample:
        """The same inputs on `device`."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (self.args, self.kwargs))
        return Sample(args, kwargs, self.autocast)

    def context(self, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
        """What to enter around the forward on `device`."""
        if self.autocast is None:
            return contextlib.nullcontext
        return functools.partial(torch.autocast, device.type, self.autocast)

    def digest(self) -> str:
        """Hash of the tensors' values."""
        found = hashlib.sha256()
        for leaf in pytree.tree_leaves((self.args, self.kwargs)):
            if isinstance(leaf, torch.Tensor):
                found.update(f"{leaf.dtype}{list(leaf.shape)}".encode())
                values = leaf.reshape(-1).clone(memory_format=torch.contiguous_format)
                found.update(values.view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def given_samples(data: Iterable[Any], device: torch.device) -> list[Sample]:
    """Samples of an iterable of (args, kwargs), or of kwargs.

    Raises:
        OptionError: an entry that is neither, or none at all.
    """
    samples = []
    for entry in data:
        if isinstance(entry, Mapping):
            entry = ((), entry)
        if not isinstance(entry, (tuple, list)) or len(entry) != 2 or not isinstance(entry[1], Mapping):
            raise OptionError(f"data must hold (args, kwargs) or kwargs of forwards, not {type(entry).__name__}.")
        samples.append(Sample.of(entry[0], entry[1], device))
    if not samples:
        raise OptionError("data holds no forward to calibrate on.")
    return samples


@torch.no_grad()
def caught_samples(
    modules: Mapping[str, nn.Module], runs: Sequence[Callable[[], Any]], count: int, seed: int, kept_runs: Any = None
) -> dict[str, list[Sample]]:
    """Do denoising runs and keep `count` forwards of each module that cover the noise levels evenly.

    The forwards of a module in one run are its way from noise to clip. That way is cut into `count` equal parts; from
    each, one forward is drawn, and the parts are shared out among the runs. Runs beyond `count` are not done, nor are
    those that `kept_runs` (a KeptRuns) holds already.

    Raises:
        OptionError: no runs, or a module that they never call.
    """
    draw = torch.Generator().manual_seed(seed)
    kept: dict[str, list[Sample]] = {name: [] for name in modules}
    runs = runs[:count]
    share = torch.randperm(count, generator=draw).tolist()
    for number, run in enumerate(runs):
        places = [(part + float(torch.rand((), generator=draw))) / count for part in share[number :: len(runs)]]
        found = None if kept_runs is None else kept_runs.load(number)
        if found is None:
            calls = _calls_of(modules, run)
            found = {
                name: [own[min(int(place * len(own)), len(own) - 1)] for place in places if own]
                for name, own in calls.items()
            }
            if kept_runs is not None:
                kept_runs.save(number, found)
        for name, samples in found.items():
            kept[name] += samples
    for name, samples in kept.items():
        if not samples:
            raise OptionError(f"the denoising runs never call '{name}'; give prompts, or a function that denoises.")
    return kept


def _calls_of(modules: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, list[Sample]]:
    """The forwards of each module in one run."""
    caught: dict[str, list[Sample]] = {name: [] for name in modules}
    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            device = next(module.parameters()).device

            def catch(_: nn.Module, args: Any, kwargs: Any, into: Any = caught[name], on: Any = device) -> None:
                into.append(Sample.of(args, kwargs, on))

            hooks.callback(module.register_forward_pre_hook(catch, with_kwargs=True).remove)
        run()
    return caught
