import base64
import dataclasses
import io
import re
from pathlib import Path

import imageio.v3 as imageio
import pytest
import torch
from rich.console import Console

from qs_compiler.demo import report, summary, terminal
from qs_compiler.demo.captions import EXAMPLE
from qs_compiler.demo.figures import GAP, clips_gif
from qs_compiler.demo.run import Demo, run_demo
from qs_compiler.runtime.schedule import Schedule
from tests.tiny_demo import SETTING, SPARSE

pytestmark = pytest.mark.usefixtures("eager_graphs")


def quiet() -> Console:
    return Console(file=io.StringIO(), width=100)


def run(folder: Path, model: Path, **changes):
    demo = Demo(recipe=SPARSE, setting=SETTING, device=torch.device("cpu"), weights=model, calibrated=False)
    demo = dataclasses.replace(demo, dumps=folder / report.GRAPHS, **changes)
    return run_demo(demo, quiet())


@pytest.fixture
def outcome(tmp_path, tiny_folder):
    return run(tmp_path, tiny_folder)


def test_figures_are_those_of_the_run(outcome):
    assert outcome.calls == {"dense": 2, "refresh": 2, "sparse": 4}
    assert outcome.sparse_density == 0.5
    assert outcome.average_density == Schedule(3, 0.25).average_density(0.5, 4)
    assert 0 < outcome.likeness.psnr < 120
    assert not torch.equal(outcome.clip, outcome.twin)
    assert sum(outcome.bytes_after.values()) < sum(outcome.bytes_before.values())
    assert [reason for name, reason, _ in outcome.skipped if name == "sparsify_attention"] == ["cross-attention"]
    passes = {name: matches for name, *matches in summary.pass_rows(outcome)}
    assert passes["quantize_linear"] == ["20", "20", "20"]
    assert passes["sparsify_attention"] == ["2", "2", "2"]


def test_calibrated_weights_are_nearer(tmp_path, tiny_folder):
    changes = {"recipe": dataclasses.replace(SPARSE, format="w4a8", density=1.0)}
    rounded = run(tmp_path, tiny_folder, **changes)
    calibrated = run(tmp_path, tiny_folder, calibrated=True, **changes)
    assert calibrated.calibrated and not rounded.calibrated
    assert calibrated.steps[0].velocity < rounded.steps[0].velocity
    assert not rounded.forward_errors
    nearest, live = calibrated.forward_errors.values()  # what was calibrated elsewhere is of the bundled model alone
    assert 0 < live < nearest
    assert [words for name, _, words in summary.headline(calibrated) if name == "Error of a forward"] == [
        f"weights {how}" for how in calibrated.forward_errors
    ]


def test_a_dense_recipe_says_that_nothing_ran_sparse(tmp_path, tiny_folder):
    outcome = run(tmp_path, tiny_folder, recipe=dataclasses.replace(SPARSE, density=1.0))
    assert outcome.sparse_density is None
    assert outcome.average_density == 1
    text = report.write_report(outcome, tmp_path, "quantsparse demo").read_text()
    assert "no call ran sparse" in text
    assert "What a sparse step reads" not in text


def test_report_is_one_file_whose_links_lead_to_the_dumped_graphs(outcome, tmp_path):
    text = report.write_report(outcome, tmp_path, "quantsparse demo --seed 0").read_text()
    links = re.findall(r'href="([^"]*)"', text)
    assert len(links) >= 6
    assert all((tmp_path / link).is_file() for link in links)
    assert any("sparse_attention.default" in (tmp_path / link).read_text() for link in links)
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', text), "nothing may be fetched"
    for words in (str(EXAMPLE), "quantsparse demo --seed 0", "cross-attention", f"{outcome.likeness.psnr:.1f} dB"):
        assert words in text


def test_pictures_can_be_decoded(outcome, tmp_path):
    text = report.write_report(outcome, tmp_path, "quantsparse demo").read_text()
    found = re.findall(r'src="data:(image/[\w+]+);base64,([^"]+)"', text)
    assert [kind for kind, _ in found] == ["image/gif", "image/svg+xml", "image/png"]
    gif, svg, png = (base64.b64decode(content) for _, content in found)
    assert imageio.imread(gif, index=None).shape == (16, 16, 3 * 16 + 2 * GAP, 3)
    assert svg.startswith(b"<?xml") and b"</svg>" in svg
    assert imageio.imread(png).shape[1] > 1000


def test_gif_shows_twin_clip_and_difference():
    twin, clip = torch.zeros(3, 3, 16, 16), torch.zeros(3, 3, 16, 16)
    twin[0, 1], clip[0, 1] = 1.0, 0.9
    frame = imageio.imread(clips_gif(twin, clip), index=None)[1].astype(int)
    expected = {8: (255, 0, 0), 16 + GAP + 8: (230, 0, 0), 2 * (16 + GAP) + 8: (102, 0, 0)}
    for column, colour in expected.items():
        assert abs(frame[8, column] - colour).max() <= 2, "a palette of 256 colours"


def test_an_earlier_runs_graphs_are_removed_and_nothing_else(tmp_path):
    folder = tmp_path / report.GRAPHS / "transformer_wan_0"
    folder.mkdir(parents=True)
    for name in ("000.sparse.quantize_linear.before.py", "report.json", "notes.txt"):
        (folder / name).write_text("x")
    (tmp_path / "report.json").write_text("x")
    report.clear_dumps(tmp_path)
    assert [p.name for p in sorted(tmp_path.rglob("*")) if p.is_file()] == ["notes.txt", "report.json"]
    assert (tmp_path / "report.json").is_file()


def test_terminal_shows_the_same_figures(outcome):
    console = quiet()
    terminal.show(outcome, console)
    text = console.file.getvalue()
    for rows in (summary.headline(outcome), summary.weight_rows(outcome), summary.pass_rows(outcome)):
        for row in rows:
            assert all(cell in text for cell in row), row


def test_progress_counts_every_call(tmp_path, tiny_folder):
    demo = Demo(recipe=SPARSE, setting=SETTING, device=torch.device("cpu"), weights=tiny_folder, calibrated=False)
    console = quiet()
    outcome = run_demo(demo, console)
    text = console.file.getvalue()
    assert text.count("8/8") == 2
    assert set(outcome.seconds) == {"sample uncompressed", "sample compressed"}
