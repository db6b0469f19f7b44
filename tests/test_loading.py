"""load(): a compressed model that never had its 16-bit weights, equal bit for bit to one that attach() compressed."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qs_compiler
from qs_compiler import Artifact, Recipe, _compat
from qs_compiler.errors import ArtifactError, OptionError, QuantSparseError, UnsupportedError
from qs_compiler.loading import parameters_on_meta
from qs_compiler.packed_linear import PackedLinear
from qs_compiler.packing import pack_weight
from qs_compiler.pipeline import plan_layers
from tests.backend.models import RECIPE, TinyDiT, clip, make
from tests.export.models import MLPAttention, mlp_inputs, wan, wan_inputs

ROOT = Path(__file__).resolve().parent.parent
diffusers = pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def artifact_of(model: nn.Module, recipe: Any = "w4a8", include_rest: bool = True) -> Artifact:
    parsed = Recipe.parse(recipe)
    layers = {n: pack_weight(model.get_submodule(n).weight, own) for n, own in plan_layers(model, parsed).items()}
    return Artifact.of(model, parsed, layers, include_rest=include_rest)


def assert_same_model(found: nn.Module, wanted: nn.Module) -> None:
    """Names, kinds, dtypes and bits of all parameters and buffers, the non-persistent ones too."""
    for kind in ("named_parameters", "named_buffers"):
        one, two = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (found, wanted))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            other = two[name]
            assert (tensor.dtype, tensor.shape, tensor.requires_grad) == (other.dtype, other.shape, other.requires_grad)
            assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), name
    assert found.state_dict().keys() == wanted.state_dict().keys()


# --- equal to an attached model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wan_bit_for_bit(tmp_path: Path, recipe: str, dtype: torch.dtype) -> None:
    model = wan().to(dtype)
    artifact_of(model, recipe).save(tmp_path / "a.qs")
    found = qs_compiler.load(type(model), dict(model.config), tmp_path / "a.qs", compile=False)
    wanted = qs_compiler.attach(model, tmp_path / "a.qs", compile=False)
    assert type(found) is type(wanted)
    assert not found.training
    assert_same_model(found, wanted)
    assert isinstance(found.blocks[0].attn1.to_q, PackedLinear)
    assert found.blocks[0].attn1.to_q.weight.dtype == dtype
    inputs = wan_inputs(dtype=dtype)
    assert torch.equal(found(**inputs)[0], wanted(**inputs)[0])


def test_the_config_from_a_saved_model(tmp_path: Path) -> None:
    model = wan()
    model.save_config(tmp_path / "model")
    artifact = artifact_of(model)
    for config in (tmp_path / "model", str(tmp_path / "model" / "config.json"), model.config):
        assert_same_model(
            qs_compiler.load(type(model), config, artifact, compile=False),
            qs_compiler.load(type(model), dict(model.config), artifact, compile=False),
        )


def test_a_model_by_hand_with_a_tied_weight(tmp_path: Path) -> None:
    """No from_config, a weight that an embedding shares, a non-persistent buffer of random values."""
    model = MLPAttention().eval()
    artifact_of(model, "w8a8").save(tmp_path / "a.qs")
    found = qs_compiler.load(MLPAttention, {"width": 32}, tmp_path / "a.qs", compile=False)
    wanted = qs_compiler.attach(MLPAttention().eval(), tmp_path / "a.qs", compile=False)
    model(*mlp_inputs())
    assert_same_model(found, wanted)
    assert torch.equal(found(*mlp_inputs())[0], wanted(*mlp_inputs())[0])


class Shared(nn.Module):
    """One Linear under two names, one parameter in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = self.first
        self.one, self.two = nn.LayerNorm(32), nn.LayerNorm(32)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.second(self.one(self.first(x))))


