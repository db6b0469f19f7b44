"""Whole diffusers pipelines, calibrated on prompts: no model's code is known to the calibration."""

import json
from typing import NamedTuple

import pytest
import torch

import qs_compiler as qs
from qs_compiler.calibration.entry import _described
from qs_compiler.calibration.kept_runs import KeptRuns
from qs_compiler.calibration.samples import Sample
from qs_compiler.errors import ArtifactError, OptionError
from qs_compiler.pipeline import plan_layers

from ..backend.pipelines import CALLS, PIPELINES, run
from .models import make_forwards, make_model

RECIPE = {"format": "w4a8", "group_size": 32}


def calibrate(name: str, pipe, prompts=("dance monkey", "monkey"), **options):
    size = {k: v for k, v in CALLS[name].items() if k != "prompt"}
    size = {"pipe_options": {**size, "num_inference_steps": 4}, "recipe": RECIPE, "progress": False, "samples": 4}
    return qs.calibrate(pipe, list(prompts), **{**size, **options})


@pytest.mark.parametrize("name", ["cogvideox", "ltx", "hunyuan"])
def test_every_planned_linear_that_runs_is_packed(name):
    pipe = PIPELINES[name]()
    artifact = calibrate(name, pipe, epochs=1, stride=16, salient=16)
    planned = set(plan_layers(pipe.transformer, qs.Recipe.parse(RECIPE)))
    assert artifact.layers.keys() | set(artifact.metrics["never_called"]) == planned
    assert len(artifact.layers) > 0.8 * len(planned)
    # Random weights attend to nothing, so little of the maps can be wrong; the output can.
    assert all(block["error"] < 0.2 for block in artifact.metrics["blocks"].values())


def test_two_experts_get_an_artifact_each_and_attach(tmp_path):
    pipe = PIPELINES["wan 2.2"]()
    before = run("wan 2.2", pipe)
    artifacts = calibrate("wan 2.2", pipe, output_dir=tmp_path)
    assert set(artifacts) == {"transformer", "transformer_2"}
    assert {p.name for p in tmp_path.iterdir()} == {"transformer", "transformer_2", "runs"}
    names = list(artifacts["transformer"].layers)
    assert any(
        not torch.equal(artifacts["transformer"].layers[n].wq, artifacts["transformer_2"].layers[n].wq) for n in names
    )
    qs.attach(pipe, artifacts, compile=False)
    after = run("wan 2.2", pipe)
    assert (after - before).norm() < 0.2 * before.norm()


def test_prompts_are_strings_or_calls_and_seeded():
    pipe = PIPELINES["ltx"]()
    digests = [
        [t.sum().item() for p in calibrate("ltx", pipe, prompts, **options).layers.values() for t in (p.ws,)]
        for prompts, options in (
            (["dance monkey"], {}),
            ([{"prompt": "dance monkey"}], {}),
            (["dance monkey"], {"seed": 5}),
        )
    ]
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(OptionError, match="no prompt"):
        calibrate("ltx", pipe, [])


def test_the_gains_of_a_sparse_recipe_are_fitted_in_the_same_runs():
    pipe = PIPELINES["ltx"]()
    sparse = {**RECIPE, "density": 0.5, "block_size": 64, "correction": "mixture", "interval": 2, "warmup": 0.0}
    artifact = calibrate("ltx", pipe, recipe=sparse)
    blocks = {f"transformer_blocks.{i}.attn1" for i in range(len(pipe.transformer.transformer_blocks))}
    assert artifact.gains.keys() == blocks
    assert all((gains >= 0).all() and (gains <= 1).all() for gains in artifact.gains.values())
    assert any((gains > 0).any() for gains in artifact.gains.values())
    assert "set_timesteps" not in vars(pipe.scheduler)  # nobody listens any more
    assert calibrate("ltx", pipe, recipe={**sparse, "correction": "first_order"}).gains == {}


SPARSE = {**RECIPE, "density": 0.5, "block_size": 64, "correction": "mixture", "interval": 2, "warmup": 0.0}


def counted(pipe, runs, stop_at=None):
    """Let `runs` count the calls of the pipeline, and the call number `stop_at` be killed."""
    encode = pipe.encode_prompt

    def encode_prompt(*args, **kwargs):
        runs.append(0)
        if len(runs) == stop_at:
            raise KeyboardInterrupt
        return encode(*args, **kwargs)

    pipe.encode_prompt = encode_prompt
    return pipe


