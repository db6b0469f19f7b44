"""The package as it is shipped: links for readers, import guards, the wheel's files, the entry point."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("passes", "lowering", "calibration")
# What a checkout may hold beside the sources: caches, environments, build leftovers.
NOT_SOURCES = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "out")


def run_python(code: str, cwd: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter in `cwd`, with `path` as PYTHONPATH."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy, since setuptools leaves build/ and egg-info in the tree."""
    tree = tmp_path_factory.mktemp("tree") / "source"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=NOT_SOURCES)
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, tree]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked, as pip would put it into site-packages."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def distribution(site: Path) -> Distribution:
    (info,) = site.glob("*.dist-info")
    return PathDistribution(info)


@pytest.mark.parametrize("name", LINKS)
def test_top_level_link_points_into_the_package(name: str) -> None:
    assert (ROOT / "qs_compiler" / name).is_dir()
    link = ROOT / name
    # A clone without symlink support (Windows) holds a text file with the target instead.
    target = os.readlink(link) if link.is_symlink() else link.read_text().strip()
    assert Path(target) == Path("qs_compiler", name)


@pytest.mark.parametrize("name", LINKS)
def test_import_through_a_link_is_refused(name: str) -> None:
    done = run_python(f"import {name}", ROOT, ROOT)
    assert done.returncode != 0
    assert f"ImportError: import qs_compiler.{name}: the top-level {name}/ is a link for readers" in done.stderr


def test_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "qs_compiler").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"qs_compiler/__init__.py", "qs_compiler/py.typed"} <= sources
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    assert shipped == sources


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "qs_compiler").rglob("*.py")}
    assert [f for f in folders if not (f / "__init__.py").is_file()] == []


def test_metadata(installed: Path) -> None:
    meta = distribution(installed).metadata
    assert meta["Name"] == "qs-compiler"
    assert meta["License-Expression"] == "Apache-2.0"
    assert "torch<2.16,>=2.11" in (meta.get_all("Requires-Dist") or [])
    done = run_python("import qs_compiler; print(qs_compiler.__version__)", installed, installed)
    assert done.stdout.strip() == meta["Version"], done.stderr


def test_entry_points(installed: Path) -> None:
    points = {(e.group, e.name): e for e in distribution(installed).entry_points}
    assert points["torch_dynamo_backends", "quantsparse"].value == "qs_compiler.backend:quantsparse"
    assert points["console_scripts", "quantsparse"].value == "qs_compiler.cli:main"


def test_backend_works_from_the_wheel_without_importing_the_package(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "f = torch.compile(torch.nn.Linear(8, 8), backend='quantsparse', options={'recipe': 'off'})\n"
        "print(tuple(f(torch.ones(2, 8)).shape), sys.modules['qs_compiler'].__file__)\n"
    )
    done = run_python(code, tmp_path, installed)
    assert done.stdout.strip() == f"(2, 8) {installed / 'qs_compiler' / '__init__.py'}", done.stderr


def test_constraints_pin_what_the_project_names() -> None:
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in "#"]
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    assert not any("+" in str(pin.specifier) for pin in pins), "a local version suffix installs from one index only"
    versions = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = [
        *project["project"]["dependencies"],
        *(r for extra in project["project"]["optional-dependencies"].values() for r in extra),
        *project["dependency-groups"]["dev"],
    ]
    for requirement in map(Requirement, named):
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement
