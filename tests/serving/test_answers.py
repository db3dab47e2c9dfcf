"""Answers from the events of the worker, in the order and speed in which they come."""

import asyncio
import threading
from unittest import mock

import numpy as np
import pytest

from simplernn_jax.data import load_tokenizer
from simplernn_jax.inference.sampling import Sampling, TokenLogprobs
from simplernn_jax.serving.answers import MAX_UNREAD_BYTES, Answer
from simplernn_jax.serving.http import LONG, in_thread_if_long
from simplernn_jax.serving.jobs import Failed, Job, NewTokens
from simplernn_jax.serving.requests import RequestError


def answer():
    """An answer to one prompt, and a function that delivers an event to it."""
    job = Job(np.zeros(0, np.int32), Sampling(), max_tokens=10**6)
    made = Answer(mock.Mock(), mock.Mock(), load_tokenizer("byte", None), [job])
    return made, lambda event: made._deliver(job, event)


def token(reason=None):
    return NewTokens(0, np.array([97], np.int32), None, reason)


async def texts(updates):
    return [piece.text async for several in updates for _, piece in several]


def test_tokens_before_a_failure_are_handed_on():
    async def run():
        made, deliver = answer()
        for event in (token(), token(), Failed("the server is stopping")):
            deliver(event)
        updates = made.updates()
        assert [piece.text for _, piece in await anext(updates)] == ["a", "a"]
        with pytest.raises(RequestError, match="the server is stopping"):
            await anext(updates)

    asyncio.run(run())


@pytest.mark.parametrize("num_logprobs", [0, 20])
def test_a_request_pauses_until_its_client_reads_and_loses_nothing(num_logprobs):
    values = np.zeros((1, num_logprobs), np.float32)
    new = token()
    if num_logprobs:
        new = new._replace(logprobs=TokenLogprobs(np.zeros(1, np.float32), values, values))

    async def run():
        made, deliver = answer()
        job, updates, count, found = made.jobs[0], made.updates(), 0, 0
        for _ in range(9):
            while not job.is_paused:
                deliver(new)
                count += 1
            deliver(new)  # of a block that was under way
            count += 1
            assert 50 < count - found < MAX_UNREAD_BYTES / (500 + 8 * num_logprobs)
            found += len(await anext(updates))
            assert job.is_paused  # what is being sent is not read yet
            deliver(new)
            count += 1
            found += len(await anext(updates))
            assert not job.is_paused
        deliver(token("length"))
        assert found + len(await texts(updates)) == count + 1

    asyncio.run(run())


def test_long_work_is_done_in_a_thread():
    async def run():
        return [await in_thread_if_long(size, threading.get_ident) for size in (1, LONG + 1)]

    short, long = asyncio.run(run())
    assert short == threading.get_ident() != long
