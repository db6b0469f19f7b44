import copy
import sys

import pytest
import torch

from qs_compiler.demo import model as demo
from qs_compiler.demo import train
from qs_compiler.demo.muon import Muon, orthogonalise


@pytest.fixture
def tiny_config(monkeypatch):
    config = copy.deepcopy(demo.CONFIG)
    config["transformer"].update(num_attention_heads=1, num_layers=1, ffn_dim=64)
    monkeypatch.setattr(train, "CONFIG", config)
    monkeypatch.setattr(demo.build_model, "__defaults__", (config,))
    return config


def run(monkeypatch, *arguments: str) -> None:
    common = ["train", "--device", "cpu", "--eager", "--samples", "2", "--stage", "2x8@4*2+3x12@2:1.5"]
    monkeypatch.setattr(sys, "argv", [*common, *arguments])
    train.main()


def test_training_saves_and_resumes(monkeypatch, tmp_path, tiny_config, capsys):
    run(monkeypatch, "--out", str(tmp_path / "one"))
    assert (tmp_path / "one" / "stage0.png").stat().st_size > 0
    first, _ = demo.load_model(folder=tmp_path / "one")
    run(monkeypatch, "--out", str(tmp_path / "two"), "--resume", str(tmp_path / "one"), "--seed", "1", "--lr", "1e-9")
    second, _ = demo.load_model(folder=tmp_path / "two")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert "Accuracy" in capsys.readouterr().out


def test_a_stage_is_read_and_its_rare_grid_spread():
    stage = train.Stage.parse("16x64@32*3+24x96@4:300")
    assert stage.seconds == 300
    assert sorted(stage.grids, key=lambda g: g.side) == [train.Grid(16, 64, 32)] * 3 + [train.Grid(24, 96, 4)]


def test_the_loss_falls(tiny_config):
    torch.manual_seed(0)
    model = train.Denoiser(*demo.build_model())
    optimisers = train.make_optimisers(model, lr=5e-3)
    clips, tokens = train.make_batch(train.Grid(2, 16, 16), seed=0, device=torch.device("cpu"))
    losses = []
    for _ in range(30):
        loss = train.flow_matching_loss(model, clips, tokens, shift=3.0)[0].mean()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


def test_noise_levels_are_stratified_and_shifted():
    def still(clips, level, tokens):
        return torch.zeros_like(clips)

    clips = torch.zeros(64, 3, 1, 4, 4)
    losses, level = train.flow_matching_loss(still, clips, torch.zeros(64, 1), shift=3.0)
    even = level / (3 - 2 * level)
    assert torch.equal((even.sort().values * 64 - 1e-3).floor().clamp(min=0), torch.arange(64.0))
    assert losses.mean().item() == pytest.approx(1.0, abs=0.15)  # the noise's variance


def test_some_captions_are_dropped():
    _, tokens = train.make_batch(train.Grid(1, 8, 200), seed=0, device=torch.device("cpu"))
    assert 5 <= tokens.eq(0).all(1).sum() <= 40


def test_muon_takes_orthogonal_steps():
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 8, 24), (2, 24, 8)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
        assert values.min() > 0.5 and values.max() < 1.3
    weights = [torch.nn.Parameter(torch.zeros(8, 24)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.randn(8, 24)
    Muon(weights, lr=0.1).step()
    assert weights[0].detach().square().mean().sqrt() == pytest.approx(0.1 * 0.2 * 24**0.5 / 24**0.5, rel=0.25)
    assert not torch.equal(*weights)
