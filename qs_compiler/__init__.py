"""A torch.compile backend that compresses a video diffusion transformer while it compiles it.

    torch.compile(model, backend="quantsparse")
"""

from ._compat import register_backend_once
from .artifact import Artifact
from .backend import quantsparse
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
    "compress",
    "denoising",
    "invalidate",
    "load",
    "register_pass",
    "reports",
]

register_backend_once(quantsparse, "quantsparse")
