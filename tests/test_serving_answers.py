"""Answers from the events of an engine, in the order and speed in which they come."""

import asyncio
import threading
from unittest import mock

import numpy as np
import pytest

from simplernn_jax.data import load_tokenizer
from simplernn_jax.serving.answers import LONG, MAX_BACKLOG, Answer, PromptResult
from simplernn_jax.serving.choice_text import ChoiceText
from simplernn_jax.serving.jobs import Failed, Job, NewTokens, Prefilled, Sampling
from simplernn_jax.serving.requests import RequestError

NONE = np.zeros(0, np.int32)


def answer():
    """An answer to one prompt, and a function that delivers an event to it."""
    job = Job(NONE, Sampling(), max_tokens=10**6)
    choice = ChoiceText(load_tokenizer("byte", None), NONE)
    result = PromptResult(job, "", None, [choice], [mock.Mock()])
    made = Answer([result], mock.Mock(), mock.Mock(), mock.Mock())
    made._deliver(job, Prefilled(0, None, None))
    return made, lambda event: made._deliver(job, event)


def token(reason=None):
    return NewTokens(0, np.array([97], np.int32), None, reason)


async def texts(updates):
    return [update.piece.text async for several in updates for update in several]


def test_tokens_before_a_failure_are_handed_on():
    async def run():
        made, deliver = answer()
        for event in (token(), token(), Failed("the server is stopping")):
            deliver(event)
        updates = made.updates()
        assert [update.piece.text for update in await anext(updates)] == ["a", "a"]
        with pytest.raises(RequestError, match="the server is stopping"):
            await anext(updates)

    asyncio.run(run())


def test_a_burst_of_events_is_no_fault_of_the_client():
    async def run():
        made, deliver = answer()
        for _ in range(2 * MAX_BACKLOG):
            deliver(token())
        deliver(token("length"))
        assert len(await texts(made.updates())) == 2 * MAX_BACKLOG + 1

    asyncio.run(run())


def test_a_client_that_does_not_read_is_cut_off():
    async def run():
        made, deliver = answer()
        updates = made.updates()
        deliver(token())
        await anext(updates)
        with made.sending():
            for _ in range(2 * MAX_BACKLOG):
                deliver(token())
        with pytest.raises(RequestError, match="too slowly, or not at all"):
            await texts(updates)
        assert made.results[0].job.is_cancelled

    asyncio.run(run())


def test_a_client_that_reads_too_slowly_is_cut_off():
    async def run():
        made, deliver = answer()
        updates = made.updates()
        deliver(token())
        for _ in range(20):
            await anext(updates)
            with made.sending():
                for _ in range(MAX_BACKLOG):
                    deliver(token())
        with pytest.raises(RequestError, match="too slowly, or not at all"):
            await texts(updates)
        assert made.results[0].job.is_cancelled

    asyncio.run(run())


def test_what_came_while_a_frame_was_made_is_no_fault_of_the_client():
    async def run():
        made, deliver = answer()
        for _ in range(2 * MAX_BACKLOG):
            deliver(token())
        with made.sending():
            deliver(token("length"))
        assert len(await texts(made.updates())) == 2 * MAX_BACKLOG + 1

    asyncio.run(run())


def test_scores_of_a_long_prompt_do_not_block_other_requests():
    started, others_ran = threading.Event(), threading.Event()

    def score(result, event):
        started.set()
        assert others_ran.wait(60)
        return []

    async def run():
        job = Job(np.zeros(LONG + 1, np.int32), Sampling(), max_tokens=0, scores_prompt=True)
        result = PromptResult(job, "", [], [mock.Mock(finish_reason=None)], [])
        made = Answer([result], mock.Mock(), score, mock.Mock())
        made._deliver(job, Prefilled(0, mock.Mock(), None))
        reading = asyncio.create_task(texts(made.updates()))
        while not started.is_set():
            await asyncio.sleep(0.001)
        others_ran.set()
        assert await reading == [""]

    asyncio.run(run())
