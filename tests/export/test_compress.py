"""compress(): the same passes over an ExportedProgram; packed weights, and nothing else is changed."""

import copy
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim, ExportedProgram

import qs_compiler
from qs_compiler import Artifact, Recipe, _compat
from qs_compiler.errors import ArtifactError, OptionError, QuantSparseError, UnsupportedError
from qs_compiler.options import FORMATS
from qs_compiler.packing import pack_weight
from qs_compiler.pipeline import plan_layers
from tests.backend.models import make as tiny_dit

from .models import MLPAttention, mlp_inputs, wan, wan_inputs

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch.export.load of torch 2.11

linear_op = torch.ops.quantsparse.linear.default
dequantize_op = torch.ops.quantsparse.dequantize.default

# Largest relative error on the tiny Wan, about twice what is measured.
ERROR = {"w8a8": 0.004, "fp8": 0.02, "w4a8": 0.035, "w4fp8": 0.035, "w8a16": 0.003, "w4a16": 0.035}


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def wan_program() -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(wan(), (), wan_inputs(), strict=False)


def export(model: torch.nn.Module, *args: Any, **kwargs: Any) -> ExportedProgram:
    return torch.export.export(model, args, kwargs, strict=False)


def count(program: ExportedProgram, target: object) -> int:
    return len(program.graph.find_nodes(op="call_function", target=target))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def saved(program: ExportedProgram) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def size(program: ExportedProgram) -> int:
    return sum(t.nbytes for t in program.state_dict.values())


def artifact_of(model: torch.nn.Module, recipe: str, **calibrated: torch.Tensor) -> Artifact:
    parsed = Recipe.parse(recipe)
    layers = {n: pack_weight(model.get_submodule(n).weight, parsed, **calibrated) for n in plan_layers(model, parsed)}
    return Artifact.of(model, parsed, layers)


# --- what is compressed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ERROR)
def test_a_wan_is_compressed(wan_program: ExportedProgram, recipe: str) -> None:
    program = qs_compiler.compress(wan_program, recipe=recipe)
    program.validate()
    low_bit = FORMATS[recipe].activation != "none"
    assert count(program, linear_op) == (20 if low_bit else 0)
    assert count(program, dequantize_op) == (0 if low_bit else 20)
    found, wanted = (p.module()(**wan_inputs())[0] for p in (program, wan_program))
    assert 0 < error(found, wanted) < ERROR[recipe]


def test_packed_weights_take_the_place_of_the_originals(wan_program: ExportedProgram) -> None:
    program = qs_compiler.compress(wan_program, recipe="w4a8")
    names = [n.removesuffix(".weight") for n, w in wan_program.state_dict.items() if "blocks" in n and w.dim() == 2]
    assert len(names) == 20
    kept = wan_program.state_dict.keys() - {f"{n}.weight" for n in names}
    packed = {f"{n}.{field}" for n in names for field in ("wq", "ws", "multipliers")}
    assert program.state_dict.keys() == kept | packed
    placeholders = program.graph.find_nodes(op="placeholder")
    specs = program.graph_signature.input_specs
    assert [p.name for p in placeholders] == [s.arg.name for s in specs]
    assert {s.target for s in specs if s.target} == program.state_dict.keys() | program.constants.keys()
    assert all(program.state_dict[n] is wan_program.state_dict[n] for n in kept)
    assert program.state_dict[f"{names[0]}.wq"].dtype == torch.uint8
    originals = sum(wan_program.state_dict[f"{n}.weight"].nbytes for n in names)
    assert size(program) - (size(wan_program) - originals) < originals / 4  # a group is no longer than a row here


def test_the_original_program_is_not_changed(wan_program: ExportedProgram) -> None:
    before = str(wan_program), {n: t.clone() for n, t in wan_program.state_dict.items()}, list(wan_program.constants)
    qs_compiler.compress(wan_program, recipe="w8a8")
    assert str(wan_program) == before[0]
    assert list(wan_program.state_dict) == list(before[1])
    assert all(torch.equal(t, before[1][n]) for n, t in wan_program.state_dict.items())
    assert list(wan_program.constants) == before[2]
    wan_program.validate()


