"""What the linears of a block read while it runs in full precision."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..passes.quantize_linear import SMALL_ROWS
from .linear_order import Ancestry, stages
from .walk import Call


@dataclasses.dataclass
class InputRecord:
    """What the linears of a block read in full precision.

    Attributes:
        rows: linear -> for each sample some rows of its input, (M, K); always the same positions of inputs alike. Those
            of a linear that is called with several tensors follow one another in the order of its calls.
        stages: groups of linears that read the same tensors, in the order of their calls, sorted into stages whose
            groups do not depend on one another (of a linear that is called again, only the first input counts).
        few_rows: linears that read one row a clip (time or modulation) instead of tokens, in all their calls.
    """

    rows: dict[str, list[torch.Tensor]]
    stages: list[list[list[str]]]
    few_rows: set[str]

    @property
    def groups(self) -> list[list[str]]:
        """The groups of all stages."""
        return [group for stage in self.stages for group in stage]


def some_rows(x: torch.Tensor, most: int) -> torch.Tensor:
    """At most `most` rows of x (..., K) as (M, K), spread evenly; the choice depends on the shape alone."""
    x = x.detach().reshape(-1, x.shape[-1])
    return x if len(x) <= most else x[torch.arange(most, device=x.device) * len(x) // most]


def input_of(call: Call) -> torch.Tensor:
    """What a linear was called with."""
    return call.args[0] if call.args else call.kwargs["input"]


class InputRecorder:
    """Collects an InputRecord while a block runs in full precision: open it around the forward of each sample."""

    def __init__(self, linears: Mapping[str, nn.Linear], rows: int) -> None:
        self.record = InputRecord({}, [], set())
        self._linears, self._rows = linears, rows
        self._open = contextlib.ExitStack()
        # What each linear has read in this forward, by id. The tensors are held, so that no later one takes an address.
        self._inputs: dict[str, dict[int, torch.Tensor]] = {}
        self._ancestry, self._ancestors = Ancestry(), {}

    def __enter__(self) -> InputRecorder:
        for name, linear in self._linears.items():

            def read(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                self._read(name, args[0] if args else kwargs["input"])

            self._open.callback(linear.register_forward_pre_hook(read, with_kwargs=True).remove)
        if not self.record.stages:  # one forward says it for all
            for name, linear in self._linears.items():

                def announce(_: nn.Module, args: Any, output: torch.Tensor, name: str = name) -> None:
                    self._ancestry.announce(name, output)

                self._open.callback(linear.register_forward_hook(announce).remove)
            self._open.enter_context(self._ancestry)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        if not self.record.stages:
            groups: dict[tuple[int, ...], list[str]] = {}
            for name, inputs in self._inputs.items():
                groups.setdefault(tuple(inputs), []).append(name)
            self.record.stages = stages(list(groups.values()), self._ancestors)
        self._inputs.clear()

    def _read(self, name: str, x: torch.Tensor) -> None:
        self._ancestors.setdefault(name, self._ancestry.of(x))
        inputs = self._inputs.setdefault(name, {})
        if id(x) in inputs:
            return
        few = x.dim() == 1 or (x.dim() == 2 and len(x) < SMALL_ROWS)
        of_samples = self.record.rows.setdefault(name, [])
        if not inputs:
            of_samples.append(some_rows(x, self._rows).clone())
            if few:
                self.record.few_rows.add(name)
        else:
            of_samples[-1] = torch.cat([of_samples[-1], some_rows(x, self._rows)])
            if not few:
                self.record.few_rows.discard(name)
        inputs[id(x)] = x
