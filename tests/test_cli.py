"""The command `quantsparse`: what it prints and writes, and what it says to bad input."""

import importlib.util
import json
import sys
from pathlib import Path

import imageio.v3 as imageio
import pytest
import torch
from diffusers import WanTransformer3DModel

import qs_compiler
from qs_compiler import _compat, cli
from qs_compiler.artifact import Artifact
from qs_compiler.packing import pack_weight
from tests.backend.pipelines import wan
from tests.tiny_demo import write_model

RECIPE = '{"format": "w8a8", "density": 0.5, "interval": 3, "warmup": 0}'


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run the command in a folder of its own: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    torch._dynamo.reset()

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quantsparse", *words])
        with pytest.raises(SystemExit) as stopped, _compat.eager_graphs():
            cli.main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    yield run
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(
    ("words", "cause", "remedy"),
    [
        (["demo", "--recipe", "w4a9"], "'w4a9' is not known", "did you mean 'w4a8'"),
        (["demo", "--recipe", "w4a8-d0"], "'-d0' is no density", "w4a8-d25"),
        (["demo", "--recipe", "{oops}"], "no JSON object", '{"format": "w4a8", "density": 0.25}'),
        (["demo", "--recipe", '{"densty": 0.5}'], "'densty'", "did you mean 'density'"),
        (["demo", "--caption", "a purple unicorn"], "a purple unicorn", "COLOUR: red|green"),
        (["demo", "--device", "abacus"], "'abacus' is no device", "cpu or cuda"),
        (["demo", "--device", "meta"], "'meta' is no device", "cpu or cuda"),
        (["demo", "--model", "nowhere"], "no demo model in nowhere", "qs_compiler.demo.train"),
        (["eval", "-r", "w8a8", "-o", "x.json", "--side", "63"], "63 is no multiple", "60 is one"),
        (["eval", "-r", "name=w4a9", "-o", "x.json"], "'w4a9' is not known", "did you mean 'w4a8'"),
        (["inspect", "nothing.qs"], "no artifact at 'nothing.qs'", "calibrate"),
        (["generate", "no/such/folder", "hello"], "'no/such/folder' is no pipeline", ""),
        (["generate", "x", "hello", "-o", "clip.webm"], "not as 'clip.webm'", ".gif or .mp4"),
        (["generate", "x", "hello", "--dtype", "int3"], "--dtype int3 is unknown", "bfloat16"),
    ],
)
def test_what_is_wrong_is_said_with_its_remedy(call, words, cause, remedy):
    status, _, stderr = call(*words)
    assert status == 1
    assert stderr.startswith("error: ")
    assert cause in stderr and remedy in stderr
    assert "Traceback" not in stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no CUDA device")
def test_a_missing_card_is_an_error(call):
    status, _, stderr = call("demo", "--device", "cuda")
    assert status == 1 and "use --device cpu" in stderr


@pytest.mark.parametrize(("command", "extra"), [("demo", "demo"), ("eval", "eval"), ("generate", "diffusers")])
def test_missing_packages_are_named_with_the_extra_that_brings_them(call, monkeypatch, command, extra):
    found = importlib.util.find_spec
    hidden = cli.EXTRAS[extra][-1]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == hidden else found(name))
    needed = {"demo": [], "eval": ["-r", "w8a8", "-o", "x.json"], "generate": ["model", "prompt"]}[command]
    status, _, stderr = call(command, *needed)
    assert status == 1
    assert hidden in stderr and f"pip install 'qs-compiler[{extra}]'" in stderr


def test_the_extras_name_what_the_commands_check():
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    for extra, names in cli.EXTRAS.items():
        assert set(names) <= {Requirement(text).name for text in project["optional-dependencies"][extra]}


def test_an_output_that_cannot_be_made_is_said_before_the_work(call, tmp_path, tiny):
    (tmp_path / "taken").write_text("")
    status, stdout, stderr = call("demo", "--model", tiny, "--output", "taken/here")
    assert status == 1 and "choose another --output" in stderr
    assert stdout == ""


def test_demo_prints_its_figures_and_writes_the_report(call, tmp_path, tiny):
    status, stdout, stderr = call(
        "demo", "--model", tiny, "--recipe", RECIPE, "--steps", "2", "--data-free", "--seed", "5", "-o", "shown"
    )
    assert status == 0, stderr
    for words in ("PSNR", "SSIM", "linears of the blocks", "cross-attention", "2 of 4 calls ran sparse"):
        assert words in stdout
    report = (tmp_path / "shown" / "report.html").read_text()
    assert "--seed 5" in report and "seed 5" in report
    assert list((tmp_path / "shown" / "graphs").glob("*/*.sparse.sparsify_attention.after.py"))

    status, stdout, _ = call("inspect", "shown/graphs")
    assert status == 0
    assert "sparsify_attention" in stdout and "cross-attention" in stdout


def test_eval_writes_rows_under_their_names(call, tmp_path, tiny):
    words = ["eval", "-r", f"tuned={RECIPE}", "-r", "w8a8", "-o", "rows.json", "--eager-graphs", "--model", tiny]
    words += ["--captions", "1", "--steps", "2", "--side", "32", "--calibration", "0"]
    status, stdout, stderr = call(*words)
    assert status == 0, stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["tuned", "w8a8"]
    assert rows[0]["recipe"]["density"] == 0.5
    assert rows[0]["command"].startswith("quantsparse eval -r 'tuned={")
    assert "tuned" in stdout and "rows.json" in stdout


