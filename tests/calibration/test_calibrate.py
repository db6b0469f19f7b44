"""`calibrate` as a user sees it: better than data-free, the same for a seed, unhurt by a kill, never in the way."""

import filecmp
from pathlib import Path

import pytest
import torch
from torch import nn

import qs_compiler as qs
from qs_compiler.calibration import blockwise
from qs_compiler.calibration.blockwise import relative_error
from qs_compiler.calibration.closed_form import packed_forward
from qs_compiler.calibration.walk import replaced_forwards
from qs_compiler.errors import ArtifactError, OptionError, RecipeError, UnsupportedError
from qs_compiler.packing import pack_weight
from qs_compiler.pipeline import plan_layers

from .models import Block, Model, make_forwards, make_model

RECIPE = {"format": "w4a8", "group_size": 32}


def calibrate(model, data=None, **options):
    data = make_forwards(4) if data is None and "run" not in options else data
    return qs.calibrate(model, data, **{"recipe": RECIPE, "progress": False, **options})


def compressed_error(model, layers, forwards) -> float:
    """Relative output error of the model with packed linears, inputs quantised as at run time."""
    linears = {n: model.get_submodule(n) for n in layers}
    fakes = {lin: lambda x, p=layers[n], b=lin.bias: packed_forward(p, x, b) for n, lin in linears.items()}
    model.eval()
    with torch.no_grad():
        targets = [model(*a, **k) for a, k in forwards]
        with replaced_forwards(fakes):
            return relative_error([model(*a, **k) for a, k in forwards], targets)


def same_folder(a: Path, b: Path) -> bool:
    names = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    same = filecmp.cmpfiles(a, b, names, shallow=False)[0]
    return len(same) == len(names) > 1 and names == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file())


GAINS = [("w4a8", 0.6), ("w4a4", 0.9), ("w6a6", 0.97), ("w8a8", 0.95), ("fp8", 0.98)]


@pytest.mark.parametrize(("name", "gain"), GAINS)
def test_it_beats_rounding_without_data_on_forwards_that_it_never_saw(name, gain):
    model, unseen = make_model(), make_forwards(3, seed=7)
    recipe = qs.Recipe.parse({**RECIPE, "format": name})
    plain = {n: pack_weight(model.get_submodule(n).weight, r) for n, r in plan_layers(model, recipe).items()}
    artifact = calibrate(model, recipe=recipe)
    assert artifact.layers.keys() == plain.keys()
    assert compressed_error(model, artifact.layers, unseen) < gain * compressed_error(model, plain, unseen)


def test_linears_outside_of_the_blocks_are_stored_low_bit_where_an_override_says_so():
    model, plain = make_model(), calibrate(make_model(), rounding="nearest", rotation=None)
    artifact = calibrate(
        model, rounding="nearest", rotation=None, recipe={**RECIPE, "overrides": {"embed": {"format": "w8a16"}}}
    )
    assert artifact.layers.keys() - plain.layers.keys() == {"embed"}
    assert artifact.layers["embed"].wq.dtype == torch.int8 and artifact.layers["embed"].activation == "none"
    attached = qs.attach(make_model().eval(), artifact, compile=False)
    x = make_forwards(1, seed=7)[0][0][0]
    with torch.no_grad():
        assert 0 < relative_error([attached.embed(x)], [model.embed(x)]) < 0.01
    elsewhere = qs.Recipe.parse({**RECIPE, "overrides": {"*": {"format": "w8a8"}}})
    assert plan_layers(model, elsewhere).keys() == plain.layers.keys(), "what computes in 8 bit lies in the blocks"


@pytest.mark.parametrize(
    "options",
    [
        {"smoothing": "search"},
        {"rotation": None},
        {"rounding": "nearest"},
        {"inputs": "full"},
        {"rows": 32},
        {"epochs": 2, "stride": 8, "salient": 8},
    ],
    ids=str,
)
def test_every_option_leads_to_another_artifact_that_works(options):
    model, unseen = make_model(), make_forwards(3, seed=7)
    default, other = calibrate(model), calibrate(model, **options)
    changed = [n for n in default.layers if not torch.equal(default.layers[n].wq, other.layers[n].wq)]
    assert changed
    assert compressed_error(model, other.layers, unseen) < 0.12


def test_linears_that_read_one_tensor_share_one_transform_also_after_a_round_trip(tmp_path):
    calibrate(make_model(), smoothing="search").save(tmp_path / "a")
    layers = qs.Artifact.load(tmp_path / "a").layers
    q, k, v, cross_q, text_k, text_v = (
        layers[f"blocks.0.{attention}.to_{n}"] for attention in ("attn1", "attn2") for n in "qkv"
    )
    assert q.smooth is k.smooth is v.smooth and q.rotation is k.rotation is v.rotation
    assert text_k.smooth is text_v.smooth
    assert cross_q.smooth is not q.smooth


