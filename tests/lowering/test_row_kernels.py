"""Kernels that the row quantiser is part of hold their rows in registers; all others are Inductor's own."""

import pytest
import torch
from torch.nn.functional import layer_norm

from qs_compiler._compat import InductorChoices, V, compile_graph, fingerprint_pass
from qs_compiler.lowering import row_kernels as module
from qs_compiler.lowering.row_kernels import RowKernels, row_kernels
from tests.fake_h100 import cuda_code
from tests.kernel_text import compile_offline, fixed_config, kernel_sources
from tests.lowering.interpret import interpret
from tests.tolerances import assert_close, codes_apart

quantsparse = torch.ops.quantsparse
bf16, f32 = torch.bfloat16, torch.float32


def of_form(function, form):
    """As `cuda_code` takes it."""
    return lambda *args: function(*args, form)


def quantise(x, form="int8"):
    return quantsparse.quantize_rows(x, None, None, form)


def modulated(x, scale, shift, form="int8"):
    """HunyuanVideo's norm, modulation and quantiser, in 16 bit."""
    return quantise(layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift, form)


def modulated_wide(x, scale, shift, form="int8"):
    """Wan's, which computes in float32."""
    h = layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift
    return quantise(h.type_as(x), form)


def gated(x, y, gate, scale, shift, form="int8"):
    """A residual before them, which the rest of the block reads too."""
    x = x + y * gate
    return x, *modulated(x, scale, shift, form)


def gated_wide(x, y, table, time, form="int8"):
    shift, scale, gate = (table + time).chunk(3, 1)
    x = (x.float() + y * gate).type_as(x)
    return x, *modulated_wide(x, scale, shift, form)


def operands(function, rows, channels, batch=1):
    """Random ones; on the device of the context."""
    wide = bf16 if function in (quantise, modulated, gated) else f32
    tokens, vectors = torch.randn(2, batch, rows, channels, dtype=bf16), torch.randn(3, batch, 1, channels, dtype=wide)
    if function is gated_wide:
        return *tokens, torch.randn(1, 3, channels), torch.randn(batch, 3, channels)
    given = {quantise: (), modulated: vectors[:2], modulated_wide: vectors[:2], gated: (tokens[1], *vectors)}
    return tokens[0], *given[function]


def only_kernel(*args, **kwargs):
    """Source of the one kernel that these arguments of `cuda_code` give."""
    [source] = kernel_sources(cuda_code(*args, **kwargs)).values()
    return source


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(module, "FEW_ROWS", 33)


WARPS = {  # of 2 rows: 128 elements a thread, or 64 where a thread has much to load
    (quantise, 1536): 1,
    (quantise, 3072): 2,
    (quantise, 8192): 4,
    (modulated, 3072): 2,
    (gated, 3072): 4,
    (modulated_wide, 1536): 2,
    (modulated_wide, 5120): 8,
    (gated_wide, 1536): 2,
    (gated_wide, 5120): 8,
}


@pytest.mark.parametrize("form", ("int8", "fp8"))
@pytest.mark.parametrize(("function", "channels"), WARPS)
def test_rows_are_held_and_nothing_spills(function, channels, form, tmp_path):
    with torch.device("meta"):
        source = only_kernel(of_form(function, form), *operands(function, 32_760, channels))
    if form == "int8" and channels > 4096 and function is not quantise:
        assert not fixed_config(source), "measured slower"
        return
    expected = {"XBLOCK": 2, "num_warps": WARPS[function, channels], "num_stages": 1}
    assert fixed_config(source) == expected
    assert "R0_BLOCK: tl.constexpr" in source and "for r0_offset" not in source
    assert source.count("tl.load(in_ptr0") == 1, "each row is read once"
    assert compile_offline(source, tmp_path, (9, 0)).spilled_bytes == 0


@pytest.mark.parametrize("function", (quantise, modulated, modulated_wide, gated, gated_wide))
def test_numbers_of_odd_rows(function, few_rows, tmp_path):
    """99 of three batches, whose modulations differ within a program."""
    args = operands(function, 33, 1100, batch=3)
    args[0][0, 3] = 0
    cases = []
    for form in ("int8", "fp8"):
        text = cuda_code(of_form(function, form), *args)
        assert [fixed_config(s)["XBLOCK"] for s in kernel_sources(text).values()] == [2]
        cases.append((text, args))
    for form, got in zip(("int8", "fp8"), interpret(cases, tmp_path), strict=True):
        *streams, codes, scales = got
        *wanted_streams, wanted_codes, wanted_scales = function(*map(torch.Tensor.float, args), form)
        # The kernel computes in float32. Sums are taken in another order: a code near a tie may go the other way.
        assert codes_apart(codes, wanted_codes) <= (0 if function is quantise else 1)
        assert_close(scales, wanted_scales)
        for stream, wanted in zip(streams, wanted_streams, strict=True):
            assert_close(stream, wanted)