def test_small_linears_are_stored_low_bit_and_computed_in_16_bit() -> None:
    model = tiny_dit().bfloat16()
    inputs = torch.randn(1, 48, 32).bfloat16(), torch.tensor([5.0]).bfloat16(), torch.randn(1, 4, 32).bfloat16()
    original = export(model, *inputs)
    program = qs_compiler.compress(original, recipe="w8a8")
    assert count(program, linear_op) == 8  # qkv, out, up, down of two blocks
    assert count(program, dequantize_op) == 2  # the modulation
    assert "blocks.1.modulation.weight" not in program.state_dict
    assert program.state_dict["blocks.1.modulation.wq"].dtype == torch.int8
    assert error(program.module()(*inputs), original.module()(*inputs)) < 0.03
    skipped = dict(qs_compiler.reports()[-1].skipped("quantize_linear"))
    assert skipped["linear_2 (blocks.0.modulation)"] == "stored low-bit, computed in 16 bit: one row per clip"
    assert skipped["linear_1 (proj_in)"] == "outside the repeated blocks"


@pytest.mark.parametrize("strict", [False, True])
def test_a_model_by_hand(strict: bool) -> None:
    """A weight used twice, a tied and a computed one, a mutated buffer, a returned input; no repeated blocks."""
    dynamic = {0: Dim.AUTO, 1: Dim.AUTO}
    model = MLPAttention().eval()
    original = torch.export.export(model, mlp_inputs(), dynamic_shapes=(dynamic, dynamic), strict=strict)
    text = str(original)
    program = qs_compiler.compress(original, recipe="w8a8")
    assert str(original) == text
    assert program.range_constraints == original.range_constraints
    for loaded in (program, torch.export.load(io.BytesIO(saved(program)))):
        for tokens in (40, 57):
            inputs = mlp_inputs(tokens)
            found, wanted = loaded.module()(*inputs), model(*inputs)
            assert 0 < error(found[0], wanted[0]) < 0.02
            assert torch.equal(found[1], inputs[0])
    assert count(program, linear_op) == 7
    assert count(program, torch.ops.quantsparse.quantize_rows.default) == 7
    assert qs_compiler.reports()[-1].skipped("pack_weights") == [("linear_7", "the weight is computed in the graph")]
    assert [n for n in program.state_dict if n.startswith("mix.")] == ["mix.bias", "mix.wq", "mix.ws"]
    assert {"embed.weight", "tied.weight"} & program.state_dict.keys(), "the embedding still reads it"
    assert "down.weight" not in program.state_dict
    with pytest.raises(UnsupportedError, match="1 linears cannot be packed: linear_7: the weight is computed"):
        qs_compiler.compress(original, recipe="w8a8", strict=True)


def test_kept_layers_and_overrides(wan_program: ExportedProgram) -> None:
    recipe = {"format": "w4a8", "keep": ["*.to_q"], "overrides": {"*.ffn.*": {"format": "w8a8"}}}
    program = qs_compiler.compress(wan_program, recipe=recipe, strict=True)
    assert count(program, linear_op) == 16
    assert program.state_dict["blocks.0.ffn.net.2.wq"].dtype == torch.int8
    assert program.state_dict["blocks.0.attn1.to_k.wq"].dtype == torch.uint8
    assert "blocks.0.attn1.to_q.weight" in program.state_dict
    skipped = dict(qs_compiler.reports()[-1].skipped("quantize_linear"))
    assert skipped["linear_5 (blocks.0.attn1.to_q)"] == "kept in 16 bit by the recipe"


