"""What holds for all tests."""

import logging

import pytest
import torch

# pytest listens to loggers that do not propagate. Torch takes that for a wish to have every graph and stack of its
# compiles written down, a sixth of the suite's time. It leaves a logger alone that propagates and has no handler.
logging.getLogger("torch.__trace").propagate = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` show what no CPU can, so they wait for a machine with one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
