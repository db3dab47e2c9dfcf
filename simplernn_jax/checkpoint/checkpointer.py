"""Save a run so that it resumes bit-exactly, and restore it only if it is bit-exact.

A checkpoint holds the training state (one array per leaf, named by its path), the position in
the data, the configuration and the tokenizer. Orbax writes it while training continues; then its
manifest is written, and only then it is complete (see `folder`).

Processes that train together each write the shards of their devices; process 0 alone writes the
manifest when all have finished, and deletes.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import sys
from typing import Any

import jax
import orbax.checkpoint as ocp

from simplernn_jax import config as config_lib
from simplernn_jax.checkpoint.folder import (
    CheckpointFolder,
    Quality,
    read_json,
    read_texts,
    read_tree,
)
from simplernn_jax.config import Config
from simplernn_jax.errors import DISK_ADVICE, UserError
from simplernn_jax.parallel.distributed import (
    barrier,
    broadcast_from_coordinator,
    check_same,
    is_coordinator,
)
from simplernn_jax.parallel.named_leaves import named_leaves

_FAILED_RUN_TIMEOUT_SECONDS = 5.0

_TIMEOUT_SECONDS = 24 * 3600
"""Limit on a save and on waiting for other processes; a failed one ends all of them long before."""


class Checkpointer:
    """Checkpoints of one run. Only one run at a time may hold it for a workdir.

    All processes of a run construct it and call `save` and `restore`, with the same arguments;
    `workdir` is on a file system that they share.

    Keeps the `keep_last` newest checkpoints and additionally the `keep_best` ones of lowest
    validation loss.

    Raises:
      UserError: another process is training in `workdir`, or a process does not see it.
    """

    def __init__(
        self, workdir: str, config: Config, tokenizer_json: str, *, keep_last: int, keep_best: int
    ) -> None:
        self._config = config
        self._tokenizer_json = tokenizer_json
        self._keep = (keep_last, keep_best)
        self._folder = CheckpointFolder(workdir)
        if is_coordinator():
            self._folder.open_for_training()
        barrier("checkpoints_open")
        check_same(
            str(os.path.isdir(self._folder.path)),
            f"does not see {self._folder.path} of process 0; use a --workdir on a shared file "
            "system",
        )
        self._writer = _make_writer()
        self._completer = concurrent.futures.ThreadPoolExecutor(1, "complete_checkpoint")
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None

    def save(
        self,
        step: int,
        state: Any,
        data_state: Any,
        quality: Quality | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Save `state` as the checkpoint of `step`, in the background unless `wait`.

        Returns as soon as the values are safe from being overwritten; `state` may be donated
        then. Waits for the save before this one. A step that is already saved is left as it is.

        Args:
          step: number of optimizer steps taken.
          state: any pytree of arrays.
          data_state: JSON-able position in the data.
          quality: evaluation of `state`, by which the checkpoint is ranked.
          wait: return only when the checkpoint is complete.

        Raises:
          UserError: the disk is full or fails; this save or the one before it is missing, all
            earlier checkpoints are intact.
        """
        self._finish()
        if broadcast_from_coordinator(step in self._folder.steps()):
            return
        barrier("save")
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(named_leaves(state)),
            data=ocp.args.JsonSave(data_state),
            config=ocp.args.JsonSave(json.loads(config_lib.to_json(self._config))),
            tokenizer=ocp.args.JsonSave(self._tokenizer_json),
            quality=ocp.args.JsonSave(dataclasses.asdict(quality) if quality else {}),
        )
        try:
            self._writer.save(self._folder.unfinished_path(step), args=items)
        except Exception as error:
            raise self._unsaved(step, error) from error
        self._pending = (step, self._completer.submit(self._complete, step))
        if wait:
            self._finish()

    def restore(self, abstract_state: Any, shardings: Any = None) -> tuple[Any, Any, Config] | None:
        """Restore the newest intact checkpoint; quarantine corrupt ones with a warning.

        Args:
          abstract_state: tree of arrays or `jax.ShapeDtypeStruct`, as given to `save` on any number
            of devices and processes.
          shardings: sharding of each array; a process reads only the shards of its devices. None is
            the default device.

        Returns:
          The state, bit-exact and without `shardings` committed to no device; the `data_state` of
          `save`; and the configuration that it was saved with. None if there is no checkpoint.

        Raises:
          UserError: there are checkpoints and none is intact, or the newest intact one is of
            a different model or optimizer.
        """
        newest = self._folder.newest_intact() if is_coordinator() else None
        step = broadcast_from_coordinator(-1 if newest is None else newest)
        if step < 0:
            return None
        path = self._folder.step_path(step)
        state = read_tree(path, abstract_state, shardings)
        return state, read_json(path, "data"), read_texts(path)[0]

    def close(self, *, failed: bool = False) -> None:
        """Wait for the last save and release the workdir.

        Args:
          failed: an error ends the run. The other processes may not have failed yet, and their
            part of the save may never come: the wait is short.

        Raises:
          UserError: the last save failed (see `save`).
        """
        if failed and jax.process_count() > 1:
            if self._pending is not None:
                concurrent.futures.wait([self._pending[1]], _FAILED_RUN_TIMEOUT_SECONDS)
            return  # this process ends at once
        try:
            self._finish()
        finally:
            with contextlib.suppress(Exception):  # Orbax raises again what `save` has raised
                self._writer.close()
            self._completer.shutdown()
            self._folder.release()  # last: nothing is written any more

    def _complete(self, step: int) -> None:
        self._writer.wait_until_finished()
        if is_coordinator():
            self._folder.mark_complete(step)
            self._folder.prune(*self._keep)
        barrier("checkpoint_complete")

    def _finish(self) -> None:
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except Exception as error:
            raise self._unsaved(step, error) from error

    def _unsaved(self, step: int, error: Exception) -> Exception:
        """Discard a failed save; return the error to raise, a `UserError` if the disk rejected it.

        With several processes, others may still be writing: the next run discards it.
        """
        if jax.process_count() == 1:
            with contextlib.suppress(OSError):
                self._folder.discard_unfinished()
        code = error.errno if isinstance(error, OSError) else None
        if isinstance(error, TimeoutError):
            code = errno.ETIMEDOUT
        if code is None:  # TensorStore reports it only in the text of a ValueError
            code = next((code for code in DISK_ADVICE if os.strerror(code) in str(error)), None)
        if code is None:
            return error
        return UserError(
            f"the checkpoint of step {step} could not be saved: {self._folder.path}: "
            f"{os.strerror(code)}: {DISK_ADVICE.get(code, 'check this folder')} and run the same "
            "command again; earlier checkpoints are intact"
        )


