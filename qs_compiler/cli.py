"""The command `quantsparse`."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape

from . import __version__
from .backend import DEVICES
from .errors import DeviceError, OptionError, QuantSparseError
from .options import Recipe

EXTRAS = {
    "demo": ("diffusers", "imageio", "jinja2", "matplotlib", "torchmetrics"),
    "eval": ("diffusers", "torchmetrics"),
    "diffusers": ("diffusers", "transformers", "accelerate"),
}

app = typer.Typer(
    help="Quantised and sparse video diffusion transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out, err = Console(), Console(stderr=True)

RecipeText = Annotated[
    str, typer.Option("--recipe", "-r", help="A name such as w4a8-d25, or a JSON object with the fields of a recipe.")
]
DeviceName = Annotated[str | None, typer.Option("--device", help="cpu or cuda; cuda by default where there is one.")]
Seed = Annotated[int, typer.Option(help="Of the starting noise.")]
Weights = Annotated[
    Path | None, typer.Option("--model", help="Folder of a model by `qs_compiler.demo.train`, not the bundled one.")
]


Model = Annotated[str, typer.Argument(help="Folder or hub name of a diffusers video pipeline.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps; the pipeline's by default.")]
Pixels = Annotated[int | None, typer.Option(min=1, help="The pipeline's by default.")]
DtypeName = Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")]


class MissingPackages(QuantSparseError):
    """A command needs packages that are not installed."""


@app.command()
def demo(
    recipe: RecipeText = "w4a8-d25",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps; the model follows its captions from 10 on.")] = 10,
    caption: Annotated[
        str | None, typer.Option(help="What the clip shows; any wrong one says how to write it.")
    ] = None,
    seed: Seed = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report.")] = Path("out/demo"),
    device: DeviceName = None,
    data_free: Annotated[
        bool, typer.Option("--data-free", help="Round the weights instead of calibrating them.")
    ] = False,
    model: Weights = None,
) -> None:
    """Compress the bundled video model, sample one clip with and without, and show what that costs and gains."""
    require("demo", "quantsparse demo")
    from .demo import report, terminal
    from .demo.captions import EXAMPLE, Caption
    from .demo.model import WEIGHTS
    from .demo.run import Demo, run_demo
    from .demo.trace import Setting

    asked = Demo(
        recipe=parse_recipe(recipe),
        setting=Setting(steps),
        device=parse_device(device),
        caption=EXAMPLE if caption is None else Caption.parse(caption),
        seed=seed,
        dumps=output / report.GRAPHS,
        weights=WEIGHTS if model is None else model,
        calibrated=not data_free,
    )
    check_folder(output)
    out.print(
        f"[bold]{asked.caption}[/]  [dim]{escape(str(asked.recipe))}, {steps} steps, seed {seed}, {asked.device}[/]"
    )
    report.clear_dumps(output)
    outcome = run_demo(asked, out)
    terminal.show(outcome, out)
    path = report.write_report(outcome, output, command_line())
    out.print(f"Report: {path}", soft_wrap=True)


@app.command("eval")
def evaluate(
    recipe: Annotated[
        list[str],
        typer.Option("--recipe", "-r", help="A recipe as for `demo`, or NAME=RECIPE; give it once for each row."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file; a stopped run goes on from it.")],
    captions: Annotated[int, typer.Option(min=1, help="Captions, none of which the training showed.")] = 16,
    seeds: Annotated[int, typer.Option(min=1, help="Noises for each caption.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 30,
    frames: Annotated[int, typer.Option(min=1)] = 16,
    side: Annotated[int, typer.Option(min=12, help="Pixels; a multiple of 4.")] = 64,
    calibration: Annotated[
        int, typer.Option(min=0, help="Forwards that the weights are calibrated on; 0 rounds them without data.")
    ] = 16,
    eager_graphs: Annotated[
        bool, typer.Option("--eager-graphs", help="Do not compile: run the rewritten graphs with the reference ops.")
    ] = False,
    device: DeviceName = None,
    model: Weights = None,
) -> None:
    """Compare recipes with the uncompressed bundled model over many captions and noises."""
    require("eval", "quantsparse eval")
    from .demo.evaluate import Evaluation
    from .demo.evaluate import evaluate as run
    from .demo.model import WEIGHTS
    from .demo.terminal import show_rows
    from .demo.trace import Setting

    if side % 4:
        raise OptionError(f"--side {side} is no multiple of the model's patch of 4 pixels; {side - side % 4} is one.")
    asked = Evaluation(
        recipes=dict(map(named_recipe, recipe)),
        setting=Setting(steps, frames, side),
        device=parse_device(device),
        captions=captions,
        seeds=seeds,
        calibration_forwards=calibration,
        eager_graphs=eager_graphs,
        weights=WEIGHTS if model is None else model,
        command=command_line(),
    )
    check_folder(output.parent)
    show_rows(run(asked, output, out), out)
    out.print(f"Results: {output}", soft_wrap=True)


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="An artifact, or a folder of dumped graphs.")]) -> None:
    """Say what an artifact holds, or what was rewritten in the graphs of a debug_dir."""
    from .inspection import show_artifact, show_dumps

    dumps = sorted(path.rglob("report.json")) if path.is_dir() else []
    if dumps:
        show_dumps(dumps, out)
    else:
        show_artifact(path, out)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument()],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .gif or .mp4 file.")] = Path("clip.gif"),
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="As for `demo`; the artifact's, else w8a8.")
    ] = None,
    artifact: Annotated[Path | None, typer.Option(help="A calibrated artifact.")] = None,
    seed: Seed = 0,
    steps: Steps = None,
    frames: Pixels = None,
    height: Pixels = None,
    width: Pixels = None,
    dtype: DtypeName = "bfloat16",
    device: DeviceName = None,
) -> None:
    """Sample one clip of a diffusers pipeline, compressed."""
    require("diffusers", "quantsparse generate")
    from .pipeline_commands import Source
    from .pipeline_commands import generate as run

    source = Source(model, parse_device(device), dtype, pipeline_call(steps, frames, height, width))
    run(source, prompt, output, None if recipe is None else parse_recipe(recipe), artifact, seed, out)


@app.command()
def calibrate(
    model: Model,
    prompts: Annotated[Path, typer.Argument(help="Text file, one prompt a line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the artifact.")],
    recipe: RecipeText = "w4a8-d25",
    samples: Annotated[int, typer.Option(min=1, help="Forwards that are kept of the denoising runs.")] = 16,
    work: Annotated[
        Path | None, typer.Option("--work", help="Folder of finished blocks; a stopped calibration goes on from it.")
    ] = None,
    steps: Steps = None,
    frames: Pixels = None,
    height: Pixels = None,
    width: Pixels = None,
    dtype: DtypeName = "bfloat16",
    device: DeviceName = None,
) -> None:
    """Calibrate a diffusers pipeline on prompts, for `generate --artifact` and qs_compiler.attach."""
    require("diffusers", "quantsparse calibrate")
    from .pipeline_commands import Source, calibrate_pipeline

    source = Source(model, parse_device(device), dtype, pipeline_call(steps, frames, height, width))
    calibrate_pipeline(source, prompts, output, parse_recipe(recipe), samples, work, out)


@app.command()
def export(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .pt2 file.")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="A dense one, such as w8a8; the artifact's, else w8a8.")
    ] = None,
    artifact: Annotated[Path | None, typer.Option(help="A calibrated artifact.")] = None,
    prompt: Annotated[str, typer.Option(help="Of the call whose shapes are exported.")] = "a video",
    frames: Pixels = None,
    height: Pixels = None,
    width: Pixels = None,
    dtype: DtypeName = "bfloat16",
    device: DeviceName = None,
) -> None:
    """Export the transformer of a diffusers pipeline, compressed, as a torch.export program."""
    require("diffusers", "quantsparse export")
    from .pipeline_commands import Source, export_transformer

    source = Source(model, parse_device(device), dtype, pipeline_call(None, frames, height, width))
    export_transformer(source, prompt, output, None if recipe is None else parse_recipe(recipe), artifact, out)


@app.command()
def bench(
    model: Model,
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", "-r", help="As for `demo`; several are compared. w8a8 and w8a8-d25.")
    ] = None,
    artifact: Annotated[Path | None, typer.Option(help="A calibrated artifact, for all recipes.")] = None,
    prompt: Annotated[str, typer.Option(help="Of the step whose inputs are used.")] = "a video",
    steps: Annotated[int, typer.Option(min=1, help="Of the run that the phases are summed over.")] = 50,
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each phase that are timed.")] = 3,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="A JSON file.")] = None,
    frames: Pixels = None,
    height: Pixels = None,
    width: Pixels = None,
    dtype: DtypeName = "bfloat16",
    device: DeviceName = None,
) -> None:
    """Time the transformer of a diffusers pipeline on this machine: as it is, with torch.compile, and compressed."""
    require("diffusers", "quantsparse bench")
    from .bench import bench as run
    from .pipeline_commands import Source

    if output is not None:
        check_folder(output.parent)
    recipes = [parse_recipe(text) for text in recipe or ("w8a8", "w8a8-d25")]
    source = Source(model, parse_device(device), dtype, pipeline_call(None, frames, height, width))
    run(source, prompt, recipes, artifact, steps, repeats, output, command_line(), out)


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    if show:
        out.print(__version__)
        raise typer.Exit


def main() -> None:
    """The console script: errors that a caller can cause are one sentence on stderr and exit status 1."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*")
    try:
        app()
    except QuantSparseError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def parse_recipe(text: str) -> Recipe:
    """A recipe's name, or its fields as a JSON object."""
    if not text.lstrip().startswith("{"):
        return Recipe.parse(text)
    try:
        return Recipe.parse(json.loads(text))
    except json.JSONDecodeError as error:
        raise OptionError(
            f'--recipe is no JSON object ({error}); write \'{{"format": "w4a8", "density": 0.25}}\'.'
        ) from error


