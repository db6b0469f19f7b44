"""Fixtures of the demo's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qs_compiler import _compat
from tests.tiny_demo import write_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model."""
    return write_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture
def eager_graphs() -> Iterator[None]:
    """Rewritten graphs run with the reference ops; nothing compiled outlives the test."""
    torch._dynamo.reset()
    with _compat.eager_graphs(), torch.no_grad():
        yield
    torch._dynamo.reset()
