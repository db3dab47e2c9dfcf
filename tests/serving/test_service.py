"""Answers from the events of an engine, in the order and speed in which they come."""

import asyncio
import threading
from unittest import mock

import numpy as np
import pytest

from simplernn_jax.data import load_tokenizer
from simplernn_jax.inference.sampling import Sampling, TokenLogprobs
from simplernn_jax.serving.jobs import Failed, Job, NewTokens, Prefilled
from simplernn_jax.serving.requests import RequestError
from simplernn_jax.serving.responses import ChoiceText
from simplernn_jax.serving.service import LONG, MAX_UNREAD_BYTES, Answer, PromptResult

NONE = np.zeros(0, np.int32)


def answer():
    """An answer to one prompt, and a function that delivers an event to it."""
    job = Job(NONE, Sampling(), max_tokens=10**6)
    choice = ChoiceText(load_tokenizer("byte", None), NONE)
    result = PromptResult(job, "", None, [choice])
    made = Answer(mock.Mock(), [result])
    made._deliver(job, Prefilled(0, None, None))
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


def test_a_request_pauses_until_its_client_reads_and_loses_nothing():
    async def run():
        made, deliver = answer()
        job, updates, count, found = made.results[0].job, made.updates(), 0, 0

        def fill():
            """Deliver tokens as long as the engine would."""
            number = 0
            while job.unread_since is None:
                deliver(token())
                number += 1
            return number

        count += fill()
        assert 50 < count < MAX_UNREAD_BYTES / 500
        found += len(await anext(updates))
        assert job.unread_since is not None  # what is being sent is not read yet
        for _ in range(9):
            since = job.unread_since
            found += len(await anext(updates))
            assert job.unread_since is None or job.unread_since > since
            count += fill()
            assert count - found < MAX_UNREAD_BYTES / 500
        deliver(token("length"))
        assert found + len(await texts(updates)) == count + 1

    asyncio.run(run())


def test_log_probabilities_count_as_unread():
    made, deliver = answer()
    values = np.zeros((100, 20), np.float32)
    deliver(
        NewTokens(0, np.zeros(100, np.int32), TokenLogprobs(values[:, 0], values, values), None)
    )
    assert made.results[0].job.unread_since is None
    for _ in range(MAX_UNREAD_BYTES // (100 * 41 * 4)):
        deliver(
            NewTokens(0, np.zeros(100, np.int32), TokenLogprobs(values[:, 0], values, values), None)
        )
    assert made.results[0].job.unread_since is not None


def test_scores_of_a_long_prompt_do_not_block_other_requests():
    started, others_ran = threading.Event(), threading.Event()

    def score(result, event):
        started.set()
        assert others_ran.wait(60)
        return []

    async def run():
        job = Job(np.zeros(LONG + 1, np.int32), Sampling(), max_tokens=0, scores_prompt=True)
        result = PromptResult(job, "", [], [mock.Mock(finish_reason=None)])
        made = Answer(mock.Mock(prompt_entries=score), [result])
        made._deliver(job, Prefilled(0, TokenLogprobs(NONE, NONE, NONE), None))
        reading = asyncio.create_task(texts(made.updates()))
        while not started.is_set():
            await asyncio.sleep(0.001)
        others_ran.set()
        assert await reading == [""]

    asyncio.run(run())
