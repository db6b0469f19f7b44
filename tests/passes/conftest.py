"""Passes are shown on exported graphs: the same IR as a captured Dynamo graph, without a compile."""

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from qs_compiler.capture import Capture, capture_dynamo
from qs_compiler.options import BackendOptions, Recipe
from qs_compiler.passes import PassContext, Phase
from qs_compiler.runtime.weights import CallTimeWeights


@pytest.fixture
def context() -> Callable[..., PassContext]:
    """Make the context of one phase for a module: `context(model, args, recipe=..., phase=...)`."""

    def build(
        model: nn.Module, args: tuple, recipe: object = "w8a8", phase: Phase = Phase.DENSE, attached: bool = False
    ) -> PassContext:
        captured: list[Capture] = []

        def backend(module: fx.GraphModule, inputs: list, **_: object) -> Callable:
            captured.append((capture_dynamo(module, inputs), inputs))
            return module.forward

        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(model, backend=backend, fullgraph=True)(*args)
        capture, inputs = captured[0]
        return PassContext(
            capture, Recipe.parse(recipe), BackendOptions(), phase, CallTimeWeights(inputs), attached=attached
        )

    return build


def targets(graph: fx.Graph) -> list[str]:
    """Names of the called ops, in order."""
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


