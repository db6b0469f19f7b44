"""Packing: how far a packed weight is from its original. PackedLinear: what a module must survive."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qs_compiler.errors import QuantSparseError, UnsupportedError
from qs_compiler.options import FORMATS, Recipe
from qs_compiler.packed_linear import PackedLinear
from qs_compiler.packing import PackedWeight, pack_weight, why_not

PACKABLE = [name for name in FORMATS if name != "off"]
ONE_SCALE_A_ROW = {"w8a8": 127, "w8a16": 127, "w6a6": 31}
GROUPED = {"w4a8": 18, "w4a16": 18, "w4a4": 18, "w4fp8": 64}


def random_weight(rows: int = 48, columns: int = 256, seed: int = 0) -> torch.Tensor:
    """Gaussian rows of unlike size, one with an outlier, one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows)[:, None]
    weight[3, 5] *= 40
    weight[7] = 0
    return weight


def random_rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1)))[0]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a.double() - b.double()).norm() / b.double().norm()).detach())


# --- packing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_SCALE_A_ROW)
def test_integers_err_by_at_most_half_a_step(name: str) -> None:
    weight = random_weight()
    step = weight.abs().amax(1, keepdim=True) / ONE_SCALE_A_ROW[name]
    packed = pack_weight(weight, Recipe(name))
    assert packed.wq.dtype == torch.int8
    error = (packed.dequantize() - weight).abs()
    assert bool((error <= step / 2 * (1 + 1e-4)).all()), "float32 rounding of codes near a tie is the 1e-4"


