"""The ops of the `quantsparse` library, one a file: schema, reference, fake, cost. Importing this defines them all."""

from . import (
    add_residual,
    block_scores,
    dequantize,
    expand_w4,
    fetch,
    linear,
    low_rank,
    pack_values,
    quantize_keys,
    quantize_rows,
    refresh_attention,
    select_blocks,
    send,
    sparse_attention,
)
from .expand_w4 import pack_int4, unpack_int4
from .library import COSTS, OpCost, OpInputError

__all__ = [
    "COSTS",
    "OpCost",
    "OpInputError",
    "add_residual",
    "block_scores",
    "dequantize",
    "expand_w4",
    "fetch",
    "linear",
    "low_rank",
    "pack_int4",
    "pack_values",
    "quantize_keys",
    "quantize_rows",
    "refresh_attention",
    "select_blocks",
    "send",
    "sparse_attention",
    "unpack_int4",
]