def named_recipe(text: str) -> tuple[str, Recipe]:
    """`NAME=RECIPE`, or a recipe that is its own name."""
    match = re.fullmatch(r"([\w. -]+)=(.*)", text, re.DOTALL)
    return (match[1], parse_recipe(match[2])) if match else (text, parse_recipe(text))


def parse_device(name: str | None) -> torch.device:
    """The device of that name; cuda where there is one, if no name is given."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in DEVICES:
        raise DeviceError(f"'{name}' is no device of this backend; choose {' or '.join(DEVICES)}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError("torch finds no CUDA device here; use --device cpu.")
    return device


def pipeline_call(steps: int | None, frames: int | None, height: int | None, width: int | None) -> dict[str, int]:
    """The arguments of a pipeline for those of these options that were given."""
    given = {"num_inference_steps": steps, "num_frames": frames, "height": height, "width": width}
    return {name: value for name, value in given.items() if value is not None}


def check_folder(folder: Path) -> None:
    """Make sure that files can be written there, before minutes of work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"the folder '{folder}' cannot be made: {error.strerror}; choose another --output."
        ) from error


def require(extra: str, command: str) -> None:
    """Make sure that the packages of an extra are there."""
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackages(
            f"`{command}` needs {', '.join(missing)}, not installed here; install the extra: "
            f"pip install 'qs-compiler[{extra}]'."
        )


def command_line() -> str:
    """How this process was called, to be typed again."""
    return shlex.join(["quantsparse", *sys.argv[1:]])


if __name__ == "__main__":
    main()
