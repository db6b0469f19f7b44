"""A torch.compile backend that compresses a video diffusion transformer while it compiles it.

torch.compile(model, backend="quantsparse")
"""

import contextlib
import importlib
import sys
from typing import Any

from ._compat import register_backend_once
from .artifact import Artifact
from .backend import quantsparse
from .calibration import calibrate
from .dump import reports
from .errors import QuantSparseError
from .export import compress
from .loading import load
from .options import Recipe
from .passes import register_pass
from .pipeline import attach
from .runtime.tracker import denoising, invalidate

__version__ = "0.1.0"

__all__ = [
    "Artifact",
    "QuantSparseError",
    "Recipe",
    "attach",
    "calibrate",
    "compress",
    "denoising",
    "invalidate",
    "load",
    "register_pass",
    "reports",
]

register_backend_once(quantsparse, "quantsparse")


def __getattr__(name: str) -> Any:
    """`QuantSparseConfig` needs diffusers, so it is imported when it is asked for."""
    if name == "QuantSparseConfig":
        return importlib.import_module(".quantizer", __name__).QuantSparseConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if sys.modules.get("diffusers") is not None:
    with contextlib.suppress(ImportError):  # a diffusers too old to have quantisers
        importlib.import_module(".quantizer", __name__)
