"""Which references generated CUDA code calls, told from its text."""

from qs_compiler.backend import _called_references

CODE = """
# Graph fragment:
#   %linear : Tensor "bf16[4, 4]cuda" = call_function[target=torch.ops.quantsparse.linear.default](args = (%xq, %xs))
#   return %linear
def call(args):
    buf0 = torch.ops.quantsparse.select_blocks.default(arg0_1, None, 2)
    buf1 = torch.ops.quantsparse.low_rank.default(buf0, 4)
"""


def test_calls_count_and_comments_do_not() -> None:
    reason = "the generated code calls its reference"
    assert _called_references([CODE], set()) == [("low_rank", reason), ("select_blocks", reason)]
    assert _called_references([CODE], {"low_rank"}) == [("select_blocks", reason)]