def test_linears_of_one_row_a_clip_are_stored_low_bit_and_computed_in_16_bit():
    packed = calibrate(make_model()).layers["blocks.1.modulation"]
    assert packed.activation == "none" and packed.wq.dtype == torch.uint8
    assert packed.smooth is None and packed.rotation is None


def test_the_model_is_left_as_it_was():
    model = make_model().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    calibrate(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(m.training and "forward" not in m.__dict__ and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_it_is_deterministic_and_a_kill_at_any_block_changes_no_byte(tmp_path, monkeypatch):
    model = make_model()
    calibrate(model, output_dir=tmp_path / "whole").save(tmp_path / "a")
    calibrate(model).save(tmp_path / "b")
    assert same_folder(tmp_path / "a", tmp_path / "b")
    done, compress = [], blockwise.compress_linears

    def killed(*args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(0)
        return compress(*args)

    monkeypatch.setattr(blockwise, "compress_linears", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, output_dir=tmp_path / "work")
    assert len(list((tmp_path / "work" / "blocks").iterdir())) == 2
    done[:] = [0]
    calibrate(model, output_dir=tmp_path / "work").save(tmp_path / "c")
    assert len(done) == 2, "finished blocks are not done again"
    assert same_folder(tmp_path / "a", tmp_path / "c")


def test_samples_run_one_at_a_time_give_the_same_artifact():
    side_by_side, alone = calibrate(make_model()), calibrate(make_model(), in_flight=3)
    for name, packed in side_by_side.layers.items():
        for field, tensor in packed.tensors().items():
            assert torch.equal(tensor, alone.layers[name].tensors()[field]), name


def test_only_the_block_in_work_is_moved_to_the_device_of_the_work(monkeypatch):
    """One CPU stands for both devices: what counts is the order of the moves."""
    model, moves = make_model(), []
    names = {block: name for name, block in model.blocks.named_children()}

    def to(block, device):
        moves.append((names[block], str(device)))

    monkeypatch.setattr(Block, "to", to)
    for block in model.blocks:
        block.up.register_forward_pre_hook(lambda *_, name=names[block]: moves.append((name, "runs")))
    calibrate(model, device="cpu:0", epochs=1, stride=8, salient=8, rounding="learned", epochs_rounding=1)
    steps = [move for i, move in enumerate(moves) if move != moves[i - 1]]
    assert steps == [(name, what) for name in names.values() for what in ("cpu:0", "runs", "cpu")]


def test_unfinished_work_of_another_calibration_is_not_mixed_in(tmp_path):
    calibrate(make_model(), output_dir=tmp_path)
    for other in ({"seed": 1}, {"rounding": "nearest"}, {"data": make_forwards(4, seed=1)}, {"recipe": "w8a8"}):
        with pytest.raises(ArtifactError, match="another recipe, other options or other samples"):
            calibrate(make_model(), output_dir=tmp_path, **other)
    with pytest.raises(ArtifactError, match="other values"):
        calibrate(make_model(seed=1), output_dir=tmp_path)


def test_the_artifact_attaches():
    model, (args, kwargs) = make_model().eval(), make_forwards(1, seed=7)[0]
    with torch.no_grad():
        target = model(*args, **kwargs)
        qs.attach(model, calibrate(model), compile=False)
        assert relative_error([model(*args, **kwargs)], [target]) < 0.05
    assert any(type(m).__name__ == "PackedLinear" for m in model.modules())


def test_what_could_not_be_fitted_is_told():
    sparse = {**RECIPE, "density": 0.5, "block_size": 64}
    words = (
        "every head keeps as many blocks, and has a gain of 0.25 in a mixture. Calibrate a pipeline, or give run=..., "
        "a loop"
    )
    for recipe in (sparse, {**sparse, "correction": "first_order"}, {**sparse, "budgets": "uniform"}):
        with pytest.warns(UserWarning, match=words):
            artifact = calibrate(make_model(blocks=1), make_forwards(1), recipe=recipe)
        assert artifact.gains == {} and artifact.shares == {}
    nothing = {**sparse, "correction": "first_order", "budgets": "uniform"}
    calibrate(make_model(blocks=1), make_forwards(1), recipe=nothing)


def test_a_loop_of_ones_own_is_run_once_without_gradients():
    model, runs = make_model(), []

    def run(target):
        runs.append(target)
        for args, kwargs in make_forwards(6):
            assert not target(*args, **kwargs).requires_grad

    artifact = calibrate(model, run=run, samples=3)
    assert runs == [model]
    assert artifact.layers.keys() == calibrate(model, run, samples=3).layers.keys()


def test_a_compiled_model_is_calibrated_as_it_is_written():
    def backend(graph, inputs):
        raise AssertionError("compiled")

    plain = calibrate(make_model(), lambda model: [model(*a, **k) for a, k in make_forwards(4)])
    whole, blocks = make_model(), make_model()
    whole.compile(backend=backend)
    for block in blocks.blocks:
        block.compile(backend=backend)
    for model in (whole, blocks, torch.compile(make_model(), backend=backend)):
        artifact = calibrate(model, lambda model: [model(*a, **k) for a, k in make_forwards(4)])
        assert all(torch.equal(p.wq, plain.layers[n].wq) for n, p in artifact.layers.items())
        with torch.no_grad(), pytest.raises(Exception, match="compiled"):
            model(*make_forwards(1)[0][0], **make_forwards(1)[0][1])


def test_a_model_without_repeated_blocks_is_one_block():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

        def forward(self, x):
            return self.body(x)

    torch.manual_seed(0)
    model, x = Wrapped(), torch.randn(64, 64)
    artifact = calibrate(model, [((x,), {})])
    assert set(artifact.layers) == {"body.0", "body.2"}
    assert list(artifact.metrics["blocks"]) == [""]


def test_a_block_that_is_called_twice_and_a_linear_that_never_is():
    class Twice(Model):
        def forward(self, x, *, timestep, text):
            h = self.embed(x)
            for block in (*self.blocks, self.blocks[0]):
                h = block(h, torch.ones(len(x), 64), text)
            return self.out(h)

    torch.manual_seed(0)
    model = Twice(blocks=2)
    model.blocks[1].unused = nn.Linear(64, 64)
    artifact = calibrate(model)
    assert artifact.metrics["never_called"] == ["blocks.1.unused"]
    assert set(artifact.metrics["blocks"]) == {"blocks.0", "blocks.1"}


def test_with_the_rest_it_loads_without_the_16_bit_model(tmp_path):
    artifact = calibrate(make_model(), smoothing="search", include_rest=True)
    artifact.save(tmp_path / "a")
    loaded = qs.load(Model, {"blocks": 3}, tmp_path / "a", compile=False)
    attached = qs.attach(make_model().eval(), tmp_path / "a", compile=False)
    (args, kwargs), = make_forwards(1, seed=7)
    with torch.no_grad():
        assert torch.equal(loaded(*args, **kwargs), attached(*args, **kwargs))
        assert not torch.equal(loaded(*args, **kwargs), make_model().eval()(*args, **kwargs))
    assert loaded.blocks[0].up.rotation is not None and loaded.blocks[0].attn1.to_q.smooth is not None
    with pytest.raises(ArtifactError, match="packed weights alone"):
        qs.load(Model, {"blocks": 3}, calibrate(make_model()))


def test_overrides_and_kept_layers_are_heard():
    recipe = {**RECIPE, "keep": ["*.attn2.*"], "overrides": {"blocks.0.*": {"format": "w8a8"}}}
    layers = calibrate(make_model(), recipe=recipe).layers
    assert not any("attn2" in n for n in layers)
    assert {n.split(".")[1] for n, p in layers.items() if p.wq.dtype == torch.int8} == {"0"}


def test_what_cannot_be_done_is_said():
    model = make_model()
    wrong = {"passes": 3, "inputs": "quantised", "rotation": 48, "samples": 0, "damping": -1.0, "device": "abacus"}
    for options in ({name: value} for name, value in wrong.items()):
        with pytest.raises(OptionError, match=next(iter(options))):
            calibrate(model, **options)
    with pytest.raises(OptionError, match="either data"):
        qs.calibrate(model)
    with pytest.raises(OptionError, match="not str"):
        calibrate(model, "a prompt")
    with pytest.raises(RecipeError):
        calibrate(model, recipe="w5a5")
    with pytest.raises(UnsupportedError, match="packs no linear"):
        calibrate(model, recipe="off")
    with pytest.raises(UnsupportedError, match="compressed already"):
        calibrate(qs.attach(make_model(), calibrate(model), compile=False))


def test_forwards_that_go_unlike_ways_are_refused():
    class Skips(Model):
        def forward(self, x, *, timestep, text):
            h = self.embed(x)
            for block in self.blocks if timestep[0] > 500 else reversed(self.blocks):
                h = block(h, torch.ones(len(x), 64), text)
            return h

    forwards = make_forwards(2)
    for (_, kwargs), time in zip(forwards, (100.0, 900.0), strict=True):
        kwargs["timestep"] = torch.full((2,), time)
    with pytest.raises(UnsupportedError, match="unlike order"):
        calibrate(Skips(), forwards)
