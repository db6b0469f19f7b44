"""Finished denoising runs on disk, so that a calibration that was killed does not denoise them again.

    <output_dir>/runs/002.pt        what was kept of the third run; whole or not there
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ArtifactError
from .head_fit import HeadFit
from .samples import Sample

log = logging.getLogger("qs_compiler.calibration")


class KeptRuns:
    """The runs of one calibration: the forwards that were kept of each, and what was learned of heads by then.

    Args:
        folder: None keeps nothing.
        key: what tells these runs from others, as JSON values. None keeps nothing, and so does what is no JSON value:
            of an image or a callback nobody can tell whether it is the same.
        fits: of the modules whose heads are fitted in the runs.
    """

    def __init__(self, folder: Path | None, key: Any, fits: Mapping[str, HeadFit]) -> None:
        self._fits = fits
        try:
            self._key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        except TypeError:
            folder = None
        self._folder = None if key is None or folder is None else folder / "runs"

    def load(self, number: int) -> dict[str, list[Sample]] | None:
        """What was kept of a run, by module; None if it is not there. The fits go on from there.

        Raises:
            ArtifactError: it belongs to another calibration, or cannot be read.
        """
        path = self._path(number)
        if path is None or not path.is_file():
            return None
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ArtifactError(f"'{path}' cannot be read ({error}); delete it to do that run again.") from error
        if found["key"] != self._key:
            raise ArtifactError(
                f"'{path}' belongs to a calibration with another recipe or pipeline, other prompts or other options; "
                "choose another output_dir, or delete this one to start anew."
            )
        for name, fit in self._fits.items():
            fit.restore(found["heads"][name])
        return {name: [Sample(*fields) for fields in samples] for name, samples in found["samples"].items()}

    def save(self, number: int, samples: Mapping[str, list[Sample]]) -> None:
        """Keep a run, unless a forward took something that a file cannot give back."""
        path = self._path(number)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {
            "key": self._key,
            "samples": {name: [(s.args, s.kwargs, s.autocast) for s in own] for name, own in samples.items()},
            "heads": {name: fit.state() for name, fit in self._fits.items()},
        }
        part = path.with_suffix(".part")
        try:
            torch.save(found, part)
            torch.load(part, weights_only=True, mmap=True)
        except (pickle.PickleError, AttributeError, TypeError, RuntimeError) as error:
            log.warning("a denoising run is not kept, and would be done again: %s", str(error).splitlines()[0])
            part.unlink(missing_ok=True)
            return
        os.replace(part, path)

    def _path(self, number: int) -> Path | None:
        return None if self._folder is None else self._folder / f"{number:03d}.pt"