def test_what_a_model_shares_stays_shared(tmp_path: Path) -> None:
    model = Shared()
    weight = pack_weight(model.first.weight, Recipe())
    Artifact.of(model, Recipe(), {"first": weight}, include_rest=True).save(tmp_path / "a.qs")
    found = qs_compiler.load(Shared, {}, tmp_path / "a.qs", compile=False)
    assert isinstance(found.first, PackedLinear)
    assert found.first is found.second
    assert found.one.weight is found.two.weight
    assert_same_model(found, qs_compiler.attach(model, tmp_path / "a.qs", compile=False))


def test_dtype() -> None:
    """What diffusers does with torch_dtype: norms that are kept in float32 stay so, rope tables stay as computed."""
    model = wan()
    found = qs_compiler.load(type(model), model.config, artifact_of(model), dtype=torch.bfloat16, compile=False)
    assert found.patch_embedding.weight.dtype == torch.bfloat16
    assert found.blocks[0].attn1.to_q.bias.dtype == torch.bfloat16
    assert found.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert found.blocks[0].attn1.to_q.ws.dtype == torch.float32
    assert found.blocks[0].norm2.weight.dtype == torch.float32
    assert found.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert torch.equal(found.rope.freqs_cos, wan().rope.freqs_cos)
    assert found(**wan_inputs(dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_it_is_compiled_and_runs_sparse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_compat, "compile_graph", lambda module, inputs, patches, own_context: module.forward)
    torch._dynamo.reset()
    artifact_of(make(), RECIPE).save(tmp_path / "a.qs")
    found = qs_compiler.load(TinyDiT, {}, tmp_path / "a.qs")
    wanted = qs_compiler.attach(make(), tmp_path / "a.qs")
    outputs = []
    for model in (found, wanted):
        before = len(qs_compiler.reports())
        with qs_compiler.denoising(model, num_steps=6) as run:
            for i, inputs in enumerate(clip(0, 6)):
                run.step(i)
                outputs.append(model(**inputs))
        if model is found:
            assert qs_compiler.reports()[before].calls["sparse"] > 0
            assert qs_compiler.reports()[before].linears[0] == 8
    assert all(torch.equal(a, b) for a, b in zip(outputs[:6], outputs[6:], strict=True))
    torch._dynamo.reset()


def test_a_loaded_model_can_be_attached_once(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = artifact_of(make(), RECIPE)
    model = qs_compiler.load(TinyDiT, {}, artifact, compile=False)
    with pytest.raises(UnsupportedError, match="is attached already"):
        qs_compiler.attach(model, artifact)
    with pytest.raises(OptionError, match="packed already, and not as w4a8"):
        qs_compiler.attach(model, recipe="w4a8")
    assert qs_compiler.attach(model, recipe=RECIPE) is model
    with pytest.raises(UnsupportedError, match="is attached already"):
        qs_compiler.attach(model, recipe=RECIPE)


# --- building without memory -------------------------------------------------------------------------------------

CLASSES: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel": {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1},
    "CogVideoXTransformer3DModel": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1},
    "LatteTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "caption_channels": 8,
    },
    "Kandinsky5Transformer3DModel": {"model_dim": 128, "ff_dim": 32, "time_dim": 16, "num_visual_blocks": 1},
}


@pytest.mark.parametrize("name", CLASSES)
def test_buffers_are_those_of_a_normal_construction(name: str) -> None:
    with parameters_on_meta():
        found = getattr(diffusers, name)(**CLASSES[name])
    wanted = getattr(diffusers, name)(**CLASSES[name])
    assert all(p.is_meta for p in found.parameters())
    assert [n for n, _ in found.named_parameters()] == [n for n, _ in wanted.named_parameters()]
    assert all(a.shape == b.shape for a, b in zip(found.parameters(), wanted.parameters(), strict=True))
    buffers = dict(wanted.named_buffers())
    assert buffers
    for buffer_name, buffer in found.named_buffers():
        assert torch.equal(buffer, buffers.pop(buffer_name))
    assert not buffers


def test_other_threads_build_as_ever() -> None:
    built: list[nn.Module] = []
    with parameters_on_meta():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        assert nn.Linear(2, 2).weight.is_meta
    assert not built[0].weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


