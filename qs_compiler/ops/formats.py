"""Number formats of quantised rows: storage dtype, largest magnitude, and how float values become codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .library import require

# Rows whose largest magnitude is below this quantise to zeros. It keeps qmax / amax and amax / qmax normal
# float32 numbers for every format, so that an all-zero row gives neither NaN nor inf, also where subnormals flush.
TINY_AMAX = 1e-30


@dataclass(frozen=True)
class RowFormat:
    """A symmetric format: codes in [-qmax, qmax], stored as `dtype`."""

    name: str
    dtype: torch.dtype
    qmax: float

    def encode(self, scaled: torch.Tensor) -> torch.Tensor:
        """Float values in units of the scale -> codes, to nearest, ties to even."""
        return (scaled if self.dtype.is_floating_point else torch.round(scaled)).to(self.dtype)


FORMATS = {
    f.name: f
    for f in (
        RowFormat("int8", torch.int8, 127.0),
        RowFormat("fp8", torch.float8_e4m3fn, 448.0),
        RowFormat("int6", torch.int8, 31.0),  # simulated: int8 storage and arithmetic
        RowFormat("int4", torch.int8, 7.0),  # simulated
    )
}


def row_format(op: str, name: str) -> RowFormat:
    """The format called `name`; OpInputError with the valid names if there is none."""
    require(name in FORMATS, op, f"format '{name}' is not known", f"Use one of {', '.join(FORMATS)}.")
    return FORMATS[name]
