"""What `quantsparse generate`, `calibrate` and `export` do with a diffusers pipeline, and what `bench` needs of it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import deprecation_utils, export_to_gif, export_to_video
from rich.console import Console
from torch import nn

from .calibration import calibrate
from .dump import reports
from .errors import OptionError
from .export import compress
from .options import Recipe
from .pipeline import attach
from .runtime.tracker import modules_of

DTYPES = ("bfloat16", "float16", "float32")
SUFFIXES = (".gif", ".mp4")
FRAMES_A_SECOND = 16
# What from_pretrained calls the dtype: newer versions of diffusers warn of the old name, older ones ignore the new one.
DTYPE = "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"


@dataclasses.dataclass(frozen=True)
class Source:
    """The pipeline, and how it is called.

    Attributes:
        model: folder or hub name.
        dtype: of DTYPES.
        call: what it is called with beside the prompt, for example num_inference_steps.
    """

    model: str
    device: torch.device
    dtype: str = "bfloat16"
    call: dict[str, Any] = dataclasses.field(default_factory=dict)

    def load(self) -> Any:
        """The pipeline, on its device.

        Raises:
            OptionError: an unknown dtype, or no such pipeline.
        """
        if self.dtype not in DTYPES:
            raise OptionError(f"--dtype {self.dtype} is unknown; choose {', '.join(DTYPES)}.")
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(self.model, **{DTYPE: getattr(torch, self.dtype)})
        except (OSError, ValueError) as error:
            raise OptionError(f"'{self.model}' is no pipeline that diffusers can load: {error}") from error
        return pipe.to(self.device)


def generate(
    source: Source, prompt: str, output: Path, recipe: Recipe | None, artifact: Path | None, seed: int, console: Console
) -> None:
    """Sample one clip, compressed, and write it.

    Args:
        output: a file of SUFFIXES.
        recipe: None for the artifact's, or the default.

    Raises:
        OptionError: a kind of file that is not written, no such pipeline, or one that does not take the call.
        ArtifactError: the artifact is damaged or belongs to another model.
    """
    if output.suffix not in SUFFIXES:
        raise OptionError(f"a clip is written as {' or '.join(SUFFIXES)}, not as '{output.name}'.")
    pipe = source.load()
    attach(pipe, artifact, recipe=recipe)
    first, start = len(reports()), time.perf_counter()
    try:
        generator = torch.Generator().manual_seed(seed)
        result = pipe(prompt, generator=generator, output_type="pil", **source.call)
    except TypeError as error:
        raise OptionError(f"{type(pipe).__name__} cannot be called so: {error}.") from error
    if not hasattr(result, "frames"):
        raise OptionError(f"{type(pipe).__name__} makes no video; use it in Python: pipe = qs_compiler.attach(pipe).")
    frames = result.frames[0]
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".gif":
        export_to_gif(frames, str(output), fps=FRAMES_A_SECOND)
    else:
        export_to_video(frames, str(output), fps=FRAMES_A_SECOND)
    for report in reports()[first:]:
        calls = ", ".join(f"{number} {phase}" for phase, number in report.calls.items())
        console.print(f"[dim]{report.line()}; calls: {calls}", soft_wrap=True, highlight=False)
    console.print(f"{len(frames)} frames in {time.perf_counter() - start:.0f} s: {output}", soft_wrap=True)


def calibrate_pipeline(
    source: Source, prompts: Path, output: Path, recipe: Recipe, samples: int, work: Path | None, console: Console
) -> None:
    """Calibrate a pipeline on prompts and save the artifact, or a folder with one for each of its experts.

    Args:
        prompts: a text file, one prompt a line.
        samples: forwards that are kept of the denoising runs.
        work: folder of finished blocks, from which a stopped calibration goes on.

    Raises:
        OptionError: no prompts, or no such pipeline.
        ArtifactError: `output` is something else, or `work` holds another calibration.
    """
    try:
        lines = [line.strip() for line in prompts.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"the prompts '{prompts}' cannot be read: {error}; give a text file, one a line.") from error
    if not lines:
        raise OptionError(f"'{prompts}' holds no prompt; write one a line.")
    found = calibrate(source.load(), lines, recipe=recipe, output_dir=work, pipe_options=source.call, samples=samples)
    for name, artifact in found.items() if isinstance(found, dict) else [("", found)]:
        artifact.save(output / name)
        console.print(f"{len(artifact.layers)} linears: {output / name}", soft_wrap=True)


def export_transformer(
    source: Source, prompt: str, output: Path, recipe: Recipe | None, artifact: Path | None, console: Console
) -> None:
    """Export a pipeline's transformer for the shapes of one call, compress the program and save it.

    Args:
        output: a .pt2 file, for `torch.export.load` in a process that has imported qs_compiler.
        recipe: a dense one; None for the artifact's, or the default.

    Raises:
        OptionError: a recipe with a density, no such pipeline, or one that does not take the call.
        ArtifactError: the artifact is damaged or belongs to another model.
    """
    if output.suffix != ".pt2":
        raise OptionError(f"an exported program is a .pt2 file, not '{output.name}'.")
    pipe = source.load()
    (transformer,) = modules_of(pipe)[:1]
    inputs = calls_of_a_step(pipe, transformer, prompt, source.call)[0]
    with torch.no_grad():
        program = compress(torch.export.export(transformer, (), inputs, strict=False), recipe=recipe, artifact=artifact)
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, output)
    console.print(f"[dim]{reports()[-1].line()}", soft_wrap=True, highlight=False)
    console.print(f"{type(transformer).__name__}, {output.stat().st_size / 1e6:.1f} MB: {output}", soft_wrap=True)


def calls_of_a_step(pipe: Any, transformer: nn.Module, prompt: str, call: dict[str, Any]) -> list[dict[str, Any]]:
    """The keyword arguments of each call of the transformer in a run that is cut short to one step.

    Raises:
        OptionError: the pipeline does not take the call.
    """
    caught: list[dict[str, Any]] = []
    hook = transformer.register_forward_pre_hook(lambda _, args, inputs: caught.append(inputs), with_kwargs=True)
    try:
        pipe(prompt, output_type="latent", **{**call, "num_inference_steps": 1})
    except TypeError as error:
        raise OptionError(f"{type(pipe).__name__} cannot be called so: {error}.") from error
    finally:
        hook.remove()
    return caught
