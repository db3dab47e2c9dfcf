"""Records some steps of a run for the profiler of TensorBoard."""

import os
from collections.abc import Callable
from types import TracebackType

import jax

FIRST = 2
"""Steps of this process before the recording: the first compiles, the second warms up."""


class Profile:
    """While entered, records `steps` steps from the third one of this process on; 0 is none.

    The trace goes to ``tensorboard`` under `workdir`, beside the metrics. It is whole however the
    run ends; a line tells where it is, or that the run was too short for one.
    """

    def __init__(self, workdir: str, steps: int, say: Callable[[str], None]) -> None:
        self._folder = os.path.join(workdir, "tensorboard")
        self._steps = steps
        self._say = say
        self._recording = False
        self._taken = 0

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._recording:
            self._stop()
        elif self._steps > 0 and self._taken <= FIRST:
            self._say("no profile: the run ended before its third step")

    def is_due(self) -> bool:
        """Whether the recording starts or ends before the next step."""
        return self._steps > 0 and self._taken in (FIRST, FIRST + self._steps)

    def start_or_stop(self) -> None:
        """Does what is due."""
        if self._recording:
            self._stop()
        else:
            jax.profiler.start_trace(self._folder)
            self._recording = True

    def step(self, number: int) -> jax.profiler.StepTraceAnnotation:
        """Marks step `number`, which is taken inside the ``with`` block."""
        self._taken += 1
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._recording = False
        recorded = min(self._taken - FIRST, self._steps)
        self._say(
            f"profile of {recorded} steps: {self._folder}/plugins/profile; see it with "
            f"`tensorboard --logdir {self._folder}` (needs: pip install tensorboard xprof)"
        )
