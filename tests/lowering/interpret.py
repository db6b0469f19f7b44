"""Run generated CUDA code on CPU tensors: Triton kernels in Triton's interpreter, everything else eagerly.

Triton decides between compiler and interpreter when it is imported, so `interpret` works in a process of its own, which
serves all tests. The numbers are those of the generated text itself: kernels, epilogues, layouts, order of the calls.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch

from tests.kernel_text import constexpr_parameters, fixed_config, import_kernel


def interpret(cases, folder: Path) -> list:
    """Results of [(generated code, CPU arguments)], each a list of tensors."""
    torch.save(cases, folder / "cases.pt")
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"):  # of the process that may start now
        interpreter().submit(run_cases, folder).result(timeout=600)
    return torch.load(folder / "results.pt")


@functools.cache
def interpreter() -> ProcessPoolExecutor:
    """One process, started by the first call that it is given."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=prepare)


def prepare() -> None:
    """What the process of `interpreter` does first."""
    import qs_compiler.ops  # noqa: F401  (ops that the generated code calls)
    from tests.lowering import interpreter_fixes

    interpreter_fixes.apply()


class Libdevice:
    """What the interpreter lacks of CUDA's libdevice."""

    @staticmethod
    def nearbyint(x):
        shift = 1.5 * 2**23  # float32 has no fraction bits left from here on, so the sum rounds to nearest even
        return (x + shift) - shift

    @staticmethod
    def exp(x):
        import triton.language as tl

        return tl.exp(x)

    @staticmethod
    def erf(x):
        import triton.language as tl

        return tl.erf(x)

    @staticmethod
    def rsqrt(x):
        import triton.language as tl

        return 1 / tl.sqrt(x)

    @staticmethod
    def tanh(x):
        import triton.language as tl

        return 2 * tl.sigmoid(2 * x) - 1


class Helpers:
    """Inductor's helper functions; its own maximum over an axis would be interpreted element by element."""

    def __getattr__(self, name):
        from torch._inductor.runtime import triton_helpers

        return getattr(triton_helpers, name)

    @staticmethod
    def max2(x, axis):
        import triton.language as tl

        return tl.max(x, axis)


class Kernel:
    """Stands for a compiled kernel of the generated code."""

    def __init__(self, source: str, folder: Path):
        self.function = import_kernel(source, folder)
        self.function.fn.__globals__.update(libdevice=Libdevice, triton_helpers=Helpers())
        chosen = {"XBLOCK": 64, "YBLOCK": 16, **fixed_config(source)}
        self.blocks = {name: chosen.get(name, 128) for name in constexpr_parameters(source)}
        self.fixed_grid = "'grid_type': 'FixedGrid'" in source

    def run(self, *args, stream):
        names = [n for n in self.function.arg_names if n not in self.blocks]
        sizes = dict(zip(names, args, strict=False))
        sizes = {"XBLOCK": sizes.get("xnumel", 1), "YBLOCK": sizes.get("ynumel", 1)}
        programs = [-(-sizes[b] // self.blocks.get(b, 1)) for b in ("XBLOCK", "YBLOCK")]
        grid = args[len(names) :] if self.fixed_grid else programs
        self.function[tuple(grid)](*args[: len(names)], **self.blocks)


class Kernels:
    """Stands for AsyncCompile in the generated code."""

    def __init__(self, folder: Path):
        self.folder = folder

    def triton(self, name, source, **_):
        return Kernel(source, self.folder)

    def wait(self, _):
        pass


def run_on_cpu(code: str, args: list, folder: Path) -> list:
    """Execute one generated source text with CPU tensors."""
    for pattern, replacement in (
        (r"from torch._C import _cuda_getCurrentRawStream as get_raw_stream", "get_raw_stream = int"),
        (r"guards\._empty_strided_cuda\b", "guards._empty_strided_cpu"),
        (r"async_compile = AsyncCompile\(\)", "async_compile = KERNELS"),
        (r"with torch\.cuda\._DeviceGuard\(\d+\):", "if True:"),
        (r"torch\.cuda\.set_device\(\d+\)", "pass"),
    ):
        code = re.sub(pattern, replacement, code)
    scope = {"KERNELS": Kernels(folder), "__name__": "generated"}
    exec(compile(code, "generated", "exec"), scope)
    return list(scope["call"](list(args)))


def run_cases(folder: Path) -> None:
    """Run what `interpret` saved; in the process of `interpreter`."""
    cases = torch.load(folder / "cases.pt")
    torch.save([run_on_cpu(code, args, folder) for code, args in cases], folder / "results.pt")