def test_fp8_errs_by_at_most_half_a_unit_in_the_last_place() -> None:
    weight = random_weight()
    step = weight.abs().amax(1, keepdim=True) / 448
    packed = pack_weight(weight, Recipe("fp8"))
    assert packed.wq.dtype == torch.float8_e4m3fn
    error = (packed.dequantize() - weight).abs()
    bound = torch.maximum(weight.abs() * 2**-4, step * 2**-10)  # 3 mantissa bits; subnormals are multiples of 2^-9
    assert bool((error <= bound * (1 + 1e-4)).all())


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("group", [32, 128])
def test_int4_groups(name: str, group: int) -> None:
    weight = random_weight()
    recipe = Recipe(name, group_size=group)  # type: ignore[arg-type]
    packed = pack_weight(weight, recipe)
    assert packed.multipliers is not None
    assert packed.wq.shape == (48, 128)
    assert packed.multipliers.shape == (48, 256 // group)
    allowed = [1, 2, 4, 8, 16, 32, 64] if name == "w4fp8" else list(range(1, 19))
    assert set(packed.multipliers.unique().tolist()) <= set(allowed)
    assert packed.multipliers.max() == GROUPED[name]
    # The group's squared error is at most that of the multiplier which clips nothing, half a step for each element.
    groups = weight.unflatten(1, (-1, group))
    ideal = (groups.abs().amax(-1) / (7 * packed.ws[:, None])).clamp(min=1)
    unclipped = 2 ** torch.ceil(torch.log2(ideal)) if name == "w4fp8" else ideal.ceil()
    error = (packed.dequantize().unflatten(1, (-1, group)) - groups).square().mean(-1)
    assert bool((error <= (unclipped * packed.ws[:, None] / 2) ** 2 * (1 + 1e-4)).all())


@pytest.mark.parametrize(("name", "dtype"), [("w4a8", torch.int8), ("w4fp8", torch.float8_e4m3fn)])
def test_int4_expands_exactly_to_8_bit(name: str, dtype: torch.dtype) -> None:
    packed = pack_weight(random_weight(), Recipe(name))
    assert packed.multipliers is not None
    w8 = torch.ops.quantsparse.expand_w4(packed.wq, packed.multipliers, dtype)
    assert torch.equal(w8.float() * packed.ws[:, None], packed.dequantize())


@pytest.mark.parametrize(
    ("name", "worst"),
    # Measured 0.0079, 0.0264, 0.0322, 0.1141, 0.1327; int4 with a float scale for each group of 128 gives 0.1173.
    [("w8a8", 0.0085), ("fp8", 0.027), ("w6a6", 0.033), ("w4a8", 0.116), ("w4fp8", 0.134)],
)
def test_relative_error_of_a_gaussian_weight(name: str, worst: float) -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    assert worst * 0.9 < relative(pack_weight(weight, Recipe(name)).dequantize(), weight) < worst


def test_integer_multipliers_are_no_worse_than_a_float_scale_for_each_group() -> None:
    weight = random_weight(256, 1024)
    groups = weight.unflatten(1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 7
    ideal = (torch.round(groups / scale) * scale).flatten(1)
    keep = torch.arange(256) != 3  # its outlier spans more than 1 to 18
    assert relative(pack_weight(weight, Recipe("w4a8")).dequantize()[keep], weight[keep]) < relative(
        ideal[keep], weight[keep]
    )


def test_an_outlier_costs_its_own_group_only() -> None:
    weight = torch.randn(1, 512, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 40
    dequantized = pack_weight(weight, Recipe("w4a8")).dequantize()
    assert relative(dequantized[:, 128:], weight[:, 128:]) < 0.17  # 0.157: its multipliers are 1 and 2 of 18
    one_scale = torch.round(weight / (40 / 7)) * (40 / 7)
    assert relative(one_scale[:, 128:], weight[:, 128:]) > 0.9


@pytest.mark.parametrize("name", PACKABLE)
def test_smoothing_and_rotation_come_out_again(name: str) -> None:
    weight = random_weight(64, 96)
    smooth = torch.rand(96, generator=torch.Generator().manual_seed(2)) * 2 + 0.5
    rotation = random_rotation(16)
    packed = pack_weight(weight, Recipe(name), smooth, rotation)
    assert packed.smooth is smooth
    assert packed.rotation is rotation
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(3))
    plain = PackedWeight(packed.wq, packed.ws, packed.multipliers, activation=packed.activation).dequantize()
    turned = ((x * smooth).unflatten(-1, (-1, 16)) @ rotation).flatten(-2) @ plain.t()
    assert relative(x @ packed.dequantize().t(), turned) < 1e-5
    worst = 0.2 if "w4" in name else 0.05
    assert relative(packed.dequantize(), weight) < worst


def test_rotation_spreads_an_outlier_column() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    weight[:, 3] *= 30
    columns = torch.arange(128) != 3
    rotated = pack_weight(weight, Recipe("w4a8"), rotation=random_rotation(128)).dequantize()
    plain = pack_weight(weight, Recipe("w4a8")).dequantize()
    assert relative(rotated, weight) < relative(plain, weight)
    assert relative(plain[:, columns], weight[:, columns]) > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PACKABLE)
def test_half_precision_weights_pack_like_their_float32_values(name: str, dtype: torch.dtype) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    low, full = pack_weight(weight, Recipe(name)).tensors(), pack_weight(weight.float(), Recipe(name)).tensors()
    assert low.keys() == full.keys()
    for field in low:
        assert low[field].dtype == full[field].dtype
        assert torch.equal(low[field].float(), full[field].float())


@pytest.mark.parametrize("name", PACKABLE)
def test_zeros_stay_zeros(name: str) -> None:
    packed = pack_weight(torch.zeros(4, 32), Recipe(name))
    assert torch.equal(packed.dequantize(), torch.zeros(4, 32))
    row = random_weight()
    assert torch.equal(pack_weight(row, Recipe(name)).dequantize()[7], torch.zeros(256))


@pytest.mark.parametrize(("columns", "groups"), [(80, 5), (1000, 125), (24, 3), (2, 1), (5120, 40)])
def test_groups_of_columns_that_128_does_not_divide(columns: int, groups: int) -> None:
    weight = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    packed = pack_weight(weight, Recipe("w4a8"))
    assert packed.multipliers is not None
    assert packed.multipliers.shape == (3, groups)
    assert packed.shape == (3, columns)
    assert relative(packed.dequantize(), weight) < 0.14


@pytest.mark.parametrize(
    ("weight", "name", "text"),
    [
        (torch.ones(4, 5), "w4a8", "packed as w4a8: int4 is stored two a byte, and it has 5 input features; name its"),
        (torch.ones(4, 4, 3), "w8a8", "its shape (4, 4, 3) is not that of a matrix"),
        (torch.ones(0, 4), "w8a8", "its shape (0, 4) is not that of a matrix"),
        (torch.ones(4, 4, dtype=torch.int8), "w8a8", "it is int8, not a 16- or 32-bit float"),
        (torch.ones(4, 4, dtype=torch.float8_e4m3fn), "w8a8", "it is float8_e4m3fn, not a 16- or 32-bit float"),
        (torch.ones(4, 4), "off", "recipe 'off' keeps it in 16 bit"),
    ],
)
def test_what_cannot_be_packed(weight: torch.Tensor, name: str, text: str) -> None:
    assert why_not(weight, Recipe(name)) is not None
    with pytest.raises(UnsupportedError) as caught:
        pack_weight(weight, Recipe(name))
    assert text in str(caught.value)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", PACKABLE)
def test_a_weight_that_is_not_finite(name: str, value: float) -> None:
    weight = torch.ones(4, 32)
    weight[2, 3] = value
    with pytest.raises(UnsupportedError, match="a weight holds inf or NaN, so it has no scale; load a sound"):
        pack_weight(weight, Recipe(name))


def test_calibrated_tensors_that_do_not_fit() -> None:
    with pytest.raises(QuantSparseError, match=r"smooth has shape \(16,\)"):
        pack_weight(torch.ones(4, 32), Recipe("w8a8"), smooth=torch.ones(16))
    with pytest.raises(QuantSparseError, match="needs a multiple of 24"):
        pack_weight(torch.ones(4, 32), Recipe("w4a8"), rotation=torch.eye(24))


# --- the module --------------------------------------------------------------------------------------------------


def make(name: str = "w4a8", bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, PackedLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias, dtype=dtype)
    calibrated = {"smooth": torch.rand(64) + 0.5, "rotation": random_rotation(16)}
    return linear, PackedLinear.from_linear(linear, Recipe(name, group_size=32), **calibrated)


def assert_same_tensors(module: PackedLinear, before: dict[str, torch.Tensor]) -> None:
    """Codes and scales have the dtypes and the very values that they had."""
    now = module.packed.tensors()
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        assert now[name].dtype == tensor.dtype, name
        assert torch.equal(now[name].float().cpu(), tensor.float()), name


def snapshot(module: PackedLinear) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.packed.tensors().items()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", PACKABLE)
def test_forward(name: str, bias: bool) -> None:
    linear, packed = make(name, bias)
    x = torch.randn(2, 7, 64)
    y = packed(x)
    assert torch.equal(y, F.linear(x, packed.weight, linear.bias))
    assert relative(y, linear(x)) < (0.2 if "w4" in name else 0.05)
    assert packed.activation == FORMATS[name].activation
    assert (packed.in_features, packed.out_features) == (64, 48)


def test_only_the_bias_is_a_parameter_and_it_is_the_linears_own() -> None:
    linear, packed = make()
    assert dict(packed.named_parameters()) == {"bias": linear.bias}
    assert list(make(bias=False)[1].parameters()) == []
    assert set(packed.state_dict()) == {"wq", "ws", "multipliers", "smooth", "rotation", "bias"}
    plain = PackedLinear.from_linear(linear, Recipe("w8a8"))
    assert set(plain.state_dict()) == {"wq", "ws", "bias"}


def test_a_bias_that_is_no_parameter_becomes_one() -> None:
    packed = PackedLinear(pack_weight(torch.randn(4, 8), Recipe()), torch.ones(4))
    assert isinstance(packed.bias, nn.Parameter)
    assert not packed.bias.requires_grad


def test_weight_has_the_dtype_and_device_of_the_linears() -> None:
    for bias in (True, False):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            linear, packed = make(bias=bias, dtype=dtype)
            assert (packed.weight.dtype, packed.weight.device) == (linear.weight.dtype, linear.weight.device)
            assert packed.weight.shape == linear.weight.shape
            assert packed(torch.randn(3, 64, dtype=dtype)).dtype == dtype


def test_training_flag_is_kept() -> None:
    linear, _ = make()
    assert not PackedLinear.from_linear(linear.eval(), Recipe()).training
    assert PackedLinear.from_linear(linear.train(), Recipe()).training


CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "bf16": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "bfloat16()": (lambda m: m.bfloat16(), torch.bfloat16),
    "half()": (lambda m: m.half(), torch.float16),
    "double()": (lambda m: m.double(), torch.float64),
    "type()": (lambda m: m.type(torch.bfloat16), torch.bfloat16),
    "device and dtype": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "back and forth": (lambda m: m.half().to(torch.bfloat16).float(), torch.float32),
}


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "in a model"])
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", ["w8a8", "w4a8", "fp8", "w4fp8"])
def test_casts_reach_the_bias_and_the_nominal_dtype_only(name: str, cast: str, inside: bool) -> None:
    _, packed = make(name)
    before = snapshot(packed)
    change, dtype = CASTS[cast]
    change(nn.Sequential(packed) if inside else packed)
    assert packed.bias is not None
    assert packed.bias.dtype == dtype
    assert_same_tensors(packed, before)
    if dtype != torch.float64:  # the op knows no float64
        assert packed.weight.dtype == dtype
        assert packed(torch.randn(2, 64).to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "fp8"])
