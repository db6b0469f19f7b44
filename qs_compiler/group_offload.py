"""diffusers' group offloading of packed models.

With `use_stream=True` it brings parameters and buffers of a block to the device and takes back the parameters alone, so
that after one forward all packed weights lay there (huggingface/diffusers#13238; in 0.35 to 0.42.1). HunyuanVideo in
w4a8 then took as much memory as without: 6 GiB. And since its hooks break the graph of the model, the patch embedding,
which tells where tokens lie in the video, may run outside of all graphs.
"""

from __future__ import annotations

import functools
from typing import Any

from .packed_linear import PackedLinear
from .runtime.seen_grid import moved


def mend_group_offloading() -> None:
    """Return packed tensors and look on at patch embeddings that are moved, in this process.

    Buffers of other modules stay on the device: a forward may have written one.
    """
    from diffusers.hooks.group_offloading import ModuleGroup

    begin, offload = ModuleGroup.__init__, ModuleGroup._offload_to_memory
    if hasattr(offload, "__wrapped__"):
        return

    @functools.wraps(begin)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        for module in self.modules:
            moved(module)

    @functools.wraps(offload)
    def offload_to_memory(self: Any) -> None:
        offload(self)
        if self.stream is None:  # whole modules were moved
            return
        parts = (part for module in self.modules for part in module.modules())
        for packed in (part for part in parts if isinstance(part, PackedLinear)):
            for buffer in packed.buffers():
                buffer.data = self.cpu_param_dict[buffer]

    ModuleGroup.__init__, ModuleGroup._offload_to_memory = init, offload_to_memory
