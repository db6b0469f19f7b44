"""Calibration: find the packed weights of a model from what flows through it.

blockwise.py     `calibrate`: block by block over a model
samples.py       the forwards that it is calibrated on
walk.py          a model run up to the calls of its blocks, or a block up to its linears
closed_form.py   the linears of a block one after the other: smoothing, rotation, range, rounding
settings.py      the options;  state.py: finished blocks on disk;  progress.py: the bar
smoothing.py, transforms.py, weight_grid.py, gptq.py      the quantisers
"""

if __name__ != "qs_compiler.calibration":
    raise ImportError("import qs_compiler.calibration: the top-level calibration/ is a link for readers")

from .blockwise import calibrate

__all__ = ["calibrate"]
