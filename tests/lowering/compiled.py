"""Compile a function with Inductor and our lowerings, and look at the code that it generates."""

import re

import torch
from torch.nn.functional import gelu, silu
from torch.torch_version import TorchVersion

from qs_compiler._compat import inductor_config, run_and_get_code
from qs_compiler.lowering import register_lowerings
from qs_compiler.lowering.row_kernels import row_kernels

EPILOGUES = {  # what may follow a product y (M, N), with a gate (N,) and a residual (M, N)
    "nothing": lambda y, gate, residual: y,
    "gelu": lambda y, gate, residual: gelu(y, approximate="tanh"),
    "erf gelu": lambda y, gate, residual: gelu(y),
    "gate and residual": lambda y, gate, residual: residual + gate * y,
    "float32 residual": lambda y, gate, residual: residual.float() + gate * y,
    "row factor": lambda y, gate, residual: y * residual.narrow(1, 0, 1),
    "cast": lambda y, gate, residual: y.float(),
    "two residuals": lambda y, gate, residual: residual + gate * y + residual.flip(0),
    "gated": lambda y, gate, residual: silu(y) * residual,
    "two results": lambda y, gate, residual: (y, residual + gate * y),
}


def compiled(function, *args, dynamic=False):
    """Result of the compiled function and its generated code (one graph)."""
    register_lowerings()
    torch.compiler.reset()
    with inductor_config.patch(fx_graph_cache=False), row_kernels():  # its keys do not cover the lowerings
        result, codes = run_and_get_code(torch.compile(function, fullgraph=True, dynamic=dynamic), *args)
    assert len(codes) == 1
    return result, codes[0]


def kernels(code):
    """Names of the C++ kernels that the generated code calls, in order."""
    return re.findall(r"^\s+(cpp_fused\w*)\(", code[code.index("def call") :], re.MULTILINE)


def gate_joins_product(batch):
    """Whether gate and residual join the product's kernel. Before torch 2.13 only at batch 1.

    There the product's store (batch * rows, columns) and the gated read (batch, rows, columns) are unlike.
    """
    return batch == 1 or TorchVersion(torch.__version__) >= (2, 13)


def library_calls(code):
    """Names of the extern kernels and ops that the generated code calls, in order."""
    return re.findall(r"(extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", code[code.index("def call") :])
