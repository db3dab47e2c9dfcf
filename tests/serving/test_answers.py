"""Answers from the events of the worker, in the order and speed in which they come."""

import asyncio
import threading
from unittest import mock

import numpy as np
import pytest

from simplernn_jax.data import load_tokenizer
from simplernn_jax.inference.sampling import Sampling, TokenLogprobs
from simplernn_jax.serving import answers
from simplernn_jax.serving.answers import MAX_UNREAD_BYTES, Answer
from simplernn_jax.serving.http import LONG
from simplernn_jax.serving.jobs import Failed, Job, NewTokens, Prefilled
from simplernn_jax.serving.requests import RequestError

NONE = np.zeros(0, np.int32)


def answer(**options):
    """An answer to one prompt, and a function that delivers an event to it."""
    job = Job(**{"tokens": NONE, "sampling": Sampling(), "max_tokens": 10**6} | options)
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


def test_scores_of_a_long_prompt_do_not_block_other_requests(monkeypatch):
    started, others_ran = threading.Event(), threading.Event()

    async def run():
        options = {"tokens": np.zeros(LONG + 1, np.int32), "max_tokens": 0, "scores_prompt": True}
        made, deliver = answer(**options)

        def make_entries(*args):
            started.set()
            assert others_ran.wait(60)
            return []

        monkeypatch.setattr(answers, "prompt_entries", make_entries)
        values = np.zeros((LONG, 1), np.float32)
        deliver(Prefilled(0, TokenLogprobs(values[:, 0], values, values), None))
        reading = asyncio.create_task(texts(made.updates()))
        while not started.is_set():
            await asyncio.sleep(0.001)
        others_ran.set()
        assert await reading == [""]

    asyncio.run(run())
