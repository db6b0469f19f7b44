"""Finished blocks on disk, so that a calibration that was killed goes on where it was.

    <output_dir>/blocks/003.blocks.3/       an artifact with the linears of one block; whole or not there
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..artifact import PLAN, Artifact
from ..errors import ArtifactError
from ..options import Recipe
from ..packing import PackedWeight
from .transforms import moved


class FinishedBlocks:
    """The finished blocks of one calibration of one model.

    Args:
        folder: None keeps nothing.
        key: everything that the result depends on (recipe, settings, seed, samples) as JSON values.
    """

    def __init__(self, folder: Path | None, model: nn.Module, recipe: Recipe, key: Mapping[str, Any]) -> None:
        self._folder, self._model, self._recipe = folder, model, recipe
        self._key = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()

    def load(self, index: int, name: str, device: torch.device) -> Artifact | None:
        """The block with this number, its tensors on `device`; None if it is not finished.

        Raises:
            ArtifactError: it belongs to another calibration, or to another model.
        """
        path = self._path(index, name)
        if path is None or not (path / PLAN).is_file():
            return None
        found = Artifact.load(path)
        if found.metrics.get("key") != self._key:
            raise ArtifactError(
                f"'{path}' belongs to a calibration with another recipe, other options or other samples; "
                "choose another output_dir, or delete this one to start anew."
            )
        found.check_model(self._model)
        found.layers = moved(found.layers, device)
        return found

    def save(self, index: int, name: str, layers: Mapping[str, PackedWeight], metrics: Mapping[str, Any]) -> None:
        """Keep a finished block."""
        path = self._path(index, name)
        if path is not None:
            Artifact.of(self._model, self._recipe, layers, {**metrics, "key": self._key}).save(path)

    def _path(self, index: int, name: str) -> Path | None:
        return None if self._folder is None else self._folder / "blocks" / f"{index:03d}.{name or 'model'}"
