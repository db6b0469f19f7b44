"""The shipped weights: present, small enough, the ones that the recorded figures belong to, and really trained."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from qs_compiler.demo.check import accuracy
from qs_compiler.demo.data import draw_scenes, render
from qs_compiler.demo.model import FRAMES, SIDE, WEIGHTS, load_model, sample

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "demo_model.json"


@pytest.fixture(scope="module")
def model():
    return load_model()


def test_the_weights_fit_into_16_mib():
    assert (WEIGHTS / "model.safetensors").stat().st_size <= 16 * 2**20


def test_the_recorded_accuracy_is_of_these_weights_and_reaches_the_goals():
    results = json.loads(RESULTS.read_text())
    assert results["weights_sha256"] == hashlib.sha256((WEIGHTS / "model.safetensors").read_bytes()).hexdigest()
    for row, tokens in zip(results["generated"], (4096, 13824), strict=False):
        assert row["tokens"] == tokens and row["clips"] >= 64
        assert row["colour"] >= 0.9 and row["direction"] >= 0.8


@torch.no_grad()
def test_the_velocity_is_right_and_follows_the_caption(model):
    transformer, text = model
    scenes = draw_scenes(1, seed=31, held_out=True)
    caption = scenes.captions()[0]
    other = str(caption).replace(f"{caption.size} {caption.colour}", f"{caption.size} cyan")
    assert other != str(caption)
    clip = render(scenes, FRAMES, SIDE) * 2 - 1
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    level = 0.5
    error = {}
    for name in (str(caption), other):
        velocity = transformer(torch.lerp(clip, noise, level), torch.tensor([1000 * level]), text.encode([name]))
        error[name] = (velocity.sample - (noise - clip)).square().mean().item()
    assert error[str(caption)] < 0.2 * clip.var().item() / level**2  # what the clip's mean as a guess would leave
    assert error[str(caption)] < 0.9 * error[other]


def test_three_steps_already_show_the_caption(model):
    scenes = draw_scenes(1, seed=32, held_out=True)
    clips = sample(*model, scenes.captions(), num_steps=3, guidance=2.0)
    found = accuracy(clips, scenes.captions())
    assert (found.colour, found.direction) == (1.0, 1.0)
