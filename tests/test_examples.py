"""Each script of examples/ runs as its docstring says, offline, and prints what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir

ROOT = Path(__file__).resolve().parent.parent
NUMBER = r"(0\.\d+)"

# script -> what its output holds, and the largest value of the numbers that are captured
EXPECTED = {
    "compile_model": ([rf"calls by phase: .*'refresh': 2, 'sparse': 5.*\n.*error after 8 steps: {NUMBER}"], 0.1),
    "custom_pass": (
        [
            r"order: .*quantize_linear.*tanh_gelu",
            r"tanh_gelu: 2 matched, skipped: \[\]",
            rf"relative error: {NUMBER}",
            r"removed; order: (?!.*tanh_gelu)",
        ],
        0.001,
    ),
    "dump_graphs": (
        [
            r"quantize_linear\.before\.py  \d+ bytes",
            r"report\.json  \d+ bytes",
            r"quantize_linear: 10 matched\n(    .*\n)*    .*blocks\.0\.to_out\): kept in 16 bit by the recipe",
            r"\n-  .*aten\.linear\.default(.*\n)*\+  .*quantsparse\.quantize_rows",
        ],
        0,
    ),
    "export_program": (
        [
            r"TinyDiT: w8a8, linears 12/16",
            rf"512 tokens, relative error: {NUMBER}",
            rf"384 tokens, relative error: {NUMBER}",
        ],
        0.02,
    ),
}


def test_every_example_is_run() -> None:
    scripts = {p.stem for p in (ROOT / "examples").glob("*.py") if "__main__" in p.read_text()}
    assert scripts == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_example(name: str, tmp_path: Path) -> None:
    caches = {"TORCHINDUCTOR_CACHE_DIR": cache_dir()}  # else TMPDIR would move them, and C++ headers compile anew
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), **caches}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    patterns, largest = EXPECTED[name]
    for pattern in patterns:
        found = re.search(pattern, done.stdout)
        assert found, f"{pattern}\n{done.stdout}"
        numbers = [float(g) for g in found.groups() if g and re.fullmatch(NUMBER, g)]
        assert all(0 < n < largest for n in numbers), numbers