def test_inspect_shows_an_artifact(call, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 32))
    recipe = qs_compiler.Recipe.parse("w4a8-d25")
    layers = {name: pack_weight(model.get_submodule(name).weight, recipe) for name in ("0", "1")}
    Artifact.of(model, recipe, layers, {"error": 0.125, "blocks": {}}).save(tmp_path / "small.qs")
    status, stdout, stderr = call("inspect", "small.qs")
    assert status == 0, stderr
    for words in ("Sequential", "w4a8-d25", "2 linears", "int4, input int8", "0.125"):
        assert words in stdout


SIZE = ["--frames", "33", "--height", "128", "--width", "128", "--steps", "3", "--dtype", "float32", "--device", "cpu"]
FOR_576_TOKENS = '{"format": "w4a8", "density": 0.5, "block_size": 64}'


@pytest.fixture
def pipeline(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wan().save_pretrained(tmp_path / "pipe")
    return tmp_path


def test_generate_writes_a_clip_of_a_compressed_pipeline(call, pipeline):
    status, stdout, stderr = call("generate", "pipe", "a cat", "-r", FOR_576_TOKENS, "-o", "made/clip.gif", *SIZE)
    assert status == 0, stderr
    assert imageio.imread(pipeline / "made" / "clip.gif", index=None).shape == (33, 128, 128, 3)
    assert "attentions 2/4" in stdout and "2 sparse" in stdout


def test_generate_uses_what_calibrate_saved(call, pipeline):
    (pipeline / "prompts.txt").write_text("a cat\n\na dog\n")
    words = ["pipe", "prompts.txt", "-o", "wan.qs", "-r", FOR_576_TOKENS, "--samples", "2", "--work", "blocks"]
    status, stdout, stderr = call("calibrate", *words, *SIZE)
    assert status == 0, stderr
    assert "20 linears: wan.qs" in stdout
    assert Artifact.load(pipeline / "wan.qs").recipe.density == 0.5
    assert list((pipeline / "blocks").iterdir())
    status, stdout, stderr = call("generate", "pipe", "a cat", "--artifact", "wan.qs", *SIZE)
    assert status == 0, stderr
    assert "w4a8-d50" in stdout and (pipeline / "clip.gif").is_file()


@pytest.mark.parametrize("content", [None, "\n \n"])
def test_calibrate_needs_prompts(call, tmp_path, content):
    if content is not None:
        (tmp_path / "prompts.txt").write_text(content)
    status, _, stderr = call("calibrate", "pipe", "prompts.txt", "-o", "wan.qs")
    assert status == 1 and "prompts.txt" in stderr and "one a line" in stderr


def test_export_saves_a_program_that_computes_as_the_transformer(call, pipeline):
    size = [word for word in SIZE if word not in ("--steps", "3")]
    status, stdout, stderr = call("export", "pipe", "-o", "wan.pt2", "-r", "w8a8", *size)
    assert status == 0, stderr
    assert "linears 20/" in stdout and "WanTransformer3DModel" in stdout
    program = torch.export.load(pipeline / "wan.pt2")
    assert not any("to_q.weight" in name for name in program.state_dict)
    inputs = program.example_inputs[1]
    with torch.no_grad():
        (found,) = program.module()(**inputs)
        (wanted,) = WanTransformer3DModel.from_pretrained(pipeline / "pipe" / "transformer")(**inputs)
    assert 0 < (found - wanted).norm() / wanted.norm() < 0.05  # int8 rounding of weights and activations


@pytest.mark.parametrize(("words", "cause"), [(["-o", "wan.bin"], ".pt2"), (["-o", "a.pt2", "-r", "w8a8-d25"], "w8a8")])
def test_export_says_what_it_cannot_do(call, pipeline, words, cause):
    status, _, stderr = call("export", "pipe", *words, *[word for word in SIZE if word not in ("--steps", "3")])
    assert status == 1 and cause in stderr


def test_bench_times_each_phase_of_each_recipe(call, pipeline):
    sparse = '{"format": "w8a8", "density": 0.5, "block_size": 64, "interval": 2, "warmup": 0.25}'
    size = [word for word in SIZE if word not in ("--steps", "3")]
    words = ["pipe", "-r", "w8a8", "-r", sparse, "--steps", "8", "--repeats", "1", "-o", "bench.json", *size]
    status, stdout, stderr = call("bench", *words)
    assert status == 0, stderr
    result = json.loads((pipeline / "bench.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["as it is", "torch.compile", "w8a8", "w8a8-d50"]
    assert result["steps"] == 8 and result["device"] == "cpu" and result["command"].startswith("quantsparse bench pipe")
    eager, compiled, packed, both = result["rows"]
    assert set(eager["milliseconds"]) == set(packed["milliseconds"]) == {"dense"}
    assert both["steps"] == {"dense": 2, "refresh": 3, "sparse": 3} and set(both["milliseconds"]) == set(both["steps"])
    assert both["seconds"] == pytest.approx(sum(both["milliseconds"][p] * n for p, n in both["steps"].items()) / 1e3)
    assert packed["weight_bytes"] < compiled["weight_bytes"] == eager["weight_bytes"]
    assert "speed-up" in stdout and "w8a8-d50" in stdout
    last = qs_compiler.reports()[-1]
    assert last.calls == {"dense": 4, "refresh": 4, "sparse": 4}  # two branches, each phase once to compile and once


def test_bench_wants_one_expert(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wan(dual=True).save_pretrained(tmp_path / "pipe")
    status, _, stderr = call("bench", "pipe", "--dtype", "float32", "--device", "cpu")
    assert status == 1 and "two experts" in stderr and "qs_compiler.attach" in stderr


def test_version(call):
    assert call("--version")[1].strip() == qs_compiler.__version__