def test_what_the_model_keeps_in_float32_stays() -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide = torch.nn.Linear(32, 32).bfloat16(), torch.nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.wide(self.narrow(x.bfloat16()).float())

    program = qs_compiler.compress(export(Mixed(), torch.randn(64, 32)))
    assert count(program, linear_op) == 1
    assert "wide.weight" in program.state_dict
    assert "kept in float32 by the model" in dict(qs_compiler.reports()[-1].skipped("quantize_linear")).values()


def test_recipe_off_copies(wan_program: ExportedProgram) -> None:
    program = qs_compiler.compress(wan_program, recipe="off")
    assert program.state_dict.keys() == wan_program.state_dict.keys()
    assert torch.equal(program.module()(**wan_inputs())[0], wan_program.module()(**wan_inputs())[0])


# --- the three ways to one result --------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8"])
def test_an_attached_model_compresses_to_the_same_program(wan_program: ExportedProgram, recipe: str) -> None:
    attached = qs_compiler.attach(wan(), recipe=recipe, compile=False)
    program = qs_compiler.compress(export(attached, **wan_inputs()))
    by_recipe = qs_compiler.compress(wan_program, recipe=recipe)
    assert count(program, linear_op) == 20
    assert count(program, dequantize_op) == 0
    assert torch.equal(program.module()(**wan_inputs())[0], by_recipe.module()(**wan_inputs())[0])
    assert by_recipe.state_dict.keys() == program.state_dict.keys()
    assert all(torch.equal(t, by_recipe.state_dict[n]) for n, t in program.state_dict.items())
    with pytest.raises(OptionError, match="packed already; leave out recipe and artifact"):
        qs_compiler.compress(export(attached, **wan_inputs()), recipe=recipe)


def test_an_artifact(wan_program: ExportedProgram, tmp_path: Path) -> None:
    """Smoothing and a rotation that all layers share: q, k and v still share one quantiser, as after attach()."""
    model = wan()
    keep = {"format": "w4a8", "keep": ["*.attn2.*", "*.ffn.*"]}
    smooth, rotation = torch.rand(24) + 0.5, torch.linalg.qr(torch.randn(12, 12))[0]
    recipe = Recipe.parse(keep)
    layers = {
        n: pack_weight(model.get_submodule(n).weight, recipe, smooth, rotation) for n in plan_layers(model, recipe)
    }
    assert len(layers) == 8
    layers["blocks.0.ffn.net.2"] = pack_weight(model.blocks[0].ffn.net[2].weight, Recipe(format="w8a16"))
    Artifact.of(model, recipe, layers).save(tmp_path / "a.qs")
    program = qs_compiler.compress(wan_program, artifact=tmp_path / "a.qs")
    assert count(program, linear_op) == 8
    assert count(program, dequantize_op) == 1
    assert count(program, torch.ops.quantsparse.quantize_rows.default) == 4  # q, k, v; out; of two blocks
    assert sum(n.endswith("rotation") for n in program.state_dict) == 1
    attached = qs_compiler.attach(wan(), tmp_path / "a.qs", compile=False)
    from_attached = qs_compiler.compress(export(attached, **wan_inputs()))
    found = program.module()(**wan_inputs())[0]
    assert torch.equal(found, from_attached.module()(**wan_inputs())[0])
    assert torch.equal(torch.export.load(io.BytesIO(saved(program))).module()(**wan_inputs())[0], found)
    assert 0 < error(found, wan_program.module()(**wan_inputs())[0]) < 0.08


