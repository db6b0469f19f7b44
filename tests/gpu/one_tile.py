"""Two compilations give the same bits where they compute the same."""

import contextlib

from qs_compiler import _compat


class OneTile(_compat.InductorChoices):
    """Two rows a program in every reduction, so that equal kernels of two graphs sum in the same order.

    Inductor tunes the tile by the clock. In its deterministic mode it goes by a hint, which a kernel of one text got as
    INNER in a graph that sends its caches and as DEFAULT in one that copies them: 32 rows a program and one, so that
    the int8 codes behind the first norm differed. (With one row a program Inductor has no x axis, and fails to write
    some of these kernels.)
    """

    def triton_kernel_kwargs(self, kernel_cls, features, groups, kernel_kwargs):
        kwargs = super().triton_kernel_kwargs(kernel_cls, features, groups, kernel_kwargs)
        if not features.is_reduction() or not kwargs.keys() <= {"features", "tiling_scores"}:
            return kwargs
        config = _compat.FixedTritonConfig({"XBLOCK": 2, "num_warps": 1, "num_stages": 1})
        held = {"override_persistent_reduction": True, "override_cooperative_reduction": False}
        return {**kwargs, **held, "fixed_config": config}


@contextlib.contextmanager
def one_tile_a_reduction():
    with _compat.inductor_config.patch(deterministic=True), _compat.V.set_choices_handler(OneTile()):
        yield


def assert_same_bits(got, want, what):
    """Of (steps, ..., channels); else says where they differ."""
    differs = got != want
    steps = [
        f"step {i}: {int(d.sum())} of {d.numel()}, by up to {float((a - b).abs().max()):.3g}, first at token "
        f"{int(d.any(-1).flatten().nonzero()[0])}"
        for i, (d, a, b) in enumerate(zip(differs, got, want, strict=True))
        if d.any()
    ]
    assert not steps, f"{what}: {'; '.join(steps)}"
