"""Profiles of some steps of a run, for TensorBoard."""

import os
from collections.abc import Callable
from typing import Any

import jax

from simplernn_jax.errors import counted

WARMUP_STEPS = 2
"""Steps of this process before the profile: the first compiles, the second warms up."""


class Profile:
    """Profile of `steps` steps, from the third one of this process on; 0 disables it.

    The trace goes to ``tensorboard`` under `workdir`. It is complete however the run ends, and a
    line says where it is.
    """

    def __init__(self, workdir: str, steps: int, print_line: Callable[[str], None]) -> None:
        self._workdir = workdir
        self._steps = steps
        self._print_line = print_line
        self._taken = 0
        self._recording = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._recording:
            self._stop()

    def step(self, number: int, state: Any) -> jax.profiler.StepTraceAnnotation:
        """Mark step `number`, which is taken from `state` inside the ``with`` block."""
        if self._steps and self._taken in (WARMUP_STEPS, WARMUP_STEPS + self._steps):
            jax.block_until_ready(state)  # so that whole steps are recorded
            if self._recording:
                self._stop()
            else:
                jax.profiler.start_trace(os.path.join(self._workdir, "tensorboard"))
                self._recording = True
        self._taken += 1
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def _stop(self) -> None:
        self._recording = False
        jax.profiler.stop_trace()
        recorded = counted(min(self._taken - WARMUP_STEPS, self._steps), "step")
        self._print_line(
            f"profile of {recorded}: {self._workdir}/tensorboard/plugins/profile; "
            f"see `tensorboard --logdir {self._workdir}` (needs: pip install tensorboard xprof)"
        )
