"""What the patch embedding of the running forward has made, for graphs that lie behind it.

A graph of a single block, or one behind a graph break, does not hold the patch embedding. It runs in the same forward
and thread, though, after it: what that made is remembered for the thread until the next step is announced.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterable

import torch
from torch import nn

Grid = tuple[int, int, int]
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


class _Seen(threading.local):
    shapes: tuple[tuple[int, ...], ...] = ()


_SEEN = _Seen()
_MAY_MOVE: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def see(shapes: Iterable[tuple[int, ...]]) -> None:
    """The convolutions of a forward have made tensors of these shapes."""
    _SEEN.shapes = tuple(tuple(shape) for shape in shapes)


def forget() -> None:
    """Another forward begins."""
    _SEEN.shapes = ()


def seen() -> tuple[tuple[int, ...], ...]:
    """Shapes of what the convolutions of this thread's forward made."""
    return _SEEN.shapes


def current_grid(grid: Grid) -> Grid:
    """The grid of the running forward, if it has as many tokens as `grid`; else `grid`.

    One graph serves a wide and a tall video of as many tokens.
    """
    length = math.prod(grid)
    for shape in _SEEN.shapes:
        height, width = shape[-2:]
        frames = shape[2] if len(shape) == 5 else length // (height * width)
        if frames * height * width == length:
            return frames, height, width
    return grid


def watch(module: nn.Module, apart: tuple[str, ...]) -> None:
    """Look on at the convolutions of a module that is not compiled as a whole, but for those in the lists `apart`."""
    module.register_forward_pre_hook(lambda *_: forget())
    for name, part in module.named_modules():
        if isinstance(part, _CONVOLUTIONS) and not f"{name}.".startswith(apart):
            part.register_forward_hook(_add)


def watch_if_moved(module: nn.Module) -> None:
    """Look on at the convolutions of a module that is compiled as a whole, once `moved` says that its graph breaks."""
    _MAY_MOVE.update(part for part in module.modules() if isinstance(part, _CONVOLUTIONS))


def moved(module: nn.Module) -> None:
    """A hook moves this module to the device and away: Dynamo breaks the graph there, and may run it by itself."""
    for part in module.modules():
        if part in _MAY_MOVE:
            _MAY_MOVE.remove(part)
            part.register_forward_hook(torch.compiler.disable(_add))


def _add(module: nn.Module, args: object, out: torch.Tensor) -> None:
    see((*seen(), out.shape))
