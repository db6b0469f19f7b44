"""The step signal of a model that nobody announced: read from the inputs of a whole-model graph.

It needs all of: a timestep input, a text-conditioning input that is the *same tensor object* as in the call before,
a strictly falling timestep, and latents that continue those of the call before. Anything else is a new video, which
starts dense. A wrong guess may cost time, never a wrong picture.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..capture import GraphInput, Kind
from .tracker import Signal, Video

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma")
CONDITIONING_NAMES = ("encoder_hidden_states", "prompt_embeds", "context")
LATENT_NAMES = ("hidden_states", "latents", "x", "sample")
PROBES = 4096  # latent elements compared from one call to the next
# Consecutive steps of one video differ by about sqrt(2) times the change of the noise level, which is below 0.2 from 8
# steps on; latents of two videos that start from different noise differ by more than their own size.
MAX_RELATIVE_CHANGE = 0.35


@dataclasses.dataclass
class _Stream:
    video: Video
    first: float
    last: float
    step: int
    latents: torch.Tensor


class ImplicitSignal:
    """Guesses the video and step of one compiled graph's calls; one instance a graph."""

    def __init__(self, inputs: Sequence[GraphInput], warmup: float) -> None:
        self.timestep = _find(inputs, TIMESTEP_NAMES)
        self.conditioning = _find(inputs, CONDITIONING_NAMES)
        self.latents = _find(inputs, LATENT_NAMES)
        self._warmup = warmup
        self._streams: Any = WeakIdKeyDictionary()
        self._ambiguous: Any = WeakIdKeyDictionary()
        self._lock = threading.Lock()

    @property
    def usable(self) -> bool:
        """Whether the graph has the inputs that a guess needs."""
        return None not in (self.timestep, self.conditioning, self.latents)

    def signal(self, args: Sequence[Any], owner: torch.Tensor) -> Signal | None:
        """The guessed step of this call, or None: run dense.

        Args:
            owner: a parameter of the model; two models that share the graph have streams of their own.
        """
        if not self.usable:
            return None
        timestep, conditioning = args[self.timestep], args[self.conditioning]
        if not all(isinstance(t, torch.Tensor) for t in (timestep, conditioning)) or timestep.numel() == 0:
            return None
        now = float(timestep.flatten()[0])
        if timestep.numel() > 1 and not bool((timestep == timestep.flatten()[0]).all()):
            return None
        sample = _sample(args[self.latents])
        with self._lock:
            streams = self._streams.setdefault(conditioning, {})
            stream = streams.get(id(owner))
            if conditioning in self._ambiguous:
                return None
            if stream is not None and not _continues(stream, now, sample):
                if now < stream.first and now < stream.last:
                    # Falling timesteps but other latents: two videos share this conditioning, never trust it again.
                    self._ambiguous[conditioning] = True
                    streams.clear()
                    return None
                stream = None
            if stream is None:
                streams[id(owner)] = _Stream(Video(None), now, now, 0, sample)
                return None
            stream.step, stream.last, stream.latents = stream.step + 1, now, sample
            stream.video.begin_call()
            # The number of steps is unknown: the timestep itself says how much of the run is over.
            if stream.first - now < self._warmup * stream.first:
                return None
            return Signal(stream.video, stream.step, num_steps=0)


def _find(inputs: Sequence[GraphInput], names: Sequence[str]) -> int | None:
    found = [i for i, x in enumerate(inputs) if x.kind is Kind.USER and x.name in names]
    return found[0] if len(found) == 1 else None


def _sample(latents: torch.Tensor) -> torch.Tensor:
    flat = latents.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // PROBES)][:PROBES].float().clone()


def _continues(stream: _Stream, now: float, sample: torch.Tensor) -> bool:
    if not now < stream.last or sample.shape != stream.latents.shape or sample.device != stream.latents.device:
        return False
    change = (sample - stream.latents).norm() / stream.latents.norm().clamp_min(1e-12)
    return bool(change <= MAX_RELATIVE_CHANGE)
