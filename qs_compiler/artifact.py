"""The calibrated, packed checkpoint: a folder with `model.safetensors` (the tensors) and `plan.json` (all else).

    wan-w4a8-d25.qs/
      plan.json             format version, model class, config hash, sample of the source weights, recipe, versions,
                            metrics, per layer its kind, shape, dtype, activation and names of its tensors, and the
                            names of the other tensors of the model, if they are there
      model.safetensors     or model-00001-of-00003.safetensors ... and model.safetensors.index.json above 5 GB

A folder is either whole or not there: it is written beside its place and moved in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from .errors import ArtifactError, QuantSparseError
from .ops.dequantize import check as check_dequantize
from .ops.library import FLOAT_DTYPES
from .options import Recipe
from .packing import PackedWeight
from .runtime.head_values import BUFFERS, GAINS, SHARES
from .source_model import SAMPLES, check_shape, config_hash, rest_of, sample_weight, source_weight, unwrap
from .tensor_files import SHARD_BYTES, TensorReader, write_tensors

FORMAT = "quantsparse-artifact"
VERSION = 1
PLAN = "plan.json"
TENSOR_NAMES = ("wq", "ws", "multipliers", "smooth", "rotation")
FLOAT_TENSORS = ("ws", "smooth", "rotation")


@dataclasses.dataclass
class Artifact:
    """A compressed model on disk or on its way there.

    Attributes:
        recipe: what it was made with.
        model_class: class name of the model that it was made from.
        config_hash: of that model's config, see `config_hash`.
        layers: qualified name of a linear -> its packed weight. The biases stay the model's own.
        samples: qualified name of a linear -> values of some elements of its 16-bit weight, see `sample_weight`.
        dtypes: qualified name of a linear -> dtype of its 16-bit weight.
        rest: qualified name -> every other parameter and buffer of the model, so that it can be loaded without its
            16-bit checkpoint (`load`); None if the artifact holds packed weights alone. Buffers that a checkpoint
            leaves out (rope tables) are there too: another version, or a cast, might compute others.
        gains: qualified name of an attention module -> the gains of its `mixture` correction, (H,) fp32.
        shares: likewise, how many key blocks each head keeps, relative to their mean.
        metrics: what calibration measured; JSON values.
        versions: of the packages that it was made with.
    """

    recipe: Recipe
    model_class: str
    config_hash: str
    layers: dict[str, PackedWeight] = dataclasses.field(default_factory=dict)
    samples: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = dataclasses.field(default_factory=dict)
    rest: dict[str, torch.Tensor] | None = None
    gains: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    shares: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=lambda: package_versions())

    @classmethod
    def of(
        cls,
        model: nn.Module,
        recipe: Recipe,
        layers: Mapping[str, PackedWeight],
        metrics: Mapping[str, Any] | None = None,
        *,
        include_rest: bool = False,
        gains: Mapping[str, torch.Tensor] | None = None,
    ) -> Artifact:
        """Describe `model`, whose linears named in `layers` were packed so.

        Args:
            include_rest: also hold the model's other tensors (not copied), which `load` needs.

        Raises:
            ArtifactError: the model has no linear of such a name and shape.
        """
        model = unwrap(model)
        weights = {name: source_weight(model, name, packed.shape) for name, packed in layers.items()}
        return cls(
            recipe=recipe,
            model_class=type(model).__name__,
            config_hash=config_hash(model),
            layers=dict(layers),
            samples={name: sample_weight(weight, name) for name, weight in weights.items()},
            dtypes={name: weight.dtype for name, weight in weights.items()},
            rest=rest_of(model, layers) if include_rest else None,
            gains=dict(gains or {}),
            metrics=dict(metrics or {}),
        )

    @property
    def head_values(self) -> dict[str, dict[str, torch.Tensor]]:
        """What heads differ in, as `give_head_values` takes it."""
        return {GAINS: self.gains, SHARES: self.shares}

    def fingerprint(self) -> str:
        """Digest of what the artifact is, without the values of its tensors (they are inputs of the compiled code)."""
        return hashlib.sha256(json.dumps(self._plan(), sort_keys=True).encode()).hexdigest()

    def save(self, path: str | os.PathLike[str], shard_bytes: int = SHARD_BYTES) -> None:
        """Write the folder `path`. It is written elsewhere and moved in, so that nobody sees a part of it.

        Args:
            path: a new folder, or an artifact to be replaced.
            shard_bytes: above so much the tensors are spread over several files.

        Raises:
            ArtifactError: `path` is something that is not an artifact, or cannot be written.
        """
        path = Path(os.path.realpath(path))
        if path.exists() and not (path / PLAN).is_file() and not (path.is_dir() and not any(path.iterdir())):
            raise ArtifactError(f"'{path}' exists and is no artifact; it is left as it is. Choose another path.")
        try:
            plan = json.dumps(self._plan(), indent=1)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"the metrics of an artifact must be JSON values: {error}.") from error
        work = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            new, old = work / "new", work / "old"
            new.mkdir()
            write_tensors(new, self._tensors()[3], shard_bytes)
            (new / PLAN).write_text(plan)
            if path.exists():
                path.rename(old)
            try:
                new.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"the artifact cannot be written to '{path}': {error}.") from error
        finally:
            if work is not None:
                shutil.rmtree(work, ignore_errors=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Artifact:
        """Read and check an artifact. Its tensors are mapped from the file, not copied into memory.

        Raises:
            ArtifactError: nothing there, not an artifact, damaged, or of a later version.
        """
        path = Path(path)
        plan = _read_plan(path)
        try:
            with TensorReader(path) as tensors:
                layers = {name: _read_layer(name, entry, tensors) for name, entry in plan["layers"].items()}
                names = plan["rest"]
                rest = None if names is None else {name: tensors.read(stored) for name, stored in names.items()}
                gains, shares = (
                    {name: _read_head_values(f"{name}.{buffer}", tensors.read(stored)) for name, stored in own.items()}
                    for buffer, own in zip(BUFFERS, (plan.get("gains", {}), plan.get("shares", {})), strict=True)
                )
            return cls(
                recipe=Recipe.from_dict(plan["recipe"]),
                model_class=plan["model_class"],
                config_hash=plan["config_hash"],
                layers=layers,
                samples={name: _read_samples(plan["samples"][name]) for name in layers},
                dtypes={name: _read_dtype(plan["layers"][name]["dtype"]) for name in layers},
                rest=rest,
                gains=gains,
                shares=shares,
                metrics=plan["metrics"],
                versions=plan["versions"],
            )
        except (SafetensorError, OSError) as error:
            raise _damaged(path, f"its tensors cannot be read: {error}") from error
        except QuantSparseError as error:
            raise _damaged(path, str(error)) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(path, f"{PLAN} is not as it was written: {type(error).__name__}: {error}") from error

    def check_model(self, model: nn.Module) -> None:
        """Make sure that the artifact was made from `model`; changes nothing.

        The sampled weights may differ by what a cast between float32, bfloat16 and float16 changes.

        Raises:
            ArtifactError: another class, config or architecture; other weights, such as those of the other expert.
        """
        for name, weight in self.check_architecture(model).items():
            self.check_weight(name, weight)

    def check_architecture(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Make sure that `model` is built like the one that the artifact was made from; its weights need no values.

        Returns:
            the weight of each layer.

        Raises:
            ArtifactError: another class, config or architecture.
        """
        model = unwrap(model)
        if type(model).__name__ != self.model_class:
            raise ArtifactError(
                f"the artifact was made from a {self.model_class}, this model is a {type(model).__name__}; "
                "calibrate an artifact for it."
            )
        weights = {name: source_weight(model, name, packed.shape) for name, packed in self.layers.items()}
        if config_hash(model) != self.config_hash:
            raise ArtifactError(
                f"the artifact was made from a {self.model_class} of another config; use the checkpoint that it was "
                "calibrated on, or calibrate again."
            )
        return weights

    def check_weight(self, name: str, weight: torch.Tensor) -> None:
        """Make sure that `weight` is what the layer called `name` was packed from.

        Raises:
            ArtifactError: it has no values, another shape or other values.
        """
        check_shape(name, weight, self.layers[name].shape)
        now, then = (torch.tensor(v, dtype=torch.float64) for v in (sample_weight(weight, name), self.samples[name]))
        # Half a unit in the last place of bfloat16 is 2^-9, of the smallest float16 numbers 2^-25.
        if not torch.allclose(now, then, rtol=2**-8, atol=2**-24):
            raise ArtifactError(
                f"'{name}.weight' has other values than the weight that the artifact was made from: another "
                "checkpoint, the other expert, or a LoRA fused into it. Attach each expert to its own artifact, "
                "load a LoRA after attaching and do not fuse it, or calibrate again."
            )

    def _tensors(
        self,
    ) -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, dict[str, str]], dict[str, torch.Tensor]]:
        """Names of the tensors of each layer, of the rest, of the values of heads, and the tensors; shared ones once.
        """
        stored: dict[Any, str] = {}
        tensors: dict[str, torch.Tensor] = {}

        def store(name: str, tensor: torch.Tensor) -> str:
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            name = stored.setdefault(place, name) if tensor.numel() else name
            tensors[name] = tensor
            return name

        layers = {
            layer: {field: store(f"{layer}.{field}", tensor) for field, tensor in packed.tensors().items()}
            for layer, packed in self.layers.items()
        }
        rest = {name: store(name, tensor) for name, tensor in (self.rest or {}).items()}
        heads = {
            buffer: {name: store(f"{name}.{buffer}", tensor) for name, tensor in own.items()}
            for buffer, own in self.head_values.items()
        }
        return layers, rest, heads, tensors

    def _plan(self) -> dict[str, Any]:
        names, rest, heads, _ = self._tensors()
        return {
            "format": FORMAT,
            "version": VERSION,
            "model_class": self.model_class,
            "config_hash": self.config_hash,
            "recipe": self.recipe.to_dict(),
            "versions": self.versions,
            "metrics": self.metrics,
            "layers": {
                layer: {
                    "kind": "linear",
                    "shape": list(packed.shape),
                    "dtype": str(self.dtypes[layer]).removeprefix("torch."),
                    "activation": packed.activation,
                    "tensors": names[layer],
                }
                for layer, packed in self.layers.items()
            },
            "samples": self.samples,
            "rest": None if self.rest is None else rest,
            "gains": heads[GAINS],
            "shares": heads[SHARES],
        }


