"""Lower to Triton source for a CUDA device on a machine without one.

`fake_h100()` makes Inductor believe in a device of some compute capability; `cuda_code` lowers a function there and
returns Inductor's source text. kernel_text.py and lowering/interpret.py compile and run that text.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from qs_compiler import _compat
from qs_compiler.lowering import register_lowerings
from qs_compiler.lowering.decompositions import decompositions
from qs_compiler.lowering.row_kernels import row_kernels

SHARED_MEMORY = {(8, 0): 166912, (8, 9): 101376, (9, 0): 232448}
DEVICE_SHARED_MEMORY = {**SHARED_MEMORY, (10, 0): 232448}


def always(value):
    return lambda *args, **kwargs: value


def forget_answers():
    """torch asks the device once for what it can do and keeps the answers."""
    for function in vars(_compat.triton_support).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@contextlib.contextmanager
def fake_h100(capability=(9, 0)):
    """CUDA calls that Inductor makes while it lowers answer as a device of this compute capability would."""
    import triton
    from triton.backends.compiler import GPUTarget

    number = capability[0] * 10 + capability[1]

    class Device:
        name = "fake"
        major, minor = capability
        multi_processor_count, warp_size, gcnArchName = 132, 32, ""
        regs_per_multiprocessor, max_threads_per_multi_processor, max_threads_per_block = 65536, 2048, 1024
        total_memory, L2_cache_size, shared_memory_per_block = 80 << 30, 50 << 20, 49152
        shared_memory_per_block_optin = DEVICE_SHARED_MEMORY[capability]

    properties = _compat.DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=132,
        cc=number,
        major=capability[0],
        warp_size=32,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
    )
    driver = mock.Mock(
        get_current_target=always(GPUTarget("cuda", number, 32)),
        get_current_device=always(0),
        get_current_stream=always(0),
        get_active_torch_device=always(torch.device("cuda", 0)),
        is_active=always(True),
    )
    state = always(torch.zeros(16, dtype=torch.uint8))
    interface = dict(
        is_available=True,
        get_compute_capability=number,
        is_triton_capable=True,
        raise_if_triton_unavailable=None,
        current_device=0,
        device_count=1,
        get_device_properties=Device(),
        get_raw_stream=0,
        is_bf16_supported=True,
    )
    with contextlib.ExitStack() as stack:

        def patch(target, **values):
            for name, value in values.items():
                if hasattr(target, name):
                    stack.enter_context(mock.patch.object(target, name, value))

        patch(
            torch.cuda,
            is_available=always(True),
            device_count=always(1),
            current_device=always(0),
            get_device_properties=always(Device()),
            get_device_capability=always(capability),
            is_tf32_supported=always(True),
            is_bf16_supported=always(True),
            _lazy_init=always(None),
            get_rng_state=state,
            set_rng_state=always(None),
        )
        patch(torch.cuda.random, get_rng_state=state, set_rng_state=always(None))
        patch(_compat.DeviceProperties, create=classmethod(lambda cls, device: properties))
        patch(_compat.CudaInterface, **{name: staticmethod(always(value)) for name, value in interface.items()})
        patch(_compat.fake_tensor, init_gpu_context=always(None))
        active = getattr(triton.runtime.driver, "_active", None)
        triton.runtime.driver.set_active(driver)
        forget_answers()
        try:
            yield
        finally:
            triton.runtime.driver._active = active
            forget_answers()


def on_cuda(value, sizes: dict[int, torch.SymInt]):
    """A fake CUDA tensor like this one, dimensions of the given sizes made symbolic; anything else as it is.

    The handle of a cache in host memory, (2,) int64, stays on the CPU.
    """
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.int64 and value.shape == (2,):
        return torch.empty(2, dtype=torch.int64)
    if not sizes:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    assert value.is_contiguous()
    return torch.empty([sizes.get(n, n) for n in value.shape], dtype=value.dtype, device="cuda")


def cuda_code(function, *args, capability=(9, 0), dynamic=(), config=None) -> str:
    """Inductor's source text for `function` of CUDA tensors shaped like `args`; sizes in `dynamic` are symbols."""
    register_lowerings()
    with fake_h100(capability):
        fake_mode = _compat.FakeTensorMode(shape_env=_compat.ShapeEnv() if dynamic else None)
        with fake_mode:
            symbols = {size: _compat.symbolic_size(fake_mode.shape_env, size) for size in dynamic}
            fakes = [on_cuda(a, symbols) for a in args]
            graph = make_fx(function, decomposition_table=decompositions())(*fakes)
        lowering = _compat.GraphLowering(graph, example_inputs=fakes, shape_env=fake_mode.shape_env, is_inference=True)
        with (
            _compat.V.set_debug_handler(_compat.DebugContext()),
            _compat.V.set_graph_handler(lowering),
            _compat.V.set_fake_mode(fake_mode),
            _compat.inductor_config.patch(config or {}),
            row_kernels(),
        ):
            lowering.run(*fakes)
            code = lowering.codegen()[0]
    return getattr(code, "value", code)
