"""Read template texts and describe tensors to them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

HERE = Path(__file__).parent
# Inductor's key of generated code sees the template, not what it imports: the text carries the hash of that.
IMPORTED = b"".join((HERE / name).read_bytes() for name in ("device.py", "attention_device.py"))
DEVICE_HASH = hashlib.sha256(IMPORTED).hexdigest()[:16]


def read_template(op: str) -> str:
    """The text of templates/<op>.py.jinja."""
    text = (HERE / "templates" / f"{op}.py.jinja").read_text()
    return text.replace("{{DEVICE_HASH}}", DEVICE_HASH)


def triton_dtype(dtype: torch.dtype) -> str:
    """A float dtype as Triton source."""
    return {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16", torch.float32: "tl.float32"}[dtype]
