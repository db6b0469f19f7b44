"""One nn.Linear under several names: calibrated once, on all that it reads, and packed under each of its names."""

import pytest
import torch
from torch import nn

import qs_compiler as qs
from qs_compiler.calibration.input_record import InputRecorder
from qs_compiler.errors import RecipeError
from qs_compiler.packed_linear import PackedLinear

from .models import CHANNELS, Block, Model, make_forwards
from .test_calibrate import RECIPE, calibrate, compressed_error, same_folder

DENSE = {"format": "w8a8"}


class Tied(Model):
    """to_k and to_v of an attention are one layer, which reads one tensor; to_q and to_out one that reads two."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__(blocks)
        for block in self.blocks:
            block.attn1.to_v, block.attn1.to_out = block.attn1.to_k, block.attn1.to_q


def tied(seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    return Tied().eval()


@pytest.mark.parametrize("options", [{}, {"in_flight": 1}, {"epochs": 1, "epochs_rounding": 1, "rounding": "learned"}])
def test_both_names_are_packed_alike(options, tmp_path):
    artifact = calibrate(tied(), include_rest=True, **options)
    assert artifact.metrics["never_called"] == []
    for one, other in (("to_k", "to_v"), ("to_q", "to_out")):
        layers = [artifact.layers[f"blocks.1.attn1.{name}"] for name in (one, other)]
        assert layers[0] is layers[1]
    assert compressed_error(tied(), artifact.layers, make_forwards(2, seed=7)) < 0.1
    artifact.save(tmp_path / "a")
    loaded = qs.load(Tied, {}, tmp_path / "a", compile=False)
    attached = qs.attach(tied(), tmp_path / "a", compile=False)
    for model in (loaded, attached):
        attention = model.blocks[0].attn1
        assert isinstance(attention.to_q, PackedLinear) and attention.to_q is attention.to_out
        assert attention.to_k is attention.to_v
    (args, kwargs), = make_forwards(1, seed=7)
    with torch.no_grad():
        assert torch.equal(loaded(*args, **kwargs), attached(*args, **kwargs))


def test_it_compiles(tmp_path):
    model = tied()
    calibrate(model, recipe=DENSE).save(tmp_path / "a")
    (args, kwargs), = make_forwards(1, seed=7)
    with torch.no_grad():
        wanted = model(*args, **kwargs)
        got = qs.attach(model, tmp_path / "a")(*args, **kwargs)
    assert ((got - wanted).norm() / wanted.norm()).item() < 0.05
    passes = {p.name: p for p in qs.reports()[-1].passes}
    assert passes["quantize_linear"].matched == 2 * 10, "calls, not layers; modulation stays"


def test_one_sample_at_a_time_finds_the_same_and_a_killed_calibration_goes_on(tmp_path):
    whole, alone = calibrate(tied()), calibrate(tied(), in_flight=1, output_dir=tmp_path / "work")
    for name, packed in whole.layers.items():
        assert torch.equal(packed.wq, alone.layers[name].wq), name
    again = calibrate(tied(), in_flight=1, output_dir=tmp_path / "work")
    alone.save(tmp_path / "a")
    again.save(tmp_path / "b")
    assert same_folder(tmp_path / "a", tmp_path / "b")


def test_all_that_it_reads_is_recorded():
    block = tied().blocks[0]
    linears = {"up": block.up, "q": block.attn1.to_q, "k": block.attn1.to_k}
    recorder, seen = InputRecorder(linears, 16), []
    block.attn1.to_q.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad(), recorder:
        block(torch.randn(1, 12, CHANNELS), torch.randn(1, CHANNELS), torch.randn(1, 5, 32))
    record = recorder.record
    assert torch.equal(record.rows["q"][0], torch.cat(seen)) and len(seen) == 2
    assert record.rows["k"][0].shape == (12, CHANNELS), "one tensor counts once"
    assert record.groups == [["q"], ["k"], ["up"]], "q is not of k's group, for it reads more"


@pytest.mark.parametrize("first", ["time", "tokens"])
def test_a_layer_that_also_reads_tokens_is_quantised_for_them(first):
    linear, tensors = nn.Linear(64, 64), {"time": torch.randn(2, 64), "tokens": torch.randn(2, 9, 64)}
    recorder = InputRecorder({"linear": linear}, 16)
    for _ in range(2):
        with torch.no_grad(), recorder:
            for name in sorted(tensors, key=lambda n: n != first):
                linear(tensors[name])
    assert recorder.record.few_rows == set()


def test_off_under_one_name_is_off():
    name = "blocks.0.attn1.to_v"
    artifact = calibrate(tied(), recipe={**RECIPE, "overrides": {name: {"format": "off"}}})
    assert not {name, "blocks.0.attn1.to_k"} & artifact.layers.keys() and "blocks.1.attn1.to_k" in artifact.layers
    model = qs.attach(tied(), recipe={**DENSE, "overrides": {name: {"format": "off"}}}, compile=False)
    assert type(model.blocks[0].attn1.to_k) is nn.Linear


def test_unlike_formats_of_one_layer_are_an_error_that_names_both():
    recipe = {**RECIPE, "overrides": {"blocks.1.attn1.to_v": {"format": "w8a8"}}}
    with pytest.raises(ValueError, match=r"'blocks.1.attn1.to_k' and 'blocks.1.attn1.to_v' are one layer.*overrides="):
        calibrate(tied(), recipe=recipe)


def test_a_layer_of_two_blocks_is_an_error_that_names_both_and_the_remedy_helps():
    model = Model(2)
    model.blocks[1].up = model.blocks[0].up
    with pytest.raises(RecipeError, match=r"'blocks.0.up' and 'blocks.1.up' are one layer of two blocks.*overrides="):
        calibrate(model)
    layers = calibrate(model, recipe={**RECIPE, "overrides": {"blocks.0.up": {"format": "off"}}}).layers
    assert "blocks.0.down" in layers and not {"blocks.0.up", "blocks.1.up"} & layers.keys()


def test_a_block_under_two_names_is_one_block():
    torch.manual_seed(0)
    model = Model(1)
    model.blocks.append(model.blocks[0])
    assert isinstance(model.blocks[1], Block)
    artifact = calibrate(model)
    assert artifact.layers["blocks.0.up"] is artifact.layers["blocks.1.up"]
    assert len(artifact.metrics["blocks"]) == 1 and artifact.metrics["never_called"] == []
