"""outline_repeated_blocks: which blocks share a body, and that what a body returns can be anybody's to overwrite."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._higher_order_ops import utils as hop_utils

import qs_compiler as qs
from qs_compiler import _compat
from qs_compiler.passes.outline_repeated_blocks import OutlineRepeatedBlocks
from tests.passes.conftest import targets
from tests.tolerances import relative_error

VIDEO, TEXT, WIDTH = 96, 16, 32


class Joint(nn.Module):
    """Works on video and text tokens together and returns both parts, as HunyuanVideo's single blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, video: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.cat([video, text], dim=1)
        x = x + self.down(self.up(x))
        return x[:, :VIDEO], x[:, VIDEO:]


class Model(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Joint() for _ in range(blocks))

    def forward(self, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        video, text = video + 1, text + 1
        for block in self.blocks:
            video, text = block(video, text)
        return video


def make(blocks: int) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return Model(blocks).eval(), (torch.randn(1, VIDEO, WIDTH), torch.randn(1, TEXT, WIDTH))


def test_bodies_return_whole_buffers_and_the_first_block_shares_them(context) -> None:
    model, args = make(4)
    ctx = context(model, args, recipe="off")
    result = OutlineRepeatedBlocks().run(ctx.capture.module.graph, ctx)
    module = ctx.capture.module
    _compat.finish_graph(module)
    # The first block reads buffers, the others parts of one. That the last one's text is not used makes no difference.
    assert result.matched == 4 and result.skipped == []
    (body,) = {call.args[0].target for call in module.graph.nodes if "invoke_subgraph" in str(call.target)}
    (output,) = module.get_submodule(body).graph.find_nodes(op="output")
    assert [str(n.target) for n in output.args[0]] == ["aten.add.Tensor"]
    torch.testing.assert_close(module(*_inputs(ctx, model, args))[0], model(*args))


@pytest.mark.parametrize(
    ("batch", "video", "why"),
    ((2, VIDEO, "strides of a part of a buffer"), (1, VIDEO - 1, "the text begins at no multiple of 16 bytes")),
)
def test_where_inputs_lie_otherwise_the_first_block_keeps_its_body(context, monkeypatch, batch, video, why) -> None:
    monkeypatch.setattr(f"{__name__}.VIDEO", video)
    monkeypatch.setattr(f"{__name__}.WIDTH", width := WIDTH + 1)
    model = Model(3).eval()
    args = torch.randn(batch, video, width), torch.randn(batch, TEXT, width)
    ctx = context(model, args, recipe="off")
    result = OutlineRepeatedBlocks().run(ctx.capture.module.graph, ctx)
    assert result.matched == 2, why
    assert result.skipped == [("('blocks.0', 'Joint')", "no other block has the same graph")]
    _compat.finish_graph(ctx.capture.module)
    torch.testing.assert_close(ctx.capture.module(*_inputs(ctx, model, args))[0], model(*args))


def test_a_chain_of_views_and_the_split_that_it_reads_leave_together(context) -> None:
    class Splitting(Joint):
        def forward(self, video: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.cat([video, text], dim=1)
            x = x + self.down(self.up(x))
            video, text = x.split([VIDEO, TEXT], dim=1)
            return video.transpose(1, 2).transpose(1, 2), text

    model, args = make(3)
    model.blocks = nn.ModuleList(Splitting() for _ in range(3)).eval()
    ctx = context(model, args, recipe="off")
    assert OutlineRepeatedBlocks().run(ctx.capture.module.graph, ctx).matched == 3
    _compat.finish_graph(ctx.capture.module)
    for name, body in ctx.capture.module.named_children():
        if not any("cat" in op for op in targets(body.graph)):
            continue
        assert not {"split", "transpose", "getitem"} & {op.split(".")[1] for op in targets(body.graph)}, name
    torch.testing.assert_close(ctx.capture.module(*_inputs(ctx, model, args))[0], model(*args))


def test_compiled_blocks_that_return_parts_of_a_buffer() -> None:
    model, args = make(4)
    with torch.no_grad():
        want = model(*args)
        got = torch.compile(model, backend="quantsparse", options={"recipe": "off"}, fullgraph=True)(*args)
    assert qs.reports()[-1].passes[-1].matched == 4
    assert relative_error(got, want) < 1e-6


def _inputs(ctx, model: nn.Module, args: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The graph's inputs: parameters by name, then what the caller passes."""
    given, tensors = iter(args), dict(model.named_parameters())
    return [tensors[x.name] if x.owned else next(given) for x in ctx.capture.inputs]


def test_a_shared_body_is_not_traced_again_for_each_of_its_calls(monkeypatch) -> None:
    """What a call costs to compile must not grow with the body: a model has 60 blocks and three phases."""
    calls, before = [], hop_utils.materialize_as_graph
    monkeypatch.setattr(hop_utils, "materialize_as_graph", lambda *a, **kw: calls.append(a) or before(*a, **kw))
    counts = []
    for blocks in (4, 8):
        calls.clear()
        torch.compiler.reset()
        model, args = make(blocks)
        with torch.no_grad(), _compat.inductor_config.patch(fx_graph_cache=False):
            torch.compile(model, backend="quantsparse")(*args)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0