MEASURE = """
import json, sys, torch, qs_compiler
from torch import nn
from qs_compiler.packing import pack_weight
from qs_compiler.pipeline import plan_layers

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(1024, 3072), nn.Linear(1024, 1024)
        self.up, self.down = nn.Linear(1024, 4096), nn.Linear(4096, 1024)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1024, 1024)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

def memory(field):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(field)]
    return int(line.split()[1]) * 1024

step, path = sys.argv[1:]
torch.set_grad_enabled(False)
if step == "make":
    model, recipe = Model().bfloat16(), qs_compiler.Recipe.parse("w4a8")
    layers = {n: pack_weight(model.get_submodule(n).weight, recipe) for n in plan_layers(model, recipe)}
    qs_compiler.Artifact.of(model, recipe, layers, include_rest=True).save(path)
    torch.save(model.state_dict(), path + ".pt")
    sys.exit()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = memory("VmRSS")
if step == "load":
    model = qs_compiler.load(Model, {}, path, compile=False)
else:
    with torch.device("meta"):
        model = Model()
    model.load_state_dict(torch.load(path + ".pt"), assign=True)
    model = qs_compiler.attach(model, path, compile=False)
for tensor in (*model.parameters(), *model.buffers()):
    tensor.view(torch.uint8).any()  # what is mapped from a file must be read to count
size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
print(json.dumps([memory("VmHWM") - before, size]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_that_of_the_packed_model(tmp_path: Path) -> None:
    def run(step: str) -> str:
        command = [sys.executable, "-c", MEASURE, step, str(tmp_path / "a.qs")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("make")
    full = 2 * (4 * 12 * 1024**2 + 1024**2)  # 103 MB in bfloat16
    loaded, size = json.loads(run("load"))
    assert size < full / 3.5
    assert size < loaded < size + full / 4, "the packed model and one parameter at a time"
    attached, same_size = json.loads(run("attach"))
    assert same_size == size
    assert attached > full, "the measurement sees a 16-bit model where there is one"


# --- the artifact's other tensors --------------------------------------------------------------------------------


def test_the_rest_of_a_model(tmp_path: Path) -> None:
    model = wan()
    made = artifact_of(model)
    packed = {f"{n}.weight" for n in made.layers}
    buffers = {n for n, _ in model.named_buffers()}
    assert made.rest is not None
    assert made.rest.keys() == (model.state_dict().keys() | buffers) - packed
    assert made.rest["blocks.0.attn1.to_q.bias"].data_ptr() == model.blocks[0].attn1.to_q.bias.data_ptr()
    for shard_bytes in (5 * 10**9, 2000):
        made.save(tmp_path / "a.qs", shard_bytes=shard_bytes)
        loaded = Artifact.load(tmp_path / "a.qs")
        assert loaded.rest is not None
        assert loaded.rest.keys() == made.rest.keys()
        assert all(torch.equal(t, made.rest[n]) and t.dtype == made.rest[n].dtype for n, t in loaded.rest.items())
        assert loaded.dtypes == made.dtypes == dict.fromkeys(made.layers, torch.float32)
        assert loaded.fingerprint() == made.fingerprint()


def test_a_tied_tensor_is_stored_once(tmp_path: Path) -> None:
    Artifact.of(Shared(), Recipe(), {}, include_rest=True).save(tmp_path / "a.qs")
    stored = load_file(tmp_path / "a.qs" / "model.safetensors")
    assert "one.weight" in stored
    assert "two.weight" not in stored
    assert Artifact.load(tmp_path / "a.qs").rest.keys() >= {"one.weight", "two.weight"}  # type: ignore[union-attr]


def change_plan(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        plan = json.loads((folder / "plan.json").read_text())
        change(plan)
        (folder / "plan.json").write_text(json.dumps(plan))

    return damage


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


BIAS = "blocks.0.out.bias"
DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no tensor": (change_tensors(lambda t: t.pop(BIAS)), f"is damaged: the tensor '{BIAS}' is missing"),
    "no rest": (change_plan(lambda p: p.pop("rest")), "is damaged: .*KeyError: 'rest'"),
    "rest as a list": (change_plan(lambda p: p.update(rest=[])), "is damaged: .*AttributeError"),
    "rest unsaid": (change_plan(lambda p: p.update(rest=None)), "holds packed weights alone; attach.. it"),
    "a name unsaid": (change_plan(lambda p: p["rest"].pop(BIAS)), f"has no tensor '{BIAS}' of the model"),
    "a name too many": (
        change_plan(lambda p: p["rest"].update(extra=BIAS)),
        "has a tensor 'extra', which the model has not",
    ),
    "other shape": (
        change_tensors(lambda t: t.update({BIAS: torch.ones(3)})),
        rf"'{BIAS}' has shape \(3,\), the model's \(32,\)",
    ),
    "no dtype": (change_plan(lambda p: p["layers"]["blocks.0.out"].pop("dtype")), "is damaged: .*KeyError: 'dtype'"),
    "other dtype": (
        change_plan(lambda p: p["layers"]["blocks.0.out"].update(dtype="int8")),
        "is damaged: .*'int8' is no dtype of a weight",
    ),
    "cut file": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]) and None,
        "is damaged: its tensors cannot be read",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_one_clear_error(tmp_path: Path, name: str) -> None:
    damage, text = DAMAGED[name]
    artifact_of(make()).save(tmp_path / "a.qs")
    damage(tmp_path / "a.qs")
    with pytest.raises(ArtifactError, match=text):
        qs_compiler.load(TinyDiT, {}, tmp_path / "a.qs", compile=False)


# --- the caller's errors -----------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[Callable[[Artifact], Any], type[QuantSparseError], str]] = {
    "another class": (
        lambda a: qs_compiler.load(Shared, {}, a),
        ArtifactError,
        "was made from a TinyDiT, this model is a Shared",
    ),
    "another config": (
        lambda a: qs_compiler.load(TinyDiT, {"blocks": 3}, a),
        ArtifactError,
        "was made from a TinyDiT of another config",
    ),
    "another width": (lambda a: qs_compiler.load(TinyDiT, {"width": 64}, a), ArtifactError, "has shape"),
    "an unknown field": (
        lambda a: qs_compiler.load(TinyDiT, {"layers": 2}, a),
        UnsupportedError,
        "a TinyDiT cannot be built from this config: TypeError: .*'layers'",
    ),
    "no class": (lambda a: qs_compiler.load(make(), {}, a), UnsupportedError, "must be a class of modules"),  # type: ignore[arg-type]
    "no config": (lambda a: qs_compiler.load(TinyDiT, "nowhere.json", a), UnsupportedError, "cannot be read"),
    "a list": (lambda a: qs_compiler.load(TinyDiT, [2], a), UnsupportedError, "a mapping or a path, not a list"),  # type: ignore[arg-type]
    "no artifact": (lambda a: qs_compiler.load(TinyDiT, {}, "nowhere.qs"), ArtifactError, "there is no artifact at"),
    "an unknown option": (lambda a: qs_compiler.load(TinyDiT, {}, a, recipes="w8a8"), OptionError, "mean 'recipe'"),
    "another format": (lambda a: qs_compiler.load(TinyDiT, {}, a, recipe="fp8"), OptionError, "is packed as w4a8"),
    "an integer dtype": (
        lambda a: qs_compiler.load(TinyDiT, {}, a, dtype=torch.int8),
        UnsupportedError,
        "dtype must be a float one",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_the_caller(case: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        call(artifact_of(make()))


def test_an_artifact_without_the_rest() -> None:
    with pytest.raises(ArtifactError, match=r"packed weights alone; .* make one with Artifact.of\(..., include_rest"):
        qs_compiler.load(TinyDiT, {}, artifact_of(make(), include_rest=False))


def test_an_artifact_of_a_model_without_values() -> None:
    made = artifact_of(make())
    with pytest.raises(ArtifactError, match=r"'blocks.0.modulation.weight' has no values"):
        Artifact.of(make().to("meta"), made.recipe, made.layers, include_rest=True)
