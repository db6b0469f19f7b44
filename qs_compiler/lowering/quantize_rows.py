"""Lower quantsparse::quantize_rows.

Without a rotation it is Inductor IR, so that it joins the kernel of whatever produces its input. A rotation is a
float32 matrix product in front of it; or, on the devices of linear_choices.ROTATED_IN_ONE_KERNEL, a Triton template
rotates and quantises in one kernel. Its tensor cores take both operands rounded to TF32: an error of 2^-12 of each, at
random, where a step of int8 is 2^-7 of the row's largest value. Blocks that are no power of two from 16 to 128, and few
rows, stay with the product: a program goes through its rows' channels one block after the other, which takes as long
for one as for thousands.
"""

from __future__ import annotations

import math

import torch

from .._compat import (
    L,
    SymbolicGridFn,
    divide_to_nearest,
    ir,
    lowerings,
    make_template,
    ops,
    register_lowering,
    select_template,
    size_hint,
    static_size,
)
from ..ops.formats import FORMATS, TINY_AMAX
from . import linear_choices
from .decode import f32, rotate
from .device_support import call_reference, shared_memory, why_no_dtype, why_no_template
from .template_source import read_template

OP = torch.ops.quantsparse.quantize_rows.default
FEW_ROWS = 4096


@SymbolicGridFn
def grid(rows, _, meta, *, cdiv):
    """How is this kernel parallelised? One program for every ROWS rows."""
    return (cdiv(rows, meta["ROWS"]), 1, 1)


TEMPLATE = make_template("quantsparse_quantize_rows", grid, read_template("quantize_rows"))


@register_lowering(OP, type_promotion_kind=None)
def lower_quantize_rows(x, smooth, rotation, format):
    form = FORMATS[format]
    if (reason := why_no_dtype(x.get_device(), form.dtype)) is not None:
        return call_reference(OP, reason, x, smooth, rotation, format)
    if rotation is not None and why_no_template(x.get_device()) is None and template_fits(x, rotation):
        return template_rows(x, smooth, rotation, form)
    x = L.to_dtype(x, f32)
    if smooth is not None:
        x = L.mul(x, smooth)
    if rotation is not None:
        x = rotate(x, rotation)
    peak = lowerings[torch.ops.aten.amax.default](L.abs(x), [-1])
    load_x, load_peak = x.make_loader(), peak.make_loader()

    def amax(index):
        return ops.maximum(load_peak(index), ops.constant(TINY_AMAX, f32))

    def scale(index):
        return divide_to_nearest(amax(index), ops.constant(form.qmax, f32))

    def code(index):
        scaled = ops.mul(load_x(index), divide_to_nearest(ops.constant(form.qmax, f32), amax(index[:-1])))
        return ops.to_dtype(scaled if form.dtype.is_floating_point else ops.round(scaled), form.dtype)

    def pointwise(dtype, inner, ranges):
        return ir.Pointwise.create(device=x.get_device(), dtype=dtype, inner_fn=inner, ranges=list(ranges))

    scales = pointwise(f32, scale, peak.get_size())
    scales.realize()  # one quotient a row, not one for each element that an epilogue scales
    return pointwise(form.dtype, code, x.get_size()), scales


def template_fits(x, rotation) -> bool:
    """Whether the template is chosen on this device, takes blocks of this size, and has rows enough."""
    if torch.cuda.get_device_capability(x.get_device()) not in linear_choices.ROTATED_IN_ONE_KERNEL:
        return False
    rows = size_hint(math.prod(x.get_size()[:-1]))
    return rows >= FEW_ROWS and static_size(rotation.get_size()[0]) in (16, 32, 64, 128)


def template_rows(x, smooth, rotation, form):
    """The codes and scales of rotated rows by the Triton template."""
    *lead, channels = x.get_size()
    rows = math.prod(lead)
    block = static_size(rotation.get_size()[0])
    stages = 3 if shared_memory(x.get_device()) > 128 * 1024 else 2
    scales = L.empty([rows], dtype=f32, device=x.get_device())
    scales.realize()
    given = [L.view(x, [rows, channels]), rotation, *([] if smooth is None else [smooth])]
    x2, rotation, *smooths = [ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(t)) for t in given]
    codes = select_template(
        "quantsparse_quantize_rows",
        TEMPLATE,
        [{"ROWS": 64, "STAGES": stages, "num_stages": stages, "num_warps": 4}],
        [x2, rotation, scales, *smooths],
        ir.FixedLayout(x.get_device(), form.dtype, [rows, channels]),
        mutated_inputs=[scales],
        R=block,
        HAS_SMOOTH=smooth is not None,
        INT8=not form.dtype.is_floating_point,
        QMAX=float(form.qmax),
        TINY_AMAX=TINY_AMAX,
    )
    return L.view(codes, [*lead, channels]), L.view(scales, lead)
