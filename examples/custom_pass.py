"""Take part in the compilation: a pass of one's own between those of the package.

    PYTHONPATH=. python examples/custom_pass.py

The pass replaces the exact GELU, erf and all, by its tanh form, which GPUs compute faster.
"""

import torch
from tiny_dit import noise, relative_error, tiny_dit
from torch import fx

import qs_compiler
from qs_compiler.passes import PassContext, PassResult, pass_names

aten = torch.ops.aten


@qs_compiler.register_pass(after="quantize_linear")
def tanh_gelu(graph: fx.Graph, context: PassContext) -> PassResult:
    """Before: gelu(x). After: gelu(x, approximate="tanh")."""
    result = PassResult()
    for node in graph.find_nodes(op="call_function", target=aten.gelu.default):
        if node.kwargs.get("approximate") == "tanh":
            result.skip(node, "it is tanh already")
            continue
        node.kwargs = {**node.kwargs, "approximate": "tanh"}
        result.matched += 1
    return result


@torch.no_grad()
def main() -> None:
    """Compile with the pass, print its place and its matches, and the difference that it makes."""
    print(f"order: {', '.join(pass_names())}")
    inputs = noise(), torch.tensor([500.0])
    model = tiny_dit()
    with_pass = torch.compile(model, backend="quantsparse", options={"recipe": "off"})(*inputs)
    (report,) = (p for p in qs_compiler.reports()[-1].passes if p.name == "tanh_gelu")
    print(f"tanh_gelu: {report.matched} matched, skipped: {report.skipped}")
    print(f"relative error: {relative_error(with_pass, model(*inputs)):.6f}")
    tanh_gelu.remove()
    print(f"removed; order: {', '.join(pass_names())}")


if __name__ == "__main__":
    main()
