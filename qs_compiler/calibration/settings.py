"""How `calibrate` goes about it. What the compressed model computes is the recipe's; this only finds its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import OptionError, nearest

CHOICES = {
    "inputs": ("quantized", "full"),
    "smoothing": ("search", "none"),
    "rounding": ("gptq", "nearest", "learned"),
    "attention": ("dense", "sparse"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of `calibrate`, each with its default.

    Attributes:
        samples: forwards that are kept of denoising runs; ignored where the forwards are given.
        inputs: what a block is calibrated on: `quantized`, what the blocks before it give once they are compressed, so
            that it learns to make their errors good; or `full`, what it gets in the full-precision model.
        device: where a block is computed, for instance "cuda" for a model that lies in host memory: one block and one
            sample at a time are moved there. None: where the model lies.
        in_flight: samples that may be run side by side within a block; more than so many are run one at a time, which
            takes less memory and more time: a forward for each stage of linears that depend on one another. None: all.
        rows: rows (tokens) of each linear's input, from each sample, that statistics are taken from.
        smoothing: `search` for the best scale of each input, or `none`.
        rotation: size of a block-diagonal Hadamard rotation (a power of two) of inputs whose channels it divides, or
            None. Inputs of fp8 weights are not rotated.
        rounding: `gptq`; `nearest`; or `learned`, which starts from GPTQ and is distilled as well.
        damping: of the GPTQ Hessian, in units of its mean diagonal.
        attention: how self-attentions are computed in distillation: `dense`, as in the paper, or `sparse`: over the
            blocks that a sparse recipe keeps, with the residual of full precision (sparse_attention.py).
        epochs: of distillation (MSAD, see msad.py) over the samples, before the rounding; 0 for none. The paper: 15.
        lr_transform: of smoothing scales and rotations; 0 leaves them as they were found.
        lr_range: of the ranges of the weights; 0 leaves them.
        epochs_rounding: of the distillation of learned rounding.
        lr_rounding: of the weights in it, in units of their rounding step.
        lambda_global: weight of the pooled attention maps' error; 0 for none.
        lambda_local: weight of the salient tokens' attention error; 0 for none.
        stride: tokens that are pooled into one for the global maps.
        salient: tokens whose attention is distilled.
        salience_every: takes every n-th query to find them; above 1 an estimate, for very long sequences.
    """

    samples: int = 16
    inputs: str = "quantized"
    device: str | None = None
    in_flight: int | None = None
    rows: int = 4096
    smoothing: str = "none"
    rotation: int | None = 64
    rounding: str = "gptq"
    damping: float = 0.05
    attention: str = "dense"
    epochs: int = 0
    lr_transform: float = 5e-3
    lr_range: float = 5e-2
    epochs_rounding: int = 40
    lr_rounding: float = 2e-3
    lambda_global: float = 1.0
    lambda_local: float = 1.0
    stride: int = 128
    salient: int = 256
    salience_every: int = 1

    @property
    def steps(self) -> int:
        """Passes of distillation over the samples, all told."""
        return self.epochs + (self.epochs_rounding if self.rounding == "learned" else 0)

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Settings:
        """Validate options by name.

        Raises:
            OptionError: an unknown name, an ill-typed value or one out of range.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                raise OptionError(
                    f"'{name}' is not an option of calibrate{nearest(name, names)} Choose from: {', '.join(names)}."
                )
        return cls(**options)

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise OptionError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}.")
        for name in ("samples", "rows", "stride", "salient", "salience_every"):
            _integer(name, getattr(self, name), 1)
        _integer("epochs", self.epochs, 0)
        _integer("epochs_rounding", self.epochs_rounding, 1)
        try:
            torch.device(self.device or "cpu")
        except (RuntimeError, TypeError) as error:
            raise OptionError(f"device {self.device!r} is none: {str(error).splitlines()[0]}") from error
        for name in ("lr_transform", "lr_range", "lr_rounding", "lambda_global", "lambda_local", "damping"):
            _number(name, getattr(self, name))
        if self.in_flight is not None:
            _integer("in_flight", self.in_flight, 1)
        if self.rotation is not None:
            _integer("rotation", self.rotation, 2)
            if self.rotation & (self.rotation - 1):
                raise OptionError(f"rotation must be a power of two such as 64, or None, not {self.rotation}.")


def _integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name} must be an integer of at least {least}, not {value!r}.")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise OptionError(f"{name} must be a finite number of at least 0, not {value!r}.")
