"""The step signal of diffusers pipelines: cache contexts, the scheduler's timesteps and the end of a video.

Pipelines wrap each transformer call in `with model.cache_context("cond", ...)`. A stateful hook hears of it outside
the compiled region. A few pipelines also pass the step and the number of steps; for the others context entries are
counted per branch, from the last `scheduler.set_timesteps`, which is where every pipeline starts a video.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager

from .runtime.tracker import ModelTracker, Signal, Video

HOOK = "quantsparse_step"


class PipelineSignal:
    """Turns a pipeline's events into signals of one tracker; the experts of a pipeline share one instance.

    One state a thread, so that two threads may run one pipeline's model.
    """

    def __init__(self, tracker: ModelTracker) -> None:
        self._tracker = tracker
        self._local = threading.local()

    def begin_video(self, num_steps: int | None) -> None:
        """The scheduler was given the timesteps of a new video."""
        self.end_video()
        self._local.num_steps = num_steps

    def begin_call(self, branch: str | None, step: int | None, num_steps: int | None) -> None:
        """The next forward computes `branch` of `step`; both may be unknown."""
        state = self._local
        last: dict[str | None, int] = state.__dict__.setdefault("last", {})
        num_steps = num_steps or getattr(state, "num_steps", None)
        if step is None:
            if getattr(state, "num_steps", None) is None:
                self._tracker.set(None)  # counting without a known start could continue an interrupted video
                return
            step = last.get(branch, -1) + 1
        elif last and (step < max(last.values()) or step == last.get(branch) == 0):
            self.end_video()
            last = state.last = {}
        if num_steps is None or step >= num_steps:
            self._tracker.set(None)
            return
        if getattr(state, "video", None) is None:
            state.video = Video(num_steps)
        last[branch] = step
        self._tracker.set(Signal(state.video, step, num_steps, branch))

    def end_call(self) -> None:
        """The forward is over; what runs outside a context has no signal."""
        self._tracker.set(None)

    def end_video(self) -> None:
        """The video is over or was given up: free its caches."""
        video = getattr(self._local, "video", None)
        if video is not None:
            video.close()
        self._local.__dict__.clear()
        self._tracker.set(None)


class _NoState(BaseState):
    def reset(self) -> None:
        """Nothing is kept per context."""


class _Listener(StateManager):
    def __init__(self, signal: PipelineSignal) -> None:
        super().__init__(_NoState)
        self._signal = signal

    def set_context(self, context: Any) -> None:
        super().set_context(context)
        if context is None:
            self._signal.end_call()
        else:
            step, total = getattr(context, "step_index", None), getattr(context, "num_inference_steps", None)
            self._signal.begin_call(context.name, step, total)


class StepHook(ModelHook):
    """Tells a PipelineSignal of every cache context of a model."""

    _is_stateful = True  # only stateful hooks hear of contexts

    def __init__(self, signal: PipelineSignal) -> None:
        super().__init__()
        self._signal, self.listener = signal, _Listener(signal)

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """The pipeline is done with a video."""
        self._signal.end_video()
        self.listener.reset()
        return module


def listen(module: torch.nn.Module, signal: PipelineSignal) -> bool:
    """Hook `signal` into a diffusers model; False if the model has no cache contexts. An older hook is replaced."""
    if not hasattr(module, "cache_context"):
        return False
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if registry.get_hook(HOOK) is not None:
        registry.remove_hook(HOOK)
    registry.register_hook(StepHook(signal), HOOK)
    return True


def ignore(module: torch.nn.Module) -> None:
    """Take back `listen`."""
    if hasattr(module, "cache_context"):
        HookRegistry.check_if_exists_or_initialize(module).remove_hook(HOOK)


def watch_scheduler(scheduler: Any, signal: PipelineSignal) -> None:
    """Make `scheduler.set_timesteps` announce a new video and its number of steps."""
    original = getattr(scheduler.set_timesteps, "__wrapped__", scheduler.set_timesteps)

    @functools.wraps(original)
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        signal.begin_video(len(scheduler.timesteps))
        return result

    scheduler.set_timesteps = set_timesteps
