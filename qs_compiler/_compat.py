"""The only module that touches private torch API.

Names of torch._inductor resolve on first use, so that importing this module (and qs_compiler.ops) stays cheap:
`from qs_compiler._compat import ir, L` imports Inductor, `import qs_compiler._compat` does not.
"""

from __future__ import annotations

import importlib
from typing import Any

# name -> (module, attribute); attribute None means the module itself
_LAZY: dict[str, tuple[str, str | None]] = {
    # lowerings
    "ir": ("torch._inductor.ir", None),
    "L": ("torch._inductor.lowering", None),
    "lowerings": ("torch._inductor.lowering", "lowerings"),
    "register_lowering": ("torch._inductor.lowering", "register_lowering"),
    "V": ("torch._inductor.virtualized", "V"),
    "ops": ("torch._inductor.virtualized", "ops"),
    # templates
    "SymbolicGridFn": ("torch._inductor.select_algorithm", "SymbolicGridFn"),
    "can_use_tma": ("torch._inductor.utils", "can_use_tma"),
    "get_num_sms": ("torch._inductor.utils", "get_num_sms"),
    "persistent_mm_grid": ("torch._inductor.kernel.mm_common", "persistent_mm_grid"),
    # inspection of generated code (tests)
    "inductor_config": ("torch._inductor.config", None),
    "run_and_get_code": ("torch._inductor.utils", "run_and_get_code"),
    "DebugContext": ("torch._inductor.debug", "DebugContext"),
    "GraphLowering": ("torch._inductor.graph", "GraphLowering"),
    "select_decomp_table": ("torch._inductor.decomposition", "select_decomp_table"),
    "DeviceProperties": ("torch._inductor.runtime.hints", "DeviceProperties"),
    "CudaInterface": ("torch._dynamo.device_interface", "CudaInterface"),
    "FakeTensorMode": ("torch._subclasses.fake_tensor", "FakeTensorMode"),
    "fake_tensor": ("torch._subclasses.fake_tensor", None),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    found = importlib.import_module(module)
    value = found if attribute is None else getattr(found, attribute)
    globals()[name] = value
    return value


# ---- lowerings and templates ----


def extern_kernel(op) -> Any:
    """A lowering that calls `op` eagerly; unlike Inductor's own handlers it leaves the global set of fallbacks alone."""
    from torch._inductor.lowering import fallback_handler

    return fallback_handler(op, add_to_fallback_set=False)


def make_template(name: str, grid, source: str) -> Any:
    """A TritonTemplate whose input layouts are frozen (an argument only from torch 2.13 on)."""
    from torch._inductor.select_algorithm import TritonTemplate

    frozen = "always_freeze_layout" in TritonTemplate.__init__.__code__.co_varnames
    return TritonTemplate(name=name, grid=grid, source=source, **({"always_freeze_layout": True} if frozen else {}))


def select_template(name: str, template, configs: list[dict], nodes: list, layout, **common) -> Any:
    """The TensorBox of `template` over `nodes` with the best of `configs` (each one is benchmarked if there are several)."""
    from torch._inductor.select_algorithm import autotune_select_algorithm

    choices: list = []
    for config in configs:
        error = template.maybe_append_choice(choices, input_nodes=nodes, layout=layout, **common, **config)
        if error is not None and len(configs) == 1:
            raise error
    selected = autotune_select_algorithm(name, choices, nodes, layout)
    return selected[0] if isinstance(selected, tuple) else selected  # a pair from torch 2.13 on


def cpp_wrapper_active() -> bool:
    """Whether the graph being lowered is emitted as C++ (AOTInductor)."""
    from torch._inductor.virtualized import V

    return bool(V.graph.cpp_wrapper)