def test_moves_between_devices(name: str) -> None:
    _, packed = make(name)
    dtypes = {field: tensor.dtype for field, tensor in packed.packed.tensors().items()}
    moved = packed.to("meta", torch.bfloat16)
    assert {f: t.dtype for f, t in moved.packed.tensors().items()} == dtypes
    assert all(t.is_meta for t in (*moved.packed.tensors().values(), moved.bias, moved.weight))
    empty = moved.to_empty(device="cpu")
    assert {f: t.dtype for f, t in empty.packed.tensors().items()} == dtypes
    assert not any(t.is_meta for t in empty.packed.tensors().values())
    reference = make(name)[1]
    empty.load_state_dict(reference.state_dict())
    assert torch.equal(empty.weight, reference.weight.to(torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["w8a8", "w4a8", "fp8"])
def test_moves_to_the_gpu_and_back(name: str) -> None:
    linear, packed = make(name)
    before = snapshot(packed)
    packed.cuda()
    assert packed.weight.is_cuda
    x = torch.randn(32, 64)
    assert relative(packed(x.cuda()).cpu(), linear(x)) < (0.2 if "w4" in name else 0.05)
    assert_same_tensors(packed.to("cpu", torch.bfloat16), before)


def test_share_memory() -> None:
    _, packed = make("fp8")
    before = snapshot(packed)
    packed.share_memory()
    assert all(t.is_shared() for t in packed.packed.tensors().values())
    assert_same_tensors(packed, before)


@pytest.mark.parametrize("name", PACKABLE)
def test_state_dict_round_trip(name: str) -> None:
    _, packed = make(name)
    other = PackedLinear.from_linear(
        nn.Linear(64, 48), Recipe(name, group_size=32), smooth=torch.ones(64), rotation=torch.eye(16)
    )
    x = torch.randn(3, 64)
    assert not torch.equal(other(x), packed(x))
    assert other.load_state_dict(packed.state_dict()).missing_keys == []
    assert torch.equal(other(x), packed(x))


def test_state_dict_of_something_else_is_refused() -> None:
    linear, packed = make()
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weight"'):
        packed.load_state_dict(linear.state_dict())
    wide = PackedLinear.from_linear(nn.Linear(128, 48), Recipe("w4a8", group_size=32))
    with pytest.raises(RuntimeError, match="size mismatch for wq"):
        wide.load_state_dict(packed.state_dict(), strict=False)


def through_pickle(module: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(module))
    return loaded


def through_torch_save(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, through_pickle, through_torch_save], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", ["w8a8", "w4a8", "fp8"])
def test_copies_are_equal_and_independent(name: str, duplicate: Callable[[nn.Module], PackedLinear]) -> None:
    _, packed = make(name, dtype=torch.bfloat16)
    before = snapshot(packed)
    other = duplicate(packed)
    assert_same_tensors(other, before)
    assert other.weight.dtype == torch.bfloat16
    assert other.activation == packed.activation
    other.ws.zero_()
    other.half()
    assert_same_tensors(packed, before)


def test_resident_bytes() -> None:
    linear = nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16)
    held = {
        name: sum(b.untyped_storage().nbytes() for b in PackedLinear.from_linear(linear, Recipe(name)).buffers())
        for name in ("w8a8", "w4a8", "fp8")
    }
    scales, multipliers = 4 * 1024, 1024 * 8
    assert held == {
        "w8a8": 1024**2 + scales,
        "w4a8": 1024**2 // 2 + scales + multipliers,
        "fp8": 1024**2 + scales,
    }


