"""Artifacts: what is saved comes back; a wrong, damaged or foreign one is one clear error and changes nothing."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qs_compiler import artifact as artifact_module
from qs_compiler.artifact import Artifact, config_hash, sample_weight
from qs_compiler.errors import ArtifactError
from qs_compiler.options import Recipe
from qs_compiler.packing import PackedWeight, pack_weight


class Tiny(nn.Module):
    """Two blocks of two linears, with a config as diffusers models have one."""

    def __init__(self, seed: int = 0, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.config = {"width": width, "heads": heads, "_diffusers_version": "0.42.1", "_name_or_path": "somewhere"}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"to_q": nn.Linear(width, width), "ff": nn.Linear(width, 2 * width, bias=False)})
            for _ in range(2)
        )


class Other(Tiny):
    """The same architecture under another class."""


def pack(model: nn.Module, recipe: str = "w4a8-d25", **calibrated: torch.Tensor) -> Artifact:
    parsed = Recipe.parse({"group_size": 32}, Recipe.parse(recipe))
    layers = {
        name: pack_weight(linear.weight.detach(), parsed, **calibrated)
        for name, linear in model.named_modules()
        if isinstance(linear, nn.Linear)
    }
    return Artifact.of(model, parsed, layers, {"psnr": 31.5})


def assert_same(a: PackedWeight, b: PackedWeight) -> None:
    assert a.activation == b.activation
    assert a.tensors().keys() == b.tensors().keys()
    for name, tensor in a.tensors().items():
        other = b.tensors()[name]
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor.float(), other.float()), name


# --- round trip --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8-d25", "fp8", "w4fp8", "w4a16", "w6a6"])
def test_round_trip(tmp_path: Path, recipe: str) -> None:
    saved = pack(Tiny(), recipe, smooth=torch.rand(32) + 0.5, rotation=torch.linalg.qr(torch.randn(16, 16))[0])
    saved.save(tmp_path / "a.qs")
    loaded = Artifact.load(str(tmp_path / "a.qs"))
    assert sorted(p.name for p in (tmp_path / "a.qs").iterdir()) == ["model.safetensors", "plan.json"]
    for field in ("recipe", "model_class", "config_hash", "samples", "metrics", "versions"):
        assert getattr(loaded, field) == getattr(saved, field)
    assert list(loaded.layers) == list(saved.layers) == ["blocks.0.to_q", "blocks.0.ff", "blocks.1.to_q", "blocks.1.ff"]
    for name in saved.layers:
        assert_same(saved.layers[name], loaded.layers[name])
    assert loaded.fingerprint() == saved.fingerprint()
    assert loaded.metrics == {"psnr": 31.5}
    assert loaded.versions["torch"] == str(torch.__version__)


def test_a_shared_tensor_is_stored_once_and_shared_again(tmp_path: Path) -> None:
    rotation = torch.linalg.qr(torch.randn(16, 16))[0]
    pack(Tiny(), rotation=rotation).save(tmp_path / "a.qs")
    stored = load_file(tmp_path / "a.qs" / "model.safetensors")
    assert [name for name in stored if name.endswith("rotation")] == ["blocks.0.to_q.rotation"]
    one, *others = (layer.rotation for layer in Artifact.load(tmp_path / "a.qs").layers.values())
    assert all(other is one for other in others)


def test_slices_of_a_fused_weight_can_be_saved(tmp_path: Path) -> None:
    model = Tiny()
    made = pack(model)
    whole = made.layers["blocks.0.ff"]
    rows = PackedWeight(whole.wq[:32], whole.ws[:32], whole.multipliers[:32], activation="int8")  # type: ignore[index]
    made.layers["blocks.0.to_q"] = rows
    made.save(tmp_path / "a.qs")
    assert_same(Artifact.load(tmp_path / "a.qs").layers["blocks.0.to_q"], rows)


def test_shards(tmp_path: Path) -> None:
    saved = pack(Tiny())
    saved.save(tmp_path / "a.qs", shard_bytes=1500)
    files = sorted(p.name for p in (tmp_path / "a.qs").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 1
    assert all((tmp_path / "a.qs" / f).stat().st_size < 1500 + 2000 for f in files), "tensors plus header"
    loaded = Artifact.load(tmp_path / "a.qs")
    for name in saved.layers:
        assert_same(saved.layers[name], loaded.layers[name])
    (tmp_path / "a.qs" / files[0]).unlink()
    with pytest.raises(ArtifactError, match=f"is damaged: the file '{files[0]}' is missing"):
        Artifact.load(tmp_path / "a.qs")


def test_an_index_cannot_point_out_of_the_folder(tmp_path: Path) -> None:
    pack(Tiny()).save(tmp_path / "a.qs", shard_bytes=1500)
    pack(Tiny()).save(tmp_path / "b.qs")
    index = tmp_path / "a.qs" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../b.qs/model.safetensors"}}))
    with pytest.raises(ArtifactError, match="is missing"):
        Artifact.load(tmp_path / "a.qs")


# --- saving ------------------------------------------------------------------------------------------------------


def test_saving_replaces_an_artifact_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    first, second = pack(Tiny(0)), pack(Tiny(1))
    first.save(tmp_path / "a.qs", shard_bytes=1500)
    old = Artifact.load(tmp_path / "a.qs")
    second.save(tmp_path / "a.qs")
    assert [p.name for p in tmp_path.iterdir()] == ["a.qs"]
    assert sorted(p.name for p in (tmp_path / "a.qs").iterdir()) == ["model.safetensors", "plan.json"]
    assert_same(Artifact.load(tmp_path / "a.qs").layers["blocks.1.ff"], second.layers["blocks.1.ff"])
    assert_same(old.layers["blocks.1.ff"], first.layers["blocks.1.ff"])  # mapped from the replaced file


def test_saving_makes_parents_and_takes_an_empty_folder(tmp_path: Path) -> None:
    pack(Tiny()).save(tmp_path / "x" / "y" / "a.qs")
    (tmp_path / "empty").mkdir()
    pack(Tiny()).save(tmp_path / "empty")
    assert Artifact.load(tmp_path / "x" / "y" / "a.qs").layers.keys() == Artifact.load(tmp_path / "empty").layers.keys()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_saving_never_replaces_what_is_no_artifact(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mine"
    content = path / "thesis.txt" if kind == "folder" else path
    content.parent.mkdir(exist_ok=True)
    content.write_text("42")
    with pytest.raises(ArtifactError, match=r"exists and is no artifact; it is left as it is. Choose another path"):
        pack(Tiny()).save(path)
    assert content.read_text() == "42"
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("step", ["write_tensors", "rename"])
def test_a_failed_save_leaves_the_old_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    first = pack(Tiny(0))
    first.save(tmp_path / "a.qs")

    def disk_full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if step == "write_tensors":
        monkeypatch.setattr(artifact_module, "write_tensors", disk_full)
    else:
        rename = Path.rename
        monkeypatch.setattr(Path, "rename", lambda s, t: disk_full() if s.name == "new" else rename(s, t))
    with pytest.raises(ArtifactError, match=r"cannot be written to '.*a\.qs': .*No space left on device"):
        pack(Tiny(1)).save(tmp_path / "a.qs")
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["a.qs"]
    assert_same(Artifact.load(tmp_path / "a.qs").layers["blocks.0.ff"], first.layers["blocks.0.ff"])


def test_metrics_must_be_json(tmp_path: Path) -> None:
    made = pack(Tiny())
    made.metrics["loss"] = torch.ones(1)
    with pytest.raises(ArtifactError, match=r"the metrics of an artifact must be JSON values: .*Tensor"):
        made.save(tmp_path / "a.qs")
    assert list(tmp_path.iterdir()) == []


# --- loading what is damaged -------------------------------------------------------------------------------------


def edit_plan(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        plan = json.loads((folder / "plan.json").read_text())
        change(plan)
        (folder / "plan.json").write_text(json.dumps(plan))

    return damage


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        # Cloned: loaded tensors are mapped from the file that is about to be written.
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def cut(file: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size]) and None


def entry(plan: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = plan["layers"]["blocks.0.to_q"]
    return found


Q = "blocks.0.to_q"
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no plan": (lambda f: (f / "plan.json").unlink(), r"is not an artifact: it is no folder with a plan\.json"),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), r"the file 'model\.safetensors' is missing"),
    "cut tensors": (cut("model.safetensors", 3000), "its tensors cannot be read: "),
    "cut header": (cut("model.safetensors", 4), "its tensors cannot be read: "),
    "empty tensors": (cut("model.safetensors", 0), "its tensors cannot be read: "),
    "cut plan": (cut("plan.json", 300), r"plan\.json cannot be read: "),
    "binary plan": (lambda f: (f / "plan.json").write_bytes(b"\xff\xfe\x00"), r"plan\.json cannot be read: "),
    "foreign plan": (lambda f: (f / "plan.json").write_text("[1]"), "is not an artifact: its plan.json is not of the"),
    "other format": (edit_plan(lambda p: p.update(format="gguf")), "not of the format 'quantsparse-artifact'"),
    "future": (
        edit_plan(lambda p: p.update(version=2)),
        "has format version 2, this package reads up to 1; upgrade qs_compiler",
    ),
    "no version": (edit_plan(lambda p: p.pop("version")), "is damaged: its version is None"),
    "text version": (edit_plan(lambda p: p.update(version="1")), "is damaged: its version is '1'"),
    "no recipe": (edit_plan(lambda p: p.pop("recipe")), r"plan\.json is not as it was written: KeyError: 'recipe'"),
    "wrong recipe": (edit_plan(lambda p: p["recipe"].update(density=25)), "density must be a number above 0"),
    "no layers": (edit_plan(lambda p: p.pop("layers")), "KeyError: 'layers'"),
    "layers as a list": (edit_plan(lambda p: p.update(layers=[])), "not as it was written: AttributeError"),
    "no samples": (edit_plan(lambda p: p["samples"].pop(Q)), f"KeyError: '{Q}'"),
    "few samples": (edit_plan(lambda p: p["samples"][Q].pop()), "15 samples of a weight instead of 16"),
    "text samples": (edit_plan(lambda p: p["samples"].update({Q: ["x"] * 16})), "could not convert string"),
    "unknown kind": (edit_plan(lambda p: entry(p).update(kind="conv")), f"layer '{Q}' is of the unknown kind 'conv'"),
    "unknown field": (edit_plan(lambda p: entry(p)["tensors"].update(zeros="x")), f"layer '{Q}' has the tensors "),
    "no scale": (edit_plan(lambda p: entry(p)["tensors"].pop("ws")), f"layer '{Q}' has the tensors "),
    "no multipliers": (edit_plan(lambda p: entry(p)["tensors"].pop("multipliers")), "without multipliers"),
    "wrong activation": (edit_plan(lambda p: entry(p).update(activation="int3")), "activation 'int3' is not known"),
    "other shape": (
        edit_plan(lambda p: entry(p).update(shape=[32, 64])),
        rf"layer '{Q}' has shape \[32, 32\], but plan\.json says \[32, 64\]",
    ),
    "tensor missing": (edit_tensors(lambda t: t.pop(f"{Q}.ws")), rf"the tensor '{Q}\.ws' is missing"),
    "scale of another shape": (
        edit_tensors(lambda t: t.update({f"{Q}.ws": torch.ones(31)})),
        rf"layer '{Q}': .*ws has shape \(31,\).*must have shape \(32\)",
    ),
    "scale of another dtype": (
        edit_tensors(lambda t: t.update({f"{Q}.ws": torch.ones(32, dtype=torch.bfloat16)})),
        rf"layer '{Q}': ws is torch.bfloat16, not torch.float32",
    ),
    "codes of another dtype": (
        edit_tensors(lambda t: t.update({f"{Q}.wq": torch.ones(32, 16)})),
        rf"layer '{Q}': .*wq is float32",
    ),
    "codes of another shape": (
        edit_tensors(lambda t: t.update({f"{Q}.wq": torch.ones(32, dtype=torch.uint8)})),
        rf"layer '{Q}': .*wq has shape \(32,\)",
    ),
    "multipliers of another shape": (
        edit_tensors(lambda t: t.update({f"{Q}.multipliers": torch.ones(32, 5, dtype=torch.uint8)})),
        rf"layer '{Q}': .*multipliers has 5 groups for K = 32",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_one_clear_error(tmp_path: Path, name: str) -> None:
    damage, text = DAMAGED[name]
    pack(Tiny()).save(tmp_path / "a.qs")
    damage(tmp_path / "a.qs")
    with pytest.raises(ArtifactError, match=text) as caught:
        Artifact.load(tmp_path / "a.qs")
    assert "a.qs" in str(caught.value), "the path is named"


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"there is no artifact at '.*nowhere\.qs'; check the path, or calibrate"):
        Artifact.load(tmp_path / "nowhere.qs")


def test_a_file_is_no_artifact(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match=r"is not an artifact: it is no folder with a plan\.json"):
        Artifact.load(tmp_path / "x.safetensors")


# --- whose weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_the_model_it_was_made_from(source: torch.dtype, dtype: torch.dtype) -> None:
    model = Tiny().to(source)
    made = pack(model)
    model.to(dtype)
    before = copy.deepcopy(model.state_dict())
    made.check_model(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    made.check_model(torch.compile(model, backend="eager"))


def test_values_that_half_precision_can_hardly_hold() -> None:
    model = Tiny()
    with torch.no_grad():
        model.blocks[0]["ff"].weight.mul_(1e-6)
    made = pack(model)
    made.check_model(model.half())


def test_config_hash_is_of_the_config_alone() -> None:
    one, two = Tiny(0), Tiny(1)
    two.config["_diffusers_version"] = "9.9"
    assert config_hash(one) == config_hash(two)
    assert config_hash(one) != config_hash(Tiny(heads=4))
    plain = nn.Sequential(nn.Linear(4, 4))
    assert config_hash(plain) != config_hash(nn.Sequential(nn.Linear(4, 8)))


def test_samples_lie_all_over_the_weight() -> None:
    weight = torch.arange(32 * 48, dtype=torch.float32).reshape(32, 48)
    values = sample_weight(weight)
    assert len(set(values)) == len(values) == 16
    assert (values[0], values[-1]) == (0, 32 * 48 - 1)
    assert len({v % 48 for v in values}) > 8, "not all in a few columns"
    assert len(sample_weight(torch.ones(1, 2))) == 16


def swap_experts(model: Tiny) -> Tiny:
    return Tiny(seed=1)


def finetune(model: Tiny) -> Tiny:
    with torch.no_grad():
        model.blocks[1]["to_q"].weight.mul_(1.02)
    return model


def drop_layer(model: Tiny) -> Tiny:
    del model.blocks[1]["ff"]
    return model


def to_meta(model: Tiny) -> Tiny:
    return model.to("meta")


def compress(model: Tiny) -> Tiny:
    model.blocks[0]["to_q"] = nn.Identity()
    return model


WRONG_MODELS: list[tuple[Callable[[Tiny], nn.Module], str]] = [
    (lambda m: Other(), "was made from a Tiny, this model is a Other; calibrate an artifact for it"),
    (lambda m: Tiny(heads=4), "was made from a Tiny of another config; use the checkpoint that it was calibrated on"),
    (lambda m: Tiny(width=64), r"'blocks\.0\.to_q\.weight' has shape \(64, 64\), the artifact .* one of \(32, 32\)"),
    (swap_experts, r"'blocks\.0\.to_q\.weight' has other values than .* the other expert, or a LoRA fused into it"),
    (finetune, r"'blocks\.1\.to_q\.weight' has other values"),
    (drop_layer, r"holds a layer 'blocks\.1\.ff', which this Tiny has not"),
    (to_meta, r"'blocks\.0\.to_q\.weight' has no values \(it is on the meta device\); load the weights first"),
    (compress, r"'blocks\.0\.to_q' is a Identity without a weight parameter: the model is compressed already"),
]


@pytest.mark.parametrize(("change", "text"), WRONG_MODELS, ids=lambda v: getattr(v, "__name__", str(v)[:30]))
def test_a_wrong_model(change: Callable[[Tiny], nn.Module], text: str) -> None:
    made = pack(Tiny())
    with pytest.raises(ArtifactError, match=text):
        made.check_model(change(Tiny()))


def test_a_pipeline_instead_of_its_model() -> None:
    with pytest.raises(ArtifactError, match=r"belongs to a module, not to a dict; pass pipe\.transformer"):
        pack(Tiny()).check_model({})  # type: ignore[arg-type]


def test_packed_tensors_of_another_shape_are_refused_when_the_artifact_is_made() -> None:
    made = pack(Tiny())
    with pytest.raises(ArtifactError, match=r"'blocks\.0\.ff\.weight' has shape \(64, 32\)"):
        Artifact.of(Tiny(), made.recipe, {"blocks.0.ff": made.layers["blocks.0.to_q"]})
