"""Named tensors in a folder: `model.safetensors`, or above a size several files and an index in Hugging Face's form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .errors import ArtifactError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write `tensors` into `folder`, in files of at most `shard_bytes` (one tensor may be larger)."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        if shards[-1] and tensor.nbytes > room:
            shards.append({})
            room = shard_bytes
        # safetensors refuses views of a larger storage, which rows of a fused weight are.
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
        shards[-1][name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
        room -= tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE)
        return
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, folder / file)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1))


class TensorReader:
    """Context manager over what `write_tensors` wrote. Tensors are mapped from their file; each is made once.

    Raises:
        ArtifactError: a file or a tensor is missing.
        SafetensorError, OSError: a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[Any] = []
        self._file_of: dict[str, Any] = {}
        self._made: dict[str, torch.Tensor] = {}

    def __enter__(self) -> Self:
        index = self._folder / INDEX
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [SINGLE]
        for name in files:
            if Path(name).name != name or not (self._folder / name).is_file():
                raise ArtifactError(f"the file '{name}' is missing")
            file = safe_open(self._folder / name, framework="pt").__enter__()
            self._files.append(file)
            self._file_of.update(dict.fromkeys(file.keys(), file))
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.__exit__(None, None, None)

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`, on the CPU."""
        if name not in self._file_of:
            raise ArtifactError(f"the tensor '{name}' is missing")
        if name not in self._made:
            self._made[name] = self._file_of[name].get_tensor(name)
        return self._made[name]
