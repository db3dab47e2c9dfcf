"""Filters of reports that only repeat the error of a failed save."""

import logging
import sys
import types

import pytest

from simplernn_jax.checkpoint.checkpointer import drop_repeated_logs


@pytest.fixture
def unraisable(monkeypatch):
    """Reports that reach the hook that was there before."""
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    drop_repeated_logs()
    drop_repeated_logs()
    return seen


def test_only_closed_event_loops_and_coroutines_of_orbax_are_dropped(unraisable):
    def report(error, of=None):
        sys.unraisablehook(
            types.SimpleNamespace(exc_type=type(error), exc_value=error, object=of, err_msg=None)
        )

    report(RuntimeError("Event loop is closed"))
    code = types.SimpleNamespace(co_filename="/site-packages/orbax/checkpoint/serialization.py")
    report(RuntimeError("coroutine ignored GeneratorExit"), of=types.SimpleNamespace(cr_code=code))
    assert unraisable == []
    report(RuntimeError("Event loop is closed"), of=print)
    report(RuntimeError("another"))
    report(ValueError("Event loop is closed"))
    assert len(unraisable) == 3


def test_only_the_forgotten_tasks_and_futures_of_a_save_are_dropped(unraisable, caplog):
    logger = logging.getLogger("asyncio")
    message = "Task exception was never retrieved\nfuture: <Task defined at %s>"
    logger.error(message, "/site-packages/orbax/checkpoint/serialization.py:188")
    assert caplog.messages == []
    logger.error(
        "Future exception was never retrieved\nfuture: <Future finished exception=ValueError("
        '\'UNKNOWN: Error writing "values/0.0" in OCDBT database at local file "/runs/a/": Failed '
        "to open: \"/runs/a/d/1b3f\": Input/output error [os_error_code=\\'5\\']')>"
    )
    future = "Future exception was never retrieved\nfuture: <Future finished exception=OSError(28)>"
    for name in ("/site-packages/orbax/checkpoint/path/async_path.py", "/elsewhere/other.py"):
        try:
            exec(compile("raise OSError(28, 'No space left on device')", name, "exec"))
        except OSError as error:
            logger.error(future, exc_info=error)
    assert caplog.messages == [future]
    logger.error(message, "/elsewhere/other.py:188")
    logger.error("something else of /orbax/checkpoint/")
    assert len(caplog.messages) == 3
