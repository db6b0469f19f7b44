"""Compile a function with Inductor and our lowerings, and look at the code that it generates."""

import re

import torch
from torch.torch_version import TorchVersion

from qs_compiler._compat import inductor_config, run_and_get_code
from qs_compiler.lowering import register_lowerings
from qs_compiler.lowering.row_kernels import row_kernels


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
