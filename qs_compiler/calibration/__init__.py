"""Calibration: find the packed weights of a model from what flows through it.

entry.py         `calibrate`;  settings.py: its options;  progress.py: its bar
samples.py       the forwards that it is calibrated on;  kept_runs.py: the runs that gave them, on disk
blockwise.py     block by block over a model;  state.py: finished blocks on disk
walk.py          a model run up to the calls of its blocks, or a block up to the calls of its linears
closed_form.py   the linears of a block one after the other;  input_record.py: what they read
                 linear_order.py: which of them depend on which
                 smoothing.py, transforms.py, weight_grid.py, gptq.py: how they are quantised
msad.py          distillation;  attention_maps.py: of attention;  fake_linear.py: through what
                 sparse_attention.py: through the blocks that a sparse step keeps
head_fit.py      what heads differ in;  attention_call.py: how both hear attention
"""

if __name__ != "qs_compiler.calibration":
    raise ImportError("import qs_compiler.calibration: the top-level calibration/ is a link for readers")

from .entry import calibrate

__all__ = ["calibrate"]
