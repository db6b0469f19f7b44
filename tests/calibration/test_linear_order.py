"""Which linears depend on which, and what that saves: one run of a sample for all that do not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from qs_compiler.calibration.blockwise import relative_error
from qs_compiler.calibration.input_record import InputRecorder
from qs_compiler.calibration.linear_order import stages
from qs_compiler.errors import UnsupportedError

from .models import CHANNELS, Block, make_forwards, make_model
from .test_calibrate import calibrate

SIZE = 64


class TwoStreams(nn.Module):
    """Video and text meet in an attention alone, as in HunyuanVideo's double blocks; each has an MLP of its own."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("to_q", "to_k", "to_v", "to_out", "up", "down"):
            self.add_module(name, nn.Linear(SIZE, SIZE))
            self.add_module(name.replace("to", "add") if "to" in name else f"add_{name}", nn.Linear(SIZE, SIZE))

    def forward(self, x, text):
        q, k, v = (
            torch.cat([a(x), b(text)], 1).unflatten(-1, (2, -1)).transpose(1, 2)
            for a, b in ((self.to_q, self.add_q), (self.to_k, self.add_k), (self.to_v, self.add_v))
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x, text = x + self.to_out(out[:, : x.shape[1]]), text + self.add_out(out[:, x.shape[1] :])
        return x + self.down(F.gelu(self.up(x))), text + self.add_down(F.gelu(self.add_up(text)))


def stages_of(block, *inputs):
    recorder = InputRecorder({n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}, 16)
    with torch.no_grad(), recorder:
        block(*inputs)
    return recorder.record.stages


def test_two_streams_share_their_stages():
    torch.manual_seed(0)
    assert stages_of(TwoStreams(), torch.randn(1, 12, SIZE), torch.randn(1, 5, SIZE)) == [
        [["to_q", "to_k", "to_v"], ["add_q", "add_k", "add_v"]],
        [["to_out"], ["add_out"]],
        [["up"], ["add_up"]],
        [["down"], ["add_down"]],
    ]


def test_modulation_comes_first_and_text_keys_wait_for_nothing():
    text, time = torch.randn(2, 5, 32), torch.randn(2, CHANNELS)
    assert stages_of(Block(), torch.randn(2, 12, CHANNELS), time, text) == [
        [["modulation"], ["attn2.to_k", "attn2.to_v"]],
        [["attn1.to_q", "attn1.to_k", "attn1.to_v"]],
        [["attn1.to_out"]],
        [["attn2.to_q"]],
        [["attn2.to_out"]],
        [["up"]],
        [["down"]],
    ]


class Written(nn.Module):
    """What `first` returns is written into a part of a buffer, and `second` reads the whole of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x):
        buffer = torch.zeros(x.shape[0], 2 * x.shape[1], SIZE)
        buffer[:, ::2].copy_(self.first(x))
        return self.second(buffer)


def test_what_is_written_through_a_view_is_seen():
    assert stages_of(Written(), torch.randn(1, 4, SIZE)) == [[["first"]], [["second"]]]


def test_a_group_follows_the_last_of_its_ancestors():
    ancestors = {"a": frozenset(), "b": frozenset({"a"}), "c": frozenset({"a", "b"}), "d": frozenset({"a", "outside"})}
    assert stages([["a"], ["b"], ["c"], ["d"]], ancestors) == [[["a"]], [["b"], ["d"]], [["c"]]]


def test_a_sample_runs_once_a_stage_and_not_once_a_group(monkeypatch):
    model, forwards = make_model(blocks=2), make_forwards(3)
    runs = dict.fromkeys(model.blocks, 0)

    def counted(self, *args, **kwargs):
        runs[self] += 1
        return original(self, *args, **kwargs)

    original = Block.forward
    monkeypatch.setattr(Block, "forward", counted)
    calibrate(model, forwards, in_flight=1)
    assert set(runs.values()) == {3 * (1 + 7 + 1)}, "in full precision, seven stages, and the output"


class Hidden(Block):
    """Numbers pass through NumPy, where nothing can follow them."""

    def forward(self, x, time, text):
        return x + self.down(torch.from_numpy(F.gelu(self.up(x)).numpy()))


class Twice(Block):
    def forward(self, x, time, text):
        return super().forward(super().forward(x, time, text), time, text)


def test_linears_that_are_called_twice_are_calibrated_alike_side_by_side_and_alone():
    model = make_model(blocks=2)
    for block in model.blocks:
        block.__class__ = Twice
    side_by_side, alone = calibrate(model), calibrate(model, in_flight=1)
    for name, packed in side_by_side.layers.items():
        assert torch.equal(packed.wq, alone.layers[name].wq), name


def test_a_dependence_that_cannot_be_followed_is_an_error_with_the_remedy():
    model = make_model(blocks=2)
    for block in model.blocks:
        block.__class__ = Hidden
    with pytest.raises(UnsupportedError, match="in_flight=None"):
        calibrate(model, in_flight=1)
    assert calibrate(model).layers


class Flex(Block):
    """Attention by a higher-order op."""

    def forward(self, x, time, text):
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.attn1.to_q(x), self.attn1.to_k(x), x))
        return x + self.attn1.to_out(flex_attention(q, k, v).transpose(1, 2).flatten(2))


class Steered(Block):
    """A number that a linear gave decides, in Python, what another reads."""

    def forward(self, x, time, text):
        scale = self.modulation(time)
        h = x * 3 if scale.abs().mean() > 0 else x
        return x + self.down(F.gelu(self.up(h)))


class Sparse(Block):
    def forward(self, x, time, text):
        return super().forward(x + torch.sparse.mm(torch.eye(x.shape[-1]).to_sparse(), x[0].T).T, time, text)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("block", (Flex, Steered, Sparse))
def test_one_at_a_time_is_as_side_by_side(block):
    model = make_model(blocks=2)
    for own in model.blocks:
        own.__class__ = block
    side_by_side, alone = calibrate(model), calibrate(model, in_flight=1)
    assert side_by_side.layers.keys() == alone.layers.keys()
    for name, packed in side_by_side.layers.items():
        assert torch.equal(packed.wq, alone.layers[name].wq), name


class Sometimes(Block):
    """Calls its MLP for some inputs alone."""

    def forward(self, x, time, text):
        x = x + self.attn1(x, x)
        return x if x.shape[1] < 48 else x + self.down(F.gelu(self.up(x)))


class Fussy(Block):
    """Takes an index from what a linear gives, before another linear that does not depend on it."""

    def forward(self, x, time, text):
        chosen = torch.zeros(2)[self.up(x[:, 0]).sigmoid().round().long()]
        return x + self.down(F.gelu(self.modulation(x))[..., :1].expand(*x.shape[:2], 128)) + chosen.sum()


def test_a_linear_of_later_samples_alone_is_an_error():
    model = make_model(blocks=2)
    for own in model.blocks:
        own.__class__ = Sometimes
    data = [*make_forwards(1, tokens=32), *make_forwards(2)]
    with pytest.raises(UnsupportedError, match=r"unlike order: 'blocks\.0\.up'"):
        calibrate(model, data, in_flight=1)


def test_what_a_model_makes_of_nan_is_an_error_with_the_remedy():
    model = make_model(blocks=2)
    for own in model.blocks:
        own.__class__ = Fussy
    with pytest.raises(UnsupportedError, match=r"IndexError.*in_flight=None"):
        calibrate(model, in_flight=1)
    assert calibrate(model).layers


def test_the_error_is_the_same_wherever_it_is_computed():
    torch.manual_seed(0)
    a, b = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(4, 8, dtype=torch.bfloat16)
    found = relative_error([(a, None)], [(b, None)], torch.device("cpu"))
    assert found == pytest.approx(float((a.double() - b.double()).norm() / b.double().norm()), rel=1e-6)
