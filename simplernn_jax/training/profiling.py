"""Profiles of some steps of a run, for TensorBoard."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax

from simplernn_jax.errors import counted, one_line

WARMUP_STEPS = 2
"""Steps of this process before the profile: the first compiles, the second warms up."""


class Profile:
    """Profile of `steps` steps, from the third one of this process on; 0 disables it.

    The trace goes to ``tensorboard`` under `workdir`. It is complete however the run ends; a line
    says where it is, or that the run was too short for one. `paused` returns a context manager
    whose duration is not counted as training time.
    """

    def __init__(
        self,
        workdir: str,
        steps: int,
        print_line: Callable[[str], None],
        paused: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._workdir = workdir
        self._steps = steps
        self._print_line = print_line
        self._paused = paused
        self._recording = False
        self._taken = 0

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._recording:
            self._stop()
        elif self._steps > 0 and self._taken <= WARMUP_STEPS:
            self._print_line(f"no profile: the run ended within {WARMUP_STEPS} steps of its start")

    def step(self, number: int, state: Any) -> jax.profiler.StepTraceAnnotation:
        """Mark step `number`, which is taken from `state` inside the ``with`` block."""
        if self._steps > 0 and self._taken in (WARMUP_STEPS, WARMUP_STEPS + self._steps):
            jax.block_until_ready(state)  # so that whole steps are recorded
            with self._paused():
                if self._recording:
                    self._stop()
                else:
                    jax.profiler.start_trace(os.path.join(self._workdir, "tensorboard"))
                    self._recording = True
        self._taken += 1
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def _stop(self) -> None:
        self._recording = False
        try:
            jax.profiler.stop_trace()
        except (jax.errors.JaxRuntimeError, OSError) as error:  # training goes on without it
            self._print_line(f"no profile: {one_line(str(error))}")
            return
        recorded = min(self._taken - WARMUP_STEPS, self._steps)
        self._print_line(
            f"profile of {counted(recorded, 'step')}: {self._workdir}/tensorboard/plugins/profile; "
            f"see `tensorboard --logdir {self._workdir}` (needs: pip install tensorboard xprof)"
        )
