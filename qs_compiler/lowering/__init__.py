"""How Inductor lowers the ops of the `quantsparse` library, and GELU: one lowering a file, named like its op."""

if __name__ != "qs_compiler.lowering":
    raise ImportError("import qs_compiler.lowering: the top-level lowering/ is a link for readers")

import importlib
from pathlib import Path

from .. import ops  # noqa: F401  (defines the ops)
from .fallbacks import collect_fallbacks

LOWERINGS = (
    "add_residual",
    "block_scores",
    "dequantize",
    "expand_w4",
    "fetch",
    "gelu",
    "linear",
    "low_rank",
    "pack_values",
    "quantize_keys",
    "quantize_rows",
    "refresh_attention",
    "select_blocks",
    "send",
    "sparse_attention",
)

__all__ = ["LOWERINGS", "collect_fallbacks", "register_lowerings", "source_files"]


def register_lowerings() -> None:
    """Tell Inductor about every lowering; a second call does nothing."""
    for name in LOWERINGS:
        importlib.import_module(f".{name}", __name__)


def source_files() -> list[str]:
    """Every file on which the code generated for our ops depends, for the key of the compile caches."""
    here = Path(__file__).parent
    package = here.parent
    found = [*here.rglob("*.py"), *here.rglob("*.jinja"), *(package / "ops").glob("*.py"), package / "_compat.py"]
    return sorted(str(path) for path in found)