# --- outliving the process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w4a8", "fp8"])
def test_a_saved_program_runs_where_the_package_is_imported(
    wan_program: ExportedProgram, tmp_path: Path, recipe: str
) -> None:
    program = qs_compiler.compress(wan_program, recipe=recipe)
    (tmp_path / "wan.pt2").write_bytes(saved(program))
    torch.save((wan_inputs(), program.module()(**wan_inputs())[0]), tmp_path / "expected.pt")
    code = (
        "import sys, json, torch, qs_compiler\n"
        f"inputs, expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"module = torch.export.load({str(tmp_path / 'wan.pt2')!r}).module()\n"
        "print(json.dumps([torch.equal(module(**inputs)[0], expected), 'diffusers' in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, False]


def test_dynamic_shapes(tmp_path: Path) -> None:
    dynamic = {"hidden_states": {2: Dim.AUTO, 3: Dim.AUTO, 4: Dim.AUTO}, "encoder_hidden_states": {1: Dim.AUTO}}
    dynamic |= {"timestep": None, "return_dict": None}
    model = wan()
    original = torch.export.export(model, (), wan_inputs(), dynamic_shapes=dynamic, strict=False)
    shape_env = next(s.node.shape_env for s in _symbols(original))
    guards = len(shape_env.guards)
    program = qs_compiler.compress(original, recipe="w8a8")
    assert len(shape_env.guards) == guards
    assert program.range_constraints == original.range_constraints
    loaded = torch.export.load(io.BytesIO(saved(program)))
    for shape in ((2, 8, 8), (3, 12, 16), (1, 4, 6)):
        inputs = wan_inputs(*shape)
        found, wanted = loaded.module()(**inputs)[0], model(**inputs)[0]
        assert 0 < error(found, wanted) < 0.02


def _symbols(program: ExportedProgram) -> list[torch.SymInt]:
    values = (p.meta["val"] for p in program.graph.find_nodes(op="placeholder"))
    return [n for v in values if isinstance(v, torch.Tensor) for n in v.shape if isinstance(n, torch.SymInt)]


@pytest.mark.filterwarnings("default")  # torch's own, of its packager
def test_aot_inductor_compiles_it(tmp_path: Path) -> None:
    """The package holds our fused kernels: it runs in a process that never heard of us."""
    program = qs_compiler.compress(export(MLPAttention().eval(), *mlp_inputs()), recipe="w4a8")
    path = _compat.aoti_compile_and_package(program, package_path=str(tmp_path / "mlp.pt2"))
    torch.save((mlp_inputs(), program.module()(*mlp_inputs())[0]), tmp_path / "expected.pt")
    code = (
        "import torch\n"
        f"inputs, expected = torch.load({str(tmp_path / 'expected.pt')!r})\n"
        f"module = torch._inductor.aoti_load_package({path!r})\n"
        "torch.testing.assert_close(module(*inputs)[0], expected, rtol=1e-4, atol=1e-5)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# --- passes ------------------------------------------------------------------------------------------------------


def test_a_pass_of_the_users_takes_part(wan_program: ExportedProgram, tmp_path: Path) -> None:
    def drop_gelu(graph: Any, context: Any) -> int:
        found = graph.find_nodes(op="call_function", target=torch.ops.aten.gelu.default)
        for node in found:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        return len(found)

    with qs_compiler.register_pass(drop_gelu, after="quantize_linear"):
        program = qs_compiler.compress(wan_program, debug_dir=tmp_path)
    gelus = count(wan_program, torch.ops.aten.gelu.default)
    assert gelus > 0
    assert count(program, torch.ops.aten.gelu.default) == 0
    assert error(program.module()(**wan_inputs())[0], wan_program.module()(**wan_inputs())[0]) > 0.02
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("WanTransformer3DModel_")
    report = json.loads((folder / "report.json").read_text())
    assert {p["name"]: p["matched"] for p in report["passes"]} == {
        "pack_weights": 20,
        "trim_padding_mask": 0,
        "quantize_linear": 20,
        "order_tokens": 0,
        "sparsify_attention": 0,
        "quantize_attention": 0,
        "reparameterize_residual": 0,
        "stage_caches": 0,
        "outline_repeated_blocks": 0,
        "drop_gelu": gelus,
    }
    assert list(folder.glob("*quantize_linear.after.py"))


def test_a_pass_that_replaces_the_output(wan_program: ExportedProgram) -> None:
    def negate(graph: Any, context: Any) -> None:
        (output,) = graph.find_nodes(op="output")
        (result,) = output.args[0]
        with graph.inserting_before(output):
            negated = graph.call_function(torch.ops.aten.neg.default, (result,))
        negated.meta["val"] = result.meta["val"]
        output.args = ((negated,),)

    plain = qs_compiler.compress(wan_program)
    with qs_compiler.register_pass(negate):
        program = qs_compiler.compress(wan_program)
    assert torch.equal(program.module()(**wan_inputs())[0], -plain.module()(**wan_inputs())[0])


def test_a_pass_that_needs_the_runtime_is_refused(wan_program: ExportedProgram) -> None:
    def add(graph: Any, context: Any) -> None:
        context.add_input("mine", torch.zeros(1), None)

    with (
        qs_compiler.register_pass(add),
        pytest.raises(UnsupportedError, match="a pass added the graph inputs mine"),
    ):
        qs_compiler.compress(wan_program)


# --- the caller's errors -----------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[Callable[[ExportedProgram], Any], type[QuantSparseError], str]] = {
    "a model": (lambda p: qs_compiler.compress(wan()), UnsupportedError, "takes an ExportedProgram, not a Wan"),  # type: ignore[arg-type]
    "a density": (
        lambda p: qs_compiler.compress(p, recipe="w8a8-d25"),
        UnsupportedError,
        r"recipe 'w8a8-d25' asks for sparse attention, which takes three graphs.* Use recipe='w8a8' here, or attach",
    ),
    "a density of one layer": (
        lambda p: qs_compiler.compress(p, recipe={"overrides": {"blocks.0.*": {"density": 0.5}}}),
        UnsupportedError,
        "one graph",
    ),
    "a sparse artifact": (
        lambda p: qs_compiler.compress(p, artifact=artifact_of(wan(), "w4a8-d25")),
        UnsupportedError,
        "Use recipe='w4a8' here",
    ),
    "another format": (
        lambda p: qs_compiler.compress(p, artifact=artifact_of(wan(), "w8a8"), recipe="w4a8"),
        OptionError,
        "the artifact is packed as w8a8",
    ),
    "an unknown recipe": (lambda p: qs_compiler.compress(p, recipe="w8a7"), OptionError, "did you mean 'w8a8'"),
    "no artifact": (lambda p: qs_compiler.compress(p, artifact="nowhere.qs"), ArtifactError, "there is no artifact"),
    "another model's artifact": (
        lambda p: qs_compiler.compress(p, artifact=artifact_of(wan(3), "w8a8")),
        ArtifactError,
        "holds a layer 'blocks.2.attn1.to_q', and the program has no parameter",
    ),
    "everything kept": (
        lambda p: qs_compiler.compress(p, recipe={"keep": ["*"]}),
        UnsupportedError,
        "no linear that can be packed",
    ),
    "no linears": (
        lambda p: qs_compiler.compress(export(torch.nn.Conv2d(1, 1, 1), torch.randn(1, 1, 2, 2))),
        UnsupportedError,
        r"no linear that can be packed; export the model without run_decompositions\(\)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_the_caller(wan_program: ExportedProgram, case: str) -> None:
    call, kind, message = ERRORS[case]
    before = str(wan_program)
    with pytest.raises(kind, match=message):
        call(wan_program)
    assert str(wan_program) == before


def test_an_artifact_of_other_weights_is_refused(wan_program: ExportedProgram) -> None:
    model = copy.deepcopy(wan())
    model.blocks[1].ffn.net[2].weight.data.add_(0.1)
    with pytest.raises(ArtifactError, match=r"'blocks.1.ffn.net.2.weight' has other values"):
        qs_compiler.compress(wan_program, artifact=artifact_of(model, "w8a8"))


def test_a_sparse_artifact_can_be_used_dense(wan_program: ExportedProgram) -> None:
    program = qs_compiler.compress(wan_program, artifact=artifact_of(wan(), "w4a8-d25"), recipe="w4a8")
    assert count(program, linear_op) == 20
