import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console

from qs_compiler import Recipe
from qs_compiler.demo import evaluate as module
from qs_compiler.demo.captions import Caption
from qs_compiler.demo.evaluate import Evaluation, evaluate
from qs_compiler.errors import ArtifactError
from qs_compiler.runtime.schedule import Schedule
from tests.tiny_demo import SETTING, SPARSE


@pytest.fixture
def asked(tiny_folder) -> Evaluation:
    return Evaluation(
        recipes={"both": SPARSE, "bits": Recipe.parse("w8a8")},
        setting=SETTING,
        device=torch.device("cpu"),
        captions=3,
        calibration_forwards=0,
        eager_graphs=True,
        weights=tiny_folder,
        command="quantsparse eval",
    )


def run(asked, path):
    return evaluate(asked, path, Console(file=io.StringIO()))


def without_times(clips):
    return {key: {k: v for k, v in clip.items() if k != "seconds"} for key, clip in clips.items()}


def test_rows_hold_figures_and_where_they_come_from(asked, tmp_path):
    rows = run(asked, tmp_path / "new" / "results.json")
    content = json.loads((tmp_path / "new" / "results.json").read_text())
    assert content["rows"] == rows
    assert [row["name"] for row in rows] == ["both", "bits"]
    sparse, dense = rows
    assert sparse["recipe"] == SPARSE.to_dict()
    assert (sparse["sparse_density"], dense["sparse_density"]) == (0.5, None)
    assert sparse["average_density"] == Schedule(3, 0.25).average_density(0.5, 4)
    assert sparse["steps"] == {"dense": 1, "refresh": 1, "sparse": 2}
    assert dense["psnr"]["mean"] > sparse["psnr"]["mean"]
    assert dense["psnr"]["interval95"] > 0
    assert sparse["clips"] == 3 and len(content["clips"]) == 6
    captions = {key.split(" | ")[1] for key in content["clips"]}
    assert len(captions) == 3 and all(Caption.parse(caption).held_out for caption in captions)
    for name in ("command", "device", "versions", "date", "caption_accuracy"):
        assert sparse[name]


def test_a_stopped_run_goes_on_where_it_was(asked, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole.json", tmp_path / "stopped.json"
    run(asked, whole)
    original, calls = module.sample_traced, []

    def stop_at_fourth(model, text, caption, setting, seed, *, announce):
        calls.append(announce)
        if calls.count(True) == 4:
            raise KeyboardInterrupt
        return original(model, text, caption, setting, seed, announce=announce)

    monkeypatch.setattr(module, "sample_traced", stop_at_fourth)
    with pytest.raises(KeyboardInterrupt):
        run(asked, stopped)
    assert len(json.loads(stopped.read_text())["clips"]) == 3
    calls.append(True)  # past the fourth
    before = len(calls)
    run(asked, stopped)
    assert calls[before:].count(True) == 3, "only what was missing is sampled"
    parts = [json.loads(path.read_text()) for path in (whole, stopped)]
    assert without_times(parts[0]["clips"]) == without_times(parts[1]["clips"])
    assert parts[0]["rows"] == parts[1]["rows"]
    assert list(tmp_path.iterdir()) and not list(tmp_path.glob(".*"))


def test_more_captions_and_recipes_join_what_is_there(asked, tmp_path):
    path = tmp_path / "results.json"
    run(dataclasses.replace(asked, captions=1, recipes={"both": SPARSE}), path)
    first = json.loads(path.read_text())["clips"]
    rows = run(dataclasses.replace(asked, captions=1), path)
    assert [row["name"] for row in rows] == ["both", "bits"]
    assert first.items() <= json.loads(path.read_text())["clips"].items()


def test_another_evaluation_is_refused_and_says_in_what(asked, tmp_path):
    path = tmp_path / "results.json"
    run(dataclasses.replace(asked, captions=1, recipes={"bits": asked.recipes["bits"]}), path)
    before = path.read_text()
    for other, words in (
        (dataclasses.replace(asked, setting=dataclasses.replace(SETTING, num_steps=5)), "setting"),
        (dataclasses.replace(asked, recipes={"bits": Recipe.parse("w4a8")}), "recipe bits"),
    ):
        with pytest.raises(ArtifactError, match=words):
            run(other, path)
    assert path.read_text() == before


@pytest.mark.parametrize("content", ["hello", "{}", "[1]"])
def test_a_file_of_something_else_is_left_alone(asked, tmp_path, content):
    path = tmp_path / "notes.json"
    path.write_text(content)
    with pytest.raises(ArtifactError, match="left as it is"):
        run(asked, path)
    assert path.read_text() == content


def test_compiled_graphs_give_the_figures_of_eager_ones(asked, tmp_path):
    one = dataclasses.replace(asked, captions=1, recipes={"both": SPARSE})
    eager = run(one, tmp_path / "eager.json")[0]
    compiled = run(dataclasses.replace(one, eager_graphs=False), tmp_path / "compiled.json")[0]
    assert compiled["steps"] == eager["steps"]
    assert compiled["psnr"]["mean"] == pytest.approx(eager["psnr"]["mean"], abs=0.2)
