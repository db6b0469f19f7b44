"""The graph passes, one a file, in the order in which they run."""

if __name__ != "qs_compiler.passes":
    raise ImportError("import qs_compiler.passes: the top-level passes/ is a link for readers")

from .base import AttentionSite, GraphPass, PassContext, PassResult, Phase, splice
from .manager import Registration, ordered_passes, pass_names, register_built_in, register_pass, run_passes
from .order_tokens import OrderTokens
from .outline_repeated_blocks import OutlineRepeatedBlocks
from .quantize_attention import QuantizeAttention
from .quantize_linear import QuantizeLinear
from .reparameterize_residual import ReparameterizeResidual
from .sparsify_attention import SparsifyAttention
from .stage_caches import StageCaches
from .trim_padding_mask import TrimPaddingMask

register_built_in(
    TrimPaddingMask(),
    QuantizeLinear(),
    OrderTokens(),
    SparsifyAttention(),
    QuantizeAttention(),
    ReparameterizeResidual(),
    StageCaches(),
    OutlineRepeatedBlocks(),
)

__all__ = [
    "AttentionSite",
    "GraphPass",
    "PassContext",
    "PassResult",
    "Phase",
    "Registration",
    "ordered_passes",
    "pass_names",
    "register_pass",
    "run_passes",
    "splice",
]
