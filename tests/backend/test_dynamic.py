"""Sizes that change: dynamic=True, None and False, compiled for real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import qs_compiler as qs
from tests.backend.models import RECIPE, TinyDiT, clip, make
from tests.tolerances import relative_error


@pytest.mark.parametrize("dynamic", [True, None, False])
def test_w8a8_over_several_lengths(dynamic: bool | None) -> None:
    torch.manual_seed(0)
    model = TinyDiT(blocks=3).eval()
    compiled = torch.compile(model, backend="quantsparse", dynamic=dynamic, fullgraph=True)
    count = len(qs.reports())
    for tokens in (320, 192, 257):
        inputs = clip(7, 1, tokens=tokens)[0]
        assert relative_error(compiled(**inputs), model(**inputs)) < 0.02
    graphs = len(qs.reports()) - count
    assert graphs == {True: 1, None: 2, False: 3}[dynamic]
    outlined = [p.matched for r in qs.reports()[count:] for p in r.passes if p.name == "outline_repeated_blocks"]
    assert min(outlined) >= 2


@pytest.mark.usefixtures("eager_graphs")
def test_a_shared_body_takes_the_sizes_as_operands(tmp_path: Path) -> None:
    options = {"debug_dir": str(tmp_path)}
    torch.compile(make(), backend="quantsparse", dynamic=True, options=options)(**clip(7, 1)[0])
    (dump,) = tmp_path.glob("*/*outline_repeated_blocks.after.py")
    text = dump.read_text()
    calls = [line for line in text.splitlines() if "invoke_subgraph(" in line]
    signature = next(line for line in text.splitlines() if "def forward" in line)
    sizes = re.findall(r"(\w+): \"Sym\(", signature)
    assert len(calls) == 2 and len(sizes) > 0
    for call in calls:
        assert all(f" {size}" in call for size in sizes), call


@pytest.mark.usefixtures("eager_graphs")
def test_sparse_runs_of_several_lengths_share_one_dynamic_graph() -> None:
    model = make(blocks=2)
    compiled = torch.compile(model, backend="quantsparse", options={"recipe": RECIPE}, dynamic=True)
    dense = torch.compile(make(blocks=2), backend="quantsparse", dynamic=True)
    for tokens in (320, 512, 320):
        steps = clip(7, 6, tokens=tokens)
        with qs.denoising(compiled, 6) as run:
            for i, inputs in enumerate(steps):
                run.step(i)
                out = compiled(**inputs)
                if i % RECIPE["interval"] == 0:
                    assert relative_error(out, dense(**inputs)) < 2e-3
    report = next(r for r in reversed(qs.reports()) if r.recipe != "w8a8")
    assert report.calls == {"dense": 0, "refresh": 6, "sparse": 12}
