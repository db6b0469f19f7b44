"""One table of tolerances by dtype, and the comparison that uses it."""

import torch

# Largest relative error ||actual - expected|| / ||expected|| by the dtype of the result.
RELATIVE_ERROR = {
    torch.float64: 1e-12,  # sums in another order
    torch.float32: 1e-5,  # sums of up to some thousand float32 terms in another order; epsilon is 1.2e-7
    torch.float16: 1e-3,  # one rounding to 11 bits: at most 4.9e-4 an element, and inputs rounded once more
    torch.bfloat16: 8e-3,  # one rounding to 8 bits: at most 3.9e-3 an element, and inputs rounded once more
}
# Where an int8 or fp8 kernel also rounds the softmax weights, to 3 bits of mantissa: at most 2^-4 an element.
FP8_WEIGHTS_ERROR = 6e-2

# tanh.approx.f32 is off by 2^-11 of its result (PTX ISA), so GELU(y) = y / 2 * (1 + tanh) by 2^-12 |y|: an eighth of
# half a step of bf16 at y, and a thirty-second of a step of int8 in a row whose largest value is |y|.
TANH_GELU_ERROR = 2**-12


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64, over the finite entries; the others must agree exactly."""
    actual, expected = actual.double(), expected.double()
    finite = torch.isfinite(expected)
    assert torch.equal(actual[~finite], expected[~finite]), "non-finite entries differ"
    assert torch.isfinite(actual[finite]).all(), "the result has non-finite entries that are not expected"
    difference, norm = (actual - expected)[finite].norm(), expected[finite].norm()
    return float(difference / norm) if norm > 0 else float(difference)


def codes_apart(actual: torch.Tensor, expected: torch.Tensor) -> int:
    """How far two results in int8 or float8 lie apart at most, counted in codes: neighbours by 1."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    bits = [x.view(torch.int8).int() for x in (actual, expected)]
    if actual.dtype != torch.int8:  # sign and magnitude, whose order is that of the numbers
        bits = [torch.where(x < 0, -(x & 127), x) for x in bits]
    return int((bits[0] - bits[1]).abs().max())


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """Same shape, and a relative error within the table's entry for the dtype of `actual`, or within `tolerance`."""
    assert actual.shape == expected.shape
    limit = RELATIVE_ERROR[actual.dtype] if tolerance is None else tolerance
    error = relative_error(actual, expected)
    assert error <= limit, f"relative error {error:.3g} exceeds {limit:.3g}"
