"""The self-attentions of the bundled model while it denoises, each with its step, branch and layer."""

from __future__ import annotations

import abc

from qs_compiler.calibration.attention_call import AttentionCall, AttentionListener


class SelfAttentions(AttentionListener):
    """While open, `look` is told of every self-attention over `tokens` tokens; `announce` must hear of each forward."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.step, self.branch, self.layer = tokens, 0, "", 0

    def announce(self, step: int, branch: str) -> None:
        """The next forward computes `branch` of `step`."""
        self.step, self.branch, self.layer = step, branch, 0

    def hear(self, call: AttentionCall) -> None:
        if call.query.shape[2] == call.key.shape[2] == self.tokens:
            self.look(call)
            self.layer += 1

    @abc.abstractmethod
    def look(self, call: AttentionCall) -> None:
        """Look at one, before it is computed."""