def test_a_killed_calibration_does_not_denoise_again(tmp_path):
    prompts, runs = ("dance monkey", "monkey", "dance"), []
    whole = calibrate("ltx", PIPELINES["ltx"](), prompts, recipe=SPARSE)
    with pytest.raises(KeyboardInterrupt):
        calibrate("ltx", counted(PIPELINES["ltx"](), runs, 3), prompts, recipe=SPARSE, output_dir=tmp_path)
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["000.pt", "001.pt"]
    found = calibrate("ltx", counted(PIPELINES["ltx"](), runs), prompts, recipe=SPARSE, output_dir=tmp_path)
    assert len(runs) == 4, "two runs, the one that was killed, and that one again"
    calibrate("ltx", counted(PIPELINES["ltx"](), runs), prompts, recipe=SPARSE, output_dir=tmp_path)
    assert len(runs) == 4
    assert found.gains.keys() == whole.gains.keys() != set()
    assert all(torch.equal(found.gains[name], whole.gains[name]) for name in whole.gains)
    for name, packed in whole.layers.items():
        assert all(torch.equal(t, found.layers[name].tensors()[k]) for k, t in packed.tensors().items()), name


def test_runs_of_another_calibration_are_not_taken(tmp_path):
    calibrate("ltx", PIPELINES["ltx"](), output_dir=tmp_path)
    for other in ({"prompts": ("monkey",)}, {"seed": 1}, {"samples": 3}):
        with pytest.raises(ArtifactError, match="other prompts or other options"):
            calibrate("ltx", PIPELINES["ltx"](), output_dir=tmp_path, **other)
    shifted, retrained = PIPELINES["ltx"](), PIPELINES["ltx"]()
    shifted.scheduler.register_to_config(shift=shifted.scheduler.config.shift + 1)
    next(p for p in retrained.text_encoder.parameters() if p.dim() > 1).data.mul_(2)
    wider = PIPELINES["ltx"]()
    wider.vae.to(torch.float64)
    for pipe in (shifted, retrained, wider):
        with pytest.raises(ArtifactError, match="other prompts or other options"):
            calibrate("ltx", pipe, output_dir=tmp_path)
    (tmp_path / "runs" / "000.pt").write_bytes(b"half a file")
    with pytest.raises(ArtifactError, match="delete it to do that run again"):
        calibrate("ltx", PIPELINES["ltx"](), output_dir=tmp_path)


def test_runs_with_what_cannot_be_told_apart_are_not_kept(tmp_path):
    size = {k: v for k, v in CALLS["ltx"].items() if k != "prompt"}
    options = {**size, "num_inference_steps": 4, "callback_on_step_end": lambda pipe, i, t, kwargs: kwargs}
    assert calibrate("ltx", PIPELINES["ltx"](), output_dir=tmp_path, pipe_options=options).layers
    assert not (tmp_path / "runs").exists()


class Outputs(NamedTuple):
    text: torch.Tensor


def test_runs_that_a_file_does_not_give_back_are_not_kept(tmp_path, caplog):
    runs, sample = KeptRuns(tmp_path, "key", {}), Sample((torch.zeros(2),), {"text": Outputs(torch.zeros(2))})
    runs.save(0, {"transformer": [sample]})
    assert "is not kept" in caplog.text and not list((tmp_path / "runs").iterdir())
    plain = Sample((torch.ones(2), [None, 3]), {"x": {"y": 0.5}}, torch.bfloat16)
    runs.save(0, {"transformer": [plain]})
    (found,) = KeptRuns(tmp_path, "key", {}).load(0)["transformer"]
    assert torch.equal(found.args[0], plain.args[0])
    assert (found.args[1], found.kwargs, found.autocast) == (plain.args[1], plain.kwargs, plain.autocast)


class Own:
    """A pipeline that is none of diffusers'."""

    def __init__(self):
        self.transformer = make_model(blocks=2)

    def __call__(self, prompt, generator, output_type):
        for args, kwargs in make_forwards(2, seed=len(prompt)):
            self.transformer(*args, **kwargs)


def test_a_pipeline_of_ones_own_keeps_blocks_and_no_runs(tmp_path):
    artifact = qs.calibrate(Own(), ["monkey"], recipe=RECIPE, progress=False, samples=2, output_dir=tmp_path)
    assert artifact.layers and [p.name for p in tmp_path.iterdir()] == ["blocks"]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_can_be_described(name):
    assert json.dumps(_described(PIPELINES[name]())) == json.dumps(_described(PIPELINES[name]()))
