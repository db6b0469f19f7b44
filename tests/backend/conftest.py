"""Fixtures of the backend's tests."""

from collections.abc import Iterator

import pytest
import torch

from qs_compiler import _compat


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No compiled function outlives its test; nothing needs gradients."""
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def eager_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the rewritten graphs with the reference ops instead of compiling them.

    For tests of what happens around the kernels: which tensors, which caches, which step.
    """
    monkeypatch.setattr(_compat, "compile_graph", lambda module, inputs, patches, own_context: module.forward)
