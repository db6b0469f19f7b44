"""The public names: complete, documented, typed, and the error tree as it is drawn."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qs_compiler
from qs_compiler import errors

ROOT = Path(__file__).resolve().parent.parent
ERRORS = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]


def test_names_are_sorted_and_there() -> None:
    assert qs_compiler.__all__ == sorted(qs_compiler.__all__)
    assert len(set(qs_compiler.__all__)) == len(qs_compiler.__all__)
    assert {
        "Artifact",
        "QuantSparseError",
        "Recipe",
        "attach",
        "denoising",
        "invalidate",
        "register_pass",
        "reports",
    } <= set(qs_compiler.__all__)


@pytest.mark.parametrize("name", qs_compiler.__all__)
def test_each_public_name_is_documented_and_ours(name: str) -> None:
    value = getattr(qs_compiler, name)
    assert value.__module__.startswith("qs_compiler.")
    assert inspect.getdoc(value)


@pytest.mark.parametrize("name", qs_compiler.__all__)
def test_each_public_callable_is_annotated(name: str) -> None:
    value = getattr(qs_compiler, name)
    functions = [value] if inspect.isfunction(value) else [
        f for n, f in inspect.getmembers(value, inspect.isfunction) if not n.startswith("_")
    ]
    for function in functions:
        signature = inspect.signature(function)
        missing = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
        assert not missing, f"{function.__qualname__}: {missing}"
        assert signature.return_annotation is not signature.empty, function.__qualname__


def test_a_star_import_gives_just_the_public_names() -> None:
    names: dict[str, object] = {}
    exec("from qs_compiler import *", names)
    assert set(names) - {"__builtins__"} == set(qs_compiler.__all__)


def test_importing_needs_no_extra() -> None:
    """Without diffusers, transformers, matplotlib, imageio and torchmetrics."""
    code = (
        "import sys\n"
        "for name in ('diffusers', 'transformers', 'matplotlib', 'imageio', 'torchmetrics'):\n"
        "    sys.modules[name] = None\n"
        "import qs_compiler\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_error_tree_is_drawn_as_it_is() -> None:
    drawn = re.findall(r"^ *[│├└─ ]*(\w+)(?: \(ValueError\))?(?:  .*)?$", errors.__doc__ or "", re.M)
    assert sorted(n for n in drawn if n.endswith(("Error", "Failed"))) == sorted(c.__name__ for c in ERRORS)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: e.__name__)
def test_each_error_is_documented_and_raised_somewhere(error: type[Exception]) -> None:
    assert issubclass(error, qs_compiler.QuantSparseError)
    assert error.__doc__
    if error is qs_compiler.QuantSparseError:
        return
    sources = [p.read_text() for p in (ROOT / "qs_compiler").rglob("*.py") if p.name != "errors.py"]
    assert any(f"{error.__name__}(" in source for source in sources)
