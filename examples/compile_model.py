"""Compile a model with 8-bit linears and block-sparse attention, and tell it which denoising step is running.

PYTHONPATH=. python examples/compile_model.py
"""

import torch
from tiny_dit import noise, relative_error, tiny_dit

import qs_compiler

STEPS = 8
# Half of the key blocks in a sparse step, a refresh every fourth step. The short form of the first two is "w8a8-d50".
RECIPE = {"format": "w8a8", "density": 0.5, "block_size": 64, "interval": 4, "warmup": 0.125}


@torch.no_grad()
def denoise(model: torch.nn.Module) -> torch.Tensor:
    """A loop of one's own; for a diffusers pipeline `qs_compiler.attach(pipe)` announces the steps instead."""
    x = noise()
    with qs_compiler.denoising(model, num_steps=STEPS) as run:
        for i in range(STEPS):
            run.step(i)
            x = x - model(x, torch.tensor([1000 * (1 - i / STEPS)])) / STEPS
    return x


def main() -> None:
    """Run the loop with the model as it is and compiled, and print what was rewritten and which steps ran how."""
    wanted = denoise(tiny_dit())
    model = torch.compile(tiny_dit(), backend="quantsparse", options={"recipe": RECIPE})
    found = denoise(model)
    report = qs_compiler.reports()[-1]
    print(report.line())
    print(f"calls by phase: {report.calls}")
    print(f"relative error after {STEPS} steps: {relative_error(found, wanted):.4f}")


if __name__ == "__main__":
    main()
