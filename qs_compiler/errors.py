"""The one exception tree. What a caller can cause is a QuantSparseError; the message says the cause, then the remedy.

    QuantSparseError
    ├── OptionError (ValueError)     an option of the backend: unknown name, wrong type, out of range, in conflict
    │   └── RecipeError              the same for a recipe
    ├── ArtifactError                an artifact that is missing, damaged, too new, or made for another model
    ├── CaptureError                 a graph that cannot be brought into our IR
    ├── PassError                    a pass that cannot be registered: name taken, unknown neighbour, cycle
    │   └── PassFailed               a pass that failed on a graph, with its name and its dump
    ├── SignalError                  a denoising step signal that contradicts itself
    ├── UnsupportedError             something that cannot be compressed, where `strict` or the call demands it
    └── DeviceError                  tensors on a device where they cannot be used, or too little memory there

Dynamo wraps what a backend raises in BackendCompilerFailed; the backend therefore returns a callable that raises, so
that the caller sees these types themselves.
"""

import difflib
from collections.abc import Iterable


class QuantSparseError(Exception):
    """Base of all errors of this package."""


class OptionError(QuantSparseError, ValueError):
    """An option of the backend is unknown, ill-typed, out of range or in conflict with another."""


class RecipeError(OptionError):
    """A recipe, or a field of one, is unknown, ill-typed or out of range."""


class ArtifactError(QuantSparseError):
    """An artifact is missing, damaged, of a later version, or belongs to another model."""


class CaptureError(QuantSparseError):
    """A graph cannot be captured as pre-dispatch ATen."""


class PassError(QuantSparseError):
    """A graph pass cannot be registered or ordered."""


class PassFailed(PassError):
    """A graph pass failed on a graph."""


class SignalError(QuantSparseError):
    """A step signal is missing where it is required, or contradicts an earlier one."""


class UnsupportedError(QuantSparseError):
    """Something cannot be compressed, and the caller asked for an error instead of a reported skip."""


class DeviceError(QuantSparseError):
    """A tensor lies on a device where it cannot be used, or the device has too little memory."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: "; did you mean 'x'?", or "." where no choice is like it."""
    found = difflib.get_close_matches(name, list(choices), n=1)
    return f"; did you mean '{found[0]}'?" if found else "."