def test_one_text_serves_every_number_of_rows(few_rows, tmp_path):
    short, long = (operands(modulated, rows, 1100) for rows in (65, 130))
    text = cuda_code(of_form(modulated, "int8"), *short, dynamic=(65,))
    [source] = kernel_sources(text).values()
    assert fixed_config(source)["XBLOCK"] == 2
    for args, (codes, scales) in zip((short, long), interpret([(text, short), (text, long)], tmp_path), strict=True):
        wanted_codes, wanted_scales = modulated(*map(torch.Tensor.float, args))
        assert codes_apart(codes, wanted_codes) <= 1
        assert_close(scales, wanted_scales)


@pytest.mark.parametrize("layout", ("heads apart", "transposed"))
def test_rows_that_lie_apart_in_memory(layout):
    """Attention's heads are read in runs of a head's channels; single elements of many rows stay with Inductor."""

    def function(x):
        return quantise(x.transpose(1, 2).flatten(2))

    shape = (1, 24, 32_760, 128) if layout == "heads apart" else (1, 3072, 32_760)
    source = only_kernel(function, torch.empty(shape, dtype=bf16, device="meta"))
    assert (fixed_config(source) != {}) == (layout == "heads apart")


@pytest.mark.parametrize(
    ("rows", "channels", "settings"),
    [
        (4095, 3072, {}),
        (32_760, 1024, {}),
        (32_760, 8960, {}),
        (32_760, 3072, {"capability": (8, 9)}),
        (32_760, 3072, {"dynamic": (3072,)}),
        *(
            (32_760, 3072, {"config": {f"triton.{name}": value}})
            for name, value in (
                ("force_cooperative_reductions", True),
                ("persistent_reductions", False),
                ("use_block_ptr", True),
                ("use_tensor_descriptor", True),
            )
        ),
    ],
)
def test_what_was_not_measured_or_is_asked_for_otherwise_stays(rows, channels, settings):
    with torch.device("meta"):
        source = only_kernel(of_form(modulated, "int8"), *operands(modulated, rows, channels), **settings)
    assert fixed_config(source) == {} and "@triton_heuristics" in source


def test_other_kernels_are_inductors():
    def function(x, scale, shift):
        return layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    with torch.device("meta"):
        args = operands(modulated, 32_760, 3072)
        ours = cuda_code(function, *args)
        with V.set_choices_handler(type("Own", (InductorChoices,), {})()):
            assert cuda_code(function, *args) == ours


def test_a_kernel_that_reduces_columns_too_is_inductors():
    def function(x):
        return *quantise(x), x.float().sum(1)

    source = only_kernel(function, torch.empty(1, 32_760, 3072, dtype=bf16, device="meta"))
    assert fixed_config(source) == {} and "RSPLIT_SIZE" in source


def test_a_choice_of_the_users_is_kept():
    class Own(InductorChoices):
        pass

    own = Own()
    with V.set_choices_handler(own), row_kernels():
        assert V.choices is own
    with row_kernels():
        assert type(V.choices) is RowKernels
    assert type(V.choices) is InductorChoices


def test_graphs_of_the_backend_are_compiled_inside(monkeypatch):
    seen = []

    def record(graph, inputs, **_):
        seen.append(type(V.choices))
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", record)
    torch.compiler.reset()
    torch.compile(torch.nn.Linear(8, 8), backend="quantsparse", options={"recipe": "off"})(torch.randn(2, 8))
    compile_graph(torch.fx.symbolic_trace(torch.nn.Identity()), [torch.randn(2)], {}, own_context=True)
    assert seen == [RowKernels, RowKernels]


def test_the_fingerprint_names_who_chooses():
    fingerprint = fingerprint_pass([module.__file__], "")
    plain = fingerprint.uuid()
    with row_kernels():
        ours = fingerprint.uuid()
        assert ours == fingerprint.uuid() != plain
    assert fingerprint.uuid() == plain
