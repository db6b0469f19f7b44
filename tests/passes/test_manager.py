"""The registry: order, names, handles, dumps, reports, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import qs_compiler as qs
from qs_compiler.errors import PassError, PassFailed
from qs_compiler.passes import GraphPass, PassContext, PassResult, pass_names
from qs_compiler.passes.manager import user_passes_fingerprint
from tests.backend.conftest import eager_graphs, fresh_dynamo  # noqa: F401

pytestmark = pytest.mark.usefixtures("eager_graphs")
BUILT_IN = [
    "trim_padding_mask",
    "quantize_linear",
    "order_tokens",
    "sparsify_attention",
    "quantize_attention",
    "reparameterize_residual",
    "stage_caches",
    "outline_repeated_blocks",
]


def noop(graph: fx.Graph, context: PassContext) -> None:
    """Does nothing."""


def compiled(**options: object) -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    return torch.compile(model, backend="quantsparse", options=options)


X = torch.randn(1, 64, 32)


def test_the_order_of_the_built_in_passes() -> None:
    assert pass_names() == BUILT_IN


@pytest.mark.parametrize(("where", "position"), [({}, 7), ({"after": "quantize_linear", "before": "order_tokens"}, 2)])
def test_a_function_takes_its_place_and_leaves(where: dict, position: int) -> None:
    with qs.register_pass(noop, **where) if not where else qs.register_pass(**where)(noop) as handle:
        assert handle.name == "noop" and pass_names().index("noop") == position
    assert pass_names() == BUILT_IN


def test_a_pass_sees_the_graph_and_is_reported() -> None:
    seen = []

    @qs.register_pass(after="quantize_linear")
    def count_linears(graph: fx.Graph, context: PassContext) -> int:
        seen.append(context.phase.value)
        return len(graph.find_nodes(op="call_function", target=torch.ops.quantsparse.linear.default))

    try:
        compiled()(X)
    finally:
        count_linears.remove()
    (report,) = [p for p in qs.reports()[-1].passes if p.name == "count_linears"]
    assert (seen, report.matched) == (["dense"], 2)
    assert report.seconds >= 0


def test_a_class() -> None:
    class Scale(GraphPass):
        """Multiply what the graph returns by two."""

        name = "scale_output"
        after = ("quantize_linear",)

        def run(self, graph: fx.Graph, context: PassContext) -> PassResult:
            (output,) = graph.find_nodes(op="output")
            (value,) = output.args[0]
            with graph.inserting_before(output):
                doubled = graph.call_function(torch.ops.aten.mul.Tensor, (value, 2.0))
            doubled.meta = dict(value.meta)
            output.args = ((doubled,),)
            return PassResult(matched=1)

    model = compiled()
    plain = model(X)
    torch._dynamo.reset()
    with qs.register_pass(Scale):
        torch.testing.assert_close(model(X), 2 * plain)


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda: qs.register_pass(noop, name="quantize_linear"), "registered already"),
        (lambda: qs.register_pass(noop, after="nowhere"), "'nowhere', which is no pass. Passes: trim_padding_mask"),
        (lambda: qs.register_pass(noop, after="sparsify_attention", before="quantize_linear"), "cycle"),
        (lambda: qs.register_pass(3), "takes a function or a GraphPass, not int"),
    ],
)
def test_a_wrong_registration(register, message: str) -> None:
    with pytest.raises(PassError, match=message):
        register()
    assert pass_names() == BUILT_IN


def test_a_pass_that_fails_is_named_with_its_dump(tmp_path: Path) -> None:
    def breaks(graph: fx.Graph, context: PassContext) -> None:
        raise IndexError("no such node")

    with qs.register_pass(breaks), pytest.raises(PassFailed, match="pass 'breaks' failed") as caught:
        compiled(debug_dir=str(tmp_path))(X)
    dump = Path(str(caught.value).rpartition("Graph: ")[2])
    assert "IndexError: no such node" in str(caught.value) and dump.read_text().count("quantsparse.linear") == 2


def test_dumps_and_report(tmp_path: Path) -> None:
    compiled(debug_dir=str(tmp_path))(X)
    (folder,) = tmp_path.iterdir()
    names = sorted(p.name for p in folder.iterdir())
    assert names == [
        "001.dense.quantize_linear.after.py",
        "001.dense.quantize_linear.before.py",
        "report.json",
    ], "a pass that changes nothing writes nothing"
    before, after = ((folder / n).read_text() for n in (names[1], names[0]))
    assert before.count("aten.linear") == 2 and after.count("quantsparse.linear") == 2
    report = json.loads((folder / "report.json").read_text())
    assert report["linears"] == [2, 2] and report["recipe"] == "w8a8"
    assert {p["name"] for p in report["passes"]} == set(BUILT_IN)


def test_the_fingerprint_follows_the_source_of_users_passes() -> None:
    empty = user_passes_fingerprint()
    with qs.register_pass(noop):
        one = user_passes_fingerprint()
    assert empty == user_passes_fingerprint() and one not in (None, empty)
    with qs.register_pass(eval("lambda graph, context: None"), name="unhashable"):
        assert user_passes_fingerprint() is None
