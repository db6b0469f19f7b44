"""What a packed linear's input goes through, and its inverse that folds into the weight.

    x' = (x * smooth) blockdiag(rotation)        W' = (W / smooth) blockdiag(rotation)        x' W'^T = x W^T
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch

from ..ops.quantize_rows import transform as transform_rows
from ..packing import PackedWeight


@dataclasses.dataclass(frozen=True, eq=False)
class Transform:
    """smooth (K,) float32 > 0 or None; rotation (R, R) float32, orthogonal, R divides K, or None.

    At run time both are applied inside the fused quantiser: K products a row, and 2 K R FLOPs a row for the rotation.
    """

    smooth: torch.Tensor | None = None
    rotation: torch.Tensor | None = None

    def of_input(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> x' float32."""
        return transform_rows(x, self.smooth, self.rotation)

    def of_weight(self, w: torch.Tensor) -> torch.Tensor:
        """(N, K) -> W' float32."""
        return transform_rows(w, None if self.smooth is None else self.smooth.reciprocal(), self.rotation)

    def quantized_input(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """(..., K) -> x' float32 as the run-time quantiser rounds it; "none" does not round."""
        if activation == "none":
            return self.of_input(x)
        codes, scales = torch.ops.quantsparse.quantize_rows(x, self.smooth, self.rotation, activation)
        return codes.float() * scales[..., None]


@functools.cache  # one tensor for all layers, so that an artifact stores it once
def hadamard(size: int, device: torch.device) -> torch.Tensor:
    """The orthogonal Hadamard matrix of Sylvester, (size, size) float32; size is a power of two. Not to be edited."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * size**-0.5


def cayley(parameter: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """`start` times the Cayley transform (I - A)(I + A)^-1 of A = P - P^T: orthogonal for every parameter P (R, R)."""
    skew = parameter - parameter.t()
    eye = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    return start @ torch.linalg.solve(eye + skew, eye - skew)


def moved(layers: Mapping[str, PackedWeight], device: torch.device) -> dict[str, PackedWeight]:
    """Packed weights on another device. What they share stays shared, and every Hadamard matrix is one tensor."""
    places: dict[int, torch.Tensor] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return places.setdefault(id(tensor), tensor.to(device))

    there = {}
    for name, packed in layers.items():
        tensors = {field: move(tensor) for field, tensor in packed.tensors().items()}
        rotation = tensors.get("rotation")
        if rotation is not None and len(rotation).bit_count() == 1:
            common = hadamard(len(rotation), device)
            tensors["rotation"] = common if torch.equal(rotation, common) else rotation
        there[name] = dataclasses.replace(packed, **tensors)
    return there
