"""Export a model, compress the program, save it, load it and run it.

PYTHONPATH=. python examples/export_program.py
"""

import tempfile
from pathlib import Path

import torch
from tiny_dit import noise, relative_error, tiny_dit
from torch.export import Dim

import qs_compiler


@torch.no_grad()
def main() -> None:
    """Print the sizes and the error of the loaded program, also for another number of tokens."""
    model = tiny_dit()
    inputs = noise(), torch.tensor([500.0])
    program = torch.export.export(model, inputs, dynamic_shapes=({1: Dim.AUTO}, None), strict=False)
    compressed = qs_compiler.compress(program, recipe="w8a8")
    print(qs_compiler.reports()[-1].line())
    for name, one in (("before", program), ("after", compressed)):
        print(f"{name}: {sum(t.nbytes for t in one.state_dict.values()) / 1000:.0f} kB of weights")
    with tempfile.TemporaryDirectory() as folder:
        torch.export.save(compressed, Path(folder) / "model.pt2")
        loaded = torch.export.load(Path(folder) / "model.pt2").module()  # elsewhere: after `import qs_compiler`
    for tokens in (512, 384):
        x = noise()[:, :tokens]
        print(f"{tokens} tokens, relative error: {relative_error(loaded(x, inputs[1]), model(x, inputs[1])):.4f}")


if __name__ == "__main__":
    main()
