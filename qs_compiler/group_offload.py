"""diffusers' group offloading takes packed tensors off the device again.

With `use_stream=True` it brings parameters and buffers of a block to the device and takes back the parameters alone, so
that after one forward all packed weights lay there (huggingface/diffusers#13238; in 0.35 to 0.42.1). HunyuanVideo in
w4a8 then took as much memory as without: 6 GiB.
"""

from __future__ import annotations

import functools
from typing import Any

from .packed_linear import PackedLinear


def return_packed_tensors() -> None:
    """Mend it for packed tensors, in this process. Other buffers stay on the device: a forward may have written one."""
    from diffusers.hooks.group_offloading import ModuleGroup

    original = ModuleGroup._offload_to_memory
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def offload_to_memory(self: Any) -> None:
        original(self)
        if self.stream is None:  # whole modules were moved
            return
        for module in self.modules:
            for part in module.modules():
                for buffer in part.buffers(recurse=False) if isinstance(part, PackedLinear) else ():
                    buffer.data = self.cpu_param_dict[buffer]

    ModuleGroup._offload_to_memory = offload_to_memory