def test_weight_only_storage() -> None:
    linear, _ = make()
    packed = PackedLinear.from_linear(linear, Recipe("w4a8").weight_only())
    assert packed.activation == "none"
    assert packed.wq.dtype == torch.uint8
    assert relative(packed(torch.randn(1, 64)), linear(torch.randn(1, 64))) < 2  # runs on one row


def test_repr_says_how_it_is_stored() -> None:
    assert repr(make("w4a8")[1]) == (
        "PackedLinear(in_features=64, out_features=48, bias=True, weight=int4, activation=int8)"
    )
    assert "weight=float8_e4m3fn, activation=fp8" in repr(make("fp8")[1])


def test_gradients_pass_through_to_the_input() -> None:
    linear, packed = make("w8a8")
    x = torch.randn(2, 64, requires_grad=True)
    packed(x).sum().backward()
    assert x.grad is not None
    assert relative(x.grad, linear.weight.sum(0).expand(2, -1)) < 0.05


def test_autocast_is_that_of_a_linear() -> None:
    linear, packed = make()
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(torch.randn(2, 64)).dtype == linear(torch.randn(2, 64)).dtype == torch.bfloat16


def targets(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("name", PACKABLE)
def test_it_exports_as_two_ops(name: str) -> None:
    _, packed = make(name)
    x = torch.randn(4, 64)
    program = torch.export.export(packed.eval(), (x,), strict=False)
    assert targets(program.graph) == ["quantsparse.dequantize.default", "aten.linear.default"]
    assert torch.equal(program.module()(x), packed(x))


def test_it_compiles_into_one_graph_with_the_packed_tensors_as_inputs() -> None:
    _, packed = make()
    seen: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        seen.append(module)
        return module.forward

    x = torch.randn(4, 64)
    with torch.no_grad():
        y = torch.compile(packed, backend=backend, fullgraph=True)(x)
    (module,) = seen
    assert torch.equal(y, packed(x))
    assert sum("dequantize" in target for target in targets(module.graph)) == 1
    inputs = {node.name for node in module.graph.nodes if node.op == "placeholder"}
    assert all(any(field in name for name in inputs) for field in ("wq", "ws", "multipliers", "smooth", "rotation"))
