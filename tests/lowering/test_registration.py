"""What the backend asks of the lowerings: registration, the files behind the cache key, the list of fallbacks."""

from pathlib import Path

import torch

import qs_compiler
from qs_compiler._compat import lowerings
from qs_compiler.lowering import collect_fallbacks, register_lowerings, source_files
from qs_compiler.lowering.fallbacks import record
from qs_compiler.lowering.template_source import DEVICE_HASH, read_template
from qs_compiler.ops import COSTS

PACKAGE = Path(qs_compiler.__file__).parent


def test_every_op_has_one_lowering_that_stays():
    register_lowerings()
    ops = [getattr(torch.ops.quantsparse, name).default for name in COSTS]
    before = [lowerings[op] for op in ops]
    register_lowerings()
    assert [lowerings[op] for op in ops] == before


def test_the_cache_key_covers_all_that_generated_code_depends_on():
    files = {Path(f).relative_to(PACKAGE).as_posix() for f in source_files()}
    on_disk = {
        p.relative_to(PACKAGE).as_posix()
        for folder in ("ops", "lowering")
        for p in (PACKAGE / folder).rglob("*")
        if p.suffix in (".py", ".jinja")
    }
    assert files == {*on_disk, "_compat.py"}
    assert {"lowering/device.py", "lowering/templates/linear.py.jinja", "ops/linear.py"} <= files


def test_templates_carry_the_hash_of_what_they_import():
    for name in ("linear", "sparse_attention"):
        assert DEVICE_HASH in read_template(name)


def test_fallbacks_go_to_the_innermost_collector_and_nowhere_without_one():
    record("linear", "nobody listens")
    with collect_fallbacks() as outer:
        record("linear", "first")
        with collect_fallbacks() as inner:
            record("low_rank", "second")
        record("linear", "third")
    assert inner == [("low_rank", "second")]
    assert outer == [("linear", "first"), ("linear", "third")]
