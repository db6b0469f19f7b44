"""QuantSparse as a quantisation of diffusers: pack while a checkpoint is read, save and load the packed model.

    from qs_compiler import QuantSparseConfig
    config = QuantSparseConfig("w8a8")
    model = WanTransformer3DModel.from_pretrained(path, quantization_config=config, torch_dtype=torch.bfloat16)
    model.save_pretrained("wan-w8a8")
    model = WanTransformer3DModel.from_pretrained("wan-w8a8", torch_dtype=torch.bfloat16)

Importing this module registers the quantiser. `import qs_compiler` does so where diffusers is imported already, so that
neither import pays for the other.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.utils.import_utils import is_accelerate_available
from torch import nn

from .errors import ArtifactError, UnsupportedError
from .options import Recipe
from .packed_linear import PACKED, PackedLinear
from .packing import empty_packed_weight, pack_weight
from .pipeline import plan_layers, replace_linears

NAME = "quantsparse"


class QuantMethod(str, enum.Enum):  # noqa: UP042  (diffusers compares with str and hashes it as one)
    """What diffusers reads the name of a quantisation from."""

    QUANTSPARSE = NAME


class QuantSparseConfig(QuantizationConfigMixin):
    """What to pack and how, as diffusers wants it told.

    Args:
        recipe: a name ("w8a8", "w4a8"), a dict or a Recipe. Weights are rounded without data. A density plays no part
            here; give it when the model is compiled or attached.

    Raises:
        RecipeError: the recipe is not valid.
        UnsupportedError: it packs nothing.
    """

    def __init__(self, recipe: str | Mapping[str, Any] | Recipe = "w8a8", **_: Any) -> None:
        self.quant_method = QuantMethod.QUANTSPARSE  # type: ignore[assignment]
        self.recipe = Recipe.parse(recipe)
        if self.recipe.weight_format is None:
            raise UnsupportedError(f"recipe '{self.recipe}' packs nothing; load the model without quantization_config.")

    def to_dict(self) -> dict[str, Any]:
        """JSON values, as they are written into the model's config.json."""
        return {"quant_method": NAME, "recipe": self.recipe.to_dict()}

    to_diff_dict = to_dict

    def __repr__(self) -> str:
        return f"QuantSparseConfig({str(self.recipe)!r})"


class QuantSparseQuantizer(DiffusersQuantizer):
    """Puts a PackedLinear in the place of each linear that the recipe compresses, as its weight comes in.

    From a 16-bit checkpoint each weight is packed when it is read, so one of them is in memory at a time. For a packed
    checkpoint the modules are there before it is read.
    """

    quantization_config: QuantSparseConfig
    requires_calibration = False
    use_keep_in_fp32_modules = True
    is_serializable = property(lambda self: True)
    is_compileable = property(lambda self: True)
    is_trainable = property(lambda self: False)

    def __init__(self, quantization_config: QuantSparseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._recipes: dict[str, Recipe] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """diffusers builds a quantised model by accelerate, and blames something else where it is missing."""
        if not is_accelerate_available():
            raise UnsupportedError("packing a model while it is loaded needs accelerate; pip install accelerate.")

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """diffusers' own default; without a dtype it would cast each tensor to that of its placeholder."""
        return torch.float32 if torch_dtype is None else torch_dtype

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self._recipes = plan_layers(model, self.quantization_config.recipe)
        if not self._recipes:
            raise UnsupportedError(f"this {type(model).__name__} has no linears that can be packed.")
        if self.pre_quantized:
            replace_linears(model, self._recipes, _empty)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, state_dict: Any, **kwargs: Any
    ) -> bool:
        """Whether `create_quantized_param` is to take this tensor of the checkpoint."""
        layer, _, field = param_name.rpartition(".")
        return layer in self._recipes and field in ((*PACKED,) if self.pre_quantized else ("weight",))

    def create_quantized_param(  # type: ignore[override]
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: Any,
        state_dict: Mapping[str, torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Pack a weight, or take a packed tensor as it was saved."""
        layer, _, field = param_name.rpartition(".")
        if field == "weight":
            make = functools.partial(_pack, param_value.to(target_device))
            replace_linears(model, {layer: self._recipes[layer]}, make)
        else:  # param_value has been cast to the model's dtype
            setattr(model.get_submodule(layer), field, state_dict[param_name].to(target_device))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name in self._recipes:
            linear: Any = model.get_submodule(name)
            if not isinstance(linear, PackedLinear):
                raise ArtifactError(f"the checkpoint has no '{name}.weight'; download it again.")
            for field, tensor in linear.packed.tensors().items():
                if tensor.is_meta:
                    raise ArtifactError(f"the packed checkpoint has no '{name}.{field}'; save it again.")
            linear._dtype_of_weight = torch.empty_like(linear._dtype_of_weight, device=linear.wq.device)
        return model


def _empty(name: str, linear: nn.Linear, recipe: Recipe) -> PackedLinear:
    packed = empty_packed_weight((linear.out_features, linear.in_features), recipe, "meta")
    return PackedLinear(packed, linear.bias, linear.weight.dtype)


def _pack(weight: torch.Tensor, name: str, linear: nn.Linear, recipe: Recipe) -> PackedLinear:
    return PackedLinear(pack_weight(weight, recipe), linear.bias, weight.dtype)


auto.AUTO_QUANTIZER_MAPPING[NAME] = QuantSparseQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = QuantSparseConfig
