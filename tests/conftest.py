"""What holds for all tests."""

import logging

import pytest
import torch

# pytest listens to loggers that do not propagate; for torch that is a wish for a trace of all that it compiles, which it
# then writes: every graph, every stack. A logger that propagates has no handler of its own, and torch stays quiet.
logging.getLogger("torch.__trace").propagate = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` show what no CPU can, so they wait for a machine with one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
