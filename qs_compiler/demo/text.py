"""Captions to conditioning: a word-level tokenizer and an embedding table, trained together with the transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .captions import COLOURS, DIRECTIONS, GROUNDS, PATTERNS, SHAPES, SIZES, CaptionError, grammar

WORDS = (
    "<pad>",  # index 0; the empty caption, all padding, is the unconditional one
    *("a", "moves", "over", "with", "and"),
    *(*SIZES, *COLOURS, *SHAPES, *DIRECTIONS, *GROUNDS, *PATTERNS),
)
MAX_TOKENS = 24  # the longest caption has 17 words

_INDEX = {word: index for index, word in enumerate(WORDS)}


def tokenize(captions: Sequence[object]) -> torch.Tensor:
    """Word indices of B captions (anything whose `str()` is one), (B, MAX_TOKENS) int64, padded with 0.

    Raises CaptionError for an unknown word or too long a caption. Word order matters: the encoder knows the grammar of
    captions.py by position.
    """
    tokens = torch.zeros(len(captions), MAX_TOKENS, dtype=torch.int64)
    for row, caption in enumerate(captions):
        words = str(caption).lower().split()
        unknown = [word for word in words if word not in _INDEX]
        if unknown:
            raise CaptionError(f"unknown words in {str(caption)!r}: {', '.join(unknown)}.\n{grammar()}")
        if len(words) > MAX_TOKENS:
            raise CaptionError(f"{str(caption)!r} has {len(words)} words, at most {MAX_TOKENS} fit.\n{grammar()}")
        tokens[row, : len(words)] = torch.tensor([_INDEX[word] for word in words], dtype=torch.int64)
    return tokens


class CaptionEncoder(nn.Module):
    """Word plus position, normalised: (B, MAX_TOKENS) int64 to (B, MAX_TOKENS, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), dim)
        self.positions = nn.Parameter(torch.randn(MAX_TOKENS, dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(self.words(tokens) + self.positions)

    def encode(self, captions: Sequence[object]) -> torch.Tensor:
        """Conditioning of B captions, (B, MAX_TOKENS, dim) on the encoder's device and in its dtype."""
        return self(tokenize(captions).to(self.positions.device))