@functools.cache
def _drop_repeated_reports() -> None:
    """Drop the reports of a failed save other than the exception that it raises.

    Orbax closes its event loop after an error. Every later write of TensorStore finds it closed,
    which ends in `sys.unraisablehook`, and asyncio logs each of the other failed writes.
    """
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # a coroutine that cannot end
        is_orbax = "/orbax/" in getattr(code, "co_filename", "")
        if not is_orbax and str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(lambda x: "never retrieved" not in x.getMessage())


def _make_writer() -> ocp.AsyncCheckpointer:
    """Return Orbax's writer of checkpoint folders.

    By default the processes of a run wait for each other in computations on the devices, which
    interfere with training when another thread starts them.
    """
    _drop_repeated_reports()
    # Created in the background, a folder that the disk rejects leaves threads that wait for it up
    # to the timeout, and the process does not end.
    options = ocp.options.AsyncOptions(
        timeout_secs=_TIMEOUT_SECONDS,
        barrier_sync_fn=_wait_unless_failing,
        create_directories_asynchronously=False,
    )
    everybody = ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(async_options=options)
        ),
        async_options=options,
        multiprocessing_options=everybody,
    )


def _wait_unless_failing(*, key: str, timeout_ms: int) -> None:
    """Wait for all processes, but not while handling an error: the others wait elsewhere then."""
    error = sys.exception()
    if error is not None:
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)