def package_versions() -> dict[str, str]:
    """Versions of this package and of those whose models and tensors an artifact holds; "none" if not installed."""

    def known(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "none"

    from . import __version__  # the package's own names import this module

    return {"qs_compiler": __version__, "torch": str(torch.__version__), "diffusers": known("diffusers")}


def _damaged(path: Path, problem: str) -> ArtifactError:
    return ArtifactError(f"artifact '{path}' is damaged: {problem.rstrip('.')}. Copy it again, or calibrate again.")


def _read_plan(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ArtifactError(f"there is no artifact at '{path}'; check the path, or calibrate and save one there.")
    if not (path / PLAN).is_file():
        raise ArtifactError(f"'{path}' is not an artifact: it is no folder with a {PLAN}.")
    try:
        plan = json.loads((path / PLAN).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{PLAN} cannot be read: {error}") from error
    if not isinstance(plan, dict) or plan.get("format") != FORMAT:
        raise ArtifactError(f"'{path}' is not an artifact: its {PLAN} is not of the format '{FORMAT}'.")
    found = plan.get("version")
    if not isinstance(found, int) or found < 1:
        raise _damaged(path, f"its version is {found!r}")
    if found > VERSION:
        raise ArtifactError(
            f"artifact '{path}' has format version {found}, this package reads up to {VERSION}; upgrade qs_compiler."
        )
    return plan


def _read_layer(layer: str, entry: Mapping[str, Any], tensors: TensorReader) -> PackedWeight:
    if entry["kind"] != "linear":
        raise ArtifactError(f"layer '{layer}' is of the unknown kind {entry['kind']!r}")
    names = entry["tensors"]
    if not {"wq", "ws"} <= names.keys() <= set(TENSOR_NAMES):
        raise ArtifactError(f"layer '{layer}' has the tensors {sorted(names)}")
    packed = PackedWeight(**{f: tensors.read(name) for f, name in names.items()}, activation=entry["activation"])
    try:
        check_dequantize(
            packed.wq, packed.ws, packed.multipliers, packed.smooth, packed.rotation, packed.activation, torch.float32
        )
    except QuantSparseError as error:
        raise ArtifactError(f"layer '{layer}': {error}") from error
    for field in FLOAT_TENSORS:
        if field in names and getattr(packed, field).dtype != torch.float32:
            raise ArtifactError(f"layer '{layer}': {field} is {getattr(packed, field).dtype}, not torch.float32")
    if list(packed.shape) != entry["shape"]:
        raise ArtifactError(f"layer '{layer}' has shape {list(packed.shape)}, but {PLAN} says {entry['shape']}")
    return packed


def _read_samples(values: list[float]) -> list[float]:
    if len(values) != SAMPLES:
        raise ValueError(f"{len(values)} samples of a weight instead of {SAMPLES}")
    return [float(value) for value in values]


def _read_head_values(name: str, values: torch.Tensor) -> torch.Tensor:
    if values.dim() != 1 or values.dtype != torch.float32 or not values.isfinite().all():
        raise ArtifactError(f"'{name}' is {values.dtype} of shape {tuple(values.shape)}, not one finite number a head")
    return values


def _read_dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if found not in FLOAT_DTYPES:
        raise ValueError(f"{name!r} is no dtype of a weight")
    return found
